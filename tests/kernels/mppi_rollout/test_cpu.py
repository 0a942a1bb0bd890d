"""The C++ rollout against the float64 reference, at every level and precision."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from iqmpc import _C
from iqmpc.errors import BackendError
from iqmpc.kernels.cpu import CpuWeights
from iqmpc.kernels.mppi_rollout import mppi_rollout
from iqmpc.kernels.weights import snapshot
from tests.kernels.contract import (
    BETA,
    GAMMA,
    TOLERANCE,
    assert_within,
    assert_within_with_elites,
    decided,
    drawn,
    end_logits,
    ending_half,
    first,
    in_float64,
)

LEVELS = _C.isa_levels()


def on_cpu(weights, draws, score="advantage", *, precision="float32", isa=None):
    packed = CpuWeights(weights, precision=precision, isa=isa)
    return mppi_rollout(packed, *draws, GAMMA, score, entropy_coef=BETA)


@settings(deadline=None, max_examples=250)
@given(
    isa=st.sampled_from(LEVELS),
    precision=st.sampled_from(list(TOLERANCE)),
    envs=st.sampled_from([1, 2, 3]),
    horizon=st.integers(1, 4),
    samples=st.sampled_from([1, 2, 7, 31, 65]),
    action_dim=st.sampled_from([1, 2, 6, 17, 39]),
    groups=st.sampled_from([1, 3, 8, 17]),
    simnorm=st.sampled_from([2, 8]),
    hidden=st.sampled_from([24, 37, 64, 100]),
    score=st.sampled_from(["advantage", "unrolled"]),
    seed=st.integers(0, 1000),
)
def test_cpu_is_the_reference(
    make_weights,
    isa,
    precision,
    envs,
    horizon,
    samples,
    action_dim,
    groups,
    simnorm,
    hidden,
    score,
    seed,
):
    # LayerNorm over two outputs is nearly a sign: it turns any rounding into an error of size one.
    assume(precision == "float32" or groups * simnorm > 2)
    weights = make_weights(
        5, action_dim, latent=groups * simnorm, simnorm=simnorm, hidden=hidden, seed=seed
    )
    draws = drawn(weights, envs, horizon, samples + 32, score, seed)
    expected = in_float64(weights, draws, score)
    # All of them, since a bound on noise as a whole says little of one; then only the first, for
    # the number of samples, which must change nothing.
    returns = on_cpu(weights, draws, score, precision=precision, isa=isa)
    assert_within(returns, expected, precision)
    some = on_cpu(weights, first(draws, samples), score, precision=precision, isa=isa)
    same = torch.equal if score == "advantage" else torch.allclose
    assert same(some, returns[:, :samples])


@settings(deadline=None, max_examples=100)
@given(
    isa=st.sampled_from(LEVELS),
    precision=st.sampled_from(list(TOLERANCE)),
    envs=st.sampled_from([1, 3]),
    horizon=st.integers(1, 5),
    samples=st.sampled_from([1, 40, 90]),
    action_dim=st.sampled_from([1, 6, 17]),
    groups=st.sampled_from([1, 3, 17]),
    hidden=st.sampled_from([24, 37, 100]),
    score=st.sampled_from(["advantage", "unrolled"]),
    seed=st.integers(0, 1000),
)
def test_cpu_ends_where_the_reference_does(
    make_weights, isa, precision, envs, horizon, samples, action_dim, groups, hidden, score, seed
):
    weights = make_weights(
        5, action_dim, latent=8 * groups, hidden=hidden, seed=seed, termination=True
    )
    draws = drawn(weights, envs, horizon, samples + 32, score, seed)
    weights = ending_half(weights, draws)
    expected = in_float64(weights, draws, score)
    returns = on_cpu(weights, draws, score, precision=precision, isa=isa)
    assert_within(returns.where(decided(weights, draws, precision), expected), expected, precision)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_cpu_with_a_head_that_ends_some(make_weights, isa, precision):
    """Samples that end at every step: all that are clear as in the reference, some changed."""
    weights = make_weights(5, 6, latent=128, hidden=100, termination=True)
    draws = drawn(weights, 2, 4, 200)
    weights = ending_half(weights, draws)
    alive = (end_logits(weights, draws)[..., :-1] <= 0).cumprod(-1).sum(-1)
    clear = decided(weights, draws, precision)
    assert alive.unique().tolist() == [0, 1, 2, 3]
    assert clear.float().mean() > (0.99 if precision == "float32" else 0.3)
    expected, returns = (
        f(weights, draws) for f in (in_float64, lambda *a: on_cpu(*a, precision=precision, isa=isa))
    )
    assert_within(returns.where(clear, expected), expected, precision)
    without = on_cpu(weights._replace(termination=()), draws, precision=precision, isa=isa)
    assert torch.equal((returns != without)[clear], (alive < 3)[clear])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(("action_dim", "latent", "hidden"), [(39, 512, 512), (6, 128, 384)])
def test_cpu_at_the_sizes_in_use(make_weights, isa, precision, action_dim, latent, hidden):
    weights = make_weights(17, action_dim, latent=latent, hidden=hidden, encoder=64)
    draws = drawn(weights, 2, 3, 256)
    expected = in_float64(weights, draws)
    returns = on_cpu(weights, draws, precision=precision, isa=isa)
    assert_within_with_elites(returns, expected, precision)


@pytest.mark.parametrize("precision", TOLERANCE)
def test_cpu_takes_any_z0(make_weights, precision):
    """SimNorm's outputs sum to one in each group, which packing uses; z0 need not."""
    weights = make_weights(5, 3, latent=24, hidden=64)
    draws = (torch.randn(2, 24), *drawn(weights, 2, 3, 64)[1:])
    expected = in_float64(weights, draws)
    error = on_cpu(weights, draws, precision=precision) - expected
    assert error.norm() <= TOLERANCE[precision] * expected.norm()


