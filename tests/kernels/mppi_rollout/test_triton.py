"""The Triton rollout against the float64 reference (`tests.kernels.on_triton`)."""

from __future__ import annotations

import shutil

import pytest
import torch

from iqmpc.kernels.mppi_refit import mppi_refit
from iqmpc.kernels.mppi_rollout import mppi_rollout
from iqmpc.kernels.triton_weights import TritonWeights
from tests.kernels.contract import (
    BETA,
    GAMMA,
    TOLERANCE,
    assert_within,
    decided,
    drawn,
    end_logits,
    ending_half,
    in_float64,
)
from tests.kernels.on_triton import (
    INTERPRETED,
    SCHEDULES,
    all_nan,
    device,
    draw,
    needs_gpu,
    needs_triton,
    rollout,
    to_device,
)


@needs_triton
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("envs", "horizon", "samples", "action_dim", "latent", "simnorm", "hidden", "score"),
    [
        (3, 3, 5, 1, 8, 8, 13, "advantage"),  # tiles over several problems
        (1, 1, 1, 3, 24, 8, 37, "advantage"),  # no dynamics, one sample
        (2, 2, 70, 1, 8, 8, 9, "unrolled"),  # in the interpreter, more tiles than programs
        (1, 3, 9, 17, 136, 8, 100, "advantage"),  # several blocks of columns
        (2, 3, 3, 5, 24, 3, 70, "unrolled"),  # groups of three
        (1, 1, 4, 1, 8, 2, 9, "unrolled"),
    ],
)
def test_rollout_is_the_reference(
    make_weights,
    envs,
    horizon,
    samples,
    action_dim,
    latent,
    simnorm,
    hidden,
    score,
    schedule,
    precision,
):
    weights = to_device(make_weights(5, action_dim, latent=latent, simnorm=simnorm, hidden=hidden))
    draws = draw(weights, envs, horizon, samples + 32, score)
    expected = in_float64(weights, draws, score)
    z0, actions, noise, pair = draws
    some = z0, actions[:, :, :samples], noise[:, :, :samples], pair
    returns = rollout(TritonWeights(weights, precision=precision), some, score, schedule)
    assert returns.shape == (envs, samples) and returns.dtype == torch.float32
    assert_within(returns, expected, precision)
    if precision == "bf16":  # it is another computation
        assert (returns - expected[:, :samples]).abs().max() > 0
        assert not torch.equal(returns, rollout(weights, some, score))


@needs_triton
@pytest.mark.parametrize(
    ("schedule", "precision", "score"),
    [
        ("throughput", "float32", "advantage"),
        ("latency", "float32", "unrolled"),
        ("throughput", "bf16", "unrolled"),
        ("latency", "bf16", "advantage"),
    ],
)
def test_rollout_ends_where_the_reference_does(make_weights, schedule, precision, score):
    """Samples that end at every step: all that are clear as in the reference, some changed."""
    weights = make_weights(5, 2, latent=24, hidden=70, termination=True)
    draws = drawn(weights, 2, 3, 30, score)
    weights = ending_half(weights, draws)
    alive = (end_logits(weights, draws)[..., :-1] <= 0).cumprod(-1).sum(-1)
    clear = decided(weights, draws, precision)
    assert alive.unique().tolist() == [0, 1, 2] and clear.float().mean() > 0.5
    expected = in_float64(weights, draws, score)
    there, placed = to_device(weights), tuple(t.to(device()) for t in draws)
    returns = rollout(TritonWeights(there, precision=precision), placed, score, schedule).cpu()
    assert_within(returns.where(clear, expected.float()), expected, precision)
    bare = TritonWeights(there._replace(termination=()), precision=precision)
    without = rollout(bare, placed, score, schedule).cpu()
    changed = (returns - without).abs() > 1e-6
    assert torch.equal(changed[clear], (alive < 2)[clear])


@needs_triton
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exponentials_beyond_float32_are_bounded(make_weights, schedule):
    """What is before SimNorm may be several hundred, either way: returns stay finite."""
    weights = make_weights(5, 2)
    last = weights.dynamics[-1]
    shift = torch.tensor([200.0, -200.0]).repeat_interleave(8)  # a group each
    large = last._replace(beta=last.beta + shift)
    weights = to_device(weights._replace(dynamics=(*weights.dynamics[:-1], large)))
    draws = draw(weights, 1, 2, 9)
    assert rollout(TritonWeights(weights), draws, schedule=schedule).isfinite().all()


