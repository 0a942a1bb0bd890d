"""How an update is made: plain torch, under torch.compile, as one CUDA graph, or the C++ library's.

Each backend is built once on a learner, whose parameters, targets, moments and generators it
changes in place: a checkpoint does not know which one made it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from iqmpc import losses
from iqmpc.capture import CapturedStep
from iqmpc.compiler import compiled
from iqmpc.config import Config
from iqmpc.errors import ConfigError
from iqmpc.kernels import layers
from iqmpc.kernels.backends import cannot_run, resolve
from iqmpc.kernels.iq_update import FusedUpdate, UpdateSettings, UpdateState
from iqmpc.kernels.weights import frozen, layer_tensors
from iqmpc.losses import Batch, ModelNoise, PolicyNoise
from iqmpc.observation import ObservationSpec
from iqmpc.optimisation import guarded_step, move
from iqmpc.replay import SliceReplay, join
from iqmpc.seeding import stream_seed
from iqmpc.threads import threads

if TYPE_CHECKING:
    from iqmpc.learner import Learner

_SHIFT = 3  # pixels, of the random shift of images


class UpdateBackend(Protocol):
    """Makes updates of the learner that it was built on. `name` is what `learner.mode` calls it."""

    name: str

    def __init__(self, learner: Learner): ...

    @staticmethod
    def unfit(config: Config, device: torch.device, spec: ObservationSpec) -> str | None:
        """Why it cannot make a run's updates, or None: a predicate that follows its name."""
        ...

    def learn(self, experts: SliceReplay | None, behaviour: SliceReplay) -> dict[str, Tensor]:
        """The metrics of one update on slices that it draws: `Learner.learn`."""
        ...

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """The metrics of one update on the slices given: `Learner.update`."""
        ...