def test_cpu_does_not_depend_on_threads_or_on_the_batch(make_weights):
    weights = make_weights(5, 3)
    z0, actions, noise, pair = drawn(weights, 3, 3, 150)
    whole = on_cpu(weights, (z0, actions, noise, pair))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(on_cpu(weights, (z0, actions, noise, pair)), whole)
    finally:
        torch.set_num_threads(before)
    part = on_cpu(
        weights,
        (z0[1:2], actions[1:2, :, 20:27].contiguous(), noise[1:2, :, 20:27].contiguous(), pair),
    )
    assert torch.equal(part, whole[1:2, 20:27])


@pytest.mark.filterwarnings("ignore:using the slow reference")
def test_cpu_is_what_auto_takes(make_weights):
    weights = make_weights(5, 3)
    draws = drawn(weights, 1, 2, 8)
    assert torch.equal(mppi_rollout(weights, *draws, GAMMA), on_cpu(weights, draws))
    # float64 is the reference's alone
    exact = in_float64(weights, draws, backend="auto")
    assert exact.dtype == torch.float64


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("part", ["dynamics", "policy", "critics"])
def test_cpu_marks_what_is_not_finite(make_weights, part, precision):
    weights = make_weights(5, 3)
    getattr(weights, part)[1].weight.view(-1)[7] = torch.nan
    if part == "critics":
        getattr(weights, part)[1].weight[2].view(-1)[7] = torch.nan
    draws = drawn(weights, 1, 3, 20)
    assert not on_cpu(weights, draws, precision=precision).isfinite().any()


