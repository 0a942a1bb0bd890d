"""What a run says of itself while it trains: progress, events in words, rows of metrics."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from iqmpc.run_folder import RunFolder
from iqmpc.runlog import RunLog
from iqmpc.timing import Timing

Metrics = tuple[tuple[str, ...], torch.Tensor]  # names and, on the learner's device, values
Phase = tuple[str, int, int]  # its name, how much of it is done, and of how much
_EVERY = 25  # steps or updates between reports of progress, and no more
_EVERY_S = 2.0  # seconds; metrics are fetched no oftener than either


class Reporter:
    """Tells a caller about a run, by `on_progress` and `on_message`, and writes its metrics.

    `counters()` gives what every report begins with: env_steps, updates, episodes, wall_s.
    `metrics` are those of the last update, or None where there are no new ones. What `timing`
    measures goes into the next row.
    """

    def __init__(
        self,
        counters: Callable[[], dict[str, Any]],
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        on_message: Callable[[str], None] | None = None,
    ):
        self._counters = counters
        self._on_progress = on_progress or (lambda values: None)
        self.message = on_message or (lambda text: None)
        self.metrics: Metrics | None = None
        self.timing = Timing()
        self._log: RunLog | None = None
        self._last_return: float | None = None
        self._told = 0.0  # when, on the monotonic clock
        self._warned = False  # of skipped updates

    def open(self, run: RunFolder, *, since: int | None, evaluated: int) -> None:
        """Write into the folder from now on, after what `RunLog` keeps there."""
        self._log = RunLog(run, since=since, evaluated=evaluated)
        self.timing.restart(self._counters()["env_steps"])

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def is_due(self, count: int, new: int) -> bool:
        """Whether to report progress after `count` steps or updates, of which `new` are new."""
        return count % _EVERY < new or time.monotonic() - self._told > _EVERY_S

    def progress(self, phase: Phase | None = None) -> None:
        """Report the current figures, within a phase that steps wait for if there is one."""
        self._told = time.monotonic()
        self._on_progress(
            {
                **self._counters(),
                "return": self._last_return,
                **({} if phase is None else {"phase": phase}),
                **self._fetched(),
            }
        )

    def episode(self, episode_return: float) -> None:
        """Write the row of an episode of training."""
        self._last_return = episode_return
        self.write({"return": episode_return, **self._fetched()})

    def write(self, values: Mapping[str, Any]) -> None:
        """Write a row: the counters as they are now, then `values`, then the times."""
        assert self._log is not None  # rows are written between open and close
        counters = self._counters()
        self._log.write({**counters, **values, **self.timing.take(counters["env_steps"])})

    def _fetched(self) -> dict[str, float]:
        """The last update's metrics, in one transfer from the device."""
        if self.metrics is None:
            return {}
        names, values = self.metrics
        fetched = dict(zip(names, values.tolist(), strict=True))
        if fetched["skipped_updates"] and not self._warned:
            self._warned = True
            warnings.warn(
                "an update had a loss or a gradient that is not finite and was left out (counted "
                "as skipped_updates, said once)",
                RuntimeWarning,
                stacklevel=2,
            )
        return fetched
