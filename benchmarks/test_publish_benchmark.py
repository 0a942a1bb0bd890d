"""Publishing time: from the learner's weights to the model that plans are computed on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.cases import PUBLISH_CASES, PublishCase
from benchmarks.variants import PUBLISH_VARIANTS


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, id=f"{case.name}/{variant}")
        for case in PUBLISH_CASES
        for variant in PUBLISH_VARIANTS
    ],
)
def test_publish(measure: Callable[..., None], case: PublishCase, variant: str) -> None:
    how = PUBLISH_VARIANTS[variant]
    measure(case.name, variant, how.build(case), how.flops(case), how.dtype, times=1000)
