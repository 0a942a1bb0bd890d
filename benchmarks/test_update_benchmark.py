"""Update time: one gradient step on the model and the critics, one on the policy."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import UPDATE_CASES, UpdateCase
from benchmarks.variants import GPU_UPDATE_VARIANTS, UPDATE_VARIANTS

PREFIX, CASES, VARIANTS, GPU_VARIANTS = "", UPDATE_CASES, UPDATE_VARIANTS, GPU_UPDATE_VARIANTS


def test_update(measure: Callable[..., None], case: UpdateCase, variant: str) -> None:
    how = (VARIANTS | GPU_VARIANTS)[variant]
    measure(case.name, variant, how.build(case), how.flops(case), how.dtype)
