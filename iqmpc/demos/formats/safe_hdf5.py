"""Reading HDF5 files that come from strangers: damage is a Defect, and no other file is opened."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from iqmpc.demos.formats import budget
from iqmpc.demos.types import Defect, Draft

Kind = TypeVar("Kind", bound=h5py.HLObject)

# h5py has no exception of its own: damaged structures surface as any of these.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError)
# gzip, HDF5's strongest common filter, shrinks by at most 1032; small datasets may say anything.
MAX_RATIO, _FREE_BYTES = 1100, 2**24
_BLOCK_BYTES = 2**18
# A dictionary of observations: groups may be linked into themselves.
_MAX_DEPTH, _MAX_LEAVES = 6, 512


def read_file(
    path: Path, at: partial[Defect], read: Callable[[h5py.File], Draft | Defect]
) -> Draft | Defect:
    """What `read` makes of the open file; a Defect when it is no HDF5 file or a damaged one."""
    try:
        if not h5py.is_hdf5(path):
            return at("", "no HDF5 signature", "an HDF5 file")
        with h5py.File(path, "r") as file:
            return read(file)
    except DAMAGE as error:
        return at("", f"a truncated or corrupt file ({error})", "a complete HDF5 file")


def stored(
    group: h5py.Group,
    name: str,
    kind: type[Kind] | tuple[type[Kind], ...],
    at: partial[Defect],
) -> Kind | Defect | None:
    """A member that lies in this file; None where there is none.

    Links and datasets with outside storage are refused: a file from a stranger must not make
    its reader open another.
    """
    link = group.get(name, getlink=True)
    if link is None:
        return None
    found = group[name] if isinstance(link, h5py.HardLink) else link
    if not isinstance(found, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        return at(name, f"a {type(found).__name__}", f"a {' or '.join(k.__name__ for k in kinds)}")
    if isinstance(found, h5py.Dataset) and (found.is_virtual or found.external):
        return at(name, "data kept in another file", "data in this file")
    return found


def values(dataset: h5py.Dataset, at: partial[Defect], rows: slice | tuple = ()) -> Any:
    """A dataset's rows as they are stored, or the Defect for which they cannot be read.

    at: takes found and expected. What a file claims to hold is not believed beyond what its bytes
    can hold.
    """
    try:
        claimed, kept = dataset.nbytes, dataset.id.get_storage_size()
        if claimed > _FREE_BYTES + MAX_RATIO * kept:
            return at(f"{claimed} bytes of data claimed and {kept} stored", "an intact dataset")
        budget.spend(_bytes_of(dataset, rows))
        return dataset[rows]
    except DAMAGE as error:
        return at(f"unreadable data ({error})", "an intact dataset")


def _bytes_of(dataset: h5py.Dataset, rows: slice | tuple) -> int:
    """That its rows take, as they are stored or as float32."""
    count = dataset.size or 0
    if isinstance(rows, slice) and dataset.ndim:
        count = len(range(*rows.indices(len(dataset)))) * int(np.prod(dataset.shape[1:]))
    return count * max(dataset.dtype.itemsize, 4)


def numbers(
    group: h5py.Group, name: str, at: partial[Defect], rows: slice | tuple = ()
) -> np.ndarray | Defect | None:
    """The rows of a dataset of numbers as float32, of its own shape; None where there is none."""
    dataset = stored(group, name, h5py.Dataset, at)
    if not isinstance(dataset, h5py.Dataset):
        return dataset
    return floats(dataset, partial(at, name), rows)


def flags(
    group: h5py.Group, name: str, at: partial[Defect], rows: slice | tuple = ()
) -> np.ndarray | Defect | None:
    """The rows of a dataset of truth values (or of 1 and 0) as bool [T]; None where none is."""
    array = numbers(group, name, at, rows)
    if isinstance(array, np.ndarray):
        if not np.isin(array, (0, 1)).all():
            return at(name, "other numbers", "true or false, or 1 or 0, per step")
        return array.reshape(-1) == 1
    return array


def observations(
    group: h5py.Group,
    name: str,
    keys: tuple[str, ...] | None,
    at: partial[Defect],
    rows: slice | tuple = (),
    *,
    named: str = "--obs-keys",
) -> np.ndarray | Defect | None:
    """Observations float32 [rows, O], a dictionary's members side by side.

    keys: members such as "agent/qpos", in this order; None takes all in sorted order. named: what
    names the keys.
    """
    member = stored(group, name, (h5py.Group, h5py.Dataset), at)
    if isinstance(member, h5py.Dataset):
        if keys is not None:
            return at(name, "one array", f"a dictionary, from which {named} chooses")
        return _state(member, partial(at, name), rows)
    if not isinstance(member, h5py.Group):
        return member
    if keys is None:
        leaves = _leaves(member, name, at)
    else:
        leaves = _chosen(member, keys, name, at, named)
    if isinstance(leaves, Defect):
        return leaves
    parts = []
    for key, dataset in leaves:
        part = _state(dataset, partial(at, key), rows)
        if isinstance(part, Defect):
            return part
        if parts and len(part) != len(parts[0]):
            return at(key, f"{len(part)} rows", f"{len(parts[0])} rows, as {leaves[0][0]}")
        parts.append(part)
    return np.concatenate(parts, axis=1) if parts else at(name, "an empty group", "observations")


def numbered(group: h5py.Group, prefix: str) -> list[str]:
    """The members called prefix and a number, in the order of the numbers."""
    names = [name for name in map(str, group) if re.fullmatch(re.escape(prefix) + r"\d{1,9}", name)]
    return sorted(names, key=lambda name: int(name.removeprefix(prefix)))


def matrix(array: np.ndarray) -> np.ndarray:
    """[T, ...] as [T, the rest side by side]."""
    return array.reshape(len(array), int(np.prod(array.shape[1:])))


def text(group: h5py.HLObject, key: str) -> Any:
    """An attribute, decoded if it is text."""
    value = group.attrs.get(key)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def floats(
    dataset: h5py.Dataset, at: partial[Defect], rows: slice | tuple = ()
) -> np.ndarray | Defect:
    """As `numbers`, of a dataset at hand; at takes found and expected."""
    if dataset.dtype.kind not in "biuf" or dataset.ndim < 1:
        return at(f"dtype {dataset.dtype} of shape {list(dataset.shape)}", "numbers per step")
    array = values(dataset, at, rows)
    if isinstance(array, Defect):
        return array
    with np.errstate(over="ignore"):  # too large for float32 becomes inf, which the checks find
        return array.astype(np.float32)


class Rows:
    """A dataset of numbers whose rows are taken in order, some at a time.

    It is read in blocks of whole chunks, so that each chunk is unpacked once or twice: chunks do
    not end where episodes do. at: takes found and expected.
    """

    def __init__(self, dataset: h5py.Dataset, at: partial[Defect]) -> None:
        self._dataset, self._at = dataset, at
        width = max(1, int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize)
        self._chunk = dataset.chunks[0] if dataset.chunks else 1
        self._rows = max(1, _BLOCK_BYTES // width)
        self._first, self._block = 0, np.zeros(0, np.float32)

    def take(self, start: int, stop: int) -> np.ndarray | Defect:
        """Rows start to stop as float32, of the dataset's own shape."""
        if start < self._first or stop > self._first + len(self._block):
            first = start // self._chunk * self._chunk
            end = -(-max(stop, first + self._rows) // self._chunk) * self._chunk
            block = floats(self._dataset, self._at, slice(first, end))
            if isinstance(block, Defect):
                return block
            self._first, self._block = first, block
        return self._block[start - self._first : stop - self._first]


def rows(
    group: h5py.Group, name: str, at: partial[Defect], state: bool = False
) -> Rows | Defect | None:
    """A dataset of numbers, to be read in parts; None where there is none. state: no images."""
    dataset = stored(group, name, h5py.Dataset, at)
    if not isinstance(dataset, h5py.Dataset):
        return dataset
    if state and _is_image(dataset):
        return _no_state(dataset, partial(at, name))
    return Rows(dataset, partial(at, name))


def _state(dataset: h5py.Dataset, at: partial[Defect], rows: slice | tuple) -> np.ndarray | Defect:
    if _is_image(dataset):
        return _no_state(dataset, at)
    array = floats(dataset, at, rows)
    return array if isinstance(array, Defect) else matrix(array)


def _is_image(dataset: h5py.Dataset) -> bool:
    return dataset.ndim > 3 or (dataset.ndim == 3 and dataset.dtype == np.uint8)


def _no_state(dataset: h5py.Dataset, at: partial[Defect]) -> Defect:
    return at(f"images of shape {list(dataset.shape)}", "state values; choose with --obs-keys")


def _chosen(
    group: h5py.Group, keys: tuple[str, ...], name: str, at: partial[Defect], named: str
) -> list[tuple[str, h5py.Dataset]] | Defect:
    leaves = []
    for key in keys:
        found: object = group
        for part in key.split("/"):
            if not isinstance(found, h5py.Group):
                break
            found = stored(found, part, (h5py.Group, h5py.Dataset), at) if part else None
        if isinstance(found, Defect):
            return found
        if not isinstance(found, h5py.Dataset):
            held = ", ".join(sorted(group)[:20])
            return at(f"{name}/{key}", "nothing", f"what {named} names ({name} has {held})")
        leaves.append((f"{name}/{key}", found))
    return leaves


def _leaves(
    group: h5py.Group, name: str, at: partial[Defect]
) -> list[tuple[str, h5py.Dataset]] | Defect:
    leaves: list[tuple[str, h5py.Dataset]] = []
    waiting: list[tuple[str, h5py.Group | h5py.Dataset, int]] = [(name, group, 0)]
    while waiting:
        path, node, depth = waiting.pop()
        if isinstance(node, h5py.Dataset):
            leaves.append((path, node))
            continue
        if depth > _MAX_DEPTH or len(leaves) + len(waiting) + len(node) > _MAX_LEAVES:
            return at(path, "groups without end", f"at most {_MAX_LEAVES} members")
        for key in sorted(node, reverse=True):
            member = stored(node, key, (h5py.Group, h5py.Dataset), at)
            if not isinstance(member, (h5py.Group, h5py.Dataset)):
                return member or at(f"{path}/{key}", "nothing", "a group or a dataset")
            waiting.append((f"{path}/{key}", member, depth + 1))
    return leaves
