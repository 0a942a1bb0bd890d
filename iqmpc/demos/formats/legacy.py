"""Pickles of older imitation-learning code, read without running anything in them.

A pickle is a program for a small machine that can call any function of any module. Here that
machine is given stand-ins for the few functions by which NumPy arrays are pickled, and nothing
else: none of NumPy's own run, so that dtype and shape are checked before an array exists.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from iqmpc.demos.formats import budget as shared
from iqmpc.demos.formats.assembly import Assembly
from iqmpc.demos.types import Defect, DemonstrationError, Draft, Facts

_SYNONYMS = {
    "observations": ("observations", "states", "obs"),
    "actions": ("actions", "acts"),
    "next_observations": ("next_observations", "next_states", "next_obs"),
    "rewards": ("rewards", "rews"),
    "terminals": ("terminals", "terminations", "terminated"),
    "lengths": ("lengths",),
}
_EXPECTED = (
    "a dict of lists (states, actions, rewards, lengths, …), a list of such dicts, or a list of "
    "(observations, actions, rewards) tuples"
)
# Opcodes that make objects other than plain containers, and need no name to do it.
_REFUSED_OPCODES = {
    "PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX",
    "NEXT_BUFFER", "DUP",
}  # fmt: skip
# After one of these, what is remembered is no tuple. Tuples in tuples in tuples, each twice, take a
# time to hash that doubles with each, so they may be referred to again only so many times.
_NO_TUPLE = {
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "LIST", "EMPTY_LIST",
    "DICT", "EMPTY_DICT", "EMPTY_SET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "FLOAT", "BINFLOAT",
    "LONG", "LONG1", "LONG4",
}  # fmt: skip
_MAX_TUPLE_REFERENCES = 16
# A list of numbers takes at least 2 bytes of a pickle each, and 4 as float32; a repeated
# reference to one large array must not become many copies.
_MAX_GROWTH, _FREE_BYTES = 16, 2**20


class _Refused(Exception):
    """What a pickle asks for and does not get."""


def read(path: Path, facts: Facts) -> Draft | Defect:
    """Read a pickle of arrays for the checks; a Defect for one that holds or does anything else.

    `dones` do not tell a terminal state from a time limit: `terminated` is true only where
    `terminals` (or `terminations`) say so. Raises DemonstrationError where it cannot be opened.
    """
    at = partial(Defect, str(path))
    try:
        shared.spend(path.stat().st_size)
        data = path.read_bytes()
    except OSError as error:
        raise DemonstrationError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        content = load(data)
        return _draft(content, path, facts, _Budget(_MAX_GROWTH * len(data) + _FREE_BYTES))
    except _Refused as error:
        return at("", str(error), "a pickle of NumPy arrays and plain containers alone")


def load(data: bytes) -> object:
    """The containers, numbers, text and `Array` stand-ins of a pickle; `_Refused` for others."""
    scan(data)
    try:
        return _Unpickler(data).load()
    except _Refused:
        raise
    except Exception as error:  # a wrong pickle fails anywhere in the machine
        raise _Refused(f"a damaged pickle ({type(error).__name__}: {error})"[:200]) from error


def scan(data: bytes, admitted: Collection[str] = ()) -> None:
    """Refuse what the machine would do without asking for a name, before it starts.

    `admitted` are opcodes that make objects of what `find_class` gives, for readers that have such.
    Each argument is within the file, as pickletools reads it; an index far beyond what the file
    could have stored would make the machine allocate a table up to it.
    """
    count, before, references = 0, "", 0
    tuples: dict[int, bool] = {}  # of each index of the memo, whether it may hold a tuple
    try:
        for opcode, argument, _ in pickletools.genops(data):
            count += 1
            name = opcode.name
            if name in _REFUSED_OPCODES and name not in admitted:
                raise _Refused(f"the opcode {name}")
            if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                index = len(tuples) if argument is None else argument
                if not 0 <= index <= count:
                    raise _Refused(f"a memo of {index} entries in {count} steps")
                tuples[index] = tuples.get(index, False) or before not in _NO_TUPLE
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                references += tuples.get(int(argument or 0), True)
                if references > _MAX_TUPLE_REFERENCES:
                    raise _Refused("references that repeat its data many times over")
            before = name
    except _Refused:
        raise
    except Exception as error:  # pickletools has no error of its own
        raise _Refused(f"a truncated or damaged pickle ({error})"[:200]) from error


class Array:
    """Stands for an array while it is unpickled."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value

    def __setstate__(self, state: object) -> None:
        _, shape, dtype, fortran, raw = _items(state, 5)
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        self.value = _from_bytes(raw, dtype, shape, "F" if fortran else "C")


