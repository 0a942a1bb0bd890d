"""The in-memory demonstration set, and where sets are found and kept."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from iqmpc.demos import formats
from iqmpc.demos.checks import find_defects
from iqmpc.demos.formats import isolated, native
from iqmpc.demos.types import Defect, DemonstrationError, Draft, Facts
from iqmpc.episode import Episode
from iqmpc.files import write_atomically
from iqmpc.observation import ObservationSpec

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """A sound set of demonstrations: every check has passed by the time one exists.

    task: the task's name, such as "walker-walk".
    episodes: at least one, all with the same O and A; rewards and success in all or in none.
    provenance: who recorded it and how, as text by name.
    Raises DemonstrationError when the arguments do not satisfy the checks.
    """

    task: str
    episodes: tuple[Episode, ...]
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "episodes", tuple(self.episodes))
        object.__setattr__(self, "provenance", dict(self.provenance))
        episodes = [vars(episode) for episode in self.episodes]
        _check(Draft(f"{self.task} (in memory)", self.task, episodes, self.provenance))

    @classmethod
    def _checked(
        cls, task: str, episodes: Sequence[Episode], provenance: Mapping[str, str]
    ) -> Demonstrations:
        """A set of what has passed the checks, which are not made again."""
        demos = object.__new__(cls)
        for name, value in (
            ("task", task),
            ("episodes", tuple(episodes)),
            ("provenance", dict(provenance)),
        ):
            object.__setattr__(demos, name, value)
        return demos

    def __len__(self) -> int:
        """The number of episodes."""
        return len(self.episodes)

    @property
    def observation_spec(self) -> ObservationSpec:
        """What one observation is."""
        return self.episodes[0].observation_spec

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """Of one observation: (O,), or (3C, 64, 64) where they are images."""
        return self.observation_spec.shape

    @property
    def action_dim(self) -> int:
        """A, the values of one action."""
        return self.episodes[0].actions.shape[1]

    @property
    def transitions(self) -> int:
        """The number of environment steps over all episodes."""
        return sum(len(episode.actions) for episode in self.episodes)

    def returns(self) -> np.ndarray | None:
        """Undiscounted return of every episode, float64 [N]; None where rewards are absent."""
        returns = [e.undiscounted_return for e in self.episodes if e.rewards is not None]
        return np.array(returns) if returns else None

    @property
    def return_mean(self) -> float | None:
        """Mean of `returns()`; None where rewards are absent."""
        returns = self.returns()
        return None if returns is None else float(returns.mean())

    @property
    def success_rate(self) -> float | None:
        """Share of episodes that ended in success, in [0, 1]; None where the task defines none."""
        known = [episode.success for episode in self.episodes if episode.success is not None]
        return float(np.mean(known)) if known else None

    def select(self, n: int) -> Demonstrations:
        """The set of the first n episodes; DemonstrationError unless 1 <= n <= len(self)."""
        if not 1 <= n <= len(self):
            raise DemonstrationError(f"{n} episodes asked of {self.task}, which has {len(self)}")
        return self._checked(self.task, self.episodes[:n], self.provenance)

    def best(self, n: int) -> Demonstrations:
        """The set of the n episodes of the highest return, in the order in which they are here.

        Raises `DemonstrationError` unless 1 <= n <= len(self), and where rewards are absent.
        """
        returns = self.returns()
        if returns is None:
            raise DemonstrationError(f"the episodes of {self.task} have no rewards to choose by")
        if not 1 <= n <= len(self):
            raise DemonstrationError(f"{n} episodes asked of {self.task}, which has {len(self)}")
        chosen = sorted(np.argsort(-returns, kind="stable")[:n])
        episodes = tuple(self.episodes[index] for index in chosen)
        return self._checked(self.task, episodes, {**self.provenance, "best": f"{n}/{len(self)}"})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        task: str | None = None,
        obs_dim: int | None = None,
        action_dim: int | None = None,
        *,
        format: str | None = None,
        facts: Facts | None = None,
    ) -> Demonstrations:
        """Read and check a file or folder; docs/demonstrations.md lists the formats.

        task, obs_dim and action_dim are what the set must be for; None accepts any. A gym task may
        be named by its env id. format: None goes by the content. facts: what the format does not
        say; the task is `task` where neither they nor the file name it. It is read in a process of
        its own, which a damaged file may hang or crash.
        Raises DemonstrationError, which lists the first defects and holds all of them.
        """
        facts = facts or Facts()
        if facts.task is None:
            facts = replace(facts, task=task)
        return cls.from_draft(isolated.read(path, format, facts), task, obs_dim, action_dim)

    @classmethod
    def from_draft(
        cls,
        draft: Draft | Defect,
        task: str | None = None,
        obs_dim: int | None = None,
        action_dim: int | None = None,
    ) -> Demonstrations:
        """What a reader returned, checked as `load` says."""
        _check(draft, task=task, obs_dim=obs_dim, action_dim=action_dim)
        assert not isinstance(draft, Defect)  # which is one that the checks raise
        episodes = [_episode(e) for e in draft.episodes if not isinstance(e, Defect)]
        return cls._checked(draft.task, episodes, draft.provenance)

    @classmethod
    def packaged(cls, task: str) -> Demonstrations:
        """The demonstrations that ship for a task; DemonstrationError lists those that do."""
        return cls.from_draft(formats.read(packaged_path(task)), task)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an HDF5 file (.h5 or .hdf5), replacing any; DemonstrationError if that fails.

        A reader sees the old file or the new one, never a part: the bytes reach the disk under
        another name first.
        """
        path = Path(path)
        if path.suffix.lower() not in (".h5", ".hdf5"):
            raise DemonstrationError(f"{path}: demonstrations are saved as .h5 or .hdf5")
        payload = native.encode(self.task, self.episodes, self.provenance)
        try:
            write_atomically(path, payload)
        except OSError as error:
            raise DemonstrationError(f"{path}: cannot be written: {error.strerror}") from error


def packaged_tasks() -> list[str]:
    """Names of the tasks whose demonstrations ship with the package."""
    return sorted(path.stem for path in _DATA.glob("*.h5"))


def packaged_path(task: str) -> Path:
    """The file that ships for a task; DemonstrationError lists those that do."""
    if task not in packaged_tasks():
        shipped = ", ".join(packaged_tasks())
        raise DemonstrationError(
            f"no demonstrations ship for {task!r}; they do for {shipped}. Give a file with "
            "demos.path=FILE, which iqmpc demos make makes"
        )
    return _DATA / f"{task}.h5"


def _episode(fields: Mapping[str, Any]) -> Episode:
    """The episode of checked fields, NumPy's truth values as Python's."""
    plain: dict[str, Any] = {
        key: bool(value) if isinstance(value, np.bool_) else value for key, value in fields.items()
    }
    return Episode(**plain)


def _check(draft: Draft | Defect, **expected: Any) -> None:
    defects = list(find_defects(draft, **expected))
    if defects:
        raise DemonstrationError.of(defects)
