"""Where the tests of the Triton kernels run: on a GPU, or in Triton's interpreter on the CPU.

TRITON_INTERPRET must be set before Triton is imported, and Triton must not be imported after Mesa,
which other tests load: without a GPU they run in a process of their own (`test_triton.py`).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from iqmpc.kernels.triton_weights import TritonWeights
from iqmpc.kernels.weights import Weights
from tests.kernels.contract import BETA, GAMMA, drawn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
SCHEDULES = ("throughput", "latency")

needs_triton = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="no CUDA device; test_all_of_triton_in_the_interpreter runs it"
)

all_nan = pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter is NumPy


def needs_gpu(test):
    skip = pytest.mark.skipif(not GPU, reason="torch sees no CUDA device")
    return pytest.mark.gpu(skip(test))


def device() -> str:
    return "cuda" if GPU else "cpu"


def to_device(weights: Weights) -> Weights:
    return weights.map(lambda t: t.to(device()))


def draw(*sizes: Any, **settings: Any) -> tuple[torch.Tensor, ...]:
    """The contract's draws, where these tests compute."""
    return tuple(t.to(device()) for t in drawn(*sizes, **settings))


def rollout(weights: Weights | TritonWeights, draws, score: str = "advantage", schedule=None):
    from iqmpc.kernels.mppi_rollout.triton import mppi_rollout_triton

    return mppi_rollout_triton(weights, *draws, GAMMA, score, BETA, schedule=schedule)
