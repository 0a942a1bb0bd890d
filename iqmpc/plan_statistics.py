"""Counts and times of plans."""

from __future__ import annotations

from dataclasses import dataclass, field

from iqmpc.kernels.mppi_plan import Plan
from iqmpc.latency import LatencyHistogram


@dataclass
class PlanStatistics:
    """Counts over plans; `times` is the histogram of what each took, in seconds.

    `nonfinite` counts problems, `iterations` whole ones and `samples` those that were scored.
    """

    plans: int = 0
    missed: int = 0
    late: int = 0
    nonfinite: int = 0
    iterations: int = 0
    samples: int = 0
    times: LatencyHistogram = field(default_factory=LatencyHistogram)

    def add(self, plan: Plan) -> None:
        """Count one plan, whose time and samples are known."""
        assert plan.samples is not None and plan.elapsed_us is not None
        self.plans += 1
        self.missed += plan.missed
        self.late += plan.late
        self.nonfinite += plan.nonfinite
        self.iterations += plan.iterations
        self.samples += plan.samples
        self.times.add(1e-6 * plan.elapsed_us)