@contextlib.contextmanager
def products(matmul: str) -> Iterator[None]:
    """float32 products and convolutions of the block in `tf32`, or else in float32.

    For the whole process: what another thread multiplies on a GPU meanwhile, it does so too.
    """
    tf32 = matmul == "tf32"
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class EagerBackend:
    """Plain torch, on any device: the losses under autograd, draws from the learner's generator."""

    name = "eager"

    def __init__(self, learner: Learner):
        self.learner = learner
        self._model_loss: Callable[..., Any] = losses.model_loss
        self._policy_loss: Callable[..., Any] = losses.policy_loss

    @staticmethod
    def unfit(config: Config, device: torch.device, spec: ObservationSpec) -> str | None:
        settings = config.learner
        if settings.precision != "float32":
            return f"multiplies as learner.matmul says, got learner.precision={settings.precision}"
        if settings.matmul == "tf32" and device.type != "cuda":
            return f"has tf32 on a CUDA device alone, got learner.matmul=tf32 on {device.type}"
        return None

    def learn(self, experts: SliceReplay | None, behaviour: SliceReplay) -> dict[str, Tensor]:
        return self.learner.update(self.batch(experts, behaviour))

    def update(self, batch: Batch) -> dict[str, Tensor]:
        metrics = self.update_on_device(batch)
        self.learner.updates += 1
        return metrics

    def batch(self, experts: SliceReplay | None, behaviour: SliceReplay) -> Batch:
        """Slices drawn with the learner's `sampler`, the experts' first."""
        size, sampler = self.learner.settings.batch, self.learner.sampler
        batch = behaviour.sample(size, sampler)
        if experts is None:
            return batch
        return join(experts.sample(size, sampler), batch)

    def update_on_device(self, batch: Batch) -> dict[str, Tensor]:
        """The update, without any state of the host's: what mode `graph` captures."""
        with products(self.learner.matmul):
            return self._update_on_device(batch)

    def _update_on_device(self, batch: Batch) -> dict[str, Tensor]:
        x, s = self.learner, self.learner.settings
        with self._autocast():
            loss, latents, metrics = self._model_loss(
                x.weights,
                x.targets,
                batch,
                self.model_noise(batch),
                s,
                x.config.discount,
                x.entropy_coef,
                x.penalise,
            )
        metrics["model_grad_norm"], finite = guarded_step(
            loss, x.model_optimiser, x.model_parameters, s.grad_clip
        )

        with self._autocast():
            policy_loss, policy_metrics = self._policy_loss(
                x.weights,
                latents,
                self.policy_noise(latents),
                s.rho,
                x.entropy_coef,
                s.entropy,
                *losses.cloning(batch, metrics, s.c_bc),
            )
        policy_metrics["policy_grad_norm"], both = guarded_step(
            policy_loss,
            x.policy_optimiser,
            list(x.model.policy.parameters()),
            s.grad_clip,
            allowed=finite,
        )

        move(layer_tensors(x.targets), layer_tensors(frozen(x.weights.critics)), s.tau * finite)
        if x.averages is not None:
            move(
                x.averages.tensors(),
                [t.detach() for t in x.weights.tensors()],
                x.config.agent.average_rate * finite,
            )
        x.skipped += ~both
        return metrics | policy_metrics | {"skipped_updates": x.skipped.to(loss.dtype)}

    def _autocast(self) -> torch.autocast:
        """For the losses alone: what is cast anew for every product can be captured."""
        x = self.learner
        return torch.autocast(
            x.device.type, torch.bfloat16, enabled=x.matmul == "bf16", cache_enabled=False
        )

    def model_noise(self, batch: Batch) -> ModelNoise:
        """The draws of the model's step on a batch, from the learner's `generator`."""
        x = self.learner
        horizon, rows, action_dim = batch.action.shape
        critics, objective = x.config.model.critics, x.settings.objective
        keep = self._keep(critics, horizon * rows)
        keep_target = keep_value = keep_penalty = mix = None
        if x.penalise:
            mix = torch.rand(horizon, batch.experts, 1, device=x.device, generator=x.generator)
        if x.settings.dropout == "always":
            keep_target = self._keep(2, horizon * rows)
            if objective != "td":
                keep_value = self._keep(
                    2, batch.experts if objective == "iq" else horizon * (rows - batch.experts)
                )
            if x.penalise:
                keep_penalty = self._keep(critics, horizon * batch.experts)
        shift = None
        if x.model.observation_spec.images:
            shift = torch.randint(
                -_SHIFT,
                _SHIFT + 1,
                (horizon + 1, rows, 2),
                device=x.device,
                generator=x.generator,
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

    def policy_noise(self, latents: Tensor) -> PolicyNoise:
        """The draws of the policy's step on latents [H+1, B, Z]."""
        x = self.learner
        steps, rows = latents.shape[:2]
        keep = self._keep(2, steps * rows) if x.settings.dropout == "always" else None
        return PolicyNoise(self._normal(steps, rows, x.model.action_dim), self._pair(), keep)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.learner.device, generator=self.learner.generator)

    def _pair(self) -> Tensor:
        return layers.random_pair(self.learner.config.model.critics, self.learner.generator)

    def _keep(self, critics: int, rows: int) -> Tensor | None:
        """Dropout multipliers [critics, rows, hidden], None without dropout."""
        m = self.learner.config.model
        if m.dropout == 0:
            return None
        keep = torch.empty(critics, rows, m.hidden_dim, device=self.learner.device)
        return keep.bernoulli_(1 - m.dropout, generator=self.learner.generator).div_(1 - m.dropout)


class CompiledBackend(EagerBackend):
    """The eager update with both losses and their backward passes under torch.compile."""

    name = "compile"

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self._model_loss = compiled(losses.model_loss, "learner.mode")
        self._policy_loss = compiled(losses.policy_loss, "learner.mode")


class GraphBackend(CompiledBackend):
    """The compiled update with the draw of its batch, replayed as one CUDA graph."""

    name = "graph"

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.captured = CapturedStep(learner.device, (learner.generator, learner.sampler))

    @staticmethod
    def unfit(config: Config, device: torch.device, spec: ObservationSpec) -> str | None:
        if device.type != "cuda":
            return f"needs a CUDA device, got {device.type}"
        return EagerBackend.unfit(config, device, spec)

    def learn(self, experts: SliceReplay | None, behaviour: SliceReplay) -> dict[str, Tensor]:
        replays = tuple(r for r in (experts, behaviour) if r is not None)
        for replay in replays:
            replay.require_slices()
        # Parameters, moments and targets never move; a replay's tensors do when it grows.
        metrics = self.captured(
            lambda: self.update_on_device(self.batch(experts, behaviour)),
            key=(experts, behaviour, *(r.allocations for r in replays)),
        )
        self.learner.updates += 1
        return metrics


