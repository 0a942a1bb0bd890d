"""How many threads iqmpc's own C++ code works on.

It has a pool of its own, apart from torch's: where planning and updates are both the C++ library's,
torch needs one thread alone, and its idle ones would only be in the way.
"""

from __future__ import annotations

import torch

_threads: int | None = None


def set_threads(count: int | None) -> None:
    """Let what is made from now on use `count` threads; None: as many as torch does."""
    global _threads
    _threads = count


def threads() -> int:
    """Threads for a plan or an update made now."""
    return _threads or torch.get_num_threads()
