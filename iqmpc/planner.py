"""MPPI over latents, warm-started from one control step to the next, on the backend that fits."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from iqmpc.config import PlannerConfig
from iqmpc.kernels.mppi_plan import BACKENDS, resolve_plan
from iqmpc.kernels.weights import Weights
from iqmpc.observation import ObservationSpec

COUNTS = ("nonfinite_plans", "missed_plans")


class Planner:
    """Plans for `problems` independent problems at once, on its own snapshot of the weights.

    Not for two threads at once: each plan starts from the last one, whosever it was. Call `reset`
    when an episode starts, `plan` at every control step and `publish` after the
    weights changed. The same seed and the same number of plans before give the same plan.
    A plan is never non-finite or out of [-1, 1]. `nonfinite_plans` counts those for which no
    trajectory had a finite score (they fall back to the policy's mean action, or to zeros where
    that is not finite either), `missed_plans` those whose `budget_us` had no room for one iteration
    (they act with the shifted previous plan, or with the policy's mean where there is none).
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
        self.config = config = config or PlannerConfig()
        self.observation_spec, self.problems = ObservationSpec(weights.obs_shape), problems
        self.backend = resolve_plan(weights, config)
        self._plan = BACKENDS[self.backend](
            weights,
            config,
            discount=discount,
            entropy_coef=entropy_coef,
            problems=problems,
            seed=seed,
        )
        self.nonfinite_plans = self.missed_plans = 0

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
        plan = self._plan(obs, explore=explore)
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
        return plan.action

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

    @contextlib.contextmanager
    def untraced(self) -> Iterator[dict[str, int]]:
        """Plan from step 0 on, and be afterwards as if nothing had been planned.

        Yields what is filled at the end: how many plans were counted, by `COUNTS`.
        """
        before, counted = self.state_dict(), dict[str, int]()
        self.step = 0
        yield counted
        counted.update({name: getattr(self, name) - int(before[name]) for name in COUNTS})
        self.load_state_dict(before)

    def count(self, counted: dict[str, int]) -> None:
        """Add to the counts, by `COUNTS`."""
        for name, number in counted.items():
            setattr(self, name, getattr(self, name) + number)

    def summary(self) -> dict[str, Any]:
        """The backend and the counts, as summary.json and `iqmpc eval` name them."""
        return {"backend": self.backend, **{name: getattr(self, name) for name in COUNTS}}

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean.clone(),
            "step": torch.tensor(self.step),
            **{name: torch.tensor(getattr(self, name)) for name in COUNTS},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean.copy_(state["mean"])
        self.step = int(state["step"])
        for name in COUNTS:
            setattr(self, name, int(state[name]))
