"""What a demonstration set is made of, and how its defects are described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iqmpc.errors import IqmpcError

MAX_LISTED = 5
_LONGEST = 300  # characters of what a file says of itself


@dataclass(frozen=True)
class Defect:
    """One thing wrong with a set: where it is, what was found there and what was expected.

    key is a dataset, attribute or archive member; "" means the file as a whole. episode counts
    from 0; None means the set as a whole.
    """

    source: str
    key: str
    found: str
    expected: str
    episode: int | None = None

    def __str__(self) -> str:
        episode = "" if self.episode is None else f"episode {self.episode}"
        place = ", ".join(filter(None, [self.source, episode, _cut(self.key)]))
        return f"{place}: found {_cut(self.found)}, expected {_cut(self.expected)}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@dataclass(frozen=True)
class Facts:
    """What the user says of a file because its format does not.

    task: the task's name, where the file gives none.
    obs_keys: which members of a dictionary of observations, in this order; None takes all of them
        in sorted order.
    action_low, action_high: the range of the file's actions, one value or A; they are rescaled
        from it to [-1, 1]. Both or neither.
    episode_length: T of every episode, where the file marks no time limits.
    task_obs_keys: the task's, which stand for obs_keys in formats that have use for them.
    mask: the name of the subset to take.
    clip_actions: actions beyond [-1, 1] become -1 or 1, as their simulator acted on them.
    episodes: read only the first so many, or all where there are fewer.
    action_key: what a LeRobot dataset calls its actions; None means "action".
    allow_gaps: of a LeRobot dataset, take the episodes that are there where numbers are missing.
    """

    task: str | None = None
    obs_keys: tuple[str, ...] | None = None
    action_low: tuple[float, ...] | None = None
    action_high: tuple[float, ...] | None = None
    episode_length: int | None = None
    mask: str | None = None
    clip_actions: bool = False
    episodes: int | None = None
    action_key: str | None = None
    allow_gaps: bool = False
    task_obs_keys: tuple[str, ...] | None = None


@dataclass
class Draft:
    """A set as a reader found it, before any check.

    Anything that could not be read is replaced by the Defect that says why, so that the checks
    can report it together with everything else. Episodes map Episode's field names to values;
    an absent value is None. action_range is (low, high), each [1] or [A], where the file has a
    specification of its actions; range_hint says what to do about actions outside [-1, 1].
    """

    source: str
    task: Any
    episodes: Sequence[dict[str, Any] | Defect]
    provenance: Any
    action_range: tuple[np.ndarray, np.ndarray] | None = None
    range_hint: str = ""


class DemonstrationError(IqmpcError, ValueError):
    """A demonstration file or set that cannot be used; `defects` holds all that was found."""

    def __init__(self, message: str, defects: Sequence[Defect] = ()) -> None:
        super().__init__(message)
        self.defects = tuple(defects)

    @classmethod
    def of(cls, defects: Sequence[Defect]) -> DemonstrationError:
        """The error whose message lists the first defects and counts the rest."""
        lines = [str(defect) for defect in defects[:MAX_LISTED]]
        if len(defects) > MAX_LISTED:
            lines.append(f"... and {len(defects) - MAX_LISTED} more defects")
        return cls("\n".join(lines), defects)
