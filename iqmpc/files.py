"""Writing files whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, data: bytes, *, exclusive: bool = False) -> None:
    """Put `data` at `path`: temporary file, fsync, rename, fsync of the folder.

    A reader sees the old file or the new one, never a part, and a failed write leaves nothing
    behind. With `exclusive` an existing file is not replaced but raises `FileExistsError`, also
    when two processes try at once.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
