"""MPPI over latents, warm-started from one control step to the next, on the backend that fits."""

from __future__ import annotations

import copy
import time

from torch import Tensor

from iqmpc.config import PlannerConfig
from iqmpc.controller import Controller
from iqmpc.errors import BackendError
from iqmpc.kernels.mppi_plan import BACKENDS, Plan, resolve_plan
from iqmpc.kernels.weights import Weights
from iqmpc.observation import ObservationSpec
from iqmpc.plan_statistics import PlanStatistics


class Planner(Controller):
    """Plans for `problems` independent problems at once, on its own snapshot of the weights.

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
        entropy_coef: float = 0.0,
        problems: int = 1,
        seed: int = 0,
    ):
        """`entropy_coef` is the entropy coefficient in force, β·A or β (the unrolled score's).

        Raises `BackendError` where the backend that is named cannot serve, or none can: because of
        the machine, of the weights, or of a setting that it does not use.
        """
        super().__init__(problems)
        self.config = config = config or PlannerConfig()
        self.observation_spec = ObservationSpec(weights.obs_shape)
        self.backend = resolve_plan(weights, config)
        try:
            self._plan = BACKENDS[self.backend](
                weights,
                config,
                discount=discount,
                entropy_coef=entropy_coef,
                problems=problems,
                seed=seed,
            )
        except (ValueError, MemoryError) as error:  # sizes beyond those that it is made for
            said = str(error) or "memory does not suffice"
            raise BackendError(f"planner.backend={self.backend}: {said}") from error
        drawn = config.samples - config.policy_trajectories
        self._all_samples = problems * (
            config.policy_trajectories + config.iterations_for(weights.action_dim) * drawn
            if config.enabled
            else 0
        )
        self._statistics = PlanStatistics()
        self.last: Plan | None = None

    def publish(self, weights: Weights) -> None:
        """Copy `weights` into the snapshot that plans are computed on."""
        self._plan.publish(weights)

    def reset(self, problem: int | None = None) -> None:
        """Forget the previous plan, of one problem or of all: an episode starts."""
        self._plan.reset(problem)

    def plan(self, obs: Tensor, *, explore: bool = False) -> Tensor:
        """obs [E, O] or uint8 [E, 3C, 64, 64] -> action [E, A] in [-1, 1]; `explore` adds std_0·ε.

        Raises `ValueError` for observations of another shape, and images of another type.
        """
        self.observation_spec.check(obs, self.problems)
        started = time.perf_counter()
        plan = self._plan(obs, explore=explore)
        if plan.elapsed_us is None:
            elapsed_us = 1e6 * (time.perf_counter() - started)
            plan = plan._replace(samples=self._all_samples, elapsed_us=elapsed_us)
        self.last = plan
        self._statistics.add(plan)
        self.count_nonfinite(
            plan.nonfinite,
            "no trajectory of a plan has a finite score: acting with the policy's mean action",
        )
        self.missed_plans += plan.missed
        self.late_plans += plan.late
        return plan.action

    def statistics(self) -> PlanStatistics:
        """Counts and times of the plans since the planner was made or `clear_statistics` called."""
        return copy.deepcopy(self._statistics)

    def clear_statistics(self) -> None:
        self._statistics = PlanStatistics()

    @property
    def leaves_torch_idle(self) -> bool:
        """Whether torch computes nothing of an action: all of it is the C++ library's."""
        return self.backend == "cpu" and not self.observation_spec.images

    @property
    def mean(self) -> Tensor:
        """The last plan's mean, [E, H, A]."""
        return self._plan.mean

    @property
    def step(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Plans so far; setting it repeats or skips random draws."""
        return self._plan.step

    @step.setter
    def step(self, value: int) -> None:
        self._plan.step = value

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean.clone(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean.copy_(state["mean"])
        super().load_state_dict(state)
