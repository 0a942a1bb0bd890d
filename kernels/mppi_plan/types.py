"""What a plan returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Plan(NamedTuple):
    """action [E, A] float32 in [-1, 1], always finite.

    `nonfinite` counts the problems without a finite score, which got the policy's mean action (or
    zeros where that is not finite either). `iterations` were done; `missed` says that the budget
    had no room for one.
    """

    action: Tensor
    nonfinite: int
    iterations: int
    missed: bool = False
