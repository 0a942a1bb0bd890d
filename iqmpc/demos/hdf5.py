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
from iqmpc.demos.types import Defect, Draft, Episode

FORMAT = "iqmpc-demonstrations"
VERSION = 1
# Most episodes are one chunk, which compresses best; a very long one stays readable in parts.
_CHUNK_ROWS = 1024


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
                    group.create_dataset(
                        key,
                        data=values,
                        chunks=(min(len(values), _CHUNK_ROWS), *values.shape[1:]),
                        compression="gzip",
                        compression_opts=9,
                        shuffle=True,
                        fletcher32=True,
                    )
    return buffer.getvalue()


def read(path: Path) -> Draft | Defect:
    """Read a file for the checks; a Defect when it is no readable file of this format."""
    at = partial(Defect, str(path))
    try:
        if not h5py.is_hdf5(path):
            return at("", "no HDF5 signature", "an HDF5 file")
        with h5py.File(path, "r") as file:
            return _read(file, at)
    # h5py has no exception of its own: damaged structures surface as any of these.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        return at("", f"a truncated or corrupt file ({error})", "a complete HDF5 file")


def _read(file: h5py.File, at: partial[Defect]) -> Draft | Defect:
    kind, version = _text(file, "format"), file.attrs.get("version")
    if not isinstance(kind, str) or kind != FORMAT:
        return at("format", describe(kind), f"{FORMAT!r}; other HDF5 layouts are not read")
    if not isinstance(version, np.integer) or version < 1:
        return at("version", describe(version), "a whole number from 1")
    if version > VERSION:
        return at("version", str(version), f"at most {VERSION}; upgrade iqmpc to read this file")

    provenance = _text(file, "provenance")
    try:
        provenance = {} if provenance is None else json.loads(provenance)
    except (ValueError, TypeError):
        provenance = at("provenance", describe(provenance), "a JSON object")

    episodes: list[dict[str, object] | Defect] = []
    group = _stored(file, "episodes", h5py.Group, at)
    if isinstance(group, h5py.Group):
        for index in range(len(group)):
            episodes.append(_read_episode(group, index, partial(at, episode=index)))
    elif group is not None:
        episodes.append(group)
    return Draft(file.filename, _text(file, "task"), episodes, provenance)


def _text(file: h5py.File, key: str) -> object:
    """A root attribute, decoded if it is text of fixed length."""
    value = file.attrs.get(key)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _read_episode(group: h5py.Group, index: int, at: partial[Defect]) -> dict[str, object] | Defect:
    name = f"{index:06d}"
    episode = _stored(group, name, h5py.Group, at)
    if not isinstance(episode, h5py.Group):
        return episode or at(name, "nothing", "a group for every episode, numbered from 000000")
    fields: dict[str, object] = {}
    for key in ("observations", "actions", "rewards"):
        dataset = _stored(episode, key, h5py.Dataset, at)
        try:
            fields[key] = dataset[()] if isinstance(dataset, h5py.Dataset) else dataset
        except (OSError, MemoryError) as error:
            fields[key] = at(key, f"unreadable data ({error})", "an intact dataset")
    for key in ("terminated", "success"):
        fields[key] = episode.attrs.get(key)
    return fields


def _stored(
    group: h5py.Group, name: str, kind: type[h5py.HLObject], at: partial[Defect]
) -> h5py.HLObject | Defect | None:
    """A member that lies in this file; None where there is none.

    Links and datasets with outside storage are refused: a file from a stranger must not make
    its reader open another.
    """
    link = group.get(name, getlink=True)
    if link is None:
        return None
    found = group[name] if isinstance(link, h5py.HardLink) else link
    if not isinstance(found, kind):
        return at(name, f"a {type(found).__name__}", f"a {kind.__name__}")
    if kind is h5py.Dataset and (found.is_virtual or found.external):
        return at(name, "data kept in another file", "data in this file")
    return found
