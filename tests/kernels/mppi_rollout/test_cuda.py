"""The CUDA C++ rollout: against the reference in float64 on a GPU, and what it says without one.

The kernels' bodies run without a GPU in csrc/tests/test_cuda_tile.cpp.
"""

from __future__ import annotations

import pytest
import torch

from iqmpc import _C
from iqmpc.errors import BackendError
from iqmpc.kernels.backends import available_backends
from iqmpc.kernels.cuda import CudaWeights
from iqmpc.kernels.mppi_rollout import mppi_rollout
from tests.kernels.contract import (
    BETA,
    GAMMA,
    TOLERANCE,
    assert_within,
    assert_within_with_elites,
    drawn,
    first,
    in_float64,
)

WHY_NOT = available_backends()["cuda"]
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"cuda: {WHY_NOT}")]


def gpu(*parameters):
    return pytest.param(*parameters, marks=needs_gpu)


def on_gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


def on_cuda(weights, draws, score="advantage", precision="float32"):
    packed = weights
    if not isinstance(weights, CudaWeights):
        packed = CudaWeights(weights, precision=precision)
    there = [t.to(packed.device) for t in draws]
    return mppi_rollout(packed, *there, GAMMA, score, entropy_coef=BETA).cpu()


@on_gpu
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("score", ["advantage", "unrolled"])
@pytest.mark.parametrize(
    ("envs", "horizon", "samples", "action_dim", "groups", "simnorm", "hidden"),
    [
        (1, 1, 1, 1, 1, 8, 24),
        (1, 2, 7, 2, 3, 2, 37),
        (2, 3, 31, 6, 8, 8, 64),
        (3, 4, 65, 17, 17, 8, 100),
        (2, 3, 65, 39, 3, 8, 37),
        (40, 2, 2, 1, 17, 2, 24),
    ],
)
def test_cuda_is_the_reference(
    make_weights, precision, score, envs, horizon, samples, action_dim, groups, simnorm, hidden
):
    weights = make_weights(5, action_dim, latent=groups * simnorm, simnorm=simnorm, hidden=hidden)
    draws = drawn(weights, envs, horizon, samples + 32, score)
    expected = in_float64(weights, draws, score)
    some = first(draws, samples)
    assert_within(on_cuda(weights, some, score, precision), expected, precision)


@on_gpu
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("envs", [1, 2, 40])  # tiles of few rows, and of many
@pytest.mark.parametrize(("action_dim", "latent", "hidden"), [(39, 512, 512), (6, 128, 384)])
def test_cuda_at_the_sizes_in_use(make_weights, precision, envs, action_dim, latent, hidden):
    weights = make_weights(17, action_dim, latent=latent, hidden=hidden, encoder=64)
    draws = drawn(weights, envs, 3, 256)
    expected = in_float64(weights, draws)
    returns = on_cuda(weights, draws, precision=precision)
    assert_within_with_elites(returns, expected, precision)


@on_gpu
@pytest.mark.parametrize("precision", TOLERANCE)
def test_cuda_takes_any_z0(make_weights, precision):
    weights = make_weights(5, 3, latent=24, hidden=64)
    draws = (torch.randn(2, 24), *drawn(weights, 2, 3, 64)[1:])
    expected = in_float64(weights, draws)
    error = on_cuda(weights, draws, precision=precision) - expected
    assert error.norm() <= TOLERANCE[precision] * expected.norm()


@on_gpu
@pytest.mark.parametrize("precision", TOLERANCE)
def test_cuda_rows_do_not_depend_on_the_batch(make_weights, precision):
    weights = make_weights(5, 3)
    packed = CudaWeights(weights, precision=precision)
    z0, actions, noise, pair = drawn(weights, 300, 3, 150)
    whole = on_cuda(packed, (z0, actions, noise, pair))
    part = on_cuda(
        packed,
        (z0[1:2], actions[1:2, :, 20:27].contiguous(), noise[1:2, :, 20:27].contiguous(), pair),
    )
    assert torch.equal(part, whole[1:2, 20:27])


@on_gpu
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("part", ["dynamics", "policy", "critics"])
def test_cuda_marks_what_is_not_finite(make_weights, part, precision):
    weights = make_weights(5, 3)
    getattr(weights, part)[1].weight.view(-1)[7] = torch.nan
    if part == "critics":
        getattr(weights, part)[1].weight[2].view(-1)[7] = torch.nan
    draws = drawn(weights, 1, 3, 20)
    assert not on_cuda(weights, draws, precision=precision).isfinite().any()


