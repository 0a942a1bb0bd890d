"""`pytest --benchmark` runs the benchmarks and nothing else; without it, they are skipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent
BENCHMARKS = ROOT / "benchmarks"
# Last, for `import benchmarks` alone: where the package is installed, that one is tested.
sys.path.append(str(ROOT))
# Kept here because tests/conftest.py, which is loaded after this file, sets one thread.
DEFAULT_THREADS = torch.get_num_threads()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("iqmpc", "iqmpc's benchmarks (docs/benchmarks.md)")
    group.addoption("--benchmark", action="store_true", help="Run benchmarks/ instead of tests/.")
    group.addoption(
        "--benchmark-cases",
        metavar="SUBSTRING",
        default="",
        help="Only cases whose CASE/VARIANT contains this, and the matrix products.",
    )
    group.addoption(
        "--benchmark-device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="Where the cases are measured. Default: cpu",
    )
    group.addoption(
        "--benchmark-threads",
        metavar="N",
        type=int,
        help="Threads for torch. Default: torch's own.",
    )
    group.addoption(
        "--benchmark-plans",
        metavar="N",
        type=int,
        default=1000,
        help="Plans of which the latency cases take the distribution. Default: 1000.",
    )
    group.addoption(
        "--benchmark-report",
        metavar="PATH",
        type=Path,
        default=BENCHMARKS / "report.json",
        help="Where to write the report. Default: benchmarks/report.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark"):
        return
    threads = config.getoption("benchmark_threads")
    if threads is not None and threads < 1:
        raise pytest.UsageError(f"--benchmark-threads must be at least 1, got {threads}")
    plans = config.getoption("benchmark_plans")
    if plans < 1:
        raise pytest.UsageError(f"--benchmark-plans must be at least 1, got {plans}")
    if config.getoption("benchmark_device") == "cuda" and not torch.cuda.is_available():
        if not config.option.collectonly:
            raise pytest.UsageError("--benchmark-device=cuda: torch sees no CUDA device")
    torch.set_num_threads(threads or DEFAULT_THREADS)
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(BENCHMARKS)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("benchmark")
    reason = "--benchmark runs benchmarks/ only" if wanted else "a benchmark: give --benchmark"
    for item in items:
        if item.path.is_relative_to(BENCHMARKS) != wanted:
            item.add_marker(pytest.mark.skip(reason=reason))
    if wanted:
        items[:] = _selected(config, items)


def _selected(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """The cases asked for, and the matrix products, which the others are held against."""
    part = config.getoption("benchmark_cases")
    chosen = [item for item in items if part in item.name]
    if items and not chosen:
        names = "\n  ".join(item.name for item in items)
        raise pytest.UsageError(f"--benchmark-cases: none contains {part!r} in\n  {names}")
    kept = [item for item in items if item in chosen or "[matmul/" in item.name]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    return kept
