"""`pytest` runs no benchmark; `pytest --benchmark` runs nothing else, and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CASE = "plan/tiny/24x6/E1/eager-unrolled"


def run_pytest(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_pytest_alone_collects_no_benchmark() -> None:
    done = run_pytest("--collect-only", "-q")
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert any(line.startswith("tests/benchmarks/") for line in collected), done.stdout
    assert not [line for line in collected if line.startswith("benchmarks/")]


def test_a_path_without_the_option_skips_and_says_why() -> None:
    done = run_pytest("benchmarks", "-rs")
    assert done.returncode == 0, done.stdout
    assert "a benchmark: give --benchmark" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]


def test_the_option_collects_only_benchmarks() -> None:
    done = run_pytest("--benchmark", "--collect-only", "-q")
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert any(CASE in line for line in collected), done.stdout
    assert all(line.startswith("benchmarks/") for line in collected)


def test_a_gpu_has_the_same_cases() -> None:
    """And variants of its own, in place of the C++ library's."""

    def collected(*words: str) -> set[str]:
        done = run_pytest("--benchmark", "--collect-only", "-q", *words)
        return {line.partition("[")[2][:-1] for line in done.stdout.splitlines() if "::" in line}

    here, there = collected(), collected("--benchmark-device", "cuda")
    assert {x.rpartition("/")[0] for x in here} == {x.rpartition("/")[0] for x in there}
    only = {x.rpartition("/")[2] for x in there - here}
    assert {"triton-bf16", "triton-bf16-latency", "graph"} <= only
    missing = {x.rpartition("/")[2] for x in here - there}
    assert missing == {"cpu", "cpu-bf16", "fused", "fused-bf16"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_device_that_is_not_here_is_an_error() -> None:
    done = run_pytest("--benchmark", "--benchmark-device", "cuda")
    assert "--benchmark-device=cuda: torch sees no CUDA device" in done.stderr


@pytest.mark.slow
def test_a_run_reports(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run_pytest(
        "--benchmark",
        "--benchmark-cases",
        CASE,
        "--benchmark-threads",
        "1",
        "--benchmark-report",
        path,
    )
    assert done.returncode == 0, done.stdout
    assert "benchmark 'plan/tiny/24x6/E1'" in done.stdout  # pytest-benchmark's table
    records = {f"{r['case']}/{r['variant']}": r for r in json.loads(path.read_text("utf-8"))}
    assert set(records) == {
        CASE,
        "matmul/512x512x512/float32/torch",
        "matmul/512x512x512/bfloat16/torch",
    }
    record = records[CASE]
    assert record["threads"] == 1
    assert record["rounds"] >= 5
    assert 0 < record["median_ms"] <= record["p99_ms"]
    assert 0 < record["gflops"]
    assert 0 < record["share_of_matmul"]


def test_nothing_measured_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run_pytest(
        "--benchmark",
        "--benchmark-cases",
        "matmul",
        "--benchmark-disable",
        "--benchmark-report",
        path,
    )
    assert done.returncode == 0, done.stdout
    assert not path.exists()


def test_an_unknown_case_is_an_error_that_names_the_cases(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run_pytest("--benchmark", "--benchmark-cases", "plan/huge", "--benchmark-report", path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert CASE in done.stderr + done.stdout
    assert not path.exists()
