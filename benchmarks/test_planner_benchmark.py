"""Planner latency: one plan, from observations to actions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.cases import PLAN_CASES, PlanCase
from benchmarks.variants import PLAN_VARIANTS
from iqmpc.errors import BackendError


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, id=f"{case.name}/{variant}")
        for case in PLAN_CASES
        for variant in PLAN_VARIANTS
    ],
)
def test_plan(measure: Callable[..., None], case: PlanCase, variant: str) -> None:
    how = PLAN_VARIANTS[variant]
    try:
        plan = how.build(case)
    except BackendError as error:
        pytest.skip(str(error))
    measure(case.name, variant, plan, how.flops(case), how.dtype)
