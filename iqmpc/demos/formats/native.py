"""The project's own demonstration format; docs/demonstrations.md describes it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from iqmpc.demos.checks import describe
from iqmpc.demos.formats import budget, safe_hdf5
from iqmpc.demos.types import Defect, Draft, Facts
from iqmpc.episode import Episode

FORMAT = "iqmpc-demonstrations"
VERSION = 1
# Most episodes are one chunk, which compresses best; a very long one stays readable in parts, and
# so do frames.
_CHUNK_ROWS, _CHUNK_BYTES = 1024, 2**20


def encode(task: str, episodes: Sequence[Episode], provenance: Mapping[str, str]) -> bytes:
    """A checked set as the bytes of an HDF5 file; the same set always gives the same bytes."""
    buffer = io.BytesIO()
    # Every part of the file carries a checksum, so that damage is found instead of learned from:
    # data through fletcher32, structures since HDF5 1.10, text only where its length is fixed
    # (np.bytes_), as the heap for the other kind has none and can hang the HDF5 library.
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        file.attrs["format"] = np.bytes_(FORMAT.encode())
        file.attrs["version"] = VERSION
        file.attrs["task"] = np.bytes_(task.encode())
        file.attrs["provenance"] = np.bytes_(json.dumps(dict(provenance)).encode())
        for index, episode in enumerate(episodes):
            group = file.create_group(f"episodes/{index:06d}")
            group.attrs["terminated"] = episode.terminated
            if episode.success is not None:
                group.attrs["success"] = episode.success
            for key in ("observations", "actions", "rewards"):
                values = getattr(episode, key)
                if values is not None:
                    rows = max(1, min(len(values), _CHUNK_ROWS, _CHUNK_BYTES // values[0].nbytes))
                    group.create_dataset(
                        key,
                        data=values,
                        chunks=(rows, *values.shape[1:]),
                        compression="gzip",
                        compression_opts=9,
                        shuffle=True,
                        fletcher32=True,
                    )
    return buffer.getvalue()


def read(path: Path, facts: Facts) -> Draft | Defect:
    """Read a file for the checks; a Defect when it is no readable file of this format."""
    at = partial(Defect, str(path))
    return safe_hdf5.read_file(path, at, partial(_read, at=at, wanted=facts.episodes))


def _read(file: h5py.File, at: partial[Defect], wanted: int | None) -> Draft | Defect:
    kind, version = safe_hdf5.text(file, "format"), file.attrs.get("version")
    if not isinstance(kind, str) or kind != FORMAT:
        return at(
            "format",
            describe(kind),
            f"{FORMAT!r}, or the layout of Minari, D4RL, robomimic or ManiSkill",
        )
    if not isinstance(version, np.integer) or version < 1:
        return at("version", describe(version), "a whole number from 1")
    if version > VERSION:
        return at("version", str(version), f"at most {VERSION}; upgrade iqmpc to read this file")

    provenance = safe_hdf5.text(file, "provenance")
    try:
        provenance = {} if provenance is None else json.loads(provenance)
    except (ValueError, TypeError, RecursionError):
        provenance = at("provenance", describe(provenance), "a JSON object")

    episodes: list[dict[str, object] | Defect] = []
    group = safe_hdf5.stored(file, "episodes", h5py.Group, at)
    if isinstance(group, h5py.Group):
        for index in range(len(group) if wanted is None else min(wanted, len(group))):
            budget.spend_episode()
            episodes.append(_read_episode(group, index, partial(at, episode=index)))
    elif group is not None:
        episodes.append(group)
    return Draft(file.filename, safe_hdf5.text(file, "task"), episodes, provenance)


def _read_episode(group: h5py.Group, index: int, at: partial[Defect]) -> dict[str, object] | Defect:
    name = f"{index:06d}"
    episode = safe_hdf5.stored(group, name, h5py.Group, at)
    if not isinstance(episode, h5py.Group):
        return episode or at(name, "nothing", "a group for every episode, numbered from 000000")
    fields: dict[str, object] = {}
    for key in ("observations", "actions", "rewards"):
        dataset = safe_hdf5.stored(episode, key, h5py.Dataset, at)
        found = isinstance(dataset, h5py.Dataset)
        fields[key] = safe_hdf5.values(dataset, partial(at, key)) if found else dataset
    for key in ("terminated", "success"):
        fields[key] = episode.attrs.get(key)
    return fields
