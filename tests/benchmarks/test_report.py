"""benchmarks.report and benchmarks.table: the records, the file and the table made from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report, table
from benchmarks.report import Measurement

FIELDS = {
    "case",
    "variant",
    "dtype",
    "rounds",
    "median_ms",
    "p99_ms",
    "p99.9_ms",
    "max_ms",
    "gflops",
    "share_of_matmul",
    "threads",
    "device",
    "torch",
    "date",
}
MATMUL = Measurement("matmul/512x512x512/float32", "torch", "float32", 100_000_000, [0.001])
SLOW = Measurement(
    "plan/tiny/24x6/E1", "eager-unrolled", "float32", 300_000_000, [0.02, 0.01, 0.012]
)
FAST = Measurement("plan/tiny/24x6/E1", "reference", "float32", 150_000_000, [0.003])


def test_records() -> None:
    matmul, slow, _ = report.records([MATMUL, SLOW, FAST])
    assert set(matmul) == set(slow) == FIELDS
    assert matmul["gflops"] == pytest.approx(100)
    assert matmul["share_of_matmul"] == 1
    assert slow["median_ms"] == 12
    assert slow["p99_ms"] == 20  # of three rounds, the slowest
    assert slow["gflops"] == pytest.approx(25)
    assert slow["share_of_matmul"] == pytest.approx(0.25)
    assert slow["threads"] == torch.get_num_threads()
    assert slow["device"]


def test_p99_is_a_rank_and_not_the_slowest_round() -> None:
    seconds = [i / 1000 for i in range(1, 201)]
    (record,) = report.records([Measurement("plan/x", "y", "float32", 1, seconds)])
    assert record["p99_ms"] == 198
    assert record["p99.9_ms"] == record["max_ms"] == 200


def test_p999_of_a_thousand_rounds_is_the_second_slowest() -> None:
    seconds = [i / 1000 for i in range(1, 1001)]
    (record,) = report.records([Measurement("plan/x", "y", "float32", 1, seconds)])
    assert record["p99.9_ms"] == 999 and record["max_ms"] == 1000


def test_no_share_without_a_product_of_the_same_dtype() -> None:
    bf16 = Measurement("plan/x", "y", "bfloat16", 1, [0.1])
    assert report.records([MATMUL, bf16])[1]["share_of_matmul"] is None


def test_no_rate_without_operations() -> None:
    report_ = report.records([MATMUL, Measurement("publish/x", "cpu", "float32", 0, [0.0001])])
    assert report_[1]["gflops"] is None and report_[1]["share_of_matmul"] is None
    assert table.results(report_).splitlines()[3] == (
        "| `publish/x` | `cpu` | 0.10 | 0.10 | 0.10 | 0.10 | 1 |  |  |  |"
    )


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "made" / "report.json"
    for measurements in ([MATMUL, SLOW, FAST], [MATMUL]):
        written = report.records(measurements)
        report.write(path, written)
        assert json.loads(path.read_text(encoding="utf-8")) == written
    assert list(path.parent.iterdir()) == [path]


def test_the_table_compares_with_the_baseline() -> None:
    lines = table.results(report.records([MATMUL, SLOW, FAST])).splitlines()
    assert lines[2].endswith("| 100.0 | 100% |  |")
    assert lines[3].endswith("| 25.0 | 25% | 1.00× |")
    assert lines[4] == (
        "| `plan/tiny/24x6/E1` | `reference` | 3.00 | 3.00 | 3.00 | 3.00 | 1 | 50.0 | 50% | 4.00× |"
    )
