"""The GPU path measured in one call: `python -m benchmarks.gpu_report --out report.json`.

The same cases, variants and records as `pytest --benchmark`, on a GPU and against goals. The
machine is measured first (matrix products, memory, launches), then the cases of `groups`. Within a
group, variants are built one after the other, the fast ones checked (`benchmarks.checks`), and then
timed in turns in this process. What fails, is wrong or does not end in time is a record that says
so, and the others still run. The table is printed last; `python -m benchmarks.table` reads the
JSON as well. `--cpu-check` runs all this on the CPU at tiny sizes, where the variants that need a
GPU are such records: it shows that the script works, and its figures mean nothing.

docs/gpu.md says what the columns are.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import flops, report
from benchmarks.cases import PlanCase, UpdateCase
from benchmarks.checks import Wrong
from benchmarks.report import Measurement
from benchmarks.table import BASELINES
from benchmarks.timing import time_limit, timed
from benchmarks.variants import (
    GPU_PLAN_VARIANTS,
    GPU_UPDATE_VARIANTS,
    PLAN_VARIANTS,
    UPDATE_VARIANTS,
    Variant,
)

LIMIT_S = 450.0  # of the whole run: below 8 minutes
BUILD_S, TIMING_S = 150.0, 10.0  # of a variant to be ready and checked; of a group to be timed
LAUNCHES = 1000


@dataclass(frozen=True)
class Settings:
    """Where and how large."""

    device: str
    plan: PlanCase
    update: UpdateCase
    many: int  # problems at once in the throughput case
    matmul: int
    copy_bytes: int
    build_s: float = BUILD_S
    timing_s: float = TIMING_S
    compile: bool = True


GPU = Settings(
    "cuda",
    PlanCase("paper", "paper", 91, 39, 1, "cuda"),
    UpdateCase("paper", 91, 39, 256, device="cuda"),
    64,
    8192,
    1 << 30,
)
CPU_CHECK = Settings(
    "cpu",
    PlanCase("tiny", "cpu", 24, 6, 1),
    UpdateCase("tiny", 24, 6, 8),
    2,
    256,
    1 << 20,
    timing_s=0.3,
    compile=False,
)


@dataclass
class Row:
    """A record in the making. `seconds` are by the device's clock, `wall` by the host's."""

    case: str
    variant: str
    dtype: str = "float32"
    operations: int = 0
    status: str = "waiting"  # ok, wrong, failed, out of time, skipped
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    floor_ms: float | None = None
    speedup: float | None = None  # over the group's baseline
    share: float | None = None  # of the machine's matrix product of the same dtype
    must: str = ""
    aim: str = ""
    passed: bool | None = None
    aim_passed: bool | None = None

    @property
    def ms(self) -> float | None:
        return 1e3 * statistics.median(self.seconds) if self.seconds else None

    def measurement(self) -> Measurement:
        return Measurement(self.case, self.variant, self.dtype, self.operations, self.seconds)


@dataclass(frozen=True)
class Goal:
    """What the judged variant must reach, and what it aims at."""

    ms: float | None = None
    speedup: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        parts = (
            self.ms and f"<= {self.ms:g} ms",
            self.speedup and f">= {self.speedup:g}x",
            self.share and f">= {self.share:.0%}",
        )
        return ", ".join(p for p in parts if p)

    def met(self, row: Row) -> bool:
        """A figure that is missing meets nothing."""
        return all(
            (
                self.ms is None or (row.ms is not None and row.ms <= self.ms),
                self.speedup is None or (row.speedup is not None and row.speedup >= self.speedup),
                self.share is None or (row.share is not None and row.share >= self.share),
            )
        )


@dataclass(frozen=True)
class Group:
    """Variants of one case, compared with `baseline`; `judged` is held to `must` and `aim`.

    The floor is what `operations` of `dtype` and `bytes` take at the machine's own rates.
    """

    case: Any
    variants: dict[str, Variant]
    operations: int
    bytes: int
    dtype: str
    baseline: str
    judged: str
    must: Goal
    aim: Goal


def groups(s: Settings) -> list[Group]:
    """A plan for one problem, a plan for many, an update."""

    def plan(case: PlanCase, must: Goal, aim: Goal) -> Group:
        names = ["eager-unrolled", "reference", "reference-compiled"]
        if case.problems == 1:
            names.append("compiled-unrolled")
        if case.device == "cpu":  # so that the check has a fast one
            names.append("cpu")
        return Group(
            case,
            {name: PLAN_VARIANTS[name] for name in names} | GPU_PLAN_VARIANTS,
            flops.plan_floor(case),
            flops.plan_bytes(case, 2),
            "bfloat16",
            BASELINES["plan"],
            "triton-bf16",
            must,
            aim,
        )

    return [
        plan(s.plan, Goal(ms=0.6, speedup=20), Goal(ms=0.25)),
        plan(dataclasses.replace(s.plan, problems=s.many), Goal(share=0.35), Goal(share=0.6)),
        Group(
            s.update,
            {name: UPDATE_VARIANTS[name] for name in ("eager", "compile")} | GPU_UPDATE_VARIANTS,
            flops.update(s.update),
            flops.update_bytes(s.update),
            "float32",
            BASELINES["update"],
            "graph",
            Goal(ms=2, speedup=8),
            Goal(ms=1),
        ),
    ]


def machine(s: Settings) -> list[Row]:
    """Matrix products (float32's in tf32, as torch makes them fastest), a copy read and written,
    and launches one by one and as the nodes of a graph."""
    rows = []

    def measure(case: str, run: Callable[[], object], **how: Any) -> None:
        for _ in range(3):
            run()
        seconds, wall = zip(*(timed(run, s.device) for _ in range(20)), strict=True)
        rows.append(Row(case, "torch", status="ok", seconds=[*seconds], wall=[*wall], **how))

    size = "x".join([str(s.matmul)] * 3)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for dtype in ("bfloat16", "float32"):
            x, y = torch.randn(2, s.matmul, s.matmul, device=s.device).to(getattr(torch, dtype))
            operations = flops.matmul(s.matmul)
            measure(
                f"matmul/{size}/{dtype}",
                lambda x=x, y=y: x @ y,
                dtype=dtype,
                operations=operations,
            )
    finally:
        torch.set_float32_matmul_precision(before)
    source = torch.randn(s.copy_bytes // 4, device=s.device)
    target = torch.empty_like(source)
    measure(f"copy/{s.copy_bytes}", lambda: target.copy_(source))
    one = torch.zeros(1, device=s.device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    measure(f"launches/{LAUNCHES}", launches)
    if s.device != "cpu":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launches()
        measure(f"graph-nodes/{LAUNCHES}", graph.replay)
    return rows


class Report:
    """The rows so far. `deadline` is a time of the monotonic clock."""

    def __init__(self, settings: Settings, groups: list[Group], deadline: float):
        self.settings, self.groups, self.deadline = settings, groups, deadline
        self.rows = {
            (g.case.name, name): Row(g.case.name, name, v.dtype, v.flops(g.case))
            for g in groups
            for name, v in g.variants.items()
        }
        self.machine: list[Row] = []

    def run(self) -> None:
        try:
            with time_limit(self.left()):
                self.machine = machine(self.settings)
        except Exception as error:  # the cases are still worth running
            self.machine = [Row("machine", "", status="failed", note=describe(error))]
        for group in self.groups:
            self.measure(group, self.build(group))
            if self.settings.device != "cpu":
                torch.cuda.empty_cache()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def build(self, group: Group) -> dict[str, Callable[[], object]]:
        """What is ready to be timed, by variant."""
        ready = {}
        for name, variant in group.variants.items():
            row = self.rows[group.case.name, name]
            if variant.compiles and not self.settings.compile:
                row.status, row.note = "skipped", "compiles"
                continue
            seconds = min(self.settings.build_s, self.left() - self.settings.timing_s)
            with self.reported(row, seconds):
                run = variant.build(group.case)
                run(), run()  # what compiles late, compiles here
                row.note = getattr(getattr(run, "func", None), "schedule", None) or ""
                ready[name] = run
        return ready

    def measure(self, group: Group, ready: dict[str, Callable[[], object]]) -> None:
        """Time the variants in turns, then judge."""
        until = time.monotonic() + min(self.settings.timing_s, self.left())
        for turn in range(1000):
            if turn >= 3 and time.monotonic() > until or not ready:
                break
            for name, run in list(ready.items()):
                row = self.rows[group.case.name, name]
                with self.reported(row, self.left()):
                    # fast ones several times a turn
                    last = row.seconds[-1] if row.seconds else 1.0
                    for _ in range(min(10, int(5e-3 / max(last, 1e-5)) + 1)):
                        seconds, wall = timed(run, self.settings.device)
                        row.seconds.append(seconds)
                        row.wall.append(wall)
                if row.status != "waiting":
                    row.seconds, row.wall = [], []
                    del ready[name]
        for name in ready:
            self.rows[group.case.name, name].status = "ok"
        self.judge(group)

    def judge(self, group: Group) -> None:
        rates = {r.dtype: r.measurement().gflops for r in self.machine if r.operations}
        bandwidth = next(
            (2 * self.settings.copy_bytes / r.ms for r in self.machine if r.case[:5] == "copy/"),
            None,
        )
        baseline = self.rows[group.case.name, group.baseline].ms
        for name in group.variants:
            row = self.rows[group.case.name, name]
            if rates and bandwidth:
                row.floor_ms = max(
                    group.operations / (1e6 * rates[group.dtype]), group.bytes / bandwidth
                )
            if row.ms is not None:
                row.speedup = baseline / row.ms if baseline else None
                rate = rates.get(row.dtype)
                row.share = row.measurement().gflops / rate if rate else None
            if name == group.judged:
                row.must, row.aim = str(group.must), str(group.aim)
                row.passed, row.aim_passed = group.must.met(row), group.aim.met(row)

    @contextlib.contextmanager
    def reported(self, row: Row, seconds: float) -> Iterator[None]:
        """What goes wrong in the block becomes the row's status."""
        if seconds <= 0:
            row.status, row.note = "out of time", "no time was left"
        try:
            with time_limit(seconds):
                yield
        except TimeoutError as error:
            row.status, row.note = "out of time", str(error)
        except Wrong as error:
            row.status, row.note = "wrong", str(error)
        except Exception as error:
            row.status, row.note = "failed", describe(error)

    def finish(self, out: Path) -> None:
        """Write the JSON and print the table."""
        rows = [*self.machine, *self.rows.values()]
        for row in rows:
            if row.status == "waiting":
                row.status, row.note = "out of time", row.note or "not reached"
        records = report.records([row.measurement() for row in rows], conditions(self.settings))
        for row, record in zip(rows, records, strict=True):
            record["wall_ms"] = report.percentile_ms(row.wall, 50)
            for key in ("status", "note", "floor_ms", "speedup"):
                record[key] = getattr(row, key)
            if row.must:
                for key in ("must", "passed", "aim", "aim_passed"):
                    record[key] = getattr(row, key)
        report.write(out, records)
        print(text(records), flush=True)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def conditions(s: Settings) -> dict[str, Any]:
    """What a GPU's records say beside a CPU's of where they were measured."""
    if s.device == "cpu":
        return {"cpu_check": True}  # no figure counts
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "driver": None,
        "triton": None,
    }
    with contextlib.suppress(ImportError):
        import importlib.metadata as metadata

        found["triton"] = metadata.version("triton")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["driver"] = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout.strip()
    return found


