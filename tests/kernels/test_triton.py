"""The Triton kernels as a whole: interpreted, compiled for GPUs that are not here, refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iqmpc.errors import BackendError
from iqmpc.kernels.mppi_refit import mppi_refit
from iqmpc.kernels.mppi_rollout import mppi_rollout
from iqmpc.kernels.triton_weights import TritonWeights
from tests.kernels.contract import GAMMA
from tests.kernels.on_triton import (
    GPU,
    INTERPRETED,
    draw,
)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_all_of_triton_in_the_interpreter():
    """Every test of this file and of those named as it, in a process of its own."""
    here = Path(__file__).parent
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not gpu",
            "-p",
            "no:cacheprovider",
            *sorted(here.rglob("test_triton*.py")),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        cwd=here.parents[1],
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 60


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles(arch):
    """For GPUs that need not be here, at the sizes in use, within their shared memory."""
    script = Path(__file__).with_name("triton_compile.py")
    result = subprocess.run(
        [sys.executable, script, "--arch", str(arch)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    done = [json.loads(line) for line in result.stdout.splitlines()]
    assert {x["kernel"] for x in done} == {
        "_chain_kernel",
        "_stage_kernel",
        "_score_kernel",
        "_refit_kernel",
        "_draw_kernel",
        "_begin_kernel",
        "_act_kernel",
        "_improve_kernel",
    }
    limit = {80: 163, 90: 227}[arch] * 1024
    for x in done:
        assert x["shared"] <= limit, x
        assert x["tensor_core"] or x["kernel"] not in ("_chain_kernel", "_stage_kernel"), x


@pytest.mark.skipif(GPU or INTERPRETED, reason="Triton can run here")
def test_triton_by_name_is_an_error_without_a_gpu(make_weights):
    weights = make_weights(5, 3)
    draws = draw(weights, 1, 2, 4)
    for call in (
        lambda: mppi_rollout(weights, *draws, GAMMA, backend="triton"),
        lambda: mppi_rollout(TritonWeights(weights), *draws, GAMMA, backend="triton"),
        lambda: mppi_refit(
            draws[1],
            torch.zeros(1, 4),
            elites=2,
            temperature=0.5,
            std_min=0.05,
            std_max=2.0,
            backend="triton",
        ),
    ):
        with pytest.raises(BackendError, match="backend=triton cannot run: torch sees no CUDA"):
            call()
