"""Histograms of durations: counts, percentiles, late ones."""

import numpy as np
import pytest

from iqmpc.latency import LatencyHistogram


def test_percentiles_are_those_of_the_durations():
    durations = np.random.default_rng(0).lognormal(-7, 1, 5000)
    histogram = LatencyHistogram(limit_s=float(np.quantile(durations, 0.9)))
    for duration in durations:
        histogram.add(float(duration))
    assert len(histogram) == 5000 and histogram.late == 500
    for share in (0.01, 0.5, 0.9, 0.99, 0.999):
        exact = np.sort(durations)[int(np.ceil(share * 5000)) - 1]
        assert exact <= histogram.percentile(share) <= 1.023 * exact
    assert histogram.percentile(1) == histogram.max_s == durations.max()


def test_extremes_and_nothing():
    histogram = LatencyHistogram()
    assert histogram.percentile(0.5) is None
    assert histogram.summary("tick") == {
        "ticks": 0,
        "late_ticks": 0,
        "tick_p50_ms": None,
        "tick_p99_ms": None,
        "tick_max_ms": None,
    }
    histogram.add(0.0)
    histogram.add(1e9)
    assert histogram.summary("tick")["tick_max_ms"] == 1e12
    assert histogram.percentile(0.5) == pytest.approx(1e-6, rel=0.03) and histogram.late == 0
