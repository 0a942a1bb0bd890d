"""The GPU path measured in one call: `python -m benchmarks.gpu_report --out report.json`.

The same cases, variants and records as `pytest --benchmark`, on a GPU and against goals. The
machine is measured first (matrix products, memory, launches), then the cases of `groups`, in
`parts`: what is judged of every group, with the baseline it is compared with, before the rest, and
what torch.compile makes slow to build last. Each part has a process of its own, so that whoever
ends his leaves the others' device alone; of a part that ends so, those that had no part in it are
measured in another. Within a part, variants are built one after the other, the fast ones checked
(`benchmarks.checks`), and then timed in turns. What crashes, fails, is wrong or does not end in
time is a record that says so, and the others still run. The table is printed last; `python -m
benchmarks.table` reads the JSON as well. `--cpu-check` runs all this on the CPU at tiny sizes,
where the variants that need a GPU are such records: it shows that the script works, and its figures
mean nothing.

docs/gpu.md says what the columns are.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
ROOT = Path(__file__).parents[1]
LOST = 70  # exit code of a process whose device was lost
GRACE_S = 15.0  # for a process to end in that no signal reaches
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
    status: str = "waiting"  # ok, wrong, failed, crashed, out of time, skipped
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
            Goal(ms=2, speedup=6),
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


class Part(NamedTuple):
    """What one process measures: variants of a group, by name; of no group, the machine."""

    group: int | None
    variants: tuple[str, ...] = ()


def parts(groups: list[Group], *, only: str = "", baselines: bool = True) -> list[Part]:
    """The judged variants of all groups first, what compiles last.

    only: part of CASE/VARIANT, of what is measured; a judged variant brings its baseline along.
    baselines: false leaves out all but judged variants, their baselines and what is a GPU's alone.
    """
    own = GPU_PLAN_VARIANTS | GPU_UPDATE_VARIANTS
    steps: list[list[Part]] = [[], [], []]
    for number, group in enumerate(groups):
        wanted = {name for name in group.variants if only in f"{group.case.name}/{name}"}
        if group.judged in wanted:
            wanted.add(group.baseline)
        first = {group.judged, group.baseline}
        slow = {name for name, v in group.variants.items() if v.compiles} - first
        rest = set(group.variants) - first - slow
        for step, names in zip(steps, (first, rest, slow), strict=True):
            chosen = tuple(
                name
                for name in group.variants
                if name in wanted & names and (baselines or name in first or name in own)
            )
            if chosen:
                step.append(Part(number, chosen))
    return [part for step in steps for part in step]


class DeviceLost(Exception):
    """An error of the device, after which every call of this process fails."""


def lost(device: str) -> bool:
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # whatever it says, nothing more can be run on it
        return True
    return False


class Measuring:
    """A part, in this process. `said` is called with each row when its state is known, and with
    one that is "begun" before what may end the process; `deadline` is a time of the monotonic
    clock."""

    def __init__(
        self,
        settings: Settings,
        group: Group,
        variants: Iterable[str],
        deadline: float,
        said: Callable[[Row], None],
    ):
        self.settings, self.group, self.deadline, self.said = settings, group, deadline, said
        self.rows = {name: row_of(group, name) for name in variants}

    def run(self) -> None:
        self.measure(self.build())
        for row in self.rows.values():
            self.said(row)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def build(self) -> dict[str, Callable[[], object]]:
        """What is ready to be timed, by variant."""
        ready = {}
        for name, row in self.rows.items():
            variant = self.group.variants[name]
            self.said(dataclasses.replace(row, status="begun"))
            seconds = min(self.settings.build_s, self.left() - self.settings.timing_s)
            with self.reported(row, seconds):
                run = variant.build(self.group.case)
                run(), run()  # what compiles late, compiles here
                row.note = getattr(getattr(run, "func", None), "schedule", None) or ""
                ready[name] = run
            if row.status != "waiting":
                self.end(row)
        return ready

    def measure(self, ready: dict[str, Callable[[], object]]) -> None:
        """Time the variants in turns."""
        until = time.monotonic() + min(self.settings.timing_s, self.left())
        for turn in range(1000):
            if turn >= 3 and time.monotonic() > until or not ready:
                break
            for name, run in list(ready.items()):
                row = self.rows[name]
                self.said(dataclasses.replace(row, status="begun", seconds=[], wall=[]))
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
                    self.end(row)
        for name in ready:
            self.rows[name].status = "ok"

    def end(self, row: Row) -> None:
        """Say a row that went wrong; `DeviceLost` where nothing more can be measured here."""
        self.said(row)
        if lost(self.settings.device):
            raise DeviceLost

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


def row_of(group: Group, name: str) -> Row:
    variant = group.variants[name]
    return Row(group.case.name, name, variant.dtype, variant.flops(group.case))


class Report:
    """Has the parts measured, each in a process, and judges. `groups` is where they come from, as
    MODULE:FUNCTION of `Settings`: a process finds them there too."""

    def __init__(
        self,
        settings: Settings,
        groups: str,
        deadline: float,
        *,
        only: str = "",
        baselines: bool = True,
    ):
        self.settings, self.source, self.deadline = settings, groups, deadline
        self.groups = found(groups)(settings)
        self.parts = parts(self.groups, only=only, baselines=baselines)
        self.rows = {
            (self.groups[part.group].case.name, name): row_of(self.groups[part.group], name)
            for part in self.parts
            for name in part.variants
        }
        self.machine: list[Row] = []

    def run(self) -> None:
        self.machine, ended = self.process(Part(None))
        if ended is not None:  # the cases are still worth running
            self.machine = [Row("machine", "", status=ended.status, note=ended.note)]
        for part in self.parts:
            self.measure(part)
        for group in self.groups:
            self.judge(group)

    def measure(self, part: Part) -> None:
        """A part, again without whoever ended its process."""
        group, remaining = self.groups[part.group], part.variants
        if not self.settings.compile:
            for name in [name for name in remaining if group.variants[name].compiles]:
                row = self.rows[group.case.name, name]
                row.status, row.note = "skipped", "compiles"
            remaining = tuple(name for name in remaining if not group.variants[name].compiles)
        while remaining:
            rows, ended = self.process(part._replace(variants=remaining))
            done = {row.variant: row for row in rows if row.status != "begun"}
            begun = [row for row in rows if row.status == "begun"]
            if ended is not None and not (ended.status == "lost" and done):
                first = next(name for name in remaining if name not in done)
                culprit = begun[-1] if begun else self.rows[group.case.name, first]
                done[culprit.variant] = dataclasses.replace(
                    culprit, status=ended.status, note=ended.note
                )
            for row in done.values():
                self.rows[row.case, row.variant] = row
            remaining = tuple(name for name in remaining if name not in done)

    def process(self, part: Part) -> tuple[list[Row], Row | None]:
        """The rows that a process said of a part, and how it ended where that was not well."""
        seconds = self.left()
        if seconds <= 0:
            return [], Row("", "", status="out of time", note="no time was left")
        with tempfile.TemporaryDirectory() as folder:
            said, errors = Path(folder, "rows"), Path(folder, "stderr")
            words = [sys.executable, "-m", "benchmarks.gpu_report", "--groups", self.source]
            words += ["--part", json.dumps(part), "--out", str(said), "--limit", f"{seconds}"]
            words += ["--cpu-check"] * (self.settings.device == "cpu")
            with errors.open("w") as stderr:
                child = subprocess.Popen(words, stderr=stderr, start_new_session=True, cwd=ROOT)
                try:
                    status = child.wait(seconds + GRACE_S)
                except subprocess.TimeoutExpired:
                    status = None
                finally:
                    if child.poll() is None:
                        os.killpg(child.pid, signal.SIGKILL)  # no signal of its own reached it
                        child.wait()
            rows = read_rows(said)
            if status == 0:
                return rows, None
            if status == LOST:
                return rows, Row("", "", status="lost", note="the device was lost")
            if status is None:
                return rows, Row("", "", status="out of time", note="something did not return")
            last = errors.read_text(errors="replace").strip().splitlines()[-1:]
            note = f"its process ended with {ending(status)}" + (f": {last[0]}" if last else "")
            return rows, Row("", "", status="crashed", note=note[:200])

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def judge(self, group: Group) -> None:
        rates = {r.dtype: r.measurement().gflops for r in self.machine if r.operations}
        bandwidth = next(
            (2 * self.settings.copy_bytes / r.ms for r in self.machine if r.case[:5] == "copy/"),
            None,
        )
        measured = {name: self.rows.get((group.case.name, name)) for name in group.variants}
        slowest = measured[group.baseline]
        baseline = None if slowest is None else slowest.ms
        for name, row in measured.items():
            if row is None:
                continue
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


def found(name: str) -> Callable[[Settings], list[Group]]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def read_rows(path: Path) -> list[Row]:
    """The last state of each row that a process wrote, the one it was at last at the end."""
    rows: dict[tuple[str, str], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line that was cut off
            row = Row(**json.loads(line))
            rows.pop((row.case, row.variant), None)
            rows[row.case, row.variant] = row
    return list(rows.values())


def ending(status: int) -> str:
    return f"exit code {status}" if status > 0 else signal.Signals(-status).name


def measure_part(settings: Settings, groups: str, part: Part, out: Path, seconds: float) -> None:
    """Measure a part in this process; its rows go to `out`, a line of JSON each time."""
    with out.open("w") as file:

        def said(row: Row) -> None:
            print(json.dumps(dataclasses.asdict(row)), file=file, flush=True)

        if part.group is None:
            with time_limit(seconds):
                for row in machine(settings):
                    said(row)
        else:
            group = found(groups)(settings)[part.group]
            deadline = time.monotonic() + seconds
            Measuring(settings, group, part.variants, deadline, said).run()


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
    parser.add_argument("--only", default="", help="what CASE/VARIANT contains")
    parser.add_argument(
        "--no-baselines",
        action="store_true",
        help="of the variants that are no GPU's, only those that goals are compared with",
    )
    parser.add_argument(
        "--cpu-check",
        action="store_true",
        help="tiny sizes on the CPU: whether the script works; no figure counts",
    )
    # Of a process of the report's own.
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--groups", default="benchmarks.gpu_report:groups", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.limit <= 0:
        parser.error(f"--limit must be positive, got {given.limit:g}")
    if not given.cpu_check and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --cpu-check runs the script without one")
    settings = CPU_CHECK if given.cpu_check else GPU
    if given.part is not None:
        number, variants = json.loads(given.part)
        try:
            measure_part(settings, given.groups, Part(number, variants), given.out, given.limit)
        except DeviceLost:
            return LOST
        return 0
    measured = Report(
        settings,
        given.groups,
        time.monotonic() + given.limit,
        only=given.only,
        baselines=not given.no_baselines,
    )
    if not measured.rows:
        parser.error(f"--only: nothing contains {given.only!r}")
    measured.run()
    measured.finish(given.out)
    return 0 if all(row.passed is not False for row in measured.rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
