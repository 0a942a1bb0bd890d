"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_EVERY_S = 30.0
_Self = TypeVar("_Self", bound="_Display")  # typing.Self needs Python 3.11


class _Display:
    """A bar of `total`, and a line now and then where there is no terminal; a context manager."""

    def __init__(self, description: str, total: int, console: Console):
        self._console, self._total = console, total
        self._printed = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=console,
            disable=not console.is_terminal)
        self._task = self._bar.add_task(description, total=total, note="")

    def __enter__(self: _Self) -> _Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, completed: int, note: str, line: str) -> None:
        self._bar.update(self._task, completed=completed, note=note)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed > _PLAIN_EVERY_S:
            self._printed = now
            self._console.print(line, highlight=False, soft_wrap=True)


class RecordingDisplay(_Display):
    """Feeds on `demos.make.record`'s `progress`; use as a context manager."""

    def __init__(self, episodes: int, console: Console):
        super().__init__("recording", episodes, console)
        self._printed = time.monotonic()  # a short recording prints no line

    def update(self, kept: int, tried: int, last_return: float) -> None:
        note = f"of {tried} tried, last return {last_return:.1f}"
        self._show(kept, note, f"{kept}/{self._total} episodes {note}")


class TrainingDisplay(_Display):
    """Feeds on the trainer's `on_progress` and `on_message`; use as a context manager."""

    def __init__(self, steps: int, console: Console):
        super().__init__("steps", steps, console)
        self._start: tuple[float, int] | None = None

    def message(self, text: str) -> None:
        # not wrapped: what it names may be pasted
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, values: dict[str, Any]) -> None:
        now, step = time.monotonic(), values["env_steps"]
        if self._start is None:
            self._start = (now, step)
        rate = (step - self._start[1]) / max(now - self._start[0], 1e-9)
        note = f"{rate:.0f} steps/s"
        if values["return"] is not None:
            note = f"last return {values['return']:.0f}  {note}"
        if "q_difference" in values:
            note += (f"  Q expert-behaviour {values['q_difference']:.2f}"
                     f"  consistency {values['consistency']:.1e}")
        self._show(step, note, f"{step}/{self._total} steps, {values['updates']} updates, "
                               f"{values['wall_s']:.0f} s  {note}")
