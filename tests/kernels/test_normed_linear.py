"""iqmpc.kernels.normed_linear: every instruction-set level against the reference in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqmpc import _C
from iqmpc.kernels.normed_linear import (
    normed_linear,
    normed_linear_reference,
    pack_normed_linear,
)
from iqmpc.kernels.normed_linear.cpu import PackedNormedLinear

LEVELS = _C.isa_levels()

Parameters = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def draw(rows: int, inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, Parameters]:
    """x [rows, inputs] and weight, bias, gamma, beta of a layer with pre-activations around 1."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=random) / inputs**0.5
    bias = torch.randn(outputs, generator=random)
    gamma = 1 + 0.3 * torch.randn(outputs, generator=random)
    beta = 0.3 * torch.randn(outputs, generator=random)
    return torch.randn(rows, inputs, generator=random), (weight, bias, gamma, beta)


def assert_close(y: torch.Tensor, x: torch.Tensor, parameters: Parameters) -> None:
    """1e-4 relative to the float64 reference, plus float32 rounding as LayerNorm amplifies it.

    The second part matters where a row's pre-activations nearly coincide, as two outputs often do:
    LayerNorm divides their rounding errors by a small deviation, in any float32 implementation.
    """
    x, weight, bias, gamma, beta = (t.double() for t in (x, *parameters))
    expected = normed_linear_reference(x, weight, bias, gamma, beta)
    pre = x @ weight.T + bias
    centred = pre - pre.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    normed = centred * scale
    rounding = 8 * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T + bias.abs())
    amplified = rounding.amax(-1, keepdim=True) * scale * (1 + normed.abs()) * gamma.abs()
    tolerance = 1e-4 * expected.abs().clamp_min(1) + amplified
    assert y.dtype == torch.float32
    assert y.shape == expected.shape
    assert bool(((y - expected).abs() <= tolerance).all())


@settings(deadline=None, max_examples=200)
@given(
    isa=st.sampled_from(LEVELS),
    rows=st.integers(0, 40),
    inputs=st.integers(1, 80),
    outputs=st.integers(1, 80),
    magnitude=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_matches_the_reference(
    isa: str, rows: int, inputs: int, outputs: int, magnitude: float, seed: int
) -> None:
    x, parameters = draw(rows, inputs, outputs, seed)
    x = x * magnitude
    assert_close(PackedNormedLinear(*parameters, isa=isa)(x), x, parameters)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(512, 551, 512), (1, 2000, 512), (3, 1, 1)]
)
def test_matches_at_the_sizes_in_use(isa: str, rows: int, inputs: int, outputs: int) -> None:
    x, parameters = draw(rows, inputs, outputs)
    assert_close(PackedNormedLinear(*parameters, isa=isa)(x), x, parameters)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("factor", [1e4, 1e12, 1e30])
def test_mish_neither_overflows_nor_underflows(isa: str, factor: float) -> None:
    x, (weight, bias, gamma, beta) = draw(9, 20, 50)
    parameters = weight, bias, gamma * factor, beta * factor
    y = PackedNormedLinear(*parameters, isa=isa)(x)
    assert y.isfinite().all()
    assert (y == 0).any()  # mish of a large negative number
    assert_close(y, x, parameters)


