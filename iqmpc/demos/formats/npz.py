"""Reader for flat .npz recordings; docs/demonstrations.md describes the layout."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from iqmpc.demos.checks import describe
from iqmpc.demos.formats import budget
from iqmpc.demos.types import Defect, Draft, Facts

_OPTIONAL = ("rewards", "success")
# key: dtype, dimensions, what to say was expected
_LAYOUT = {
    "task": (np.str_, 0, "the task's name"),
    "episode_lengths": (np.integer, 1, "a whole number per episode"),
    "observations": (np.float32, 2, "float32 [sum of T+1, O]"),
    "actions": (np.float32, 2, "float32 [sum of T, A]"),
    "rewards": (np.float32, 1, "float32 [sum of T]"),
    "terminated": (np.bool_, 1, "true or false per episode"),
    "success": (np.floating, 1, "1, 0 or NaN per episode"),
}


def read(path: Path, facts: Facts) -> Draft | Defect:
    """Read an archive for the checks; a Defect when it is no readable archive. Never unpickles."""
    at = partial(Defect, str(path))
    if not zipfile.is_zipfile(path):
        return at("", "a truncated archive or another format", "a complete .npz archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            members = {key: _member(archive, key, at) for key in _LAYOUT}
    except budget.OverBudget:
        raise
    except Exception as error:  # zipfile, its compressions and numpy's headers have dozens
        return at("", f"a corrupt archive ({error})", "a complete .npz archive")
    task = members.pop("task")
    if isinstance(task, np.ndarray):
        task = str(task)
    return Draft(str(path), task, _episodes(members, at)[: facts.episodes], {})


def _member(archive: NpzFile, key: str, at: partial[Defect]) -> Any:
    """The array under a key; a Defect if it is unusable or missing, None if it may be missing."""
    dtype, ndim, expected = _LAYOUT[key]
    if key not in archive.files:
        return None if key in _OPTIONAL else at(key, "nothing", expected)
    try:
        budget.spend(_size(archive, key))
        value = archive[key]
    except budget.OverBudget:
        raise
    except Exception as error:
        pickled = "allow_pickle" in str(error)
        found = "pickled Python objects, which are never loaded" if pickled else f"damage ({error})"
        return at(key, found, expected)
    # zipfile members that are no arrays come back as bytes.
    fits = isinstance(value, np.ndarray) and value.ndim == ndim
    if not fits or not np.issubdtype(value.dtype, dtype):
        return at(key, describe(value), expected)
    return value


def _size(archive: NpzFile, key: str) -> int:
    """The bytes that a member unpacks to, as the archive says (zipfile reads no more)."""
    names = {info.filename.removesuffix(".npy"): info.file_size for info in archive.zip.infolist()}
    return names.get(key, 0)


def _episodes(members: dict[str, Any], at: partial[Defect]) -> Sequence[dict[str, Any] | Defect]:
    lengths = members.pop("episode_lengths")
    if isinstance(lengths, np.ndarray) and (lengths < 0).any():
        lengths = at("episode_lengths", str(lengths.min()), "no negative lengths")
    if isinstance(lengths, Defect):
        return [lengths, *(value for value in members.values() if isinstance(value, Defect))]

    for _ in lengths:
        budget.spend_episode()
    steps = lengths.tolist()
    rows = {"observations": [t + 1 for t in steps], "actions": steps, "rewards": steps}
    episodes: list[dict[str, Any]] = [{} for _ in steps]
    for key, value in members.items():
        counts = rows.get(key, [1] * len(steps))
        ends = list(accumulate(counts, initial=0))
        if isinstance(value, np.ndarray) and len(value) != ends[-1]:
            value = at(key, f"{len(value)} rows", f"{ends[-1]} rows, as episode_lengths says")
        for index, episode in enumerate(episodes):
            part = value
            if isinstance(value, np.ndarray):
                part = value[ends[index] : ends[index + 1]]
                if key == "terminated":
                    part = bool(part[0])
                elif key == "success":
                    part = _success(part[0], partial(at, episode=index))
            episode[key] = part
    return episodes


def _success(value: np.floating, at: partial[Defect]) -> bool | Defect | None:
    if np.isnan(value):
        return None
    return bool(value) if value in (0, 1) else at("success", str(value), "1, 0 or NaN")
