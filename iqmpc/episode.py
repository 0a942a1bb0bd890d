"""An episode: open, while it is being recorded, and finished."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from iqmpc.observation import ObservationSpec


@dataclass(frozen=True, eq=False)
class Episode:
    """One recorded episode of T environment steps.

    observations: float32 [T+1, O]; row t is what was seen before action t, the last row what
        followed the last action. Of images every frame once, uint8 [T+1, C, 64, 64]: what was seen
        at row t is `observed()[t]`.
    actions: float32 [T, A] in [-1, 1].
    rewards: float32 [T], or None where they were not recorded. Of demonstrations for reporting
        only: the method never sees them.
    terminated: whether the last row is a terminal state (not merely a time limit).
    success: whether the task was solved at the last step; None where the task defines none.
    corrected: bool [T], the steps in which a person acted in the agent's place; None where none.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray | None = None
    terminated: bool = False
    success: bool | None = None
    corrected: np.ndarray | None = None

    @property
    def observation_spec(self) -> ObservationSpec:
        """What one observation is."""
        return ObservationSpec.of_rows(self.observations)

    @property
    def undiscounted_return(self) -> float:
        """The sum of the rewards, in float64; NaN where they were not recorded."""
        return float("nan") if self.rewards is None else float(self.rewards.sum(dtype=np.float64))

    def observed(self) -> np.ndarray:
        """What was seen at each row, float32 [T+1, O] or uint8 [T+1, 3C, 64, 64]."""
        return self.observation_spec.observed(self.observations)

    def corrections(self) -> list[Episode]:
        """Each unbroken stretch of corrected steps, of flat observations, as an episode."""
        if self.corrected is None:
            return []
        edges = np.flatnonzero(np.diff(self.corrected, prepend=False, append=False)).tolist()
        return [
            Episode(
                self.observations[first : end + 1],
                self.actions[first:end],
                None if self.rewards is None else self.rewards[first:end],
                self.terminated and end == len(self.actions),
            )
            for first, end in zip(edges[::2], edges[1::2], strict=True)
        ]


@dataclass(eq=False)
class EpisodeBuffer:
    """An episode so far: T+1 observations, float32 [O] or images, T actions float32 [A], T rewards.

    `number` counts the run's episodes from 0; `corrected` are the steps in which a person acted.
    """

    observations: list[np.ndarray]
    number: int = 0
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    corrected: list[int] = field(default_factory=list)

    def add(
        self,
        action: np.ndarray,
        reward: float,
        observation: np.ndarray,
        taken_over: np.ndarray | None = None,
    ) -> None:
        """Append a step: the action, or a person's who has `taken_over`, and what followed it."""
        if taken_over is not None:
            self.corrected.append(len(self.actions))
            action = taken_over
        self.actions.append(action)
        self.rewards.append(reward)
        self.observations.append(observation)

    def part(self, first: int, *, terminated: bool = False) -> Episode:
        """The steps from number `first` on, of flat observations, as an episode of their own."""
        return Episode(
            np.array(self.observations[first:]),
            np.array(self.actions[first:], np.float32),
            np.array(self.rewards[first:], np.float32),
            terminated,
        )

    def finish(self, *, terminated: bool = False, success: bool | None = None) -> Episode:
        """The whole episode, of at least one step.

        Raises `TaskError` for images that are not stacked as `ObservationSpec.rows` wants them.
        """
        return Episode(
            ObservationSpec(self.observations[0].shape).rows(self.observations),
            np.array(self.actions, np.float32),
            np.array(self.rewards, np.float32),
            terminated,
            success,
            np.isin(np.arange(len(self.actions)), self.corrected) if self.corrected else None,
        )
