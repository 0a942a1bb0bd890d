"""The machine's rate for a square matrix product, which the other rates are held against."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from benchmarks import flops

SIZE = 512
CASES = {f"matmul/{SIZE}x{SIZE}x{SIZE}/{dtype}": dtype for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize("case", CASES)
def test_matmul(measure: Callable[..., None], device: str, case: str) -> None:
    a, b = torch.randn(2, SIZE, SIZE, device=device).to(getattr(torch, CASES[case]))
    measure(case, "torch", functools.partial(torch.matmul, a, b), flops.matmul(SIZE), CASES[case])
