"""The distribution of a plan's time, over as many plans as --benchmark-plans says."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from benchmarks.cases import PLAN_CASES
from benchmarks.variants import PLAN_VARIANTS
from iqmpc.errors import BackendError

CASE, VARIANT = PLAN_CASES[0], "cpu"  # the CPU preset


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", [pytest.param(VARIANT, id=f"latency/{CASE.name}/{VARIANT}")])
def test_latency(measure: Callable[..., None], pytestconfig: pytest.Config, variant: str) -> None:
    how = PLAN_VARIANTS[variant]
    try:
        plan = how.build(CASE)
    except BackendError as error:
        pytest.skip(str(error))
    gc.collect()
    measure(
        f"latency/{CASE.name}",
        variant,
        plan,
        how.flops(CASE),
        how.dtype,
        times=pytestconfig.getoption("benchmark_plans"),
    )
