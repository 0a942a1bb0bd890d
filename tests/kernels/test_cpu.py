"""iqmpc.kernels.cpu: the level that weights are packed for, and what is no array for C++."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from iqmpc import _C
from iqmpc.kernels.cpu import CpuWeights

LEVELS = _C.isa_levels()
UNKNOWN = "unknown instruction set, expected portable, avx2, avx512 or avx512bf16"


def run_python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "IQMPC_ISA": isa}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("isa", [*LEVELS, ""])
def test_the_environment_variable_forces_a_level(isa: str) -> None:
    code = (
        "from iqmpc import WorldModel, _C; from iqmpc.config import ModelConfig;"
        "from iqmpc.kernels.cpu import CpuWeights;"
        "model = WorldModel(2, 1, ModelConfig(hidden_dim=8, latent_dim=8, encoder_dim=8));"
        "print(_C.isa(), CpuWeights(model.weights()).isa)"
    )
    result = run_python(code, isa)
    expected = isa or LEVELS[-1]
    assert result.stdout.split() == [expected, expected], result.stderr


def test_an_unknown_level_is_an_error(make_weights) -> None:
    result = run_python("from iqmpc import _C; _C.isa()", "sse9")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"ValueError: IQMPC_ISA=sse9: {UNKNOWN}"
    with pytest.raises(ValueError) as raised:
        CpuWeights(make_weights(5, 3), isa="")
    assert str(raised.value) == f"isa=: {UNKNOWN}"


def misaligned(*shape: int) -> np.ndarray:
    size = 4 * int(np.prod(shape))
    return np.zeros(size + 1, np.uint8)[1:].view(np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("z0", "message"),
    [
        (np.zeros((1, 15)), "with shape [1, 16], got float64 [1, 15]"),
        (np.zeros((1, 16), ">f4"), "with shape [1, 16], got >f4 [1, 16]"),
        (misaligned(1, 16), "z0 must be C-contiguous and aligned, got strides of [64, 4] bytes"),
    ],
)
def test_the_extension_says_what_is_no_array_for_it(make_weights, z0, message: str) -> None:
    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def call(z0: np.ndarray) -> None:
        rest = zeros(1, 1, 2, 3), zeros(1, 0, 2, 3), (0, 1), 0.9, "advantage", 0.0, zeros(1, 2), 1
        _C.rollout(native, z0, *rest)

    native = CpuWeights(make_weights(5, 3)).native
    call(zeros(1, 16))
    with pytest.raises(ValueError) as raised:
        call(z0)
    assert message in str(raised.value)
