"""A seeded engine of damage: what storage, transfer, other programs and ill will do to a file.

A file is `Files`: relative names and their bytes, the first of which is what a reader is given.
Everything follows from the `random.Random` that is handed in.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

Files = dict[str, bytes]
Reshape = Callable[[bytes, random.Random], bytes]

_INTEGERS = (
    0, 1, 2, 7, 8, 127, 128, 255, 256, 1023, 4096, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**33,
    2**53, 2**63 - 1, 2**64 - 1, -1, -2, -(2**31), -(2**63),
)  # fmt: skip
_FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e30,
    -1e30,
    3.5e38,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
)
_TEXTS = ("", " ", "\x00", "\x1b[2J", "a" * 5000, "null", "../outside/canary.h5", "é", "\ud800",
          "1e999", "9" * 400, "walker-walk", "NaN", "[" * 50,
          "${oc.env:HOME}", "{x}", "%s")  # fmt: skip


def bytes_changed(data: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """A few changes somewhere in a row of bytes; mostly one, sometimes many."""
    changed = bytearray(data)
    for _ in range(_few(rng)):
        changed = rng.choice(_CHANGES)(changed, rng, others)
    return bytes(changed)


def _few(rng: random.Random) -> int:
    count = 1
    while count < 40 and rng.random() < 0.45:
        count += 1
    return count


def _span(size: int, rng: random.Random) -> tuple[int, int]:
    first = rng.randrange(size + 1)
    longest = size - first
    length = min(longest, rng.choice((1, 2, 4, 8, 16, 64, 256, max(1, size // 3))))
    return first, first + rng.randint(0, length)


def _flip(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _byte(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return data


def _number(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    """Another whole number, or float, over what lies there."""
    order = rng.choice("<>")
    if rng.random() < 0.2:
        raw = struct.pack(order + "d", rng.choice(_FLOATS))
        if rng.random() < 0.5:
            raw = struct.pack(order + "f", rng.choice(_FLOATS[:6] + _FLOATS[8:]))
    else:
        size, code = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
        raw = struct.pack(order + code, rng.choice(_INTEGERS) % 2 ** (8 * size))
    first = rng.randrange(len(data) + 1)
    data[first : first + len(raw)] = raw
    return data


def _cut(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    first, last = _span(len(data), rng)
    del data[first:last]
    return data


def _end(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    return data[: rng.randrange(len(data) + 1)]


def _repeat(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    first, last = _span(len(data), rng)
    data[first:first] = data[first:last] * rng.choice((1, 1, 2, 16))
    return data


def _blank(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    first, last = _span(len(data), rng)
    data[first:last] = bytes([rng.choice((0, 0xFF))]) * (last - first)
    return data


def _noise(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    first, last = _span(len(data), rng)
    data[first:last] = rng.randbytes(last - first)
    return data


def _move(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    first, last = _span(len(data), rng)
    taken = data[first:last]
    del data[first:last]
    to = rng.randrange(len(data) + 1)
    data[to:to] = taken
    return data


def _splice(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    """The end of another file, or a part of it, in the place of one's own."""
    if not others:
        return data
    other = rng.choice(others)
    first, last = _span(len(other), rng)
    to = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        return data[:to] + other[first:]
    data[to : to + last - first] = other[first:last]
    return data


def _append(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytearray:
    return data + rng.randbytes(rng.choice((1, 7, 100)))


_CHANGES = (
    _flip, _flip, _byte, _byte, _number, _number, _number, _cut, _end, _repeat, _blank, _noise,
    _move, _splice, _append,
)  # fmt: skip


def text_changed(data: bytes, rng: random.Random) -> bytes:
    """Words, numbers and lines of a text moved, repeated and replaced."""
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    for _ in range(_few(rng)):
        index = rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            lines.insert(rng.randrange(len(lines) + 1), lines[index])
        elif kind == 1 and len(lines) > 1:
            del lines[index]
        elif kind == 2:
            lines[index] = lines[rng.randrange(len(lines))]
        else:
            cut = rng.choice((",", ":", " ", "=", "."))
            words = lines[index].split(cut)
            words[rng.randrange(len(words))] = str(
                rng.choice(
                    (*_INTEGERS, *_FLOATS, *_TEXTS, "&a", "*a", "!!python/name:os.system", "- 1")
                )
            )
            lines[index] = cut.join(words)
    text = "\n".join(lines)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def json_changed(data: bytes, rng: random.Random) -> bytes:
    """A JSON text with other values, keys and shapes in places."""
    value = json.loads(data)
    for _ in range(_few(rng)):
        value = tree_changed(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.02:  # deeper than a parser's stack
        text = "[" * 100_000 + text
    return text.encode("utf-8", "surrogatepass")


def tree_changed(value: Any, rng: random.Random) -> Any:
    """A value of JSON with one part replaced, removed, renamed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed, kind = dict(value), rng.randrange(10)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[str(rng.choice(_TEXTS))] = changed.pop(key)
        elif kind == 2:
            changed[key] = changed[rng.choice(list(value))]
        else:
            changed[key] = tree_changed(changed[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        changed, index = list(value), rng.randrange(len(value))
        kind = rng.randrange(6)
        if kind == 0:
            del changed[index]
        elif kind == 1:
            changed *= 2
        else:
            changed[index] = tree_changed(changed[index], rng)
        return changed
    if isinstance(value, str) and value and rng.random() < 0.4:
        raw = bytes_changed(value.encode("utf-8", "surrogatepass"), rng)
        return raw.decode("utf-8", "replace")
    return rng.choice(
        (
            None,
            True,
            False,
            *_INTEGERS,
            *_FLOATS,
            10**30,
            *_TEXTS,
            [],
            {},
            [[]],
            [1, 2],
            {"a": 1},
            [value],
            {"a": value},
        )  # fmt: skip
    )


def zip_changed(data: bytes, rng: random.Random, member: Reshape) -> bytes:
    """A sound zip whose members are damaged, renamed, missing, repeated or compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError):
        return bytes_changed(data, rng)
    for _ in range(_few(rng)):
        if not members:
            break
        index = rng.randrange(len(members))
        name, content = members[index]
        kind = rng.randrange(12)
        if kind == 0:
            del members[index]
        elif kind == 1:
            members[index] = rng.choice(("../evil", "/abs", "a" * 300, name + "x", "x")), content
        elif kind == 2:
            members.append((name, content))
        else:
            members[index] = name, member(content, rng)
    buffer = io.BytesIO()
    how = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def npy_changed(data: bytes, rng: random.Random) -> bytes:
    """An .npy file with another header: dtype, shape or order."""
    if rng.random() < 0.4 or not data.startswith(b"\x93NUMPY\x01"):
        return bytes_changed(data, rng)
    size = struct.unpack("<H", data[8:10])[0]
    header, body = data[10 : 10 + size].decode("latin1"), data[10 + size :]
    for found, others in (
        (
            "'<f4'",
            ("'<f8'", "'|O'", "'<U9'", "'>f4'", "'<i8'", "'V4'", "'<f2'", "'M8[s]'", "'<c8'"),
        ),
        ("(", ("(0, ", "(-1, ", "(1000000000, ", "(2, 3, ", "(" * 60)),
        (")", (", 1)", ", 10**9)", "", ", 5)")),
        ("False", ("True", "None", "1")),
    ):
        if rng.random() < 0.4:
            header = header.replace(found, rng.choice(others), 1)
    raw = header.encode("latin1")
    return data[:8] + struct.pack("<H", len(raw)) + raw + body