@needs_triton
def test_the_schedule_follows_from_the_number_of_tiles(monkeypatch):
    from iqmpc.kernels.mppi_rollout import triton as module

    monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    where = torch.device(device())
    assert module.choose_schedule(1, 488, where) == "latency"
    assert module.choose_schedule(16, 488, where) == "latency"  # 122 tiles of 64 rows
    assert module.choose_schedule(64, 488, where) == "throughput"


@needs_triton
def test_the_faster_schedule_is_kept(make_weights, monkeypatch, tmp_path):
    from iqmpc.kernels.mppi_rollout import triton as module

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_measured", {})
    weights, timed = TritonWeights(to_device(make_weights(5, 3))), []

    def resolve(samples, times, envs=1):
        def timer(call):
            call()  # what is timed is a rollout
            timed.append(samples)
            return times[len(timed) % 2]  # of the schedules, the latency schedule's comes second

        z0, actions, noise, pair = draw(weights, envs, 1, samples)
        r = module.Launch(
            weights,
            actions,
            noise,
            pair,
            GAMMA,
            torch.zeros(envs, samples, device=device()),
            module.new_root(weights, envs),
            samples,
        )
        return module.resolve_schedule(r, timer)

    assert resolve(4, (1.0, 2.0)) == "latency" and timed == [4, 4]
    assert resolve(4, (2.0, 1.0)) == "latency" and timed == [4, 4]  # not timed again, ...
    module._measured.clear()
    assert resolve(3, (2.0, 1.0)) == "latency" and timed == [4, 4]  # ... nor by another process
    assert resolve(9, (2.0, 1.0)) == "throughput" and timed == [4, 4, 9, 9]
    monkeypatch.setattr(module, "_LARGEST", 1)
    assert resolve(20, (1.0, 2.0)) == "throughput" and timed == [4, 4, 9, 9]


@needs_triton
@pytest.mark.parametrize("name", ["triton_weights", "mppi_rollout/triton_jobs", "triton_launch"])
def test_a_schedule_is_timed_anew_when_a_kernel_file_has_changed(tmp_path, name):
    from iqmpc.kernels.mppi_rollout import triton as module

    kernels = shutil.copytree(module._KERNELS, tmp_path / "kernels")
    before = module.sources(kernels)
    assert before == module.sources(module._KERNELS)
    path = kernels / f"{name}.py"
    path.write_text(path.read_text() + "# another\n")
    assert module.sources(kernels) != before


@needs_triton
def test_more_numbers_than_a_kernel_counts_are_refused(make_weights):
    weights = to_device(make_weights(5, 3))
    z0, actions, noise, pair = draw(weights, 1, 2, 1)
    many = actions.expand(1, 2, 2**29, 3), noise.expand(1, 1, 2**29, 3)  # takes no memory
    with pytest.raises(ValueError, match="have 3221225472 numbers, and the triton backend counts"):
        rollout(weights, (z0, *many, pair))


@needs_triton
def test_triton_by_name(make_weights):
    weights = to_device(make_weights(5, 3))
    draws = draw(weights, 1, 2, 6)
    expected = rollout(weights, draws)
    for given in (weights, TritonWeights(weights)):
        assert torch.equal(
            mppi_rollout(given, *draws, GAMMA, entropy_coef=BETA, backend="triton"), expected
        )


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_auto_does_not_take_the_interpreter(make_weights):
    weights = make_weights(5, 3)
    draws = draw(weights, 1, 2, 6)
    assert torch.equal(
        mppi_rollout(weights, *draws, GAMMA), mppi_rollout(weights, *draws, GAMMA, backend="cpu")
    )


@needs_triton
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sample_does_not_depend_on_its_neighbours(make_weights, schedule):
    weights = to_device(make_weights(5, 3))
    z0, actions, noise, pair = draw(weights, 2, 2, 20)
    whole = rollout(weights, (z0, actions, noise, pair), schedule=schedule)
    part = rollout(
        weights, (z0[1:], actions[1:, :, 3:9], noise[1:, :, 3:9], pair), schedule=schedule
    )
    # Not bit for bit: other shapes may have other tiles.
    torch.testing.assert_close(part, whole[1:, 3:9], rtol=1e-5, atol=1e-5)


