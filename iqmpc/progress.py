"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_EVERY_S = 30.0


class RecordingDisplay:
    """Feeds on `demos.make.record`'s `progress`; use as a context manager."""

    def __init__(self, episodes: int, console: Console):
        self._console, self._episodes, self._printed = console, episodes, time.monotonic()
        self._bar = Progress(
            TextColumn("recording"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=console,
            disable=not console.is_terminal)
        self._task = self._bar.add_task("episodes", total=episodes, note="")

    def __enter__(self) -> RecordingDisplay:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, kept: int, tried: int, last_return: float) -> None:
        note = f"of {tried} tried, last return {last_return:.1f}"
        self._bar.update(self._task, completed=kept, note=note)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed > _PLAIN_EVERY_S:
            self._printed = now
            self._console.print(f"{kept}/{self._episodes} episodes {note}", highlight=False)


class TrainingDisplay:
    """Feeds on the trainer's `on_progress` and `on_message`; use as a context manager."""

    def __init__(self, steps: int, console: Console):
        self._console, self._steps, self._printed = console, steps, 0.0
        self._start: tuple[float, int] | None = None
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=console,
            disable=not console.is_terminal)
        self._task = self._bar.add_task("steps", total=steps, note="")

    def __enter__(self) -> TrainingDisplay:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

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
        self._bar.update(self._task, completed=step, note=note)
        if not self._console.is_terminal and now - self._printed > _PLAIN_EVERY_S:
            self._printed = now
            self._console.print(
                f"{step}/{self._steps} steps, {values['updates']} updates, "
                f"{values['wall_s']:.0f} s  {note}", highlight=False, soft_wrap=True)
