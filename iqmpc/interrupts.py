"""Signals that ask a run to end, taken where it can be ended without losing work."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from iqmpc.errors import Interrupted

# Each with the handler that means that nobody else wants it; nohup, say, ignores SIGHUP.
_SIGNALS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


class Interrupts:
    """Within it, the first SIGINT, SIGTERM or SIGHUP is remembered and raised by `check`.

    An exception in the middle of anything would be swallowed by some compilers, and would leave a
    step half done. The second one is raised where it comes. `on_signal(name)` is called at the
    first. Signals that the program handles itself or ignores are left alone, and so are all of them
    outside the main thread. A context manager.
    """

    def __init__(self, on_signal: Callable[[str], None]):
        self._on_signal, self._received = on_signal, 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            for number, default in _SIGNALS.items():
                if signal.getsignal(number) == default:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def check(self) -> None:
        """Raise `Interrupted` where a signal has come."""
        if self._received:
            raise Interrupted(self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise Interrupted(number)
        self._received = number
        # It came in the middle of printing, or with the end of the terminal.
        with contextlib.suppress(RuntimeError, OSError):
            self._on_signal(signal.Signals(number).name)
