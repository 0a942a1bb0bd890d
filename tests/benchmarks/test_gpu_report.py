"""benchmarks.gpu_report: its whole logic, on the CPU."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_report, table
from benchmarks.checks import Wrong
from benchmarks.gpu_report import CPU_CHECK, Goal, Group, Report
from benchmarks.variants import Variant

FAST = dataclasses.replace(CPU_CHECK, build_s=0.5, timing_s=0.05, matmul=16, copy_bytes=1 << 12)


def variant_of(build, **how) -> Variant:
    return Variant(lambda case: build(), lambda case: 1000, "bfloat16", **how)


def waits(ms: float):
    return lambda: lambda: time.sleep(ms / 1000)


def fails(error: Exception):
    def build():
        raise error

    return build


def breaks_after(calls: int):
    left = [calls]

    def run():
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("broke\nwith a second line")

    return lambda: run


def reported(seconds: float = 60.0, must: Goal | None = None, **variants: Variant) -> Report:
    group = Group(
        SimpleNamespace(name="case"),
        variants,
        operations=1000,
        bytes=100,
        dtype="bfloat16",
        baseline="slow",
        judged="quick",
        must=must or Goal(ms=1e3, speedup=2),
        aim=Goal(ms=1e-6),
    )
    report = Report(FAST, [group], time.monotonic() + seconds)
    report.run()
    return report


def test_a_case_that_goes_wrong_is_a_row_and_the_others_run() -> None:
    report = reported(
        slow=variant_of(waits(20)),
        no_good=variant_of(fails(ValueError("no good"))),
        wrong=variant_of(fails(Wrong("returns: 1e-1 from the reference"))),
        hangs=variant_of(lambda: time.sleep(5)),
        breaks=variant_of(breaks_after(3)),
        compiled=variant_of(waits(1), compiles=True),
        quick=variant_of(waits(2)),
    )
    rows = {name: row for (_, name), row in report.rows.items()}
    assert {name: row.status for name, row in rows.items()} == {
        "slow": "ok",
        "no_good": "failed",
        "wrong": "wrong",
        "hangs": "out of time",
        "breaks": "failed",
        "compiled": "skipped",
        "quick": "ok",
    }
    assert rows["no_good"].note == "ValueError: no good"
    assert rows["breaks"].note == "RuntimeError: broke"
    assert rows["wrong"].ms is None  # not timed
    quick = rows["quick"]
    assert 2 <= quick.ms <= 1e3 * max(quick.seconds) and len(quick.seconds) >= 3
    assert quick.speedup == pytest.approx(rows["slow"].ms / quick.ms) and quick.speedup > 2
    machine = {row.case.split("/")[0] + row.dtype: row for row in report.machine}
    rate = 2 * 16**3 / (machine["matmulbfloat16"].ms / 1e3)
    bandwidth = 2 * FAST.copy_bytes / (machine["copyfloat32"].ms / 1e3)
    assert quick.floor_ms == pytest.approx(1e3 * max(1000 / rate, 100 / bandwidth)) and rate > 0
    assert quick.share == pytest.approx(1000 / (quick.ms / 1e3) / rate)
    assert (quick.passed, quick.aim_passed) == (True, False)
    assert (quick.must, quick.aim) == ("<= 1000 ms, >= 2x", "<= 1e-06 ms")
    assert rows["slow"].passed is None


@pytest.mark.parametrize("must", [Goal(ms=1e3, speedup=2), Goal(share=1e-12)])
def test_what_was_not_measured_has_not_passed(must: Goal) -> None:
    report = reported(
        slow=variant_of(fails(ValueError("no baseline"))), quick=variant_of(waits(1)), must=must
    )
    assert report.rows["case", "quick"].passed == (must.speedup is None)
    report = reported(
        slow=variant_of(waits(1)), quick=variant_of(fails(ValueError("none"))), must=must
    )
    assert report.rows["case", "quick"].passed is False


def test_when_no_time_is_left_the_rest_says_so(tmp_path: Path, capsys) -> None:
    report = reported(slow=variant_of(waits(1)), quick=variant_of(waits(1)), seconds=0.0)
    report.finish(tmp_path / "new" / "report.json")
    machine, *records = json.loads((tmp_path / "new" / "report.json").read_text())
    assert [record["status"] for record in records] == ["out of time"] * 2
    assert (machine["case"], machine["status"]) == ("machine", "failed")
    assert "TimeoutError: not done after 0 s" in machine["note"]
    assert machine["note"] in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_script_without_a_gpu(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_report, "CPU_CHECK", dataclasses.replace(CPU_CHECK, timing_s=0.05))
    path = tmp_path / "report.json"
    assert gpu_report.main(["--cpu-check", "--out", str(path)]) == 1  # nothing passes here
    records = json.loads(path.read_text())
    rows = {(r["case"], r["variant"]): r for r in records}
    plans = ("plan/tiny/24x6/E1", "plan/tiny/24x6/E2")
    for case in plans:
        for variant in ("eager-unrolled", "reference", "cpu"):
            assert rows[case, variant]["status"] == "ok", rows[case, variant]
            assert 0 < rows[case, variant]["median_ms"] <= rows[case, variant]["max_ms"]
        judged = rows[case, "triton-bf16"]
        assert judged["status"] == "failed" and "on a cuda device, got cpu" in judged["note"]
        assert judged["passed"] is False
        assert rows[case, "reference-compiled"]["status"] == "skipped"
    assert rows[plans[0], "triton-bf16"]["must"] == "<= 0.6 ms, >= 20x"
    assert rows[plans[1], "triton-bf16"]["must"] == ">= 35%"
    assert rows["update/tiny/24x6/8+8", "graph"]["must"] == "<= 2 ms, >= 8x"
    assert rows["update/tiny/24x6/8+8", "eager"]["status"] == "ok"
    graph = rows["update/tiny/24x6/8+8", "graph"]
    assert graph["status"] == "failed" and "needs a CUDA device, got cpu" in graph["note"]
    machine = {case.split("/")[0] for case, variant in rows if variant == "torch"}
    assert machine == {"matmul", "copy", "launches"}
    assert all(record["cpu_check"] for record in records) and len(rows) == len(records)
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 1 + 1 + len(rows) and printed[1].startswith("case")
    # One format: what a CPU's run has is there too, and the same table is made from it.
    assert records[0].keys() > json.loads(table.REPORT.read_text("utf-8"))[0].keys()
    assert len(table.results(records).splitlines()) == 2 + len(records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x", "--cpu-check", "--limit", "0"], "--limit must be positive, got 0"),
        ([], "required: --out"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        gpu_report.main(arguments)
    assert message in capsys.readouterr().err
