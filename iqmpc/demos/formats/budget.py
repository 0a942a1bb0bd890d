"""How much may be made of a file from a stranger: bytes and episodes against its size, in time.

A few kilobytes can claim gigabytes: by compression, by links to the same data, by rows that are
only counted. Every reader spends what it is about to make from the budget of the file at hand.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

# Of real recordings all data shrink less than a hundredfold, though parts may more.
_FREE_BYTES, _RATIO = 2**27, 100
_EPISODE_BYTES = 512  # what the bookkeeping of one takes
_FREE_S, _S_PER_BYTE = 60.0, 1e-6


class OverBudget(Exception):
    """A file asks for more than its size allows; says what was found."""


class Budget:
    """What is left for a file or folder of `size` bytes."""

    def __init__(self, size: int):
        self.size = size
        self.limit = self._left = _FREE_BYTES + _RATIO * size
        self.limit_s = _FREE_S + _S_PER_BYTE * size
        self._started = time.monotonic()

    def spend(self, count: int) -> None:
        """Before `count` bytes are made; raises `OverBudget` where that is too much or too late."""
        self._left -= count
        if self._left < 0:
            raise OverBudget(f"over {self.limit} bytes of data in {self.size} bytes")
        if time.monotonic() - self._started > self.limit_s:
            raise OverBudget(f"no end of reading after {self.limit_s:.0f} s")


_current: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextlib.contextmanager
def of(path: Path) -> Iterator[Budget]:
    """The budget of a file or folder, for everything that is read inside."""
    budget = Budget(size_of(path))
    token = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(token)


def spend(count: int) -> None:
    """Spend bytes from the budget of the file that is being read, if it has one."""
    budget = _current.get()
    if budget is not None:
        budget.spend(count)


def spend_episode() -> None:
    """Spend what one more episode takes."""
    spend(_EPISODE_BYTES)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 where there is none."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:
        return 0
