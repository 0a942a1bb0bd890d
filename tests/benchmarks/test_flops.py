"""benchmarks.flops: the formulas against torch's own count of what ran."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops, table
from benchmarks.cases import PLAN_CASES, UPDATE_CASES, PlanCase, UpdateCase
from benchmarks.variants import PLAN_VARIANTS, UPDATE_VARIANTS

ROOT = Path(__file__).parents[2]
TINY = PLAN_CASES[0]


@pytest.mark.parametrize("variant", ["eager-unrolled", "reference"])
@pytest.mark.parametrize("case", [TINY, dataclasses.replace(TINY, action_dim=21, problems=2)])
def test_a_plan(case: PlanCase, variant: str) -> None:
    how = PLAN_VARIANTS[variant]
    plan = how.build(case)
    with FlopCounterMode(display=False) as counter:
        plan()
    assert how.flops(case) == counter.get_total_flops()


@pytest.mark.parametrize("case", [*UPDATE_CASES[:2], UpdateCase("small", 5, 3, 4)])
def test_an_update(case: UpdateCase) -> None:
    how = UPDATE_VARIANTS["eager"]
    update = how.build(case)
    with FlopCounterMode(display=False) as counter:
        update()
    assert how.flops(case) == counter.get_total_flops()


def test_a_matrix_product() -> None:
    with FlopCounterMode(display=False) as counter:
        torch.randn(8, 8) @ torch.randn(8, 8)
    assert flops.matmul(8) == counter.get_total_flops()


def test_the_floor_by_hand() -> None:
    """The paper's planner (H = 3) with 39 actions: 8 iterations of 488 samples and 24 once."""
    case = next(c for c in PLAN_CASES if c.name == "plan/paper/91x39/E1")
    z, a, h = 512, 39, 512
    rest = h * h + h  # a critic after its first layer
    latent = 448 * h  # a latent's part of a first layer: 7 of every 8 features
    critics = 2 * ((a * h + rest) + 2 * (latent + 2 * (a * h + rest)))
    dynamics = (a * h + h * h + h * z) + (latent + a * h + h * h + h * z)
    policy = latent + h * h + h * 2 * a
    once = 91 * 256 + 256 * z + policy + 3 * latent  # z_0, π(z_0), its part of d and two critics
    expected = 2 * ((8 * 488 + 24) * (critics + dynamics + 2 * policy) + once)
    assert flops.plan_floor(case) == expected


def test_the_documented_counts_are_these() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert table.floors() in page, "a case or a formula changed: run python -m benchmarks.table"
