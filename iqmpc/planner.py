"""MPPI over latents, warm-started from one control step to the next, on the backend that fits."""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor

from iqmpc.config import PlannerConfig
from iqmpc.errors import BackendError
from iqmpc.frames import is_image
from iqmpc.kernels import mppi_plan, triton_weights
from iqmpc.kernels.backends import interpreted, resolve_backend
from iqmpc.kernels.mppi_plan import Plan
from iqmpc.kernels.weights import Weights
from iqmpc.plan_statistics import PlanStatistics


class Planner:
    """Plans for `num_envs` independent problems at once, on its own snapshot of the weights.

    Not for two threads at once: each plan starts from the last one, whosever it was. Call `reset`
    when an episode starts, `plan` at every control step and `publish` after the
    weights changed. The same seed and the same number of plans before give the same plan.
    A plan is never non-finite or out of [-1, 1]. `nonfinite_plans` counts those for which no
    trajectory had a finite score (they fall back to the policy's mean action, or to zeros where
    that is not finite either), `missed_plans` those whose `budget_us` had no room for one sample
    (they act with the shifted previous plan, or with the policy's mean where there is none),
    `late_plans` those that took longer than `budget_us`. `last` is the last plan, with its time,
    iterations and samples.
    """

    def __init__(
        self,
        weights: Weights,
        config: PlannerConfig | None = None,
        *,
        discount: float,
        beta: float = 0.0,
        num_envs: int = 1,
        seed: int = 0,
    ):
        """`beta` is the entropy coefficient in force (the unrolled score's).

        Raises `BackendError` where no backend can serve the settings.
        """
        self.config = config = config or PlannerConfig()
        self.obs_shape, self.num_envs = weights.obs_shape, num_envs
        self.backend = _backend(config, weights)
        self._plan = mppi_plan.BACKENDS[self.backend](
            weights, config, discount=discount, beta=beta, num_envs=num_envs, seed=seed
        )
        self._samples = (
            num_envs
            * (
                config.policy_trajectories
                + config.iterations_for(weights.action_dim)
                * (config.samples - config.policy_trajectories)
            )
            if config.enabled
            else 0
        )
        self._statistics = PlanStatistics()
        self.last: Plan | None = None
        self.nonfinite_plans = self.missed_plans = self.late_plans = 0

    def publish(self, weights: Weights) -> None:
        """Copy `weights` into the snapshot that plans are computed on."""
        self._plan.publish(weights)

    def reset(self, env: int | None = None) -> None:
        """Forget the previous plan, of one problem or of all: an episode starts."""
        self._plan.reset(env)

    def plan(self, obs: Tensor, *, explore: bool = False) -> Tensor:
        """obs [E, O] or uint8 [E, 3C, 64, 64] -> action [E, A] in [-1, 1]; `explore` adds std_0·ε.

        Raises `ValueError` for observations of another shape, and images of another type.
        """
        expected = [self.num_envs, *self.obs_shape]
        if list(obs.shape) != expected:
            raise ValueError(f"obs must be {expected}, got {list(obs.shape)}")
        if is_image(self.obs_shape) and obs.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {obs.dtype}")
        started = time.perf_counter()
        plan = self._plan(obs, explore=explore)
        if plan.elapsed_us is None:
            elapsed_us = 1e6 * (time.perf_counter() - started)
            plan = plan._replace(samples=self._samples, elapsed_us=elapsed_us)
        self.last = plan
        self._statistics.add(plan)
        if plan.nonfinite:
            if not self.nonfinite_plans:
                warnings.warn(
                    "no trajectory of a plan has a finite score: acting with the policy's mean "
                    "action (counted as nonfinite_plans, said once)",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self.nonfinite_plans += plan.nonfinite
        self.missed_plans += plan.missed
        self.late_plans += plan.late
        return plan.action

    def statistics(self) -> PlanStatistics:
        """Counts and times of the plans since the planner was made or `clear_statistics` called."""
        return self._statistics.copy()

    def clear_statistics(self) -> None:
        self._statistics = PlanStatistics()

    @property
    def mean(self) -> Tensor:
        """The last plan's mean, [E, H, A]."""
        return self._plan.mean

    @property
    def step(self) -> int:
        """Plans so far; setting it repeats or skips random draws."""
        return self._plan.step

    @step.setter
    def step(self, value: int) -> None:
        self._plan.step = value

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean.clone(),
            "step": torch.tensor(self.step),
            "nonfinite_plans": torch.tensor(self.nonfinite_plans),
            "missed_plans": torch.tensor(self.missed_plans),
            "late_plans": torch.tensor(self.late_plans),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean.copy_(state["mean"])
        self.step = int(state["step"])
        self.nonfinite_plans = int(state["nonfinite_plans"])
        self.missed_plans = int(state["missed_plans"])
        self.late_plans = int(state.get("late_plans", 0))  # checkpoints of 0.1 have none


def _backend(config: PlannerConfig, weights: Weights) -> str:
    """The backend to use, or `BackendError` with what keeps those named from serving."""
    device = weights.encoder[0].weight.device
    reasons = {}

    def refuse(name: str, *pairs: tuple[bool, str]) -> None:
        """The first reason whose condition holds."""
        reason = next((text for holds, text in pairs if holds), None)
        if reason is not None:
            reasons[name] = reason

    precision = f"got planner.precision={config.precision}"
    budget = (config.budget_us is not None, "keeps to no planner.budget_us")
    ends = (bool(weights.termination), "takes no model with a termination head (model.termination)")
    capture = (config.capture is True, "captures no CUDA graph, got planner.capture=true")
    unfit = triton_weights.unfit(weights) or triton_weights.encoder_unfit(weights)
    refuse(
        "reference",
        (
            config.precision not in ("float32", "float64"),
            f"computes in float32 or float64, {precision}",
        ),
        budget,
        capture,
    )
    refuse(
        "cpu",
        (config.precision not in ("float32", "bf16"), f"computes in float32 or bf16, {precision}"),
        (device.type != "cpu", f"needs weights on the CPU, got {device}"),
        capture,
    )
    refuse("cuda", ends)
    refuse(
        "triton",
        ends,
        (
            config.precision not in triton_weights.PRECISIONS,
            f"computes in float32, tf32 or bf16, {precision}",
        ),
        budget,
        (
            device.type != "cuda" and not (config.backend == "triton" and interpreted()),
            f"needs weights on a CUDA device, got {device}",
        ),
        (unfit is not None, f"cannot take the model: {unfit}"),
    )
    if config.backend in reasons:
        raise BackendError(f"backend {config.backend!r} {reasons[config.backend]}")
    usable = [name for name in mppi_plan.BACKENDS if name not in reasons]
    if not usable:
        raise BackendError(
            "no backend can serve these settings: "
            + "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        )
    return resolve_backend(config.backend, usable)
