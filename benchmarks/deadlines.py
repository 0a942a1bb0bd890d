"""How well plans keep to their budget: `python -m benchmarks.deadlines --out deadlines.json`.

For models whose iteration takes from fractions of a millisecond to some fifty, and budgets from
0.1 to 20 ms, plans on one thread and takes each plan's time on its processor: what a machine takes
away for others is not the plan's. `within` is the share of plans whose processor time was at most
the budget and a tenth and 50 µs; `late` is the share that the library itself calls late, by the
clock on the wall, others' work included. docs/real-time.md says what came out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import PlanCase
from iqmpc.config import PlannerConfig
from iqmpc.kernels.mppi_plan import CpuPlan
from iqmpc.provenance import machine

BUDGETS_MS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0)
# (model, observations, actions, samples): an iteration of the first takes some 0.3 ms on one
# AVX-512 thread, of the last some 50.
CASES = (("tiny", 24, 6, 64), ("tiny", 24, 6, 512), ("small", 24, 6, 512), ("paper", 91, 39, 960))
EPISODE = 500


def measured(
    case: tuple[str, int, int, int], budget_ms: float, plans: int, *, isa: str | None = None
) -> dict[str, Any]:
    """One row: `plans` plans of the case on random observations, an episode after the other."""
    name, obs_dim, action_dim, samples = case
    about = PlanCase(name, "paper", obs_dim, action_dim, 1)
    config = PlannerConfig(samples=samples, threads=1, budget_us=1e3 * budget_ms)
    weights = about.world_model().weights()
    plan = CpuPlan(weights, config, discount=0.99, isa=isa).native
    whole = dataclasses.replace(config, budget_us=None, iterations=1)
    iteration_ms = _iteration_ms(CpuPlan(weights, whole, discount=0.99, isa=isa), obs_dim)
    observations = np.random.default_rng(0).standard_normal((997, 1, obs_dim), np.float32)
    action = np.empty((1, action_dim), np.float32)
    used_us, scored = np.empty(plans), np.empty(plans)
    late = missed = 0
    for i in range(plans):
        if i % EPISODE == 0:
            plan.reset()
        before = time.thread_time_ns()
        _, n, _, plan_missed, plan_late, _ = plan.plan(observations[i % 997], False, action)
        used_us[i] = (time.thread_time_ns() - before) / 1e3
        scored[i] = n
        missed += plan_missed
        late += plan_late
    allowed_us = 1.1e3 * budget_ms + 50
    p50, p99, p999 = np.quantile(used_us, [0.5, 0.99, 0.999])
    return {
        "model": name,
        "samples": samples,
        "iteration_ms": iteration_ms,
        "budget_ms": budget_ms,
        "plans": plans,
        "within": float((used_us <= allowed_us).mean()),
        "p50_us": p50,
        "p99_us": p99,
        "p99.9_us": p999,
        "max_us": float(used_us.max()),
        "scored": float(scored.mean()),
        "missed": missed / plans,
        "late": late / plans,
    }


def _iteration_ms(plan: CpuPlan, obs_dim: int) -> float:
    """The least processor time of a plan of one iteration."""
    obs = torch.zeros(1, obs_dim)
    times = []
    for _ in range(5):
        before = time.thread_time_ns()
        plan(obs)
        times.append((time.thread_time_ns() - before) / 1e6)
    return min(times)


def rows(
    budgets_ms: list[float], plans: int, seconds: float, isa: str | None
) -> Iterator[dict[str, Any]]:
    """Every case with every budget: `plans` plans, or fewer where they took beyond `seconds`."""
    for budget_ms in budgets_ms:
        count = max(1000, min(plans, int(1e3 * seconds / budget_ms)))
        for case in CASES:
            yield measured(case, budget_ms, count, isa=isa)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=3600, help="at most, for one row")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS_MS, help="in ms")
    parser.add_argument("--isa", help="as IQMPC_ISA")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = []
    print(
        "| model | samples | iteration, ms | budget, ms | plans | within | p99.9 / budget |"
        " scored | missed | late by the wall |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows(list(given.budgets), given.plans, given.seconds, given.isa):
        done.append(row)
        print(
            f"| {row['model']} | {row['samples']} | {row['iteration_ms']:.2f} "
            f"| {row['budget_ms']:g} | {row['plans']:,} | {100 * row['within']:.3f} % "
            f"| {row['p99.9_us'] / row['budget_ms'] / 1e3:.2f} | {row['scored']:.0f} "
            f"| {100 * row['missed']:.2f} % | {100 * row['late']:.2f} % |",
            flush=True,
        )
        if given.out:
            given.out.write_text(json.dumps({"machine": machine("cpu"), "rows": done}, indent=1))


if __name__ == "__main__":
    main()
