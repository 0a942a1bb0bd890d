"""Planner latency: one plan, from observations to actions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.cases import PLAN_CASES, PlanCase
from benchmarks.variants import GPU_PLAN_VARIANTS, PLAN_VARIANTS
from iqmpc.errors import BackendError

PREFIX, CASES, VARIANTS, GPU_VARIANTS = "", PLAN_CASES, PLAN_VARIANTS, GPU_PLAN_VARIANTS


def test_plan(measure: Callable[..., None], case: PlanCase, variant: str) -> None:
    how = (VARIANTS | GPU_VARIANTS)[variant]
    try:
        plan = how.build(case)
    except BackendError as error:
        pytest.skip(str(error))
    measure(case.name, variant, plan, how.flops(case), how.dtype)
