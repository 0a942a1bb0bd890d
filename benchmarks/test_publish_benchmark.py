"""Publishing time: from the learner's weights to the model that plans are computed on."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import PUBLISH_CASES, PublishCase
from benchmarks.variants import GPU_PUBLISH_VARIANTS, PUBLISH_VARIANTS

PREFIX, CASES, VARIANTS, GPU_VARIANTS = "", PUBLISH_CASES, PUBLISH_VARIANTS, GPU_PUBLISH_VARIANTS


def test_publish(measure: Callable[..., None], case: PublishCase, variant: str) -> None:
    how = (VARIANTS | GPU_VARIANTS)[variant]
    measure(case.name, variant, how.build(case), how.flops(case), how.dtype, times=1000)
