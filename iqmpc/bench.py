"""An agent in a control loop on this machine: how long its plans take, and what fits."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iqmpc.agent import Agent
from iqmpc.config import Config
from iqmpc.errors import ConfigError
from iqmpc.latency import LatencyHistogram
from iqmpc.plan_statistics import PlanStatistics

SHARE = 0.8  # of a tick, what a plan may take where no budget is given: the rest is the robot's
SAMPLES, ITERATIONS = (32, 64, 128, 256, 512, 1024), (1, 2, 3, 4, 6)
_PRIORITY = 50  # of SCHED_FIFO: below the kernel's own threads for interrupts
_LOCK = 1 | 2  # MCL_CURRENT | MCL_FUTURE
_EPISODE = 500
_REPEATS = 12  # plans of each setting of the table


@dataclass
class Bench:
    """What a loop took. `ticks`: from when a tick was due to its action, late beyond a period."""

    hz: float
    seconds: float
    budget_us: float
    threads: int
    plans: PlanStatistics
    late_plans: int  # longer than the budget
    ticks: LatencyHistogram
    not_real_time: list[str]  # what of real time was not to be had, in sentences
    fits: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        plans, times = self.plans, self.plans.times
        shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
        return {
            "hz": self.hz,
            "seconds": self.seconds,
            "budget_us": self.budget_us,
            "threads": self.threads,
            "plans": plans.plans,
            "late_plans": self.late_plans,
            "missed_plans": plans.missed,
            "iterations_mean": plans.iterations / max(1, plans.plans),
            "samples_mean": plans.samples / max(1, plans.plans),
            **{f"plan_{name}_us": _us(times.percentile(q)) for name, q in shares.items()},
            "plan_max_us": _us(times.max_s),
            "late_ticks": self.ticks.late,
            **{f"tick_{name}_us": _us(self.ticks.percentile(q)) for name, q in shares.items()},
            "tick_max_us": _us(self.ticks.max_s),
            "not_real_time": self.not_real_time,
            "fits": self.fits,
        }


def bench(
    run: str | Path,
    *,
    hz: float,
    seconds: float,
    changes: Mapping[str, Any] | None = None,
    table: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Bench:
    """Drive the agent of a run or a file at a rate, on random observations, in episodes of 500.

    It acts on the CPU, or where `changes` say, such as `device=cuda`. Its budget is
    `planner.budget_us` of the run or of `changes`, else 80 % of a tick; a plan of a backend that
    keeps to none, as a GPU's, takes as long as it takes and is late beyond it. The process
    is put into a real-time class, on cores of its own and into locked memory where that is allowed,
    and stays there. `table` also measures which samples × iterations fit, without a budget.
    Raises as `Agent.load` does, and `ConfigError` for a rate that is not positive.
    """
    if not (hz > 0 and seconds > 0):
        raise ConfigError(f"hz and seconds must be positive, got {hz:g} and {seconds:g}")
    torch.set_num_threads(1)
    chosen = {"device": "cpu", **(changes or {})}
    chosen.setdefault("planner.backend", "cpu" if chosen["device"] == "cpu" else "auto")
    # Where nothing else is said: the others know neither a budget nor threads.
    other = {"planner.budget_us": None, "planner.threads": None}
    unsaid = {"planner.threads": 1} if chosen["planner.backend"] == "cpu" else other
    held = Agent.load(run, changes=unsaid | chosen)
    held.require_world_model("iqmpc bench")
    planner = held.config.planner
    budget_us = planner.budget_us or SHARE * 1e6 / hz
    missing = become_real_time(planner.threads or 1)
    # Made again: its threads are of the class and on the cores that the process has now.
    keeps = held.planner.backend == "cpu"
    config = held.config.replace({"planner.budget_us": budget_us if keeps else None})
    agent = Agent(held.model, config, seed=config.seed)
    progress(f"{hz:g} Hz for {seconds:g} s")
    ticks, late = _loop(agent, hz, int(hz * seconds), budget_us)
    plans, threads = agent.planner.statistics(), planner.threads or 1
    found = Bench(hz, seconds, budget_us, threads, plans, late, ticks, missing)
    if table:
        progress("which samples × iterations fit")
        found.fits = list(plan_times(held, limit_ms=budget_us / 1e3))
    return found


def become_real_time(threads: int) -> list[str]:
    """Put this process into SCHED_FIFO, on `threads` cores and into locked memory, for good.

    Returns what could not be had, a sentence each.
    """
    missing = []
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    except (OSError, AttributeError) as error:
        missing.append(f"no real-time class (SCHED_FIFO): {_said(error)}; see ulimit -r")
    try:
        cores = sorted(os.sched_getaffinity(0))
        if threads < len(cores):
            os.sched_setaffinity(0, cores[-threads:])  # the first one has the most interrupts
        else:
            missing.append(f"no core of its own: {threads} threads, {len(cores)} cores")
    except (OSError, AttributeError) as error:
        missing.append(f"no core of its own: {_said(error)}")
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlockall(_LOCK) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    except (OSError, AttributeError) as error:
        missing.append(f"no locked memory (mlockall): {_said(error)}; see ulimit -l")
    return missing


def plan_times(agent: Agent, *, limit_ms: float) -> Iterator[dict[str, Any]]:
    """The median and the longest of some plans by samples and iterations, the prior alone first.

    Settings beyond the first that takes longer than `limit_ms` are left out. Without a budget.
    """
    free = agent.config.replace({"planner.budget_us": None})
    yield {"samples": 0, "iterations": 0, **_timed(agent, free, {"planner.enabled": False})}
    for samples in SAMPLES:
        for iterations in ITERATIONS:
            elites = max(1, min(free.planner.elites, samples // 8))
            found = _timed(
                agent,
                free,
                {
                    "planner.enabled": True,
                    "planner.samples": samples,
                    "planner.iterations": iterations,
                    "planner.elites": elites,
                    "planner.policy_trajectories": min(
                        free.planner.policy_trajectories, samples // 4
                    ),
                },
            )
            yield {"samples": samples, "iterations": iterations, **found}
            if found["median_ms"] > limit_ms:
                break


def _timed(agent: Agent, config: Config, changes: Mapping[str, Any]) -> dict[str, float]:
    timed = Agent(agent.model, config.replace(changes))
    observations = _observations(timed)
    timed.act(observations[0])
    times = []
    for i in range(_REPEATS):
        timed.act(observations[i])
        last = timed.planner.last
        assert last is not None and last.elapsed_us is not None
        times.append(last.elapsed_us / 1e3)
    return {"median_ms": float(np.median(times)), "max_ms": max(times)}


def _observations(agent: Agent) -> np.ndarray:
    spec, random = agent.model.observation_spec, np.random.default_rng(0)
    if spec.images:
        return random.integers(0, 256, (16, *spec.shape), dtype=np.uint8)
    return random.standard_normal((997, *spec.shape)).astype(np.float32)


def _loop(agent: Agent, hz: float, count: int, budget_us: float) -> tuple[LatencyHistogram, int]:
    """Act `count` times, once a tick, and count the plans that took longer than the budget; ticks
    are kept in absolute time."""
    observations, period = _observations(agent), 1 / hz
    ticks, late = LatencyHistogram(period), 0
    with _no_collections():
        start = time.perf_counter() + 0.1
        for tick in range(count):
            if tick % _EPISODE == 0:
                agent.reset()
            due = start + tick * period
            wait = due - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            agent.act(observations[tick % len(observations)])
            ticks.add(time.perf_counter() - due)
            last = agent.planner.last
            late += last is not None and (last.elapsed_us or 0.0) > budget_us
    return ticks, late


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Python's collector stops the world for milliseconds."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def draw(found: Bench, out: Path) -> None:
    """The histogram of plan times as PNG; `ConfigError` where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ConfigError("pictures need matplotlib: pip install 'iqmpc[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges_s, counts = found.plans.times.bins()
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.stairs(counts, 1e3 * edges_s, fill=True, color="tab:blue")
    axes.axvline(found.budget_us / 1e3, color="tab:red", linewidth=1, label="budget")
    axes.set(yscale="log", xlabel="plan, ms", ylabel="plans")
    axes.set_xlim(0, 1.1e3 * max(found.budget_us / 1e6, edges_s[-1]))
    axes.set_title(f"{found.plans.plans} plans at {found.hz:g} Hz, {found.threads} thread(s)")
    axes.legend()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e6 * seconds, 1)


def _said(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "not on this system"
