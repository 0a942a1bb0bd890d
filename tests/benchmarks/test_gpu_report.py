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
from benchmarks.gpu_report import CPU_CHECK, Goal, Group, Measuring, Report, Row, machine
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


def group_of(must: Goal | None = None, **variants: Variant) -> Group:
    return Group(
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


def measured(group: Group, seconds: float = 60.0) -> dict[str, Row]:
    """The group's rows, measured in this process."""
    said = {}
    measuring = Measuring(
        FAST,
        group,
        group.variants,
        time.monotonic() + seconds,
        lambda row: said.update({row.variant: row}),
    )
    measuring.run()
    return said


def judged(group: Group) -> Report:
    """A report on the group's rows, measured in this process."""
    report = Report(FAST, "tests.benchmarks.fake_groups:none", 0)
    report.machine = machine(FAST)
    report.rows = {("case", name): row for name, row in measured(group).items()}
    report.judge(group)
    return report


def test_a_case_that_goes_wrong_is_a_row_and_the_others_run() -> None:
    report = judged(
        group_of(
            slow=variant_of(waits(20)),
            no_good=variant_of(fails(ValueError("no good"))),
            wrong=variant_of(fails(Wrong("returns: 1e-1 from the reference"))),
            hangs=variant_of(lambda: time.sleep(5)),
            breaks=variant_of(breaks_after(3)),
            quick=variant_of(waits(2)),
        )
    )
    rows = {name: row for (_, name), row in report.rows.items()}
    assert {name: row.status for name, row in rows.items()} == {
        "slow": "ok",
        "no_good": "failed",
        "wrong": "wrong",
        "hangs": "out of time",
        "breaks": "failed",
        "quick": "ok",
    }
    assert rows["no_good"].note == "ValueError: no good"
    assert rows["breaks"].note == "RuntimeError: broke"
    assert rows["wrong"].ms is None  # not timed
    quick = rows["quick"]
    assert 2 <= quick.ms <= 1e3 * max(quick.seconds) and len(quick.seconds) >= 3
    assert quick.speedup == pytest.approx(rows["slow"].ms / quick.ms) and quick.speedup > 2
    of = {row.case.split("/")[0] + row.dtype: row for row in report.machine}
    rate = 2 * 16**3 / (of["matmulbfloat16"].ms / 1e3)
    bandwidth = 2 * FAST.copy_bytes / (of["copyfloat32"].ms / 1e3)
    assert quick.floor_ms == pytest.approx(1e3 * max(1000 / rate, 100 / bandwidth)) and rate > 0
    assert quick.share == pytest.approx(1000 / (quick.ms / 1e3) / rate)
    assert (quick.passed, quick.aim_passed) == (True, False)
    assert (quick.must, quick.aim) == ("<= 1000 ms, >= 2x", "<= 1e-06 ms")
    assert rows["slow"].passed is None


@pytest.mark.parametrize("must", [Goal(ms=1e3, speedup=2), Goal(share=1e-12)])
def test_what_was_not_measured_has_not_passed(must: Goal) -> None:
    no_baseline = variant_of(fails(ValueError("no baseline")))
    report = judged(group_of(must, slow=no_baseline, quick=variant_of(waits(1))))
    assert report.rows["case", "quick"].passed == (must.speedup is None)
    none = variant_of(fails(ValueError("none")))
    report = judged(group_of(must, slow=variant_of(waits(1)), quick=none))
    assert report.rows["case", "quick"].passed is False


def test_a_lost_device_ends_the_process_after_its_row(monkeypatch) -> None:
    monkeypatch.setattr(gpu_report, "lost", lambda device: True)
    group = group_of(
        slow=variant_of(fails(RuntimeError("illegal memory access"))), quick=variant_of(waits(1))
    )
    said = []
    measuring = Measuring(FAST, group, group.variants, time.monotonic() + 9, said.append)
    with pytest.raises(gpu_report.DeviceLost):
        measuring.run()
    assert [(row.variant, row.status) for row in said][-1] == ("slow", "failed")


def test_what_is_judged_comes_first_and_what_compiles_last() -> None:
    groups = gpu_report.groups(gpu_report.GPU)
    ordered = gpu_report.parts(groups)
    assert [part.group for part in ordered] == [0, 1, 2, 0, 1, 0, 1, 2]
    for part, group in zip(ordered, groups, strict=False):
        assert set(part.variants) == {group.judged, group.baseline}
    for part in ordered[5:]:
        assert all(groups[part.group].variants[name].compiles for name in part.variants)
    every = [(part.group, name) for part in ordered for name in part.variants]
    assert len(every) == len(set(every)) == sum(len(g.variants) for g in groups)

    own = gpu_report.parts(groups, baselines=False)
    names = {name for part in own for name in part.variants}
    assert "triton-bf16-latency" in names and "eager-unrolled" in names
    assert not names & {"reference", "reference-compiled", "compiled-unrolled", "compile"}
    some = gpu_report.parts(groups, only="E64/triton-bf16")
    assert {part.group for part in some} == {1} and some[0].variants[0] == "eager-unrolled"
    assert gpu_report.parts(groups, only="nothing") == []


def test_each_part_has_a_process_and_a_crash_costs_one_row(tmp_path: Path, capsys) -> None:
    """Real processes, on variants that end theirs in three ways."""
    report = Report(FAST, "tests.benchmarks.fake_groups:groups", time.monotonic() + 120)
    report.run()
    rows = {name: (row.status, row.note) for (_, name), row in report.rows.items()}
    assert rows["quick"][0] == "ok" and report.rows["case", "quick"].passed is True
    assert rows["slow"][0] == rows["after"][0] == "ok"
    assert rows["aborts"] == ("crashed", "its process ended with SIGABRT: the last words")
    assert rows["loses"] == ("failed", "RuntimeError: illegal memory access")
    assert {row.status for row in report.machine} == {"ok"}
    report.finish(tmp_path / "new" / "report.json")
    records = json.loads((tmp_path / "new" / "report.json").read_text())
    assert {r["variant"]: r["status"] for r in records if r["case"] == "case"} == {
        name: status for name, (status, _) in rows.items()
    }
    assert "the last words" in capsys.readouterr().out


def test_when_no_time_is_left_the_rest_says_so(tmp_path: Path, capsys) -> None:
    report = Report(FAST, "tests.benchmarks.fake_groups:groups", time.monotonic())
    report.run()
    report.finish(tmp_path / "report.json")
    machine, *records = json.loads((tmp_path / "report.json").read_text())
    assert {record["status"] for record in [machine, *records]} == {"out of time"}
    assert machine["note"] == "no time was left" and machine["note"] in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_script_without_a_gpu(tmp_path: Path, capsys) -> None:
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
    assert rows["update/tiny/24x6/8+8", "graph"]["must"] == "<= 2 ms, >= 6x"
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
        (["--out", "x", "--cpu-check", "--only", "no such"], "nothing contains 'no such'"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        gpu_report.main(arguments)
    assert message in capsys.readouterr().err
