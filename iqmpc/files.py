"""Writing files whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
# What file systems say that have no hard links, or whose folders cannot be synchronised.
_UNSUPPORTED = {
    errno.EPERM,
    errno.EACCES,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EMLINK,
    errno.EBADF,
    errno.EISDIR,
    errno.EXDEV,
}


def write_atomically(path: Path, data: bytes, *, exclusive: bool = False) -> None:
    """Put `data` at `path`: temporary file, fsync, rename, fsync of the folder.

    A reader sees the old file or the new one, never a part, and a failed write leaves nothing
    behind. With `exclusive` an existing file is not replaced but raises `FileExistsError`, also
    when two processes try at once. Raises `OSError` that names `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with naming(path):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if exclusive:
                _link(temporary, path)
            else:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _synchronise(path.parent)


def strict_json(values: Mapping[str, Any]) -> str:
    """Strict JSON, in which a number that is not finite is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(values), indent=2, allow_nan=False)


def remove_temporary(folder: Path) -> None:
    """Remove what writes that were killed have left in a folder. Nobody may be writing there."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an `OSError` from inside, which may name a temporary file, or none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _link(temporary: Path, path: Path) -> None:
    """Give the file its name unless that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        open(path, "xb").close()  # claims the name, without hard links
        os.replace(temporary, path)


def _synchronise(folder: Path) -> None:
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
