"""How many threads a run works on: those of iqmpc's own C++ code, and torch's.

The C++ library has a pool of its own, apart from torch's: where planning and updates are both its,
torch needs one thread alone, and its idle ones would only be in the way.
"""

from __future__ import annotations

import torch

from iqmpc.config import Config

_threads = 0  # 0: not set yet
_torchs = 0  # as they were set here
_default = 0  # as torch, or who uses it, had set them before


def set_threads(count: int | None, *, torch_idle: bool = False) -> None:
    """Let what is made from now on use `count` threads; None: as many as torch had at first.

    torch works on as many, or with `torch_idle` on one.
    """
    global _threads, _torchs, _default
    if torch.get_num_threads() != _torchs:
        _default = torch.get_num_threads()
    _threads = count or _default
    _torchs = 1 if torch_idle else _threads
    torch.set_num_threads(_torchs)


def threads() -> int:
    """Threads for a plan or an update made now."""
    return _threads or torch.get_num_threads()


def share_threads(config: Config) -> Config:
    """The settings with which an agent plans beside a learner: one thread of its own by default.

    The learner gets the others from now on, one at least.
    """
    if config.planner.backend not in ("auto", "cpu"):  # which have no threads to share
        return config
    acting = config.planner.threads or 1
    set_threads(max(1, threads() - acting))
    return config.replace({"planner.threads": acting})


def prepare_torch(config: Config) -> None:
    """Set the process to the run's `threads`, and torch to flush denormal numbers to zero."""
    set_threads(config.threads)
    torch.set_flush_denormal(True)  # denormal latents cost a CPU dearly and mean nothing


def leave_torch_idle() -> None:
    """Let torch have one thread from now on: the C++ library does all but trifles."""
    set_threads(threads(), torch_idle=True)