@pytest.mark.parametrize("isa", LEVELS)
def test_mish_alone(isa: str) -> None:
    # With gamma = 0 the layer is mish(beta).
    points = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -3e38, 3e38, -87, 20])])
    zeros = torch.zeros(len(points))
    layer = PackedNormedLinear(torch.ones(len(points), 1), zeros, zeros, points, isa=isa)
    expected = torch.nn.functional.mish(points.double())
    error = (layer(torch.ones(1, 1))[0] - expected).abs()
    assert bool((error <= 1e-6 * expected.abs() + 1e-35).all())


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_row_only(isa: str, value: float) -> None:
    x, parameters = draw(31, 17, 45)
    layer = PackedNormedLinear(*parameters, isa=isa)
    clean = layer(x)
    x[12, 3] = value
    y = layer(x)
    assert y[12].isnan().all()
    others = torch.arange(31) != 12
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("isa", LEVELS)
def test_an_overflowing_variance_is_nan_and_not_zero(isa: str) -> None:
    x, parameters = draw(2, 17, 45)
    x[1] *= 1e25
    y = PackedNormedLinear(*parameters, isa=isa)(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("isa", LEVELS)
def test_a_row_does_not_depend_on_its_batch(isa: str) -> None:
    x, parameters = draw(61, 40, 70)
    layer = PackedNormedLinear(*parameters, isa=isa)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_a_packed_layer_is_a_snapshot() -> None:
    x, parameters = draw(4, 5, 6)
    for backend in ("cpu", "reference"):
        layer = pack_normed_linear(*parameters, backend=backend)
        before = layer(x)
        changed = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(1)
        assert torch.equal(layer(x), before)
        for p, old in zip(parameters, changed, strict=True):
            p.copy_(old)


def test_writes_into_the_callers_buffer() -> None:
    x, parameters = draw(4, 5, 6)
    layer = PackedNormedLinear(*parameters)
    out = torch.empty(4, 6)
    assert layer(x, out) is out
    assert torch.equal(out, layer(x))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_the_operation_on_each_backend(backend: str) -> None:
    x, parameters = draw(10, 33, 21)
    assert_close(normed_linear(x, *parameters, backend=backend), x, parameters)
    assert_close(pack_normed_linear(*parameters, backend=backend)(x), x, parameters)


def test_the_reference_is_differentiable_in_float64() -> None:
    x, parameters = draw(3, 4, 5)
    arguments = [t.double().requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradcheck(normed_linear_reference, arguments)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "gamma", "beta"])
def test_the_cpu_backend_never_drops_a_gradient(name: str) -> None:
    x, parameters = draw(3, 4, 5)
    arguments = dict(zip(("x", "weight", "bias", "gamma", "beta"), (x, *parameters), strict=True))
    arguments[name].requires_grad_()
    message = (
        f"^{name} requires grad and the cpu backend has no backward: use backend='reference' or "
        r"torch\.no_grad\(\)$"
    )
    with pytest.raises(ValueError, match=message):
        normed_linear(**arguments, backend="cpu")
    with torch.no_grad():
        assert not normed_linear(**arguments, backend="cpu").requires_grad


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_operation_refuses_shapes_that_do_not_fit(backend: str) -> None:
    x, (weight, bias, gamma, beta) = draw(4, 134, 6)
    with pytest.raises(ValueError, match=r"^x must have shape \[N, 134\], got \[4, 133\]$"):
        normed_linear(x[:, 1:], weight, bias, gamma, beta, backend=backend)
    with pytest.raises(ValueError, match=r"^weight must have shape \[O, I\], got \[6\]$"):
        normed_linear(x, bias, bias, gamma, beta, backend=backend)
    with pytest.raises(ValueError, match=r"^gamma must have shape \[6\], got \[1, 6\]$"):
        pack_normed_linear(weight, bias, gamma[None], beta, backend=backend)


def test_the_cpu_backend_refuses_other_dtypes_devices_and_strides() -> None:
    x, parameters = draw(4, 6, 6)
    with pytest.raises(
        ValueError, match=r"^x must be float32 for the cpu backend, got torch.bfloat"
    ):
        normed_linear(x.bfloat16(), *parameters, backend="cpu")
    with pytest.raises(ValueError, match=r"^x must be on the CPU for the cpu backend, got meta$"):
        normed_linear(x.to("meta"), *parameters, backend="cpu")
    with pytest.raises(ValueError, match=r"^x must be C-contiguous and aligned, got strides of"):
        normed_linear(x.repeat(2, 1)[::2], *parameters, backend="cpu")


def arrays(inputs: int = 134, outputs: int = 6) -> dict[str, np.ndarray]:
    _, parameters = draw(1, inputs, outputs)
    names = ("weight", "bias", "gamma", "beta")
    return {name: p.numpy() for name, p in zip(names, parameters, strict=True)}


