"""Which kernels a plan and an update spend a GPU's time in: `python -m benchmarks.offline.profile`.

Prints torch's profile of each, by kernel. `--once` makes one small plan, launched kernel by kernel,
and no profile: what a memory checker runs. `--cpu-check` does it on the CPU, at tiny sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import PlanCase
from benchmarks.gpu_report import CPU_CHECK, GPU
from benchmarks.variants import learner, package

ROWS, TIMES = 30, 10


def table(run: Callable[[], object], *, cuda: bool) -> str:
    """Where the time of some calls goes, by kernel (on a CPU by operation)."""
    for _ in range(5):
        run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        for _ in range(TIMES):
            run()
        if cuda:
            torch.cuda.synchronize()
    by = "cuda_time_total" if cuda else "cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=ROWS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline.profile")
    parser.add_argument("--once", action="store_true", help="one small plan, for a memory checker")
    parser.add_argument("--cpu-check", action="store_true")
    given = parser.parse_args()
    settings = CPU_CHECK if given.cpu_check else GPU
    cuda = settings.device == "cuda"
    if given.once:
        case = PlanCase("tiny", "cpu", 24, 6, 2, settings.device)
        how = dict(backend="triton", capture=False) if cuda else {}
        print(package(case, **how)())
        return 0
    for case in (settings.plan, dataclasses.replace(settings.plan, problems=settings.many)):
        print(f"{TIMES} of {case.name}\n{table(package(case), cuda=cuda)}")
    print(f"{TIMES} of {settings.update.name}\n{table(learner(settings.update), cuda=cuda)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
