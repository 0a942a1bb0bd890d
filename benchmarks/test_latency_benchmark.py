"""The distribution of a plan's time, over as many plans as --benchmark-plans says."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from benchmarks.cases import PLAN_CASES, PlanCase
from benchmarks.variants import GPU_PLAN_VARIANTS, PLAN_VARIANTS
from iqmpc.errors import BackendError

PREFIX, CASES = "latency/", [PLAN_CASES[0]]  # the CPU preset
VARIANTS = {"cpu": PLAN_VARIANTS["cpu"]}
GPU_VARIANTS = {"triton-bf16": GPU_PLAN_VARIANTS["triton-bf16"]}


@pytest.mark.timeout(3600)
def test_latency(
    measure: Callable[..., None], pytestconfig: pytest.Config, case: PlanCase, variant: str
) -> None:
    how = (VARIANTS | GPU_VARIANTS)[variant]
    try:
        plan = how.build(case)
    except BackendError as error:
        pytest.skip(str(error))
    gc.collect()
    measure(
        f"latency/{case.name}",
        variant,
        plan,
        how.flops(case),
        how.dtype,
        times=pytestconfig.getoption("benchmark_plans"),
    )
