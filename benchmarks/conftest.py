"""How a benchmark is timed and reported. The options are in the root's conftest.py."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import report
from benchmarks.report import Measurement
from benchmarks.timing import rounds

MEASUREMENTS = pytest.StashKey[list[Measurement]]()


@pytest.fixture
def measure(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Callable[..., None]:
    """measure(case, variant, function, flops, dtype): time `function()` and record it.

    `times` is how often, where that is not to be chosen by how long it takes.
    """

    def run(
        case: str,
        variant: str,
        function: Callable[[], object],
        flops: int,
        dtype: str,
        *,
        times: int | None = None,
    ) -> None:
        function()  # what is compiled, is compiled here
        start = time.perf_counter()
        function()
        estimate = time.perf_counter() - start
        benchmark.group = case
        benchmark.pedantic(function, rounds=times or rounds(estimate))
        if benchmark.stats:  # none under --benchmark-disable
            pytestconfig.stash.setdefault(MEASUREMENTS, []).append(
                Measurement(case, variant, dtype, flops, benchmark.stats.stats.data)
            )

    return run


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Compile each benchmark on its own: torch gives up on a function after eight variations."""
    torch.compiler.reset()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    measurements = session.config.stash.get(MEASUREMENTS, [])
    if measurements and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        report.write(session.config.getoption("benchmark_report"), report.records(measurements))