class FusedBackend:
    """The C++ library: a whole update is one call, with draws of its own, numbered by `updates`."""

    name = "fused"

    def __init__(self, learner: Learner):
        self.learner = learner
        self._steps = []  # Adam's, of the model and of the policy
        moments = {}
        for optimiser in (learner.model_optimiser, learner.policy_optimiser):
            self._steps.append(torch.zeros(()))
            for group in optimiser.param_groups:
                for p in group["params"]:
                    moments[p] = optimiser.state[p] = {
                        "step": self._steps[-1],  # the same for all, which take each step together
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
        state = UpdateState(
            learner.weights,
            learner.targets,
            lambda p: moments[p]["exp_avg"],
            lambda p: moments[p]["exp_avg_sq"],
            learner.averages,
        )
        try:
            self.fused = FusedUpdate(
                state,
                UpdateSettings.of(learner.config, learner.model.action_dim),
                seed=stream_seed(learner.config.seed, "learner"),
                precision=learner.settings.precision,
                threads=threads(),
            )
        except ValueError as error:  # such as layers wider than it is made for
            raise ConfigError(
                f"learner.mode=fused: {error} (learner.mode=compile and eager have no such limit)"
            ) from error

    @staticmethod
    def unfit(config: Config, device: torch.device, spec: ObservationSpec) -> str | None:
        if device.type != "cpu":
            return f"needs device=cpu, got {device.type}"
        if config.learner.matmul is not None:
            return (
                f"multiplies as learner.precision says, got learner.matmul={config.learner.matmul}"
            )
        if spec.images:
            return f"takes flat observations, got images {list(spec.shape)}"
        return cannot_run("cpu", "fused")

    def learn(self, experts: SliceReplay | None, behaviour: SliceReplay) -> dict[str, Tensor]:
        batch = self.learner.settings.batch
        return self._apply(self.fused.learn, experts and experts.rows(), behaviour.rows(), batch)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        return self._apply(self.fused.update, *batch)

    def _apply(self, update: Callable[..., Any], *arguments: Any) -> dict[str, Tensor]:
        x, (model_steps, policy_steps) = self.learner, self._steps
        values, model_skipped, policy_skipped = update(
            *arguments,
            update=x.updates,
            model_steps=int(model_steps),
            policy_steps=int(policy_steps),
        )
        x.updates += 1
        model_steps += not model_skipped
        policy_steps += not policy_skipped
        x.skipped += model_skipped or policy_skipped
        absent = set()
        if x.settings.objective == "td":
            absent |= {"q_expert", "reward_expert", "reward_behaviour", "value_term"}
        else:
            values["q_difference"] = values["q_expert"] - values["q_behaviour"]
        if not x.penalise:
            absent.add("gradient_penalty")
        if not x.settings.c_bc:
            absent.add("cloning_error")
        if not x.weights.termination:
            absent |= {"termination_loss", "termination_recall", "termination_precision"}
        values["skipped_updates"] = x.skipped
        names = [name for name in values if name not in absent]
        return dict(zip(names, torch.tensor([values[n] for n in names]).unbind(), strict=True))


# In the order in which `auto` takes them; the last is for who asks for it.
BACKENDS: dict[str, type[UpdateBackend]] = {
    backend.name: backend for backend in (FusedBackend, GraphBackend, CompiledBackend, EagerBackend)
}
AUTO = ("fused", "graph", "compile")


def resolve_update(config: Config, device: torch.device, spec: ObservationSpec) -> str:
    """The backend that `learner.mode` comes to, by name.

    Raises `ConfigError` with what keeps the named one, or all of them, from serving.
    """
    unfit = {name: x.unfit(config, device, spec) for name, x in BACKENDS.items()}
    mode = config.learner.mode
    return resolve(mode, unfit, order=AUTO, setting="learner.mode", error=ConfigError)
