"""The C++ backend of `mppi_plan`: one call a plan, on threads of its own."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from iqmpc.config import PlannerConfig
from iqmpc.kernels import layers
from iqmpc.kernels.backends import cannot_run
from iqmpc.kernels.cpu import LiveView, as_array
from iqmpc.kernels.mppi_plan.types import Plan, unserved_precision, unused
from iqmpc.kernels.weights import Weights, map_layers
from iqmpc.threads import threads


class CpuPlan:
    """See `iqmpc.kernels.mppi_plan`. Weights and flat observations are float32 on the CPU.

    Images are encoded by torch, in float32 and on the plan's budget; the C++ planner gets z_0.
    Both scores rank alike in the same draws and this backend computes the advantage form for both.
    The GIL is released while a plan runs; `publish` may be called meanwhile, from another thread.
    """

    @staticmethod
    def unfit(weights: Weights, config: PlannerConfig) -> str | None:
        device = weights.encoder[0].weight.device
        return (
            unserved_precision(config, "float32", "bf16")
            or (None if device.type == "cpu" else f"needs weights on the CPU, got {device}")
            or unused(config, "threads", "budget_us")
            or cannot_run("cpu", config.backend)
        )

    def __init__(
        self,
        weights: Weights,
        config: PlannerConfig,
        *,
        discount: float,
        entropy_coef: float = 0.0,  # of the unrolled score, which the advantage form does without
        problems: int = 1,
        seed: int = 0,
        isa: str | None = None,
    ):
        from iqmpc import _C

        self.problems = problems
        self._view = LiveView()
        self._keep_encoder(weights)
        packed = _C.WorldModel(
            self._view.of(weights), precision=config.precision or "float32", isa=isa
        )
        self.action_dim: int = packed.action_dim
        self.native = _C.Planner(
            packed,
            problems=problems,
            horizon=config.horizon,
            samples=config.samples,
            elites=config.elites,
            policy_trajectories=config.policy_trajectories,
            iterations=config.iterations_for(packed.action_dim),
            temperature=config.temperature,
            std_min=config.std_min,
            std_max=config.std_max,
            discount=discount,
            enabled=config.enabled,
            threads=config.threads or threads(),
            budget_us=config.budget_us or 0.0,
            seed=seed,
        )

    def __call__(self, obs: Tensor, *, explore: bool = False) -> Plan:
        """obs [E, O] or [E, 3C, 64, 64] -> the plan; `explore` adds std_0 ε to its action."""
        started = time.perf_counter()
        if self._encoder is not None:
            with torch.no_grad():
                obs = layers.encode(self._encoder, obs)
        action = torch.empty(self.problems, self.action_dim)
        array = as_array("obs", obs.float().contiguous())
        spent_us = 1e6 * (time.perf_counter() - started)
        iterations, samples, nonfinite, missed, late, elapsed_us = self.native.plan(
            array, explore, action.numpy(), spent_us
        )
        return Plan(action, nonfinite, iterations, missed, late, samples, elapsed_us)

    def publish(self, weights: Weights) -> None:
        self.native.publish(self._view.of(weights))
        self._keep_encoder(weights)

    def _keep_encoder(self, weights: Weights) -> None:
        """A copy of an encoder of images, which torch computes; a plan that runs has the last."""
        encoder: Weights | None = None
        if weights.encodes_images:
            copied = map_layers(lambda t: t.detach().clone(), weights.encoder)
            encoder = weights._replace(encoder=copied, dynamics=(), policy=(), critics=())
        self._encoder = encoder

    def reset(self, problem: int | None = None) -> None:
        if problem is None:
            self.native.reset()
        else:
            self.native.reset(problem)

    @property
    def mean(self) -> Tensor:
        """[E, H, A], the planner's own memory."""
        return torch.from_numpy(self.native.mean)

    @property
    def step(self) -> int:
        return self.native.step

    @step.setter
    def step(self, value: int) -> None:
        self.native.step = value
