"""Update time: one gradient step on the model and the critics, one on the policy."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.cases import UPDATE_CASES, UpdateCase
from benchmarks.variants import UPDATE_VARIANTS


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, id=f"{case.name}/{variant}")
        for case in UPDATE_CASES
        for variant in UPDATE_VARIANTS
    ],
)
def test_update(measure: Callable[..., None], case: UpdateCase, variant: str) -> None:
    how = UPDATE_VARIANTS[variant]
    measure(case.name, variant, how.build(case), how.flops(case), how.dtype)
