"""Markdown tables for docs/benchmarks.md: `python -m benchmarks.table [REPORT]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import flops
from benchmarks.cases import PLAN_CASES, PlanCase

REPORT = Path(__file__).with_name("report.json")
# What each kind of case is compared with; the others have no ratio.
BASELINES = {"plan": "eager-unrolled", "update": "eager"}


def floors() -> str:
    """The operation counts of every planner case, in GFLOP a plan."""
    counts = (flops.plan_floor, flops.plan_advantage, flops.plan_unrolled)

    def row(case: PlanCase) -> list[str]:
        return [f"`{case.name}`", *(f"{count(case) / 1e9:.2f}" for count in counts)]

    return _table(("case", "floor", "`reference`", "`eager-unrolled`"), map(row, PLAN_CASES))


def results(report: Sequence[dict[str, Any]]) -> str:
    """Every record, and how many times faster than its baseline the median is.

    What was not measured has no figures.
    """
    medians = {(r["case"], r["variant"]): r["median_ms"] for r in report}

    def row(r: dict[str, Any]) -> list[str]:
        baseline = medians.get((r["case"], BASELINES.get(r["case"].split("/")[0])))
        rate, share = r["gflops"], r["share_of_matmul"]
        return [
            f"`{r['case']}`",
            f"`{r['variant']}`",
            *(
                "" if r[key] is None else f"{r[key]:.2f}"
                for key in ("median_ms", "p99_ms", "p99.9_ms", "max_ms")
            ),
            str(r["rounds"]),
            "" if rate is None else f"{rate:.1f}",
            "" if share is None else f"{share:.0%}",
            "" if not (baseline and r["median_ms"]) else f"{baseline / r['median_ms']:.2f}×",
        ]

    header = (
        "case",
        "variant",
        "median ms",
        "p99 ms",
        "p99.9 ms",
        "max ms",
        "rounds",
        "GFLOP/s",
        "of matmul",
        "against baseline",
    )
    return _table(header, map(row, report))


def conditions(report: Sequence[dict[str, Any]]) -> str:
    """Where and when the report was measured, one line for each different answer."""
    lines = {
        f"{r['device']}, {r['threads']} threads, torch {r['torch']}, {r['date']}": None
        for r in report
    }
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    loaded = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else REPORT).read_text("utf-8"))
    print(floors(), conditions(loaded), results(loaded), sep="\n\n")
