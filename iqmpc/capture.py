"""Device work that repeats: captured once as a CUDA graph, then replayed."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from iqmpc.errors import ConfigError

WARM_UPS = 3
_CAPTURING = threading.Lock()  # a process may have one capture under way at a time


def captured(
    function: Callable[[], Any],
    stream: torch.cuda.Stream,
    generators: Iterable[torch.Generator] = (),
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The function's work on the device as a CUDA graph, and its result, which replays rewrite.

    Nothing is executed. What the function draws, it draws from `generators`. Other threads may use
    the device meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with _CAPTURING:
        # A kernel that is collected unloads its module, which no capture survives.
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                return graph, function()
        finally:
            if collecting:
                gc.enable()


class CapturedStep:
    """Calls a function as a CUDA graph: `step(function, key)` does what `function()` does.

    The function must be work of the device alone: no host synchronisation, random draws from
    `generators` only, and tensors that stay where they are for as long as `key` is the same. Its
    result is tensors too, which the next call overwrites.

    The first `warm_ups` calls with a new key run the function as it is, on the stream of the
    capture (they compile and allocate what a capture cannot); the next one captures it, and every
    call from then on is one replay. A capture executes nothing, so each call has the function's
    effect exactly once, and a replay draws what the function would have drawn: it starts from the
    generators' present states and moves them on, and a state that is set between two calls is the
    one from which the next draws. `captures` counts the captures made.

    Raises `ConfigError` for a device that is no CUDA device.
    """

    def __init__(
        self,
        device: torch.device,
        generators: tuple[torch.Generator, ...] = (),
        *,
        warm_ups: int = WARM_UPS,
    ):
        self._prepare(device)
        self._generators, self._warm_ups, self.captures = generators, warm_ups, 0
        self._key: Hashable = None
        self._calls = 0
        self._replay: Callable[[], Any] | None = None

    def __call__(self, function: Callable[[], Any], key: Hashable) -> Any:
        if key != self._key:
            self._key, self._calls = key, 0
            self._forget()
        self._calls += 1
        if self._calls <= self._warm_ups:
            return self._warm_up(function)
        if self._replay is None:
            self._replay = self._capture(function)
            self.captures += 1
        return self._replay()

    def _prepare(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(f"a CUDA graph needs a CUDA device, got {device.type}")
        self._device, self._stream = device, torch.cuda.Stream(device)
        # Adam says so at the first warm-up.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")

    def _warm_up(self, function: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def _capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        graph, result = captured(function, self._stream, self._generators)

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def _forget(self) -> None:
        if self._replay is not None:
            torch.cuda.synchronize(self._device)  # its memory goes with it
            self._replay = None
