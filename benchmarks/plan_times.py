"""Plan times by model, samples, iterations, threads and instruction set, as a table:
`python -m benchmarks.plan_times`.

On one thread, the median of a plan's processor time, which others' work does not count in; on more,
the shortest time by the clock, which is what an idle machine gives. No budget. docs/real-time.md
has the table.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from benchmarks.cases import PlanCase
from iqmpc import _C
from iqmpc.config import PlannerConfig
from iqmpc.kernels.mppi_plan import CpuPlan
from iqmpc.provenance import machine

MODELS = (("tiny", 24, 6), ("small", 24, 6), ("paper", 91, 39))
# samples × iterations; none: the prior alone
SETTINGS = ((0, 0), (64, 2), (128, 3), (256, 4), (512, 6))


def plan_ms(
    model: tuple[str, int, int],
    samples: int,
    iterations: int,
    *,
    threads: int,
    isa: str,
    precision: str,
    repeats: int,
) -> float:
    name, obs_dim, action_dim = model
    config = PlannerConfig(
        enabled=samples > 0,
        samples=samples or 512,
        elites=max(1, (samples or 512) // 8),
        policy_trajectories=min(24, (samples or 512) // 4),
        iterations=iterations or 1,
        threads=threads,
        precision=precision,
    )
    weights = PlanCase(name, "paper", obs_dim, action_dim, 1).world_model().weights()
    plan = CpuPlan(weights, config, discount=0.99, isa=isa).native
    obs, action = np.zeros((1, obs_dim), np.float32), np.zeros((1, action_dim), np.float32)
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    times = []
    for _ in range(repeats + 1):
        before = clock()
        plan.plan(obs, False, action)
        times.append((clock() - before) / 1e6)
    return float(np.median(times[1:]) if threads == 1 else min(times[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine('cpu')}\n")
    names = ["prior alone" if not s else f"{s} × {i}" for s, i in SETTINGS]
    print("| model | instruction set | operands | threads | " + " | ".join(names) + " |")
    print("|---" * (4 + len(names)) + "|")
    for model in MODELS:
        for isa in _C.isa_levels():
            precision = "bf16" if isa == "avx512bf16" else "float32"
            for threads in given.threads:
                times = [
                    plan_ms(
                        model,
                        samples,
                        iterations,
                        threads=threads,
                        isa=isa,
                        precision=precision,
                        repeats=given.repeats,
                    )
                    for samples, iterations in SETTINGS
                ]
                cells = " | ".join(f"{ms:.3g}" for ms in times)
                print(f"| {model[0]} | {isa} | {precision} | {threads} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