class _Dtype:
    """Stands for a dtype of plain numbers while it is unpickled."""

    __slots__ = ("value",)

    def __init__(self, name: object, *_: object) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?(b1|\?|[iu][1248]|f[248])", name):
            if name in ("O", "O8", "|O", "|O8"):
                raise _Refused("an array of Python objects")
            said = repr(name[:20]) if isinstance(name, str) else type(name).__name__
            raise _Refused(f"an array of dtype {said}")
        self.value = np.dtype(name)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise _Refused("a dtype's state that is none")
        if any(part is not None for part in state[2:5]):
            raise _Refused("a structured dtype")
        if self.value.itemsize > 1 and state[1] in "<>":
            self.value = self.value.newbyteorder(state[1])


class _Call:
    """A function that a pickle may call; it can be given no attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise _Refused("a change to a function")


def _items(value: object, count: int) -> tuple[object, ...]:
    if not isinstance(value, tuple) or len(value) != count:
        raise _Refused("an array's state that is none")
    return value


def _from_bytes(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise _Refused(f"an array of {type(raw).__name__}")
    sizes: tuple[Any, ...] = shape if isinstance(shape, tuple) else (shape,)
    if (
        len(sizes) > 8
        or not all(type(n) is int and n >= 0 for n in sizes)
        or order
        not in (
            "C",
            "F",
        )
    ):
        raise _Refused("an array's shape that is none")
    claimed = dtype.value.itemsize
    for n in sizes:  # in Python's whole numbers, which do not overflow
        claimed *= n
    if claimed != len(raw):
        raise _Refused(f"an array of {claimed} bytes with {len(raw)}")
    return np.frombuffer(raw, dtype.value).reshape(sizes, order="F" if order == "F" else "C")


def _reconstruct(kind: object, shape: object, code: object) -> Array:
    if kind is not _NDARRAY or shape != (0,):
        raise _Refused("an array that is none")
    return Array()


def _scalar(dtype: object, raw: object = b"") -> object:
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    return _from_bytes(raw, dtype, (), "C").item()


def _frombuffer(raw: object, dtype: object, shape: object, order: object, *_: object) -> Array:
    return Array(_from_bytes(raw, dtype, shape, order))


def _no_class(*_: object) -> object:
    raise _Refused("a call of numpy.ndarray")


_NDARRAY = _Call(_no_class)
# How arrays and numbers of NumPy are pickled.
ARRAYS: Mapping[tuple[str, str], _Call] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Call(_Dtype),
    **{
        (f"numpy.{core}.{module}", name): call
        for core in ("core", "_core")
        for module, name, call in (
            ("multiarray", "_reconstruct", _Call(_reconstruct)),
            ("multiarray", "scalar", _Call(_scalar)),
            ("numeric", "_frombuffer", _Call(_frombuffer)),
        )
    },
}
_ALLOWED: Mapping[tuple[str, str], _Call] = {
    **ARRAYS,
    ("collections", "defaultdict"): _Call(lambda *_: {}),
    ("builtins", "list"): _Call(lambda: []),  # what a defaultdict makes; nothing is copied with it
    ("__builtin__", "list"): _Call(lambda: []),
}


class _Budget:
    """How much may be made of a file in all."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def spend(self, count: int) -> None:
        self.left -= count
        shared.spend(count)
        if self.left < 0:
            raise _Refused("references that repeat its data many times over")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        # latin1: Python 2's way to keep bytes in text.
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._copied = _Budget(len(data))
        self._allowed = {
            **_ALLOWED,
            ("_codecs", "encode"): _Call(self._encode),
            ("collections", "OrderedDict"): _Call(self._ordered),
        }

    def find_class(self, module: str, name: str) -> _Call:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise _Refused(repr(f"{module}.{name}"[:80])) from None

    def _encode(self, text: object, encoding: object = "latin1") -> bytes:
        """How bytes are kept before protocol 3."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise _Refused("bytes in another encoding than latin1")
        self._copied.spend(len(text))
        return text.encode("latin1")

    def _ordered(self, items: object = ()) -> dict[object, object]:
        if not isinstance(items, (list, tuple)):
            raise _Refused("an OrderedDict of no list")
        self._copied.spend(len(items))
        return dict(items)


def _draft(content: object, path: Path, facts: Facts, budget: _Budget) -> Draft:
    assembly = Assembly("legacy pickle", path, facts)
    for trajectory in _trajectories(content, budget):
        fields = {key: _matrix(value, budget) for key, value in trajectory.items()}
        terminals = fields.pop("terminals", None)
        if "observations" not in fields or "actions" not in fields:
            raise _Refused(f"a trajectory with {', '.join(fields) or 'nothing'} alone")
        ended = terminals is not None and terminals.size > 0 and terminals.ravel()[-1] == 1
        assembly.add(**fields, terminated=bool(ended))
    return assembly.draft(facts.task)


def _trajectories(content: object, budget: _Budget) -> list[dict[str, object]]:
    """Each trajectory's fields under this project's names, not yet arrays."""
    if isinstance(content, dict):
        return _columns(_renamed(content), budget)
    if not isinstance(content, (list, tuple)) or not content:
        raise _Refused(f"a {_kind(content)} where there should be {_EXPECTED}")
    found = []
    for item in content:
        if isinstance(item, dict):
            fields = _renamed(item)
            fields.pop("lengths", None)
        elif isinstance(item, (list, tuple)) and 2 <= len(item) <= 3:
            fields = dict(zip(("observations", "actions", "rewards"), item, strict=False))
        else:
            raise _Refused(f"a list of {_kind(item)} where there should be {_EXPECTED}")
        found.append(fields)
    return found


def _renamed(fields: dict[object, object]) -> dict[str, object]:
    return {
        key: fields[name]
        for key, names in _SYNONYMS.items()
        for name in names
        if name in fields and fields[name] is not None
    }


def _columns(columns: dict[str, object], budget: _Budget) -> list[dict[str, object]]:
    """A dict of lists, or of arrays over all trajectories, as one dict a trajectory."""
    lengths = columns.pop("lengths", None)
    if "observations" not in columns or "actions" not in columns:
        held = ", ".join(columns) or "no known key"
        raise _Refused(f"a dict with {held} where there should be {_EXPECTED}")
    steps = None
    if lengths is not None:
        numbers = _matrix(lengths, budget).ravel()
        if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
            raise _Refused("lengths that are none")
        steps = numbers.astype(int).tolist()
    count = len(steps) if steps is not None else _count(columns["actions"])
    split = {}
    for key, column in columns.items():
        if isinstance(column, Array):
            column = column.value if column.value is not None else ()
        if not isinstance(column, (list, tuple, np.ndarray)):
            raise _Refused(f"{key} of {_kind(column)}")
        if len(column) != count and steps is not None:  # end to end
            column = _cut(column, steps, key)
        if len(column) != count:
            raise _Refused(f"{len(column)} {key} for {count} trajectories")
        split[key] = column
    found = [{key: column[i] for key, column in split.items()} for i in range(count)]
    if steps is not None:  # padded to the longest
        for fields, n in zip(found, steps, strict=True):
            rows = _count(fields["actions"])
            for key, value in fields.items():
                if _count(value) > n + 1 or (_count(value) > n and _count(value) == rows):
                    fields[key] = _first(value, n)
    return found


def _cut(column: Sequence[object] | np.ndarray, steps: list[int], key: str) -> list[object]:
    if len(column) != sum(steps):
        raise _Refused(f"{len(column)} {key} where lengths add up to {sum(steps)}")
    ends = np.cumsum([0, *steps]).tolist()
    return [column[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _first(value: Any, n: int) -> Any:
    held: Any = value.value if isinstance(value, Array) else value
    return held[:n]


def _count(value: object) -> int:
    value = value.value if isinstance(value, Array) else value
    if not isinstance(value, (list, tuple, np.ndarray)) or (
        isinstance(value, np.ndarray) and not value.ndim
    ):
        raise _Refused(f"a {_kind(value)} where there should be a list or an array")
    return len(value)


def _matrix(value: object, budget: _Budget) -> np.ndarray:
    """An array, a list of arrays or a list of (lists of) numbers as float32."""
    if isinstance(value, Array):
        value = value.value
    if isinstance(value, np.ndarray):
        if value.ndim < 1:
            raise _Refused("a single number where there should be an array")
        budget.spend(4 * value.size)
        with np.errstate(over="ignore"):  # becomes inf, which the checks find
            return value.astype(np.float32)
    if not isinstance(value, (list, tuple)):
        raise _Refused(f"a {_kind(value)} where there should be a list or an array")
    if value and all(type(x) in (int, float, bool) for x in value):
        return _row(value, budget)  # at once: one by one each is an array
    rows = [_row(item, budget) for item in value]
    if len({row.shape for row in rows}) > 1:
        raise _Refused("rows of different lengths")
    return np.stack(rows) if rows else np.zeros(0, np.float32)


def _row(item: object, budget: _Budget) -> np.ndarray:
    if isinstance(item, Array):
        item = item.value
    if isinstance(item, np.ndarray):
        budget.spend(4 * item.size + 16)
        with np.errstate(over="ignore"):
            return item.astype(np.float32)
    numbers = item if isinstance(item, (list, tuple)) else [item]
    budget.spend(4 * len(numbers) + 16)
    if not all(type(x) in (int, float, bool) for x in numbers):
        raise _Refused("a list of other things than numbers")
    try:
        with np.errstate(over="ignore"):
            row = np.array(numbers, np.float64).astype(np.float32)
    except OverflowError:
        raise _Refused("a number beyond all floats") from None
    return row if isinstance(item, (list, tuple)) else row[0]


def _kind(value: object) -> str:
    return "array" if isinstance(value, Array) else type(value).__name__
