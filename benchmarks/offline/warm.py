"""Compile a plan's Triton kernels into Triton's cache, for a GPU that need not be here.

    TRITON_CACHE_DIR=cache python -m benchmarks.offline.warm --arch 90

The kernels go through Triton's own way from a launch to a cubin, under the names by which a process
with that GPU and the same Triton looks for them; nothing is run. Tile sizes are timed there.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.cases import PlanCase
from benchmarks.gpu_report import GPU
from iqmpc.config import PlannerConfig
from iqmpc.kernels import triton_launch
from iqmpc.kernels.mppi_plan.triton import TritonPlan
from iqmpc.kernels.mppi_rollout.triton import SCHEDULES
from iqmpc.kernels.triton_tiles import Target
from iqmpc.kernels.weights import Weights

# Shared memory for one program, and Hopper's products, by the compute capability.
TARGETS = {80: Target(163 << 10, False), 89: Target(99 << 10, False), 90: Target(227 << 10, True)}


class Absent:
    """Triton's driver of a GPU that is not here: enough of it to compile."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[None]:
    """A launch in the block, on CPU tensors, compiles every choice of tiles and runs nothing."""
    launch = JITFunction.run

    def compile_one(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        return launch(self, *arguments, grid=grid, warmup=True, **named)

    def compile_choices(self: Any, *arguments: Any, **named: Any) -> None:
        self.nargs = dict(zip(self.arg_names, arguments, strict=False))
        for config in self.prune_configs(named):
            self.fn.run(*arguments, **named, **config.all_kwargs())

    with (
        mock.patch.object(driver, "_active", Absent(arch)),
        mock.patch.object(JITFunction, "run", compile_one),
        mock.patch.object(Autotuner, "run", compile_choices),
        mock.patch.object(triton_launch, "target", lambda device: TARGETS[arch]),
        mock.patch.object(triton_launch, "DEVICE", "cpu"),
    ):
        yield


def warm(weights: Weights, config: PlannerConfig, *, arch: int, problems: int = 1) -> None:
    """Compile what plans with these settings launch, in both schedules."""
    with compiling(arch), torch.no_grad():
        for schedule in SCHEDULES if config.enabled else SCHEDULES[:1]:
            plan = TritonPlan(weights, config, discount=0.99, problems=problems, schedule=schedule)
            plan._plan()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline.warm")
    parser.add_argument("--arch", type=int, choices=TARGETS, default=90)
    parser.add_argument("--precision", default="bf16")
    given = parser.parse_args()
    for problems in (1, GPU.many):
        case = PlanCase("paper", "paper", GPU.plan.obs_dim, GPU.plan.action_dim, problems)
        settings = case.config.replace({"planner.precision": given.precision}).planner
        warm(case.world_model().weights(), settings, arch=given.arch, problems=problems)


if __name__ == "__main__":
    main()
