"""What all baselines learn with: transitions, guarded steps of Adam, and an exact continuation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from iqmpc.baselines.model import PolicyModel, PolicyWeights
from iqmpc.config import Config
from iqmpc.losses import Batch
from iqmpc.observation import ObservationSpec
from iqmpc.optimisation import guarded_step, load_optimiser_tensors, optimiser_tensors
from iqmpc.replay import SliceReplay, join
from iqmpc.scaling import ObservationScaling
from iqmpc.seeding import stream_seed


class Transitions(NamedTuple):
    """Single steps: obs, next_obs [N, O], action [N, A], terminated [N].

    The first `experts` rows are demonstrations.
    """

    obs: Tensor
    action: Tensor
    next_obs: Tensor
    terminated: Tensor
    experts: int

    def behaviour(self) -> Transitions:
        """The rows that are no demonstrations."""
        n = self.experts
        return Transitions(
            self.obs[n:], self.action[n:], self.next_obs[n:], self.terminated[n:], experts=0
        )

    @classmethod
    def of(cls, batch: Batch) -> Transitions:
        """All steps of a batch of slices."""

        def rows(t: Tensor) -> Tensor:  # [H, B, ...] -> [B·H, ...]
            return t.transpose(0, 1).flatten(0, 1)

        return cls(
            rows(batch.obs[:-1]),
            rows(batch.action),
            rows(batch.obs[1:]),
            rows(batch.terminated),
            batch.experts * len(batch.action),
        )


class BaselineLearner:
    """A method's networks, optimisers and random draws (`iqmpc.methods.MethodLearner`).

    A method names its `model_class`, makes its optimisers in `set_up` and gradient steps in
    `update`, with `optimiser` and `step`; a step that is not finite is left out and counted in
    `skipped_updates`. What is beside `model`, such as target networks, is registered in `others`.
    """

    mode, matmul = "eager", "float32"
    model_class = PolicyModel

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
            spec = ObservationSpec.of(obs_shape)
            self.model = self.make_model(spec, action_dim, config).to(self.device)
        if scaling is not None:
            self.model.obs_mean.copy_(scaling.mean)
            self.model.obs_std.copy_(scaling.std)
        self.weights = self.model.weights()
        self.others = nn.ModuleDict()
        self.generator = torch.Generator(self.device).manual_seed(
            stream_seed(config.seed, "learner")
        )
        if sampler is None:
            seed = stream_seed(config.seed, "sampler")
            sampler = torch.Generator(self.device).manual_seed(seed)
        self.sampler = sampler
        self.updates = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self._optimisers: dict[str, torch.optim.Adam] = {}
        self.set_up()

    def set_up(self) -> None:
        """Make what a method has beside `model`: its optimisers and `others`."""

    @classmethod
    def make_model(
        cls,
        obs_shape: ObservationSpec,
        action_dim: int,
        config: Config,
        *,
        termination: bool | None = None,
    ) -> PolicyModel:
        """What acts and decodes rewards; `termination` is the world model's, and means nothing."""
        return cls.model_class(obs_shape, action_dim, config)

    def learn(self, experts: SliceReplay | None, behaviour: SliceReplay) -> dict[str, Tensor]:
        """Draw `learner.batch` slices of each replay and make one update on all their steps.

        Raises `ValueError` for a replay without slices.
        """
        assert experts is not None  # the schema refuses a baseline without demonstrations
        metrics = self.update(Transitions.of(self.draw(experts, behaviour)))
        self.updates += 1
        return metrics | {"skipped_updates": self.skipped.float()}

    def draw(self, experts: SliceReplay, behaviour: SliceReplay) -> Batch:
        """The slices of an update, the experts' first."""
        size = self.settings.batch
        return join(experts.sample(size, self.sampler), behaviour.sample(size, self.sampler))

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        """One update; its metrics as 0-dim tensors."""
        raise NotImplementedError

    def optimiser(
        self, name: str, parameters: Sequence[Tensor], lr: float | None = None
    ) -> torch.optim.Adam:
        """Adam for `parameters`, kept in checkpoints under `name`; `lr` is `learner.lr`'s."""
        self._optimisers[name] = torch.optim.Adam(parameters, lr or self.settings.lr, fused=True)
        return self._optimisers[name]

    def step(self, loss: Tensor, optimiser: torch.optim.Adam) -> tuple[Tensor, Tensor]:
        """A step on all of the optimiser's parameters: `iqmpc.optimisation.guarded_step`."""
        parameters = optimiser.param_groups[0]["params"]
        norm, made = guarded_step(loss, optimiser, parameters, self.settings.grad_clip)
        self.skipped += ~made
        return norm, made

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws."""
        return torch.randn(shape, device=self.device, generator=self.generator)

    def acting_weights(self) -> PolicyWeights:
        return self.weights

    def evaluation_weights(self) -> PolicyWeights:
        return self.weights

    @property
    def skipped_updates(self) -> int:
        """Steps left out so far; reading it waits for the device."""
        return int(self.skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything an exact continuation needs but `sampler`, as a flat mapping of tensors."""
        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        state |= {f"others.{k}": v for k, v in self.others.state_dict().items()}
        for name, optimiser in self._optimisers.items():
            state |= optimiser_tensors(f"adam.{name}", optimiser)
        state["generator"] = self.generator.get_state()
        state["updates"] = torch.tensor(self.updates)
        state["skipped_updates"] = self.skipped
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; raises `KeyError` or `RuntimeError` where it does not fit."""
        for prefix, module in (("model.", self.model), ("others.", self.others)):
            module.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
        for name, optimiser in self._optimisers.items():
            load_optimiser_tensors(f"adam.{name}", optimiser, state)
        self.generator.set_state(state["generator"])
        self.updates = int(state["updates"])
        self.skipped.copy_(state["skipped_updates"])
