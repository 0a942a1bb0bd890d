"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PLAIN_EVERY_S = 10.0
_Self = TypeVar("_Self", bound="_Display")  # typing.Self needs Python 3.11


class _Display:
    """A bar of `total`, and a line now and then where there is no terminal; a context manager.

    On a terminal the time shown keeps running whatever happens. Elsewhere a thread says what is
    under way, and since when, where nothing has been printed for `every_s`. With a `name`, which
    begins every line, others print beside it, and it is as without a terminal.
    """

    def __init__(
        self,
        description: str,
        total: int,
        console: Console,
        *,
        every_s: float = _PLAIN_EVERY_S,
        name: str | None = None,
    ):
        self._console, self._total, self._every_s = console, total, every_s
        self._prefix = "" if name is None else f"{name}: "
        self._bars = console.is_terminal and name is None
        self._printed = time.monotonic()  # what is over sooner prints no line
        self._under_way = f"{description}: 0/{total}", self._printed  # what, and since when
        self._lock, self._over = threading.Lock(), threading.Event()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._bars,
        )
        self._task = self._bar.add_task(description, total=total, note="")
        self._phase: tuple[str, TaskID] | None = None
        self._alive = threading.Thread(target=self._say_that_it_lives, daemon=True)

    def __enter__(self: _Self) -> _Self:
        self._bar.start()
        if not self._bars:
            self._alive.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._alive.is_alive():
            self._alive.join()
        self._bar.stop()

    def _show(self, completed: int, note: str, line: str) -> None:
        """Progress of the whole: what was shown of a part is over."""
        if self._phase is not None:
            self._bar.remove_task(self._phase[1])
            self._phase = None
        self._bar.update(self._task, completed=completed, note=note)
        self._line(line)

    def _show_phase(self, name: str, completed: int, total: int, note: str, line: str) -> None:
        """Progress of a part that the whole waits for, on a bar of its own."""
        if self._phase is None or self._phase[0] != name:
            if self._phase is not None:
                self._bar.remove_task(self._phase[1])
            self._phase = name, self._bar.add_task(name, total=total, note=note)
        self._bar.update(self._phase[1], completed=completed, total=total, note=note)
        self._line(line)

    def _line(self, line: str) -> None:
        with self._lock:
            self._under_way = line, time.monotonic()
            if not self._bars and self._quiet_s() > self._every_s:
                self._print(line)

    def _say(self, text: str) -> None:
        """Print an event, which is also what is under way from then on."""
        with self._lock:
            self._under_way = text, time.monotonic()
            self._print(text)

    def _quiet_s(self) -> float:
        return time.monotonic() - self._printed

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        # not wrapped: what it names may be pasted
        self._console.print(self._prefix + text, markup=False, highlight=False, soft_wrap=True)

    def _say_that_it_lives(self) -> None:
        while not self._over.wait(self._every_s / 10):
            with self._lock:
                if self._quiet_s() > self._every_s:
                    text, since = self._under_way
                    self._print(f"{text} (for {time.monotonic() - since:.0f} s)")


class RecordingDisplay(_Display):
    """Feeds on `demos.make.record`'s `progress`; use as a context manager."""

    def __init__(self, episodes: int, console: Console):
        super().__init__("recording", episodes, console)

    def update(self, kept: int, tried: int, last_return: float) -> None:
        note = f"of {tried} tried, last return {last_return:.1f}"
        self._show(kept, note, f"{kept}/{self._total} episodes {note}")


class TrainingDisplay(_Display):
    """Feeds on the trainer's `on_progress` and `on_message`; use as a context manager.

    `every_s` is how long it is silent, at most, where there is no bar; `name` as of `_Display`.
    """

    def __init__(
        self,
        steps: int,
        console: Console,
        *,
        every_s: float = _PLAIN_EVERY_S,
        name: str | None = None,
    ):
        super().__init__("steps", steps, console, every_s=every_s, name=name)
        self._start: tuple[str, float, int] | None = None  # of the phase: name, time, count

    def message(self, text: str) -> None:
        self._say(text)

    def update(self, values: dict[str, Any]) -> None:
        steps = values["env_steps"]
        name, done, total = values.get("phase", ("steps", steps, self._total))
        now = time.monotonic()
        if self._start is None or self._start[0] != name:
            self._start = (name, now, done)  # the rate is that of the phase
        rate = (done - self._start[2]) / max(now - self._start[1], 1e-9)
        each = "episodes" if name == "evaluation" else "updates" if "phase" in values else "steps"
        note = f"{rate:.{0 if rate >= 10 else 1}f} {each}/s" if done > self._start[2] else ""
        if "phase" in values:
            if "updates" in each:
                note += _losses(values)
            self._show_phase(
                name, done, total, note, f"{name}: {done}/{total}, {values['wall_s']:.0f} s  {note}"
            )
            return
        if values["return"] is not None:
            note = f"last return {values['return']:.0f}  {note}"
        note += _losses(values)
        self._show(
            steps,
            note,
            f"{steps}/{total} steps, {values['updates']} updates, {values['wall_s']:.0f} s  {note}",
        )


def _losses(values: dict[str, Any]) -> str:
    """What of the last update is there: a baseline has not all of it."""
    found = ""
    if "q_difference" in values:
        found += f"  Q expert-behaviour {values['q_difference']:.2f}"
    if "consistency" in values:
        found += f"  consistency {values['consistency']:.1e}"
    return found
