"""What a plan returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
