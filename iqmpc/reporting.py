"""What a run says of itself while it trains: progress, events in words, rows of metrics."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from iqmpc.config import Config
from iqmpc.run_folder import RunFolder
from iqmpc.runlog import RunLog
from iqmpc.timing import Timing
from iqmpc.trackers import Trackers

Metrics = tuple[tuple[str, ...], torch.Tensor]  # names and, on the learner's device, values
Phase = tuple[str, int, int]  # its name, how much of it is done, and of how much
_EVERY = 25  # steps or updates between reports of progress, and no more
_EVERY_S = 2.0  # seconds; metrics are fetched no oftener than either


class Reporter:
    """Tells a caller about a run, by `on_progress` and `on_message`, and writes its metrics.

    `counters()` gives what every report begins with: env_steps, updates, episodes, wall_s.
    `metrics` are those of the last update, or None where there are no new ones. What `timing`
    measures goes into the next row, and with `train.log_every` so do `returns`, those of the
    episodes that are in no row yet.
    """

    def __init__(
        self,
        config: Config,
        counters: Callable[[], dict[str, Any]],
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        on_message: Callable[[str], None] | None = None,
    ):
        self._config, self._counters = config, counters
        self._on_progress = on_progress or (lambda values: None)
        self.message = on_message or (lambda text: None)
        self.metrics: Metrics | None = None
        self.timing = Timing()
        self.returns: list[float] = []
        self._log: RunLog | None = None
        self._trackers: Trackers | None = None
        self._last_return: float | None = None
        self._told = 0.0  # when, on the monotonic clock
        self._warned = False  # of skipped updates

    def open(self, run: RunFolder, *, since: int | None, evaluated: int) -> None:
        """Write into the folder from now on, after what `RunLog` keeps there."""
        self._log = RunLog(run, since=since, evaluated=evaluated)
        self._trackers = Trackers(self._config, run, since=since, on_message=self.message)
        self.timing.restart(self._counters()["env_steps"])

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None

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
        """Note an episode of training, and write its row unless rows have their own steps."""
        self._last_return = episode_return
        self.returns.append(episode_return)
        if self._config.train.log_every is None:
            self._write_training()

    def tick(self, env_steps: int, new: int, *, ended: bool) -> None:
        """Write the row that is due after `new` more steps, in which episodes have `ended` or not.

        What was written of the last update is not written again.
        """
        every = self._config.train.log_every
        if every is not None and env_steps // every > (env_steps - new) // every:
            self._write_training()
        elif every is not None or not ended:
            return
        self.metrics = None

    def flush(self) -> None:
        """Write a row of the episodes that are in none yet."""
        if self.returns:
            self._write_training()

    def write(self, values: Mapping[str, Any]) -> None:
        """Write a row: the counters as they are now, then `values`, then the times."""
        assert self._log is not None and self._trackers is not None  # between open and close
        counters = self._counters()
        row = {**counters, **values, **self.timing.take(counters["env_steps"])}
        self._log.write(row)
        self._trackers.write(row)

    def video(self, step: int, path: Path) -> None:
        """Show the video of an evaluation."""
        assert self._trackers is not None
        self._trackers.video(step, path)

    def _write_training(self) -> None:
        mean = {"return": sum(self.returns) / len(self.returns)} if self.returns else {}
        self.returns = []
        self.write({**mean, **self._fetched()})

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
