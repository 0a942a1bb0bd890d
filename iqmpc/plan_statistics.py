"""Counts and times of plans, with a histogram that is fine enough for tails."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iqmpc.kernels.mppi_plan import Plan

_PER_OCTAVE, _BUCKETS = 8, 216  # from 1 µs to some two minutes, as the C++ library counts


@dataclass
class PlanStatistics:
    """Counts over plans; times in microseconds.

    `histogram[b]` counts the plans whose time lay in [edges[b], edges[b + 1]); the first and the
    last one also count what lies below and above.
    """

    plans: int = 0
    missed: int = 0
    late: int = 0
    nonfinite: int = 0
    iterations: int = 0
    samples: int = 0
    total_us: float = 0.0
    max_us: float = 0.0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(_BUCKETS, np.int64))

    @property
    def edges(self) -> np.ndarray:
        """[B + 1], eight to an octave."""
        return 2.0 ** (np.arange(_BUCKETS + 1) / _PER_OCTAVE)

    def add(self, plan: Plan) -> None:
        self.plans += 1
        self.missed += plan.missed
        self.late += plan.late
        self.nonfinite += plan.nonfinite
        self.iterations += plan.iterations
        self.samples += plan.samples
        self.total_us += plan.elapsed_us
        self.max_us = max(self.max_us, plan.elapsed_us)
        bucket = int(_PER_OCTAVE * np.log2(max(plan.elapsed_us, 1.0)))
        self.histogram[min(bucket, _BUCKETS - 1)] += 1

    def quantile_us(self, q: float) -> float:
        """A time that the share `q` of the plans did not exceed, up to a bucket's width (9 %).

        0 without plans.
        """
        if not self.plans:
            return 0.0
        bucket = int(np.searchsorted(np.cumsum(self.histogram), max(1, q * self.plans)))
        return float(min(self.edges[bucket + 1], self.max_us))

    def copy(self) -> PlanStatistics:
        return copy.deepcopy(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the counts, and the histogram's buckets that are not empty."""
        counts = {k: v for k, v in vars(self).items() if k != "histogram"}
        filled = np.flatnonzero(self.histogram)
        histogram = [
            {
                "from_us": float(self.edges[b]),
                "to_us": float(self.edges[b + 1]),
                "plans": int(self.histogram[b]),
            }
            for b in filled
        ]
        return counts | {"histogram": histogram}
