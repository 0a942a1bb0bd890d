"""From what other formats record to episodes of T actions and T+1 observations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from iqmpc.demos.formats import budget
from iqmpc.demos.formats.safe_hdf5 import matrix
from iqmpc.demos.types import Defect, Draft, Facts


class Assembly:
    """Collects a file's episodes; what had to be left out is counted and put into the provenance.

    Arrays are float32; every value may be the Defect for which it could not be read. `full` says
    that there are as many episodes as `facts` asks for.
    """

    def __init__(self, kind: str, path: Path, facts: Facts) -> None:
        self._wanted = facts.episodes
        self.at = partial(Defect, str(path))
        self._path = path
        self._episodes: list[dict[str, object] | Defect] = []
        self._notes = {"source_format": kind, "source": path.name}
        self._dropped = self._ends = self._short = 0

    @property
    def full(self) -> bool:
        return self._wanted is not None and len(self._episodes) >= self._wanted

    def here(self) -> partial[Defect]:
        """Makes the defects of the episode that is added next."""
        return partial(self.at, episode=len(self._episodes))

    def add(
        self,
        observations: Any,
        actions: Any,
        *,
        rewards: Any = None,
        terminated: Any = False,
        success: Any = None,
        next_observations: Any = None,
    ) -> None:
        """Add an episode of actions [T, ...] and observations [T+1, O] or [T, O].

        After T observations the last of next_observations [T, O] is the missing row. Without them
        the last action goes, as what followed it is not known, and with it the end that it led
        to; an episode of one step then goes whole.
        """
        budget.spend_episode()
        observations, actions, next_observations = (
            matrix(value) if isinstance(value, np.ndarray) else value
            for value in (observations, actions, next_observations)
        )
        if isinstance(rewards, np.ndarray):
            rewards = rewards.reshape(-1)
        if isinstance(next_observations, Defect) and isinstance(observations, np.ndarray):
            observations = next_observations
        known = isinstance(observations, np.ndarray) and isinstance(actions, np.ndarray)
        if known and 0 < len(observations) == len(actions):
            if isinstance(next_observations, np.ndarray):
                observations = np.concatenate([observations, next_observations[-1:]])
            elif len(actions) == 1:
                self._short += 1
                return
            else:
                actions = actions[:-1]
                rewards = rewards[:-1] if isinstance(rewards, np.ndarray) else rewards
                self._dropped += 1
                self._ends += terminated is True
                terminated = False
        self._episodes.append(
            {
                "observations": observations,
                "actions": actions,
                "rewards": rewards,
                "terminated": terminated,
                "success": success,
            }
        )

    def add_defect(self, defect: Defect) -> None:
        """Add an episode, or the whole of what follows, that could not be read."""
        budget.spend_episode()
        self._episodes.append(defect)

    def draft(
        self,
        task: Any,
        notes: Mapping[str, str] | None = None,
        action_range: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Draft:
        """The set so far, under the task's name (None where the file gives none)."""
        notes = {**self._notes, **(notes or {})}
        if self._dropped:
            notes["dropped_steps"] = (
                f"{self._dropped}, the last of each episode: no observation followed it"
            )
        if self._ends:
            notes["dropped_terminations"] = f"{self._ends}, with their last steps"
        if self._short:
            notes["dropped_episodes"] = f"{self._short} of one step, after which none was observed"
        return Draft(str(self._path), task, self._episodes, notes, action_range)


def last(value: Any) -> Any:
    """The last of an array of truth values, as a bool; anything else as it is, empty as None."""
    if isinstance(value, np.ndarray):
        return bool(value[-1]) if len(value) else None
    return value