# Columns of the printed table: of a record, and how a number is written.
_COLUMNS = {
    "case": "",
    "variant": "",
    "status": "",
    "median_ms": ".3f",
    "p99_ms": ".3f",
    "wall_ms": ".3f",
    "floor_ms": ".4f",
    "speedup": ".2f",
    "share_of_matmul": ".1%",
    "must": "",
    "passed": "",
    "aim": "",
    "aim_passed": "",
    "note": "",
}


def text(records: list[dict[str, Any]]) -> str:
    """The table, with where and when it was measured above it."""

    def cell(record: dict[str, Any], key: str) -> str:
        value = record.get(key)
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "" if value is None else format(value, _COLUMNS[key])

    lines = [tuple(_COLUMNS), *(tuple(cell(r, key) for key in _COLUMNS) for r in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    where = ("device", "torch", "cuda", "driver", "triton", "date")
    return "\n".join(
        [
            "; ".join(f"{k}: {records[0][k]}" for k in where if records[0].get(k)),
            *(
                "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
                for line in lines
            ),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 where every judged row passed, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of the whole run")
    parser.add_argument(
        "--cpu-check",
        action="store_true",
        help="tiny sizes on the CPU: whether the script works; no figure counts",
    )
    given = parser.parse_args(arguments)
    if given.limit <= 0:
        parser.error(f"--limit must be positive, got {given.limit:g}")
    if not given.cpu_check and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --cpu-check runs the script without one")
    settings = CPU_CHECK if given.cpu_check else GPU
    measured = Report(settings, groups(settings), time.monotonic() + given.limit)

    def give_up() -> None:  # the main thread is stuck where no signal reaches it
        measured.machine.append(Row("run", "", status="cut off", note="something did not return"))
        measured.finish(given.out)
        os._exit(1)

    watchdog = threading.Timer(given.limit + 15, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        measured.run()
    finally:
        watchdog.cancel()
    measured.finish(given.out)
    return 0 if all(row.passed is not False for row in measured.rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
