"""How long things took, counted in constant memory: for ticks of a control loop."""

from __future__ import annotations

import math

import numpy as np

_PER_OCTAVE = 32  # bins of a factor of 1.022 each: what a percentile may be off by
_LEAST_S, _OCTAVES = 1e-6, 30  # from a microsecond to 18 minutes


class LatencyHistogram:
    """Durations in seconds, and how many of them were over `limit_s` (None: none are)."""

    def __init__(self, limit_s: float | None = None):
        self.limit_s = limit_s
        self.late = 0
        self.max_s = 0.0
        self._bins = np.zeros(_PER_OCTAVE * _OCTAVES, np.int64)

    def add(self, seconds: float) -> None:
        """Count one duration."""
        octaves = math.log2(max(seconds, _LEAST_S) / _LEAST_S)
        self._bins[min(int(octaves * _PER_OCTAVE), len(self._bins) - 1)] += 1
        self.max_s = max(self.max_s, seconds)
        self.late += self.limit_s is not None and seconds > self.limit_s

    def __len__(self) -> int:
        return int(self._bins.sum())

    def percentile(self, share: float) -> float | None:
        """Seconds that `share` (0 to 1) of the durations stay within; None where there is none.

        The upper edge of a bin: at most 2.2 % more than the exact figure, and never less.
        """
        total = len(self)
        if not total:
            return None
        index = int(np.searchsorted(np.cumsum(self._bins), math.ceil(share * total)))
        return min(_LEAST_S * 2 ** ((index + 1) / _PER_OCTAVE), self.max_s)

    def bins(self) -> tuple[np.ndarray, np.ndarray]:
        """Edges [B+1] in seconds and counts [B], from the first bin that is not empty to the last.

        The first and the last bin of all also count what lies beyond them. Empty without durations.
        """
        filled = np.flatnonzero(self._bins)
        if not len(filled):
            return np.zeros(1), np.zeros(0, np.int64)
        first, last = int(filled[0]), int(filled[-1])
        edges = _LEAST_S * 2.0 ** (np.arange(first, last + 2) / _PER_OCTAVE)
        return edges, self._bins[first : last + 1].copy()

    def summary(self, name: str) -> dict[str, float | int | None]:
        """The count, how many were late, and p50, p99 and the greatest in ms, by `name`."""

        def ms(seconds: float | None) -> float | None:
            return None if seconds is None else round(1e3 * seconds, 3)

        return {
            f"{name}s": len(self),
            f"late_{name}s": self.late,
            f"{name}_p50_ms": ms(self.percentile(0.5)),
            f"{name}_p99_ms": ms(self.percentile(0.99)),
            f"{name}_max_ms": ms(self.max_s) if len(self) else None,
        }
