"""How long a call takes, how often it is called, and how long it may take at most."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator

import torch


def rounds(seconds: float) -> int:
    """How many rounds to take of something that lasts `seconds`.

    About three seconds' worth, but at least 5 (3 above 5 s), at least 100 below 50 ms (so that p99
    is not simply the slowest round), and at most 500.
    """
    least = 100 if seconds < 0.05 else 5 if seconds < 5 else 3
    return min(max(least, math.ceil(3 / seconds)), 500)


def timed(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of one call: between CUDA events around it, and by the host's clock until the device
    is done. On the CPU both are the host's."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
        return wall, wall
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * begin.elapsed_time(end), time.perf_counter() - start


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block after `seconds`. In the main thread."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"not done after {max(seconds, 0.0):.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
