"""Reader for D4RL's HDF5 files: all steps end to end, in flat arrays."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np

from iqmpc.demos.formats import safe_hdf5
from iqmpc.demos.formats.assembly import Assembly
from iqmpc.demos.types import Defect, Draft, Facts


def read(path: Path, facts: Facts) -> Draft | Defect:
    """Read a file for the checks; a Defect when it is no readable HDF5 file.

    An episode ends where `terminals` or `timeouts` is true, or with the file. Without `timeouts`,
    facts.episode_length says where the time limits were.
    """
    return safe_hdf5.read_file(
        path, partial(Defect, str(path)), partial(_read, path=path, facts=facts)
    )


def _read(file: h5py.File, path: Path, facts: Facts) -> Draft | Defect:
    assembly = Assembly("d4rl", path, facts)
    terminals, ends = _ends(file, facts.episode_length, assembly)
    at = assembly.at
    columns = [
        safe_hdf5.rows(file, "observations", at, state=True),
        safe_hdf5.rows(file, "next_observations", at, state=True),
        safe_hdf5.rows(file, "actions", at),
        safe_hdf5.rows(file, "rewards", at),
    ]
    for start, stop in pairwise([0, *ends]):
        if assembly.full:
            break
        observations, following, actions, rewards = (
            column.take(start, stop) if isinstance(column, safe_hdf5.Rows) else column
            for column in columns
        )
        if isinstance(observations, np.ndarray) and isinstance(following, np.ndarray):
            following = _continued(observations, following, assembly.here())
        assembly.add(
            observations,
            actions,
            rewards=rewards,
            terminated=bool(terminals[stop - 1]),
            next_observations=following,
        )
    return assembly.draft(facts.task)


def _ends(file: h5py.File, length: int | None, assembly: Assembly) -> tuple[np.ndarray, list[int]]:
    """(terminals, where each episode stops: the index after its last step).

    Where that cannot be told there are no ends, and the assembly has the defects.
    """
    at = assembly.at
    terminals = safe_hdf5.flags(file, "terminals", at)
    if not isinstance(terminals, np.ndarray):
        assembly.add_defect(terminals or at("terminals", "nothing", "true or false per step"))
        return np.zeros(0, bool), []
    steps, defects = len(terminals), []
    for key in ("observations", "actions", "rewards", "next_observations", "timeouts"):
        dataset = safe_hdf5.stored(file, key, h5py.Dataset, at)
        if isinstance(dataset, Defect):
            defects.append(dataset)
        elif dataset is not None and dataset.shape[:1] != (steps,):
            shape = f"shape {list(dataset.shape)}"
            defects.append(at(key, shape, f"{steps} rows, as terminals"))
    timeouts = safe_hdf5.flags(file, "timeouts", at)
    if timeouts is None and length is None:
        expected = "true at time limits; give --episode-length instead"
        defects.append(at("timeouts", "nothing", expected))
    elif isinstance(timeouts, Defect):
        defects.append(timeouts)
    for defect in defects:
        assembly.add_defect(defect)
    if defects:
        return terminals, []
    over = terminals.copy() if timeouts is None else terminals | timeouts
    if length is not None:
        start = 0
        for stop in [*(np.flatnonzero(over) + 1).tolist(), steps]:
            over[np.arange(start + length, stop, length) - 1] = True
            start = stop
    return terminals, sorted({*(np.flatnonzero(over) + 1).tolist(), steps} - {0})


def _continued(
    observations: np.ndarray, following: np.ndarray, at: partial[Defect]
) -> np.ndarray | Defect:
    """next_observations, if inside the episode they are the observations of the next step."""
    if following.shape == observations.shape:
        after, before = following[:-1], observations[1:]
        other = ((after != before) & ~(np.isnan(after) & np.isnan(before))).any(axis=1)
        if other.any():
            step = int(np.argmax(other))
            return at(
                "next_observations",
                f"another state than observations has one step later, at [{step}]",
                "episodes without gaps; give --episode-length where time limits are not marked",
            )
    return following