@needs_triton
@all_nan
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_not_finite_is_nan(make_weights, schedule):
    weights = to_device(make_weights(5, 3))
    z0, actions, noise, pair = draw(weights, 1, 3, 9)
    packed = TritonWeights(weights, precision="bf16")
    clean = rollout(packed, (z0, actions, noise, pair), schedule=schedule)
    assert clean.isfinite().all()
    actions[0, 1, 4, 2] = torch.nan
    noise[0, 1, 7, 0] = torch.inf
    returns = rollout(packed, (z0, actions, noise, pair), schedule=schedule)
    others = torch.tensor([s not in (4, 7) for s in range(9)], device=returns.device)
    # Infinite noise saturates the tanh: a finite action.
    assert returns[0, 4].isnan() and returns[0, 7].isfinite()
    assert torch.equal(returns[0, others], clean[0, others])
    for out_of_range in ([0, 3], [-1, 0]):
        pair = torch.tensor(out_of_range, device=device())
        assert rollout(packed, (z0, actions, noise, pair), schedule=schedule).isnan().all()


@needs_triton
@all_nan
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("part", ["dynamics", "policy", "critics"])
def test_weights_that_are_not_finite_make_nan(make_weights, part, schedule):
    weights = to_device(make_weights(5, 3))
    layer = getattr(weights, part)[1].weight
    (layer[2] if part == "critics" else layer).view(-1)[7] = torch.nan
    assert rollout(weights, draw(weights, 1, 2, 5), schedule=schedule).isnan().all()


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(actions=torch.zeros(1, 3, 4, 3).double()),
            "actions must be float32 for the triton backend, got torch.float64",
        ),
        (
            dict(z0=torch.zeros(1, 16, requires_grad=True)),
            "z0 requires grad and the triton backend",
        ),
        (dict(score_noise=torch.zeros(1, 2, 4, 3, device="meta")), "tensors on one"),
        (dict(critic_pair=torch.zeros(2, device="meta", dtype=torch.int64)), "tensors on one"),
    ],
)
def test_arguments_that_do_not_fit_are_named(make_weights, change, message):
    weights = to_device(make_weights(5, 3))
    names = ("z0", "actions", "score_noise", "critic_pair")
    given = dict(zip(names, draw(weights, 1, 3, 4), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        mppi_rollout(weights, **given, discount=GAMMA, backend="triton")
    with pytest.raises(ValueError, match="schedule must be one of throughput, latency"):
        rollout(weights, draw(weights, 1, 3, 4), schedule="both")


@needs_gpu
@pytest.mark.parametrize("precision", [*TOLERANCE, "tf32"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("envs", [1, 8])
@pytest.mark.parametrize(("action_dim", "latent", "hidden"), [(39, 512, 512), (6, 128, 384)])
def test_at_the_sizes_in_use(make_weights, action_dim, latent, hidden, envs, schedule, precision):
    weights = to_device(make_weights(17, action_dim, latent=latent, hidden=hidden, encoder=64))
    draws = draw(weights, envs, 3, 488)
    expected = in_float64(weights, draws)
    returns = rollout(TritonWeights(weights, precision=precision), draws, schedule=schedule)
    assert (returns - expected).norm() <= TOLERANCE.get(precision, 1e-2) * expected.norm()
    for got, true in zip(returns.topk(64).indices, expected.topk(64).indices, strict=True):
        assert len(set(got.tolist()) & set(true.tolist())) >= 0.95 * 64


@needs_gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_captured_iteration_is_the_uncaptured_one(make_weights, schedule):
    old, new = (to_device(make_weights(5, 6, latent=64, hidden=128, seed=s)) for s in (0, 1))
    packed = TritonWeights(old, precision="bf16")
    inputs = draw(old, 2, 3, 100)

    def iteration():
        returns = rollout(packed, inputs, schedule=schedule)
        return returns, *mppi_refit(
            inputs[1],
            returns,
            elites=16,
            temperature=0.5,
            std_min=0.05,
            std_max=2.0,
            backend="triton",
        )

    iteration()  # compiles and tunes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = iteration()
    for t, fresh in zip(inputs, draw(old, 2, 3, 100, seed=1), strict=True):
        t.copy_(fresh)
    packed.refresh(new)
    graph.replay()
    for got, expected in zip(captured, iteration(), strict=True):
        assert torch.equal(got, expected)


@needs_gpu
def test_auto_takes_triton_for_tensors_on_the_gpu(make_weights):
    weights = to_device(make_weights(5, 3))
    draws = draw(weights, 1, 2, 8)
    assert torch.equal(mppi_rollout(weights, *draws, GAMMA), rollout(weights, draws))