def test_cpu_marks_the_sample_that_is_not_finite(make_weights):
    weights = make_weights(5, 3)
    z0, actions, noise, pair = drawn(weights, 1, 3, 20)
    clean = on_cpu(weights, (z0, actions, noise, pair))
    actions[0, 1, 4, 2] = torch.nan
    returns = on_cpu(weights, (z0, actions, noise, pair))
    others = torch.arange(20) != 4
    assert returns[0, 4].isnan() and torch.equal(returns[0, others], clean[0, others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(actions=torch.zeros(1, 3, 4, 3).double()),
            "actions must be float32 for the cpu backend, got torch.float64",
        ),
        (
            dict(actions=torch.zeros(1, 4, 3, 3).transpose(1, 2)),
            r"actions must be C-contiguous and aligned, got strides of \[144, 12, 36, 4\] bytes",
        ),
        (
            dict(z0=torch.zeros(1, 32)[:, ::2]),
            r"z0 must be C-contiguous and aligned, got strides of \[128, 8\] bytes",
        ),
        (dict(critic_pair=torch.tensor([0, 3])), r"critic_pair must lie in \[0, 3\), got 3"),
        (dict(critic_pair=torch.tensor([-1, 0])), r"critic_pair must lie in \[0, 3\), got -1"),
        (
            dict(z0=torch.zeros(1, 16, requires_grad=True)),
            "z0 requires grad and the cpu backend has",
        ),
        (
            dict(z0=torch.zeros(1, 16, device="meta")),
            "z0 must be on the CPU for the cpu backend, got meta",
        ),
    ],
)
def test_cpu_names_what_it_cannot_take(make_weights, change, message):
    weights = make_weights(5, 3)
    names = ("z0", "actions", "score_noise", "critic_pair")
    given_ = dict(zip(names, drawn(weights, 1, 3, 4), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        mppi_rollout(weights, **given_, discount=GAMMA, backend="cpu")


def test_packed_weights_are_a_snapshot_and_the_cpus(make_weights):
    weights = make_weights(5, 3)
    packed, draws = CpuWeights(weights), drawn(weights, 1, 3, 9)
    before = mppi_rollout(packed, *draws, GAMMA)
    for tensor in weights.tensors():
        tensor.zero_()
    assert torch.equal(mppi_rollout(packed, *draws, GAMMA), before)
    with pytest.raises(BackendError, match="backend=reference cannot run"):
        mppi_rollout(packed, *draws, GAMMA, backend="reference")


def test_packed_weights_freed_by_another_thread(make_weights):
    """A rollout holds what it computes on, whoever lets go of it."""
    weights = make_weights(5, 3, hidden=200)
    draws = drawn(weights, 1, 3, 2000)
    expected, holder, results = on_cpu(weights, draws), [CpuWeights(weights)], []

    def run(packed):
        results.append(mppi_rollout(packed, *draws, GAMMA))

    thread = threading.Thread(target=run, args=(holder[0],))
    thread.start()
    holder.clear()
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w._replace(encoder=w.encoder[:1]), "policy layer 0: expected 9 inputs, got 16"),
        (
            lambda w: w._replace(dynamics=w.dynamics[:1]),
            "dynamics: expected at least 2 layers, got 1",
        ),
        (lambda w: w._replace(simnorm_dim=5), "simnorm_dim: must divide the latent size 16, got 5"),
        (
            lambda w: w._replace(
                policy=(*w.policy[:2], w.policy[1]._replace(gamma=None, beta=None))
            ),
            r"policy: expected an even number of outputs, got 13",
        ),
        (
            lambda w: w._replace(policy=(*w.policy[:2], w.policy[1])),
            "policy layer 2: needs weight and bias, and has no LayerNorm",
        ),
        (
            lambda w: w._replace(policy=(*w.policy[:2], w.policy[2]._replace(bias=torch.zeros(7)))),
            r"policy layer 2 bias must be float32 with shape \[6\], got float32 \[7\]",
        ),
        (
            lambda w: w._replace(
                critics=tuple(type(x)(*(t if t is None else t[:1] for t in x)) for x in w.critics)
            ),
            "critics: expected at least 2, got 1",
        ),
        (
            lambda w: w._replace(termination=w.dynamics),
            "termination layer 0: expected 16 inputs, got 19",
        ),
        (
            lambda w: w._replace(termination=(w.policy[0], w.policy[2])),
            "termination: expected 1 outputs, got 6",
        ),
        (
            lambda w: w._replace(
                encoder=(w.encoder[0]._replace(gamma=None, beta=None), w.encoder[1])
            ),
            "encoder layer 0: needs weight, bias, gamma and beta",
        ),
        (
            lambda w: w._replace(encoder=(w.encoder[0]._replace(beta=None), w.encoder[1])),
            r"encoder layer 0 must be \(weight, bias\) or "
            r"\(weight, bias, gamma, beta\), got 3 arrays",
        ),
        (lambda w: snapshot(w, torch.float64), "encoder layer 0 weight must be float32"),
    ],
)
def test_weights_that_do_not_fit_are_named(make_weights, change, message):
    with pytest.raises(ValueError, match=message):
        CpuWeights(change(make_weights(5, 3)))


def test_wrong_levels_and_precisions_are_named(make_weights):
    with pytest.raises(ValueError, match="precision must be float32 or bf16, got int8"):
        CpuWeights(make_weights(5, 3), precision="int8")
    with pytest.raises(ValueError, match="isa=sse9: unknown instruction set"):
        CpuWeights(make_weights(5, 3), isa="sse9")


def test_arrays_from_elsewhere_are_checked(make_weights):
    """The extension checks for itself what it is given, without the wrapper."""
    weights = make_weights(5, 3)
    native = CpuWeights(weights).native
    z0, actions, noise, pair = (t.numpy() for t in drawn(weights, 2, 3, 4))
    arguments = dict(
        model=native,
        z0=z0,
        actions=actions,
        score_noise=noise,
        critic_pair=(0, 1),
        discount=0.9,
        score="advantage",
        entropy_coef=0.0,
        returns=np.empty((2, 4), np.float32),
        threads=1,
    )
    read_only = np.empty((2, 4), np.float32)
    read_only.flags.writeable = False
    for change, error, message in (
        (
            dict(z0=z0[:1]),
            ValueError,
            r"z0 must be float32 with shape \[2, 16\], got float32 \[1, 16\]",
        ),
        (dict(z0=z0.tolist()), TypeError, "z0 must be a NumPy array, got list"),
        (
            dict(score_noise=noise[:, :1]),
            ValueError,
            r"score_noise must be float32 with shape \[2, 2, 4, 3\], got float32 \[2, 1, 4, 3\]",
        ),
        (
            dict(returns=np.empty((2, 5), np.float32)),
            ValueError,
            r"returns must be float32 with shape \[2, 4\], got float32 \[2, 5\]",
        ),
        (dict(returns=read_only), ValueError, "returns must be writeable"),
        (dict(threads=0), ValueError, r"threads must lie in \[1, 1024\], got 0"),
        (dict(score="both"), ValueError, "score must be advantage or unrolled, got both"),
        (dict(model=SimpleNamespace()), TypeError, "incompatible function arguments"),
    ):
        with pytest.raises(error, match=message):
            _C.rollout(**(arguments | change))