@on_gpu
def test_cuda_marks_the_sample_that_is_not_finite(make_weights):
    weights = make_weights(5, 3)
    z0, actions, noise, pair = drawn(weights, 1, 3, 20)
    clean = on_cuda(weights, (z0, actions, noise, pair))
    actions[0, 1, 4, 2] = torch.nan
    returns = on_cuda(weights, (z0, actions, noise, pair))
    others = torch.arange(20) != 4
    assert returns[0, 4].isnan() and torch.equal(returns[0, others], clean[0, others])


@on_gpu
def test_cuda_graphs_capture_it(make_weights):
    weights = make_weights(5, 3)
    packed = CudaWeights(weights)
    first, second = (drawn(weights, 2, 3, 40, seed=seed) for seed in (0, 1))
    there = [t.cuda() for t in first]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returns = mppi_rollout(packed, *there, GAMMA)
    for draws in (first, second):
        for target, source in zip(there, draws, strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(returns.cpu(), on_cuda(packed, draws))


@on_gpu
def test_cuda_packs_plain_weights_and_stays_a_snapshot(make_weights):
    weights = make_weights(5, 3)
    packed, draws = CudaWeights(weights), [t.cuda() for t in drawn(weights, 1, 3, 9)]
    before = mppi_rollout(packed, *draws, GAMMA)
    assert torch.equal(mppi_rollout(weights, *draws, GAMMA, backend="cuda"), before)
    for tensor in weights.tensors():
        tensor.zero_()
    assert torch.equal(mppi_rollout(packed, *draws, GAMMA), before)
    with pytest.raises(BackendError, match="backend=reference cannot run"):
        mppi_rollout(packed, *draws, GAMMA, backend="reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        gpu(
            dict(actions=lambda t: t.double()),
            "actions must be float32 for the cuda backend, got float64",
        ),
        gpu(
            dict(actions=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
            "actions must be C-contiguous for the cuda backend, got strides of",
        ),
        gpu(
            dict(critic_pair=lambda t: torch.tensor([0, 3])),
            r"critic_pair must lie in \[0, 3\), got 3",
        ),
        gpu(dict(critic_pair=lambda t: t.int()), "critic_pair must be int64 for the cuda backend"),
        gpu(dict(z0=lambda t: t.requires_grad_()), "z0 requires grad and the cuda backend has"),
        gpu(dict(z0=lambda t: t.cpu()), "z0 must be on cuda:0 for the cuda backend, got cpu"),
    ],
)
def test_cuda_names_what_it_cannot_take(make_weights, change, message):
    weights = make_weights(5, 3)
    names = ("z0", "actions", "score_noise", "critic_pair")
    given = {name: t.cuda() for name, t in zip(names, drawn(weights, 1, 3, 4), strict=True)}
    given |= {name: f(given[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=message):
        mppi_rollout(CudaWeights(weights), **given, discount=GAMMA)


@on_gpu
def test_a_model_that_is_too_wide_is_named(make_weights):
    with pytest.raises(ValueError, match="the model is too wide for .* in float32: 8 rows of it"):
        CudaWeights(make_weights(5, 3, hidden=5000))


@on_gpu
def test_a_critic_that_does_not_exist_gives_nan(make_weights):
    weights = make_weights(5, 3)
    draws = [t.cuda() for t in drawn(weights, 2, 2, 5)]
    draws[3] = torch.tensor([0, 3], device="cuda")
    assert mppi_rollout(CudaWeights(weights), *draws, GAMMA).isnan().all()


@pytest.mark.skipif(WHY_NOT is None, reason="the cuda backend can run here")
def test_without_a_gpu_it_says_why(make_weights):
    assert not torch.cuda.is_available() or _C.cuda_unavailable_reason() == WHY_NOT
    with pytest.raises(BackendError) as raised:
        CudaWeights(make_weights(5, 3))
    assert str(raised.value) == f"backend=cuda cannot run: {WHY_NOT}"


@pytest.mark.skipif(_C.cuda_available(), reason="a CUDA device is there")
def test_the_extension_works_without_a_driver(make_weights):
    """The extension names CUDA's own error where it was built with CUDA, else that it was not."""
    reason = _C.cuda_unavailable_reason()
    if not hasattr(_C, "CudaWorldModel"):
        assert reason == "iqmpc._C was built without CUDA"
        return
    assert reason.startswith("no CUDA device can be used: ")
    layers = [
        tuple(t.numpy() for t in layer if t is not None) for layer in make_weights(5, 3).encoder
    ]
    with pytest.raises(ValueError, match="policy: expected at least 2 layers, got 0"):
        _C.CudaWorldModel(
            _C.ModelView(
                encoder=layers,
                dynamics=[],
                policy=[],
                critics=[],
                simnorm_dim=8,
                log_std_min=-10,
                log_std_max=2,
            )
        )
