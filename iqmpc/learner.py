"""One update of the world model, the critics and the policy prior."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iqmpc import losses
from iqmpc.capture import CapturedStep
from iqmpc.config import Config
from iqmpc.errors import ConfigError
from iqmpc.kernels import layers
from iqmpc.kernels.iq_update import FusedUpdate, UpdateSettings, UpdateState
from iqmpc.kernels.weights import Weights, frozen, layer_tensors, map_layers
from iqmpc.losses import Batch, ModelNoise, PolicyNoise
from iqmpc.model import WorldModel
from iqmpc.observation import ObservationSpec
from iqmpc.replay import SliceReplay, join
from iqmpc.seeding import stream_seed
from iqmpc.threads import threads

_SHIFT = 3  # pixels, of the random shift of images


def update_mode(config: Config, device: torch.device, spec: ObservationSpec) -> str:
    """What `learner.mode` comes to; `ConfigError` with the reason where it cannot be."""
    mode, precision = config.learner.mode, config.learner.precision
    unfit = None  # what keeps the C++ library from making the updates
    if device.type != "cpu":
        unfit = f"needs device=cpu, got {device.type}"
    elif spec.images:
        unfit = f"takes flat observations, got images {list(spec.shape)}"
    elif importlib.util.find_spec("iqmpc._C") is None:
        unfit = "needs the compiled extension iqmpc._C, which is missing"
    if mode == "auto":
        if unfit is None:
            mode = "fused"
        else:
            mode = "graph" if device.type == "cuda" else "compile"
    elif mode == "fused" and unfit is not None:
        raise ConfigError(f"learner.mode=fused {unfit}")
    elif mode == "graph" and device.type != "cuda":
        raise ConfigError(f"learner.mode=graph needs a CUDA device, got {device.type}")
    if precision != "float32" and mode != "fused":
        raise ConfigError(
            f"learner.precision={precision} needs learner.mode=fused, got {mode}"
            + ("" if unfit is None else f" (fused {unfit})")
        )
    return mode


class Learner:
    """Parameters, target critics, optimisers and the random draws of learning.

    `update` makes one gradient step on the encoder, dynamics and critics, one on the policy prior,
    and moves the target critics and the average of the weights (`averages`, None where
    `agent.average` is off); `learn` draws the batch for it too.

    A step whose loss or gradient norm is not finite is not made. If it is the model's, the update
    changes nothing: no parameter, moment, step count, target or average. If it is the policy's
    alone, only that step is left out. Either is counted once, in `skipped_updates`; `updates`
    counts these attempts too, so that schedules go on.

    `mode` is what `config.learner.mode` comes to here (`update_mode`): `fused` (the C++ library),
    `eager`, `compile` (torch.compile of both losses with their backward passes) or `graph`
    (`compile`, and all of `learn` as one CUDA graph); they agree on the same draws. The fused
    update has draws of its own, numbered by `updates`; the others draw from `generator`, and slices
    from `sampler`, by default a generator of the learner's own; whoever gives it keeps its state.

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
    ):
        self.config, self.settings = config, config.learner
        self.device = torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "model"))
            self.model = WorldModel(
                obs_shape, action_dim, config.model, termination=config.termination
            ).to(self.device)
        self.mode = update_mode(config, self.device, self.model.observation_spec)
        self.weights = self.model.weights()
        self.targets = map_layers(lambda t: t.detach().clone(), self.weights.critics)
        self.average: WorldModel | None = None
        if config.agent.average != "off":
            self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.averages = None if self.average is None else self.average.weights()
        self.beta = config.entropy_coefficient(action_dim)
        self.generator = torch.Generator(self.device).manual_seed(
            stream_seed(config.seed, "learner")
        )
        self.sampler = (
            sampler
            if sampler is not None
            else torch.Generator(self.device).manual_seed(stream_seed(config.seed, "sampler"))
        )
        self.updates = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)

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
        self._model_loss, self._policy_loss = losses.model_loss, losses.policy_loss
        self._captured: CapturedStep | None = None
        self._fused: FusedUpdate | None = None
        self._steps = {"model_adam": 0, "policy_adam": 0}  # of the fused update
        if self.mode == "graph":
            self._captured = CapturedStep(self.device, (self.generator, self.sampler))
        if self.mode == "fused":
            self._fused = self._make_fused()
        elif self.mode != "eager":
            self._model_loss = torch.compile(losses.model_loss, dynamic=False)
            self._policy_loss = torch.compile(losses.policy_loss, dynamic=False)

    def learn(self, experts: SliceReplay | None, behaviour: SliceReplay) -> dict[str, Tensor]:
        """Draw `learner.batch` slices of each replay and make one update on them.

        Returns what `update` does; in mode `graph` the next call overwrites these tensors.
        `experts` is None for `objective: td`. Raises `ValueError` for a replay without slices.
        """
        if self._fused is not None:
            sources = experts and experts.rows(), behaviour.rows(), self.settings.batch
            return self._apply_fused(self._fused.learn, *sources)
        if self._captured is None:
            return self.update(self._batch(experts, behaviour))
        replays = tuple(r for r in (experts, behaviour) if r is not None)
        for replay in replays:
            replay.require_slices()
        # Parameters, moments and targets never move; a replay's tensors do when it grows.
        metrics = self._captured(
            lambda: self._update_on_device(self._batch(experts, behaviour)),
            key=(experts, behaviour, *(r.allocations for r in replays)),
        )
        self.updates += 1
        return metrics

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update. Returns metrics as 0-dim tensors on the device; fetch them when logging."""
        if self._fused is not None:
            return self._apply_fused(self._fused.update, *batch)
        metrics = self._update_on_device(batch)
        self.updates += 1
        return metrics

    def _make_fused(self) -> FusedUpdate:
        """Of the parameters, and of moments where checkpoints expect them."""
        moments = {}
        for _, optimiser in self._optimisers():
            for group in optimiser.param_groups:
                for p in group["params"]:
                    moments[p] = optimiser.state[p] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
        state = UpdateState(
            self.weights,
            self.targets,
            lambda p: moments[p]["exp_avg"],
            lambda p: moments[p]["exp_avg_sq"],
            self.averages,
        )
        return FusedUpdate(
            state,
            UpdateSettings.of(self.config, self.model.action_dim),
            seed=stream_seed(self.config.seed, "learner"),
            precision=self.settings.precision,
            threads=threads(),
        )

    def _apply_fused(self, update: Callable[..., Any], *arguments: Any) -> dict[str, Tensor]:
        values, model_skipped, policy_skipped = update(
            *arguments,
            update=self.updates,
            model_steps=self._steps["model_adam"],
            policy_steps=self._steps["policy_adam"],
        )
        self.updates += 1
        self._steps["model_adam"] += not model_skipped
        self._steps["policy_adam"] += not policy_skipped
        self._skipped += model_skipped or policy_skipped
        absent = set()
        if self.settings.objective == "td":
            absent |= {"q_expert", "reward_expert", "reward_behaviour", "value_term"}
        else:
            values["q_difference"] = values["q_expert"] - values["q_behaviour"]
        if not self.penalise:
            absent.add("gradient_penalty")
        if not self.weights.termination:
            absent |= {"termination_loss", "termination_recall", "termination_precision"}
        values["skipped_updates"] = self._skipped
        names = [name for name in values if name not in absent]
        return dict(zip(names, torch.tensor([values[n] for n in names]).unbind(), strict=True))

    def _batch(self, experts: SliceReplay | None, behaviour: SliceReplay) -> Batch:
        batch = behaviour.sample(self.settings.batch, self.sampler)
        if experts is None:
            return batch
        return join(experts.sample(self.settings.batch, self.sampler), batch)

    def _update_on_device(self, batch: Batch) -> dict[str, Tensor]:
        """The update, without any state of the host's: what mode `graph` captures."""
        s = self.settings
        loss, latents, metrics = self._model_loss(
            self.weights,
            self.targets,
            batch,
            self._model_noise(batch),
            s,
            self.config.discount,
            self.beta,
            self.penalise,
        )
        metrics["model_grad_norm"], finite = self._step(
            loss, self.model_optimiser, self.model_parameters
        )

        policy_loss, policy_metrics = self._policy_loss(
            self.weights, latents, self._policy_noise(latents), s.rho, self.beta, s.entropy
        )
        policy_metrics["policy_grad_norm"], both = self._step(
            policy_loss, self.policy_optimiser, list(self.model.policy.parameters()), finite
        )

        _move(
            layer_tensors(self.targets),
            layer_tensors(frozen(self.weights.critics)),
            self.settings.tau * finite,
        )
        if self.averages is not None:
            _move(
                self.averages.tensors(),
                [t.detach() for t in self.weights.tensors()],
                self.config.agent.average_rate * finite,
            )
        self._skipped += ~both
        return metrics | policy_metrics | {"skipped_updates": self._skipped.to(loss.dtype)}

    def acting_weights(self) -> Weights:
        """What training acts with: a live view, of the average for `agent.average: always`."""
        if self.averages is not None and self.config.agent.average == "always":
            return self.averages
        return self.weights

    def evaluation_weights(self) -> Weights:
        """What evaluation acts with: a live view, of the average where there is one."""
        return self.weights if self.averages is None else self.averages

    @property
    def skipped_updates(self) -> int:
        """Updates of which a step was left out, so far; reading it waits for the device."""
        return int(self._skipped)

    @property
    def penalise(self) -> bool:
        return self.config.gradient_penalty and self.settings.objective != "td"

    def _step(
        self,
        loss: Tensor,
        optimiser: torch.optim.Optimizer,
        parameters: list[Tensor],
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A step, if `allowed` (bool, 0-dim) and finite: the gradient's norm and whether it was."""
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip).detach()
        made = loss.detach().isfinite() & norm.isfinite()
        if allowed is not None:
            made = made & allowed
        # Fused Adam looks at this where the gradients are, so that the host need not wait: where it
        # is 1, parameters, moments and step counts stay (what gradient scaling uses it for).
        optimiser.found_inf = (~made).to(torch.float32)
        optimiser.step()
        return norm, made

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def _pair(self) -> Tensor:
        return layers.random_pair(self.config.model.critics, self.generator)

    def _keep(self, critics: int, rows: int) -> Tensor | None:
        """Dropout multipliers [critics, rows, hidden], None without dropout."""
        m = self.config.model
        if m.dropout == 0:
            return None
        keep = torch.empty(critics, rows, m.hidden_dim, device=self.device)
        return keep.bernoulli_(1 - m.dropout, generator=self.generator).div_(1 - m.dropout)

    def _model_noise(self, batch: Batch) -> ModelNoise:
        horizon, rows, action_dim = batch.action.shape
        critics, objective = self.config.model.critics, self.settings.objective
        keep = self._keep(critics, horizon * rows)
        keep_target = keep_value = keep_penalty = mix = None
        if self.penalise:
            mix = torch.rand(
                horizon, batch.experts, 1, device=self.device, generator=self.generator
            )
        if self.settings.dropout == "always":
            keep_target = self._keep(2, horizon * rows)
            if objective != "td":
                keep_value = self._keep(
                    2, batch.experts if objective == "iq" else horizon * (rows - batch.experts)
                )
            if self.penalise:
                keep_penalty = self._keep(critics, horizon * batch.experts)
        shift = None
        if self.model.observation_spec.images:
            shift = torch.randint(
                -_SHIFT,
                _SHIFT + 1,
                (horizon + 1, rows, 2),
                device=self.device,
                generator=self.generator,
            )
        starts = horizon if objective == "v_diff" else 1
        return ModelNoise(
            self._normal(horizon, rows, action_dim),
            self._normal(starts, rows, action_dim),
            keep,
            mix,
            self._pair(),
            shift,
            keep_target,
            keep_value,
            keep_penalty,
        )

    def _policy_noise(self, latents: Tensor) -> PolicyNoise:
        steps, rows = latents.shape[:2]
        keep = self._keep(2, steps * rows) if self.settings.dropout == "always" else None
        return PolicyNoise(self._normal(steps, rows, self.model.action_dim), self._pair(), keep)

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
        for name, optimiser in self._optimisers():
            if self._fused is not None:
                for values in optimiser.state.values():
                    values["step"].fill_(self._steps[name])
            for index, values in optimiser.state_dict()["state"].items():
                state |= {f"{name}.{index}.{key}": v for key, v in values.items()}
        state["generator"] = self.generator.get_state()
        state["updates"] = torch.tensor(self.updates)
        state["skipped_updates"] = self._skipped
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; raises `KeyError` or `RuntimeError` where it does not fit.

        All in place, the optimisers' moments too: a captured update stays valid.
        """
        for prefix, model in (("model.", self.model), ("average.", self.average)):
            if model is not None:
                model.load_state_dict(
                    {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                )
        for i, layer in enumerate(self.targets):
            for name, t in layer._asdict().items():
                if t is not None:
                    t.copy_(state[f"target.{i}.{name}"])
        for name, optimiser in self._optimisers():
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            for index, parameter in enumerate(parameters):
                held, prefix = optimiser.state[parameter], f"{name}.{index}."
                for t in held.values():
                    t.zero_()  # as before the first step, where nothing was saved
                for key, v in state.items():
                    if not key.startswith(prefix):
                        continue
                    field = key.removeprefix(prefix)
                    if field in held:
                        held[field].copy_(v)
                    else:
                        held[field] = v.to(self.device, copy=True)
            self._steps[name] = int(state.get(f"{name}.0.step", 0))
        self.generator.set_state(state["generator"])
        self.updates = int(state["updates"])
        self._skipped.fill_(int(state.get("skipped_updates", 0)))  # absent: saved before any count

    def _optimisers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        return [("model_adam", self.model_optimiser), ("policy_adam", self.policy_optimiser)]


@torch.no_grad()
def _move(old: list[Tensor], new: list[Tensor], rate: Tensor) -> None:
    """old ← old + rate (new - old) in place; rate, 0-dim, on their device."""
    torch._foreach_lerp_(old, new, [rate] * len(old))
