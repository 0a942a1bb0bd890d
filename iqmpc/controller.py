"""What an agent's actions come from: a planner, or a policy alone."""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

COUNTS = ("nonfinite_plans", "missed_plans", "late_plans")


class Controller(abc.ABC):
    """Gives the actions of `problems` independent problems on its own snapshot of the weights.

    Its random draws follow from the seed and from `step`, the calls of `plan` so far, so that the
    same seed and step give the same action. Counts, by `COUNTS`, are of plans that fell short.
    Raises `ValueError` for fewer problems than one.
    """

    backend: str  # as summary.json names it
    step: int

    def __init__(self, problems: int) -> None:
        if problems < 1:
            raise ValueError(f"problems (num_envs of an agent) must be at least 1, got {problems}")
        self.problems = problems
        self.nonfinite_plans = self.missed_plans = self.late_plans = 0

    @abc.abstractmethod
    def publish(self, weights: Any) -> None:
        """Copy `weights` into the snapshot."""

    @abc.abstractmethod
    def reset(self, problem: int | None = None) -> None:
        """An episode starts, in one problem or in all."""

    @abc.abstractmethod
    def plan(self, obs: Tensor, *, explore: bool = False) -> Tensor:
        """obs [E, O] or uint8 [E, 3C, 64, 64] -> action [E, A] in [-1, 1] on the CPU."""

    @property
    def leaves_torch_idle(self) -> bool:
        """Whether torch computes nothing of an action."""
        return False

    def count_nonfinite(self, problems: int, instead: str) -> None:
        """Count actions that were not finite; say once what the agent does `instead`."""
        if problems and not self.nonfinite_plans:
            warnings.warn(
                f"{instead} (counted as nonfinite_plans, said once)", RuntimeWarning, stacklevel=3
            )
        self.nonfinite_plans += problems

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
            "step": torch.tensor(self.step),
            **{name: torch.tensor(getattr(self, name)) for name in COUNTS},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])
        for name in COUNTS:
            setattr(self, name, int(state.get(name, 0)))  # those of 0.1 count no late ones
