"""The GPU path measured in one call: `python -m benchmarks.gpu_report --out report.json`.

Measures the machine first (matrix products, memory, launches), then the cases of `groups`, and
prints one table last; the JSON holds the same rows. Within a group, variants are built one after
the other, the fast ones checked against float64 (updates: against the eager update), and then
timed in turns in this process. What fails, is wrong or does not end in time is a row that says so,
and the others still run. `--cpu-check` runs all this on the CPU at tiny sizes, where the variants
that need a GPU are such rows: it shows that the script works, and its figures mean nothing.

docs/gpu.md says what the columns are.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import flops
from benchmarks.cases import PlanCase, UpdateCase
from benchmarks.eager_unrolled import EagerUnrolled
from iqmpc.capture import WARM_UPS
from iqmpc.config import PlannerConfig
from iqmpc.episode import Episode
from iqmpc.files import write_atomically
from iqmpc.kernels.mppi_plan import BACKENDS, PlanNoise, ReferencePlan
from iqmpc.kernels.mppi_refit import mppi_refit
from iqmpc.kernels.weights import Weights, snapshot
from iqmpc.learner import Learner
from iqmpc.replay import SliceReplay

TOLERANCE = {"float32": 1e-4, "bf16": 2e-2}  # of returns, relative: the contract's
LIMIT_S = 450.0  # of the whole run: below 8 minutes
BUILD_S, TIMING_S = 150.0, 10.0  # of a variant to be ready and checked; of a group to be timed


class Wrong(Exception):
    """A fast variant's answer is not the reference's."""


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
    planner: dict[str, Any] = field(default_factory=dict)  # changes to the case's

    def plan_config(self, case: PlanCase, **changes: Any) -> PlannerConfig:
        return dataclasses.replace(case.config.planner, **(self.planner | changes))


GPU = Settings(
    "cuda",
    PlanCase("paper", "paper", 91, 39, 1),
    UpdateCase("paper", 91, 39, 256),
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
    planner=dict(samples=24, elites=6, policy_trajectories=4, iterations=2, mode="eager"),
)


@dataclass
class Row:
    """One line of the table. `ms` is the median by the device's clock, `wall_ms` by the host's."""

    case: str
    variant: str
    status: str = "waiting"  # ok, wrong, failed, out of time, skipped
    note: str = ""
    ms: float | None = None
    p90_ms: float | None = None
    wall_ms: float | None = None
    rounds: int = 0
    floor_ms: float | None = None
    speedup: float | None = None  # over the group's baseline
    share: float | None = None  # of the measured matrix rate
    must: str = ""
    aim: str = ""
    passed: bool | None = None
    aim_passed: bool | None = None


@dataclass(frozen=True)
class Variant:
    """`build()` gives what is timed, ready and, where it is fast, checked."""

    name: str
    build: Callable[[], Callable[[], object]]
    compiles: bool = False


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
    """Variants of one case, compared with `baseline`; `judged` is held to `must` and `aim`."""

    case: str
    variants: list[Variant]
    operations: int
    bytes: int
    rate: str  # the machine's figure that bounds the operations
    baseline: str
    judged: str
    must: Goal
    aim: Goal


# --- What is timed ------------------------------------------------------------------------------


def on(weights: Weights, device: str) -> Weights:
    return weights.map(lambda t: t.detach().to(device))


def eager_unrolled(s: Settings, case: PlanCase, *, compiled: bool) -> Callable[[], object]:
    config = case.config
    planner = EagerUnrolled(
        snapshot(on(case.world_model().weights(), s.device)),
        s.plan_config(case),
        discount=config.discount,
        entropy=case.entropy,
        num_envs=case.envs,
        compiled=compiled,
    )
    obs = case.observations()

    def run() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # tf32: the baseline as fast as torch makes it
        try:
            return planner.plan(obs.to(s.device)).cpu()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def package(
    s: Settings, case: PlanCase, *, backend: str, schedule: str | None = None, **changes: Any
) -> Callable[[], object]:
    config = s.plan_config(case, **changes)
    weights, obs = on(case.world_model().weights(), s.device), case.observations()
    settings = dict(discount=case.config.discount, entropy_coef=case.entropy, problems=case.envs)
    if schedule is not None:
        settings["schedule"] = schedule
    plan = BACKENDS[backend](weights, config, **settings)
    if backend == "triton":
        once = dataclasses.replace(config, iterations=1)
        first = BACKENDS[backend](weights, once, **settings)
        check_plan(first, once, weights, obs, settings["discount"], elites=0.95)
        check_plan(plan, config, weights, obs, settings["discount"])

    def run() -> object:
        return plan(obs)

    run.plan = plan
    return run


def check_plan(
    plan: Any,
    config: PlannerConfig,
    weights: Weights,
    obs: Tensor,
    discount: float,
    *,
    elites: float = 0.0,
) -> None:
    """Raise `Wrong` unless the last iteration of a Triton plan is the float64 reference's.

    Its returns are the reference's of the same actions and draws, within the contract's tolerance,
    and so are the policy's trajectories; the mean is the refit to those returns. elites: the share
    of them that must be the reference's, for a plan of one iteration: later ones sample where
    returns hardly differ.
    """
    done = plan(obs)
    *drawn, pair = plan.draws()
    noise = PlanNoise(*(t.double() for t in drawn), pair)
    exact = snapshot(weights, torch.float64)
    wide = dataclasses.replace(config, precision="float64", score="advantage", capture=None)
    reference = ReferencePlan(exact, wide, discount=discount, problems=len(obs))
    mean = torch.zeros_like(plan.mean, dtype=torch.float64)
    z0 = reference.begin(exact, obs.to(mean), mean, noise)[0]
    prior = reference.policy_trajectories(exact, z0, noise.policy_noise)
    tolerance, count = TOLERANCE[config.precision], config.policy_trajectories
    actions = plan.actions.double()
    scores = torch.cat(
        [
            reference.returns(exact, z0, part, draws, noise.root, pair)
            for part, draws in (
                (actions[:, :, :count], noise.policy_score_noise),
                (actions[:, :, count:], noise.score_noise[-1]),
            )
        ],
        dim=1,
    )

    def compare(what: str, got: Tensor, expected: Tensor, allowed: float) -> None:
        error = ((got - expected).norm() / expected.norm()).item()
        if not error <= allowed:
            raise Wrong(f"{what}: {error:.1e} from the float64 reference, allowed {allowed:.0e}")

    compare("policy trajectories", actions[:, :, :count], prior, tolerance)
    compare("returns", plan.returns.double(), scores, tolerance)
    refit = mppi_refit(
        actions,
        plan.returns.double(),
        elites=config.elites,
        temperature=config.temperature,
        std_min=config.std_min,
        std_max=config.std_max,
        backend="reference",
    )
    compare("mean", plan.mean.double(), refit[0], 1e-4)
    best = scores.topk(config.elites, dim=1).indices
    same = (best.unsqueeze(2) == refit[2].unsqueeze(1)).any(2).double().mean().item()
    if same < elites:
        raise Wrong(f"elites: {same:.1%} are the float64 reference's, expected {elites:.0%}")
    if done.nonfinite or not done.action.abs().max() <= 1:
        raise Wrong("action: not finite or out of range")


def learn(s: Settings, mode: str) -> Callable[[], object]:
    """Updates by `Learner.learn`, after six of them were those of the eager learner.

    More than `WARM_UPS`, so that replays of the graph are among them.
    """

    def build(mode: str) -> tuple[Learner, Callable[[], dict[str, Tensor]]]:
        case, config = s.update, s.update.config
        config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, mode=mode))
        learner = Learner(case.obs_dim, case.action_dim, config, s.device)
        draw, replays = torch.Generator().manual_seed(1), []
        for _ in range(2):
            replay = SliceReplay(
                case.obs_dim,
                case.action_dim,
                horizon=config.learner.horizon,
                capacity=100_000,
                device=s.device,
            )
            for _ in range(100):
                obs = torch.randn(101, case.obs_dim, generator=draw)
                action = torch.rand(100, case.action_dim, generator=draw) * 2 - 1
                replay.add(Episode(obs.numpy(), action.numpy()))
            replays.append(replay)
        return learner, lambda: learner.learn(*replays)

    _, run = build(mode)
    if mode != "eager":
        _, eager = build("eager")
        for update in range(2 * WARM_UPS):
            expected = {k: float(v) for k, v in eager().items()}
            for key, value in run().items():
                # Adam's first steps turn rounding into steps of full length.
                if not abs(float(value) - expected[key]) <= 1e-2 * max(1.0, abs(expected[key])):
                    raise Wrong(
                        f"update {update}: {key} is {float(value):.6g}, the eager "
                        f"update's {expected[key]:.6g}"
                    )
    return run


def groups(s: Settings) -> list[Group]:
    def plans(case: PlanCase) -> list[Variant]:
        def triton(**how: Any) -> Callable[[], Callable[[], object]]:
            return lambda: package(s, case, backend="triton", precision="bf16", **how)

        def reference(mode: str) -> Callable[[], Callable[[], object]]:
            return lambda: package(s, case, backend="reference", mode=mode)

        variants = [
            Variant("eager-unrolled", lambda: eager_unrolled(s, case, compiled=False)),
            Variant("triton captured", triton()),
            Variant("triton captured, latency", triton(schedule="latency")),
            Variant("triton captured, throughput", triton(schedule="throughput")),
            Variant("triton uncaptured", triton(capture=False)),
            Variant("reference", reference("eager")),
            Variant("reference compiled", reference("compile"), compiles=True),
        ]
        if case.envs == 1:
            variants.append(
                Variant(
                    "eager-unrolled compiled",
                    lambda: eager_unrolled(s, case, compiled=True),
                    compiles=True,
                )
            )
        if s.device == "cpu":  # so that the check has a fast one
            variants.append(Variant("cpu", lambda: package(s, case, backend="cpu")))
        return variants

    many = dataclasses.replace(s.plan, envs=s.many)
    return [
        *(
            Group(
                case.name,
                plans(case),
                flops.plan_floor(case),
                flops.plan_bytes(case, 2),
                "bf16",
                "eager-unrolled",
                "triton captured",
                must,
                aim,
            )
            for case, must, aim in (
                (s.plan, Goal(ms=0.6, speedup=20), Goal(ms=0.25)),
                (many, Goal(share=0.35), Goal(share=0.6)),
            )
        ),
        Group(
            s.update.name,
            [
                Variant("eager", lambda: learn(s, "eager")),
                Variant("graph", lambda: learn(s, "graph"), compiles=s.device != "cpu"),
                Variant("compile", lambda: learn(s, "compile"), compiles=True),
            ],
            flops.update(s.update),
            flops.update_bytes(s.update),
            "tf32",
            "eager",
            "graph",
            Goal(ms=2, speedup=8),
            Goal(ms=1),
        ),
    ]


# --- How it is timed ----------------------------------------------------------------------------


def timed(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Milliseconds of one call: between CUDA events around it, and by the host's clock until the
    device is done. On the CPU both are the host's."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        wall = 1e3 * (time.perf_counter() - start)
        return wall, wall
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), 1e3 * (time.perf_counter() - start)


def median_ms(run: Callable[[], object], device: str, rounds: int = 20) -> float:
    for _ in range(3):
        run()
    return statistics.median(timed(run, device)[0] for _ in range(rounds))


def machine(s: Settings) -> dict[str, float]:
    """Rates in operations and bytes a second, and microseconds a launch and a node of a graph."""
    found: dict[str, float] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        x, y = (torch.randn(s.matmul, s.matmul, device=s.device).to(dtype) for _ in range(2))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        ms = median_ms(lambda x=x, y=y: x @ y, s.device)
        torch.set_float32_matmul_precision(before)
        found[name] = flops.matmul(s.matmul) / (1e-3 * ms)
    source = torch.randn(s.copy_bytes // 4, device=s.device)
    target = torch.empty_like(source)
    found["bytes"] = 2 * s.copy_bytes / (1e-3 * median_ms(lambda: target.copy_(source), s.device))
    one, nodes = torch.zeros(1, device=s.device), 1000

    def launches() -> None:
        for _ in range(nodes):
            one.add_(1)

    found["launch_us"] = 1e3 * median_ms(launches, s.device, 5) / nodes
    if s.device != "cpu":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launches()
        found["node_us"] = 1e3 * median_ms(graph.replay, s.device) / nodes
    return found


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block after `seconds`. In the main thread."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """The rows so far. `deadline` is a time of the monotonic clock."""

    def __init__(self, settings: Settings, groups: list[Group], deadline: float):
        self.settings, self.groups, self.deadline = settings, groups, deadline
        self.rows = {(g.case, v.name): Row(g.case, v.name) for g in groups for v in g.variants}
        self.machine: dict[str, float] = {}
        self.error = ""

    def run(self) -> None:
        try:
            with time_limit(self.left()):
                self.machine = machine(self.settings)
        except Exception as error:  # the cases are still worth running
            self.error = f"the machine was not measured: {describe(error)}"
        for group in self.groups:
            self.measure(group, self.build(group))
            if self.settings.device != "cpu":
                torch.cuda.empty_cache()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def build(self, group: Group) -> dict[str, Callable[[], object]]:
        """What is ready to be timed, by variant."""
        ready = {}
        for variant in group.variants:
            row = self.rows[group.case, variant.name]
            if variant.compiles and not self.settings.compile:
                row.status, row.note = "skipped", "compiles"
                continue
            seconds = min(self.settings.build_s, self.left() - self.settings.timing_s)
            with self.reported(row, seconds):
                run = variant.build()
                run(), run()  # what compiles late, compiles here
                plan = getattr(run, "plan", None)
                row.note = getattr(plan, "schedule", None) or ""
                ready[variant.name] = run
        return ready

    def measure(self, group: Group, ready: dict[str, Callable[[], object]]) -> None:
        """Time the variants in turns, then judge."""
        device, took = self.settings.device, {name: [] for name in ready}
        until = time.monotonic() + min(self.settings.timing_s, self.left())
        for turn in range(1000):
            if turn >= 3 and time.monotonic() > until or not ready:
                break
            for name, run in list(ready.items()):
                with self.reported(self.rows[group.case, name], self.left()):
                    # fast ones several times a turn
                    again = (
                        1 if not took[name] else min(10, int(5 / max(took[name][-1][0], 0.01)) + 1)
                    )
                    took[name] += [timed(run, device) for _ in range(again)]
                if self.rows[group.case, name].status != "waiting":
                    del ready[name]
        for name in ready:
            row = self.rows[group.case, name]
            by_device, by_host = zip(*took[name], strict=True)
            row.status, row.rounds = "ok", len(by_device)
            row.ms, row.wall_ms = statistics.median(by_device), statistics.median(by_host)
            row.p90_ms = sorted(by_device)[int(0.9 * (len(by_device) - 1))]
        self.judge(group)

    def judge(self, group: Group) -> None:
        rows = [self.rows[group.case, v.name] for v in group.variants]
        baseline = self.rows[group.case, group.baseline].ms
        for row in rows:
            if self.machine:
                row.floor_ms = 1e3 * max(
                    group.operations / self.machine[group.rate], group.bytes / self.machine["bytes"]
                )
            if row.ms is not None:
                row.speedup = baseline / row.ms if baseline else None
                row.share = (
                    group.operations / (1e-3 * row.ms) / self.machine[group.rate]
                    if self.machine
                    else None
                )
            if row.variant == group.judged:
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
        for row in self.rows.values():
            if row.status == "waiting":
                row.status, row.note = "out of time", row.note or "not reached"
        document = {
            "conditions": conditions(self.settings),
            "machine": self.machine,
            "error": self.error,
            "rows": [dataclasses.asdict(row) for row in self.rows.values()],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
        print(text(document), flush=True)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def conditions(s: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": None,
        "triton": None,
        "cpu_check": s.device == "cpu",
    }
    with contextlib.suppress(ImportError):
        import importlib.metadata as metadata

        found["triton"] = metadata.version("triton")
    if s.device != "cpu":
        found["device"] = torch.cuda.get_device_name()
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found["driver"] = subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
            ).stdout.strip()
    return found


def text(document: dict[str, Any]) -> str:
    """The table, with where and when it was measured above it."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def word(passed: bool | None) -> str:
        return "" if passed is None else "passed" if passed else "not passed"

    header = (
        "case",
        "variant",
        "status",
        "ms",
        "p90",
        "wall ms",
        "floor ms",
        "x floor",
        "speed-up",
        "of matmul",
        "must",
        "",
        "aim",
        "",
        "note",
    )
    lines = [header]
    for r in document["rows"]:
        over = r["ms"] / r["floor_ms"] if r["ms"] and r["floor_ms"] else None
        lines.append(
            (
                r["case"],
                r["variant"],
                r["status"],
                number(r["ms"], ".3f"),
                number(r["p90_ms"], ".3f"),
                number(r["wall_ms"], ".3f"),
                number(r["floor_ms"], ".4f"),
                number(over, ".1f"),
                number(r["speedup"], ".2f"),
                number(r["share"], ".1%"),
                r["must"],
                word(r["passed"]),
                r["aim"],
                word(r["aim_passed"]),
                r["note"],
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    where = [f"{k}: {v}" for k, v in document["conditions"].items()]
    units = {"bf16": 1e12, "tf32": 1e12, "bytes": 1e9, "launch_us": 1, "node_us": 1}
    names = {
        "bf16": "TFLOP/s bf16",
        "tf32": "TFLOP/s tf32",
        "bytes": "GB/s",
        "launch_us": "us a launch",
        "node_us": "us a graph node",
    }
    rates = [f"{v / units[k]:.1f} {names[k]}" for k, v in document["machine"].items()]
    table = [
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return "\n".join(filter(None, ["; ".join(where), "; ".join(rates), document["error"], *table]))


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
    report = Report(settings, groups(settings), time.monotonic() + given.limit)

    def give_up() -> None:  # the main thread is stuck where no signal reaches it
        report.error = "the run was cut off: something did not return"
        report.finish(given.out)
        os._exit(1)

    watchdog = threading.Timer(given.limit + 15, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        report.run()
    finally:
        watchdog.cancel()
    report.finish(given.out)
    return 0 if all(row.passed is not False for row in report.rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
