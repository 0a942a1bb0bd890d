"""One update of the world model, the critics and the policy prior."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from iqmpc import update_backends
from iqmpc.config import Config
from iqmpc.kernels.weights import Weights, map_layers
from iqmpc.losses import Batch
from iqmpc.model import WorldModel
from iqmpc.observation import ObservationSpec
from iqmpc.optimisation import load_optimiser_tensors, optimiser_tensors
from iqmpc.replay import SliceReplay
from iqmpc.scaling import ObservationScaling
from iqmpc.seeding import stream_seed


class Learner:
    """Parameters, target critics, optimisers and the random draws of learning.

    `update` makes one gradient step on the encoder, dynamics and critics, one on the policy prior,
    and moves the target critics and the average of the weights (`averages`, None where
    `agent.average` is off); `learn` draws the batch for it too.

    A step whose loss or gradient norm is not finite is not made. If it is the model's, the update
    changes nothing: no parameter, moment, step count, target or average. If it is the policy's
    alone, only that step is left out. Either is counted once, in `skipped_updates`; `updates`
    counts these attempts too, so that schedules go on.

    `mode` is what `config.learner.mode` comes to here and `backend` what makes the updates
    (`iqmpc.update_backends`): `fused` (the C++ library), `eager`, `compile` (torch.compile of both
    losses with their backward passes) or `graph` (`compile`, and all of `learn` as one CUDA graph);
    they agree on the same draws. The fused update has draws of its own, numbered by `updates`; the
    others draw from `generator`, and slices from `sampler`, by default a generator of the learner's
    own; whoever gives it keeps its state. `matmul` is what `config.learner.matmul` comes to here,
    of torch's matrix products in an update. `entropy_coef` is the entropy coefficient in force.
    `scaling` is that of the observations in the replays; what acts takes them unscaled.

    Raises `ConfigError` for a mode that cannot be here, with the reason.
    """

    def __init__(
        self,
        obs_shape: ObservationSpec | tuple[int, ...] | int,
        action_dim: int,
        config: Config,
        device: torch.device | str = "cpu",
        *,
        sampler: torch.Generator | None = None,
        scaling: ObservationScaling | None = None,
    ):
        self.config, self.settings = config, config.learner
        self.device = torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "model"))
            self.model = self.make_model(obs_shape, action_dim, config).to(self.device)
        self.scaling = None if scaling is None else scaling.to(self.device)
        spec = self.model.observation_spec
        self.mode = update_backends.resolve_update(config, self.device, spec)
        self.matmul = self.settings.matmul or ("tf32" if self.device.type == "cuda" else "float32")
        self.weights = self.model.weights()
        self.targets = map_layers(lambda t: t.detach().clone(), self.weights.critics)
        self.average: WorldModel | None = None
        if config.agent.average != "off":
            self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.averages = None if self.average is None else self.average.weights()
        self.entropy_coef = config.entropy_coefficient(action_dim)
        self.generator = torch.Generator(self.device).manual_seed(
            stream_seed(config.seed, "learner")
        )
        self.sampler = (
            sampler
            if sampler is not None
            else torch.Generator(self.device).manual_seed(stream_seed(config.seed, "sampler"))
        )
        self.updates = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

        s, m = self.settings, self.model
        self.model_parameters = [
            *m.encoder.parameters(),
            *m.dynamics.parameters(),
            *m.critics.parameters(),
            *m.termination.parameters(),
        ]
        self.model_optimiser = torch.optim.Adam(
            [
                {"params": list(m.encoder.parameters()), "lr": s.lr * s.encoder_lr_scale},
                {
                    "params": [
                        *m.dynamics.parameters(),
                        *m.critics.parameters(),
                        *m.termination.parameters(),
                    ]
                },
            ],
            lr=s.lr,
            fused=True,
            capturable=self.mode == "graph",
        )
        self.policy_optimiser = torch.optim.Adam(
            m.policy.parameters(), lr=s.lr, fused=True, capturable=self.mode == "graph"
        )
        self.backend = update_backends.BACKENDS[self.mode](self)

    @staticmethod
    def make_model(
        obs_shape: ObservationSpec | tuple[int, ...] | int,
        action_dim: int,
        config: Config,
        *,
        termination: bool | None = None,
    ) -> WorldModel:
        """What a run learns: `termination` is `config.termination` where it is not given."""
        if termination is None:
            termination = config.termination
        return WorldModel(obs_shape, action_dim, config.model, termination=termination)

    def learn(self, experts: SliceReplay | None, behaviour: SliceReplay) -> dict[str, Tensor]:
        """Draw `learner.batch` slices of each replay and make one update on them.

        Returns what `update` does; in mode `graph` the next call overwrites these tensors.
        `experts` is None for `objective: td`. Raises `ValueError` for a replay without slices.
        """
        return self.backend.learn(experts, behaviour)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update. Returns metrics as 0-dim tensors on the device; fetch them when logging."""
        return self.backend.update(batch)

    def acting_weights(self) -> Weights:
        """What training acts with: a live view, of the average for `agent.average: always`.

        Of a scaling's learner the encoder's first layer is a copy, into which it is folded.
        """
        always = self.config.agent.average == "always"
        return self._unscaled(self.averages if self.averages and always else self.weights)

    def evaluation_weights(self) -> Weights:
        """What evaluation acts with: a live view, of the average where there is one."""
        return self._unscaled(self.averages or self.weights)

    def _unscaled(self, weights: Weights) -> Weights:
        return weights if self.scaling is None else self.scaling.folded(weights)

    @property
    def skipped_updates(self) -> int:
        """Updates of which a step was left out, so far; reading it waits for the device."""
        return int(self.skipped)

    @property
    def penalise(self) -> bool:
        """Whether there is a gradient penalty: with c_gp = 0 it is neither computed nor shown."""
        s = self.settings
        return self.config.gradient_penalty and s.objective != "td" and s.c_gp > 0

    def state_dict(self) -> dict[str, Tensor]:
        """Everything an exact continuation needs but `sampler`, as a flat mapping of tensors."""
        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        state |= {
            f"target.{i}.{name}": t
            for i, layer in enumerate(self.targets)
            for name, t in layer._asdict().items()
            if t is not None
        }
        if self.average is not None:
            state |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        if self.scaling is not None:
            state |= {f"scaling.{k}": v for k, v in self.scaling._asdict().items()}
        for name, optimiser in self._optimisers():
            state |= optimiser_tensors(name, optimiser)
        state["generator"] = self.generator.get_state()
        state["updates"] = torch.tensor(self.updates)
        state["skipped_updates"] = self.skipped
        return state

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin at the weights of a model of the same sizes, targets and average too, in place.

        It takes observations without any scaling.
        """
        if self.scaling is not None:
            weights = self.scaling.to("cpu").inverse().folded_state(weights)
        for model in (self.model, self.average):
            if model is not None:
                model.load_state_dict(dict(weights))
        for target, layer in zip(self.targets, self.weights.critics, strict=True):
            for name, t in target._asdict().items():
                if t is not None:
                    t.copy_(getattr(layer, name).detach())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; raises `KeyError` or `RuntimeError` where it does not fit.

        All in place, the optimisers' moments too: a captured update stays valid.
        """
        for prefix, model in (("model.", self.model), ("average.", self.average)):
            if model is not None:
                model.load_state_dict(
                    {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                )
        if self.scaling is not None:
            for name, t in self.scaling._asdict().items():
                t.copy_(state[f"scaling.{name}"])
        for i, layer in enumerate(self.targets):
            for name, t in layer._asdict().items():
                if t is not None:
                    t.copy_(state[f"target.{i}.{name}"])
        for name, optimiser in self._optimisers():
            load_optimiser_tensors(name, optimiser, state)
        self.generator.set_state(state["generator"])
        self.updates = int(state["updates"])
        self.skipped.fill_(int(state.get("skipped_updates", 0)))  # absent: saved before any count

    def _optimisers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        return [("model_adam", self.model_optimiser), ("policy_adam", self.policy_optimiser)]