def misaligned(shape: tuple[int, ...]) -> np.ndarray:
    size = 4 * int(np.prod(shape))
    return np.zeros(size + 1, np.uint8)[1:].view(np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            np.zeros((4, 133)),
            ValueError,
            "x must be float32 with shape [N, 134], got float64 [4, 133]",
        ),
        (
            np.zeros(134, np.float32),
            ValueError,
            "x must be float32 with shape [N, 134], got float32 [134]",
        ),
        (
            np.zeros((4, 134), ">f4"),
            ValueError,
            "x must be float32 with shape [N, 134], got >f4 [4, 134]",
        ),
        (
            np.zeros((8, 134), np.float32)[::2],
            ValueError,
            "x must be C-contiguous and aligned, got strides of [1072, 4] bytes",
        ),
        (
            misaligned((4, 134)),
            ValueError,
            "x must be C-contiguous and aligned, got strides of [536, 4] bytes",
        ),
        ([[0.0] * 134], TypeError, "x must be a NumPy array, got list"),
    ],
)
def test_the_extension_refuses_x(x: object, error: type[Exception], message: str) -> None:
    layer = _C.NormedLinear(**arrays())
    with pytest.raises(error) as raised:
        layer.forward(x, np.zeros((4, 6), np.float32))
    assert str(raised.value) == message


def test_the_extension_refuses_out() -> None:
    layer = _C.NormedLinear(**arrays(6, 6))
    x = np.zeros((4, 6), np.float32)
    constant = np.zeros((4, 6), np.float32)
    constant.flags.writeable = False
    buffer = np.zeros((7, 6), np.float32)
    for source, out, message in (
        (x, x[:3], "out must be float32 with shape [4, 6], got float32 [3, 6]"),
        (x, constant, "out must be writeable"),
        (x, x, "x and out must not overlap"),
        (buffer[:4], buffer[3:], "x and out must not overlap"),
    ):
        with pytest.raises(ValueError) as raised:
            layer.forward(source, out)
        assert str(raised.value) == message
    layer.forward(buffer[:3], buffer[3:6])  # neighbours do not overlap
    assert np.isfinite(buffer).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "weight",
            np.zeros(6, np.float32),
            "weight must be float32 with shape [O, I], got float32 [6]",
        ),
        ("bias", np.zeros(6), "bias must be float32 with shape [6], got float64 [6]"),
        ("beta", np.zeros(7, np.float32), "beta must be float32 with shape [6], got float32 [7]"),
        (
            "gamma",
            np.zeros((6, 1), np.float32),
            "gamma must be float32 with shape [6], got float32 [6, 1]",
        ),
    ],
)
def test_the_extension_refuses_parameters(name: str, value: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        _C.NormedLinear(**{**arrays(), name: value})
    assert str(raised.value) == message


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_the_extension_refuses_an_empty_weight(shape: tuple[int, int]) -> None:
    vector = np.zeros(shape[0], np.float32)
    with pytest.raises(ValueError) as raised:
        _C.NormedLinear(np.zeros(shape, np.float32), vector, vector, vector)
    expected = f"weight must have at least one row and one column, got {list(shape)}"
    assert str(raised.value) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_refused(value: float) -> None:
    for name, place, text in (("weight", (2, 5), "2, 5"), ("bias", (3,), "3"), ("beta", (0,), "0")):
        parameters = {key: array.copy() for key, array in arrays().items()}
        parameters[name][place] = value
        with pytest.raises(ValueError) as raised:
            _C.NormedLinear(**parameters)
        assert str(raised.value) == f"{name} must be finite, got {value} at [{text}]"


def run_python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "IQMPC_ISA": isa}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("isa", [*LEVELS, ""])
def test_the_environment_variable_forces_a_level(isa: str) -> None:
    code = (
        "import numpy as np; from iqmpc import _C; one = np.ones(1, np.float32);"
        "print(_C.isa(), _C.NormedLinear(np.ones((1, 1), np.float32), one, one, one).isa)"
    )
    result = run_python(code, isa)
    expected = isa or LEVELS[-1]
    assert result.stdout.split() == [expected, expected], result.stderr


def test_an_unknown_level_is_an_error() -> None:
    message = "unknown instruction set, expected portable, avx2, avx512 or avx512bf16"
    result = run_python("from iqmpc import _C; _C.isa()", "sse9")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"ValueError: IQMPC_ISA=sse9: {message}"
    with pytest.raises(ValueError) as raised:
        _C.NormedLinear(**arrays(), isa="")
    assert str(raised.value) == f"isa=: {message}"
