"""How a benchmark is timed and reported. The options are in the root's conftest.py."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import report
from benchmarks.gpu_report import GPU, conditions
from benchmarks.report import Measurement
from benchmarks.timing import rounds
from benchmarks.variants import on

MEASUREMENTS = pytest.StashKey[list[Measurement]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's CASES by its VARIANTS on the device asked for, those of a GPU in GPU_VARIANTS."""
    if not {"case", "variant"} <= set(metafunc.fixturenames):
        return
    module, device = metafunc.module, metafunc.config.getoption("benchmark_device")
    metafunc.parametrize(
        ("case", "variant"),
        [
            pytest.param(case.on(device), name, id=f"{module.PREFIX}{case.name}/{name}")
            for case in module.CASES
            for name in on(device, module.VARIANTS, module.GPU_VARIANTS)
        ],
    )


@pytest.fixture
def device(pytestconfig: pytest.Config) -> str:
    return pytestconfig.getoption("benchmark_device")


@pytest.fixture
def measure(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, device: str
) -> Callable[..., None]:
    """measure(case, variant, function, flops, dtype): time `function()` and record it, on a GPU
    until the device is done.

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
        if device == "cuda":
            function = synchronised(function)
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


def synchronised(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Compile each benchmark on its own: torch gives up on a function after eight variations."""
    torch.compiler.reset()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    measurements = session.config.stash.get(MEASUREMENTS, [])
    if measurements and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        on_gpu = session.config.getoption("benchmark_device") == "cuda"
        where = conditions(GPU) if on_gpu else None
        records = report.records(measurements, where)
        report.write(session.config.getoption("benchmark_report"), records)
