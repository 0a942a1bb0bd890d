"""What a plan backend is, what it returns, and what it says of settings that it does not use."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from iqmpc.config import PlannerConfig
from iqmpc.kernels.weights import Weights


class Plan(NamedTuple):
    """action [E, A] float32 in [-1, 1], always finite.

    `nonfinite` counts the problems without a finite score, which got the policy's mean action (or
    zeros where that is not finite either). `iterations` were done whole; `missed` says that the
    budget had no room for any sample, `late` that the plan took longer than the budget. `samples`
    were scored, over all iterations and problems, in `elapsed_us`: None of a backend that keeps to
    no budget, and scores all samples.
    """

    action: Tensor
    nonfinite: int
    iterations: int
    missed: bool = False
    late: bool = False
    samples: int | None = None
    elapsed_us: float | None = None


class PlanBackend(Protocol):
    """Plans for E problems at once, on a snapshot of the weights: built once, called every step.

    All that passes from one call to the next is `mean` [E, H, A], the last plan's mean, in memory
    that stays where it is, and `step`, the number of plans so far, which can be set: a plan's draws
    follow from it and the seed alone.
    """

    step: int

    @property
    def mean(self) -> Tensor: ...

    def __call__(self, obs: Tensor, *, explore: bool = False) -> Plan:
        """The plan for obs [E, O], or uint8 images [E, 3C, 64, 64]; `explore` adds std_0 ε."""
        ...

    def publish(self, weights: Weights) -> None:
        """Copy `weights` into the snapshot."""
        ...

    def reset(self, problem: int | None = None) -> None:
        """Forget the last plan, of one problem or of all."""
        ...


class PlanBackendType(Protocol):
    """Builds a `PlanBackend`, and says before that what keeps it from serving."""

    def unfit(self, weights: Weights, config: PlannerConfig) -> str | None:
        """Why it cannot plan on these weights with these settings here, or None.

        The reason is the predicate of a sentence: it follows the backend's name.
        """
        ...

    def __call__(
        self,
        weights: Weights,
        config: PlannerConfig,
        *,
        discount: float,
        entropy_coef: float = 0.0,
        problems: int = 1,
        seed: int = 0,
    ) -> PlanBackend: ...


def unused(config: PlannerConfig, *used: str) -> str | None:
    """The reason against a backend that makes nothing of a setting: one given and not in `used`.

    Of the settings that only some backends use, a value other than the default is given.
    """
    given = {
        "mode": (config.mode == "compile", "compiles nothing, got planner.mode=compile"),
        "capture": (config.capture is True, "captures no CUDA graph, got planner.capture=true"),
        "threads": (
            config.threads is not None,
            f"has no threads of its own, got planner.threads={config.threads}",
        ),
        "budget_us": (config.budget_us is not None, "keeps to no planner.budget_us"),
    }
    return next((why for key, (asked, why) in given.items() if asked and key not in used), None)


def unserved_precision(config: PlannerConfig, *served: str) -> str | None:
    """The reason against a backend that computes in the precisions `served`, or None."""
    if config.precision in (None, *served):
        return None
    return (
        f"computes in {', '.join(served[:-1])} or {served[-1]}, "
        f"got planner.precision={config.precision}"
    )
