"""Where a run's time goes, between one row of its metrics and the next."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Literal

Part = Literal["plan", "env", "update"]


class Timing:
    """Mean times of a run's parts and its rate of steps, since the last `take`.

    Threads may measure while another takes. Times are the host's: what it only hands to a GPU
    counts as long as handing it over lasts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self.restart(0)

    def restart(self, env_steps: int) -> None:
        """Forget what was measured, and count steps from `env_steps` on."""
        with self._lock:
            self._seconds.clear()
            self._counts.clear()
            self._taken, self._steps = time.monotonic(), env_steps

    @contextlib.contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """One plan, step of all environments or update; one that raises does not count."""
        began = time.monotonic()
        yield
        with self._lock:
            self._seconds[part] += time.monotonic() - began
            self._counts[part] += 1

    def take(self, env_steps: int) -> dict[str, float]:
        """`plan_ms`, `env_ms`, `update_ms` and `steps_per_s`, each where there was any."""
        with self._lock:
            figures = {
                f"{part}_ms": 1e3 * self._seconds[part] / count
                for part, count in self._counts.items()
            }
            elapsed = time.monotonic() - self._taken
            if env_steps > self._steps and elapsed:
                figures["steps_per_s"] = (env_steps - self._steps) / elapsed
        self.restart(env_steps)
        return figures
