"""The whole plan: the C++ backend against the reference on the same draws, and what it promises."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqmpc import _C
from iqmpc.config import PlannerConfig
from iqmpc.kernels import layers
from iqmpc.kernels.cpu import CpuWeights, layer_arrays, model_view
from iqmpc.kernels.mppi_plan import BACKENDS, CpuPlan, PlanNoise, ReferencePlan
from iqmpc.kernels.weights import snapshot
from tests.kernels.contract import drawn, ending_half, image_model, images

LEVELS = _C.isa_levels()
CONFIG = PlannerConfig(samples=40, elites=8, policy_trajectories=6, iterations=3)
# What the library is given for CONFIG, but for the seed.
NATIVE = dict(
    problems=1,
    horizon=3,
    samples=40,
    elites=8,
    policy_trajectories=6,
    iterations=3,
    temperature=0.5,
    std_min=0.05,
    std_max=2.0,
    discount=0.97,
    enabled=True,
    threads=1,
    budget_us=0.0,
)


def cpu(weights, config=CONFIG, **settings):
    return CpuPlan(
        weights, config, **({"discount": 0.97, "entropy_coef": 1e-3, "seed": 7} | settings)
    )


def its_draws(plan: CpuPlan, score: str, *, explore: bool) -> PlanNoise:
    """What the next plan of the C++ backend will draw."""
    d = {k: torch.tensor(v) for k, v in plan.native.draws(plan.step).items()}
    pair, explored = d.pop("pair"), d.pop("explore").double()
    if score == "unrolled":  # the reference also draws at z_H, whose value cancels
        for name, other in (
            ("policy_score_noise", "policy_noise"),
            ("score_noise", "sample_noise"),
        ):
            like = d[other][..., :1, :, :]
            d[name] = torch.cat([d[name], torch.randn_like(like)], dim=-3)
    return PlanNoise(
        **{k: v.double() for k, v in d.items()},
        pair=pair,
        root=torch.zeros_like(explored),
        explore=explored * explore,
    )


def reference(weights, config=CONFIG, **settings):
    config = dataclasses.replace(config, precision="float64", threads=None)
    return ReferencePlan(weights, config, **({"discount": 0.97, "entropy_coef": 1e-3} | settings))


@settings(deadline=None, max_examples=60)
@given(
    isa=st.sampled_from(LEVELS),
    envs=st.sampled_from([1, 3]),
    horizon=st.integers(1, 4),
    action_dim=st.sampled_from([1, 5, 17]),
    shape=st.sampled_from(
        [(1, 1, 0), (1, 1, 1), (40, 8, 6), (40, 40, 0), (33, 5, 33), (130, 16, 70)]
    ),
    iterations=st.integers(1, 3),
    score=st.sampled_from(["advantage", "unrolled"]),
    refit=st.sampled_from([(0.5, 0.05, 2.0), (3.0, 0.2, 0.8)]),
    threads=st.sampled_from([1, 2, 3]),
    explore=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cpu_plans_what_the_reference_plans(
    make_weights,
    isa,
    envs,
    horizon,
    action_dim,
    shape,
    iterations,
    score,
    refit,
    threads,
    explore,
    seed,
):
    samples, elites, policy_trajectories = shape
    weights = make_weights(5, action_dim, latent=24, hidden=37, seed=seed)
    config = PlannerConfig(
        samples=samples,
        elites=elites,
        policy_trajectories=policy_trajectories,
        horizon=horizon,
        iterations=iterations,
        temperature=refit[0],
        std_min=refit[1],
        std_max=refit[2],
        score=score,
        threads=threads,
    )
    meaning = reference(weights, config, problems=envs)
    plan = cpu(weights, config, problems=envs, isa=isa, seed=seed)
    random = torch.Generator().manual_seed(seed)
    for _ in range(2):  # the second one starts from the first one's mean
        obs = torch.randn(envs, 5, generator=random)
        action, mean = meaning.compute(
            meaning.weights, obs.double(), meaning.mean, its_draws(plan, score, explore=explore)
        )
        done = plan(obs, explore=explore)
        assert done.iterations == iterations and done.nonfinite == 0 and not done.missed
        torch.testing.assert_close(done.action.double(), action[:, :-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plan.mean.double(), mean, rtol=1e-4, atol=1e-4)
        meaning.mean.copy_(mean)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("score", ["advantage", "unrolled"])
def test_a_termination_head_changes_both_plans_alike(make_weights, isa, score):
    weights = make_weights(5, 3, latent=24, hidden=37, termination=True)
    weights = ending_half(weights, drawn(weights, 2, 3, 100))
    config = dataclasses.replace(CONFIG, score=score)
    plan, meaning = (
        cpu(weights, config, problems=2, isa=isa),
        reference(weights, config, problems=2),
    )
    without = weights._replace(termination=())
    other = reference(without, config, problems=2)
    obs = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    noise = its_draws(plan, score, explore=False)
    action, mean = meaning.compute(meaning.weights, obs.double(), meaning.mean, noise)
    _, changed = other.compute(other.weights, obs.double(), other.mean, noise)
    assert (mean - changed).abs().max() > 1e-2
    torch.testing.assert_close(plan(obs).action.double(), action[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plan.mean.double(), mean, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError,
        match=r"published model's termination head \(1 for one\) must "
        "be 1 as the planner's, got 0",
    ):
        plan.publish(without)


@pytest.mark.parametrize("isa", LEVELS)
def test_bf16_refits_to_nearly_the_same_elites(make_weights, isa):
    weights = make_weights(17, 6, latent=128, hidden=256)
    config = PlannerConfig(samples=256, elites=32, policy_trajectories=16, iterations=1)
    exact = cpu(weights, config)
    half = cpu(weights, dataclasses.replace(config, precision="bf16"), isa=isa)
    obs = torch.randn(1, 17)
    exact(obs), half(obs)
    assert (exact.mean - half.mean).abs().max() < 0.1
    assert not torch.equal(exact.mean, half.mean)  # it is another computation


def test_same_seed_and_step_same_plan_on_any_thread_count(make_weights):
    weights = make_weights(5, 3)
    obs = torch.randn(5, 2, 5)
    runs = [
        torch.stack([plan(o, explore=True).action for o in obs])
        for plan in (
            cpu(weights, dataclasses.replace(CONFIG, threads=n), problems=2) for n in (1, 2, 3, 7)
        )
    ]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    other = cpu(weights, problems=2, seed=8)
    assert not torch.equal(torch.stack([other(o, explore=True).action for o in obs]), runs[0])


def test_a_step_can_be_repeated(make_weights):
    plan, obs = cpu(make_weights(5, 3)), torch.randn(1, 5)
    first, mean = plan(obs).action, plan.mean.clone()
    assert plan.step == 1
    second = plan(obs).action
    plan.step, plan.mean[:] = 1, mean
    assert torch.equal(plan(obs).action, second) and not torch.equal(first, second)


def test_problems_of_a_batch_are_planned_for_independently(make_weights):
    weights, obs = make_weights(5, 3), torch.randn(3, 5)
    one, other = cpu(weights, problems=3), cpu(weights, problems=3)
    changed = obs.clone()
    changed[1] += 3
    a, b = one(obs).action, other(changed).action
    assert torch.equal(a[[0, 2]], b[[0, 2]]) and not torch.equal(a[1], b[1])


def test_draws_are_standard_normal_and_independent(make_weights):
    plan = cpu(
        make_weights(5, 3),
        PlannerConfig(samples=512, elites=64, policy_trajectories=24, iterations=6),
        problems=2,
    )
    draws = plan.native.draws(0)
    x = draws["sample_noise"].ravel().astype(np.float64)
    bound = 5 / np.sqrt(x.size)
    assert abs(x.mean()) < bound and abs((x**2).mean() - 1) < bound * np.sqrt(2)
    assert abs((x**3).mean()) < bound * np.sqrt(15) and abs((x**4).mean() - 3) < bound * np.sqrt(96)
    assert abs((np.abs(x) > 1.959964).mean() - 0.05) < bound * 0.22
    # Between neighbours, iterations, problems, purposes and steps.
    s, later = draws["sample_noise"], plan.native.draws(1)["sample_noise"]
    for a, b in (
        (s[..., 0], s[..., 1]),
        (s[0], s[1]),
        (s[:, 0], s[:, 1]),
        (s, later),
        (s[:, :, 1:], draws["score_noise"]),
        (s[:, :, 0, :-1], s[:, :, 0, 1:]),
    ):
        assert abs((a.astype(np.float64) * b).mean()) < 5 / np.sqrt(a.size)
    gumbel = np.concatenate([plan.native.draws(i)["gumbel"].ravel() for i in range(50)])
    assert abs(gumbel.mean() - 0.5772) < 5 * 1.2825 / np.sqrt(gumbel.size)
    pairs = [plan.native.draws(i)["pair"] for i in range(600)]
    counts = np.unique(pairs, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 60  # every ordered pair of three critics, 100 each


def test_draws_are_the_same_at_every_level(make_weights):
    weights = make_weights(5, 3)
    draws = [cpu(weights, isa=isa).native.draws(3) for isa in LEVELS]
    for other in draws[1:]:
        for name, value in other.items():
            np.testing.assert_allclose(value, draws[0][name], rtol=2e-5, atol=2e-6)


def test_no_time_for_an_iteration_is_a_miss(make_weights):
    weights = make_weights(5, 3)
    plan = cpu(weights, dataclasses.replace(CONFIG, budget_us=1e-3))
    obs = torch.randn(1, 5)
    meaning = reference(weights, dataclasses.replace(CONFIG, enabled=False))
    done = plan(obs, explore=True)
    assert done.missed and done.iterations == 0 and done.nonfinite == 0
    torch.testing.assert_close(done.action, meaning(obs).action)  # the policy's mean action
    assert plan.mean.count_nonzero() == 0

    planned = torch.tensor([[0.1, 0.2, 0.3], [-0.4, 0.5, -0.6], [0.7, -0.8, 0.9]])
    plan.mean[0] = planned
    done = plan(obs, explore=True)
    assert done.missed and torch.equal(done.action, planned[1:2])
    assert torch.equal(plan.mean[0], torch.cat([planned[1:], torch.zeros(1, 3)]))


def test_a_budget_ends_the_plan(make_weights):
    """Enough time for some of a million iterations: the plan is what those iterations give.

    Where it ended inside one, what that had scored counts too, which csrc/tests/test_planner.cpp
    looks at with a clock of its own.
    """
    weights, obs = make_weights(5, 3), torch.randn(1, 5)
    plan = cpu(weights, dataclasses.replace(CONFIG, iterations=1_000_000, budget_us=20_000.0))
    started = time.perf_counter()
    done = plan(obs)
    # Not a measurement: only that it did end, long before the hours a million would take.
    assert time.perf_counter() - started < 60
    assert 1 <= done.iterations < 1_000_000 and not done.missed
    same = cpu(weights, dataclasses.replace(CONFIG, iterations=done.iterations))
    given = same(obs)
    assert done.samples >= given.samples
    if done.samples == given.samples:
        assert torch.equal(given.action, done.action)
        assert torch.equal(same.mean, plan.mean)


def test_a_generous_budget_changes_nothing(make_weights):
    weights, obs = make_weights(5, 3), torch.randn(1, 5)
    free, bound = cpu(weights), cpu(weights, dataclasses.replace(CONFIG, budget_us=1e9))
    for _ in range(2):
        assert torch.equal(free(obs).action, bound(obs).action)


def test_publishing_and_freeing_weights_while_plans_run(make_weights):
    """Every plan is one of the two models', whichever it found; none is a mixture or a crash."""
    old, new = (make_weights(5, 3, hidden=64, seed=s) for s in (0, 1))
    config = dataclasses.replace(CONFIG, samples=64, threads=2)
    obs = torch.randn(1, 5)
    plan = cpu(old, config)
    possible = []
    for weights in (old, new):
        alone = cpu(weights, config)
        possible.append(alone(obs).action)
    stop, seen = threading.Event(), []

    def publish():
        while not stop.is_set():
            plan.publish(new)
            plan.publish(old)

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        for _ in range(300):
            plan.step = 0
            plan.reset()
            seen.append(plan(obs).action)
    finally:
        stop.set()
        publisher.join()
    assert all(any(torch.equal(a, p) for p in possible) for a in seen)


def first_plan(plan, obs):
    plan.step = 0
    plan.reset()
    return plan(obs).action


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_publishing_is_of_what_the_weights_are_then(make_weights, precision):
    """Changed in place, moved, exchanged or other ones: never what an earlier view showed."""
    weights, other = (make_weights(5, 3, hidden=64, seed=s) for s in (0, 1))
    config, obs = dataclasses.replace(CONFIG, precision=precision), torch.randn(1, 5)
    plan = cpu(weights, config)

    def expect(published):
        plan.publish(published)
        assert torch.equal(first_plan(plan, obs), first_plan(cpu(published, config), obs))

    before = first_plan(plan, obs)
    for tensor in weights.tensors():
        tensor.mul_(1.1)
    assert torch.equal(first_plan(plan, obs), before)  # a snapshot until then
    expect(weights)
    assert not torch.equal(first_plan(plan, obs), before)
    for tensor, moved in zip(weights.tensors(), other.tensors(), strict=True):
        tensor.data = moved.clone()  # the same tensors with other memory
    expect(weights)
    expect(other)
    layer = weights.policy[1]  # the same memory read otherwise: a square that is not contiguous
    turned = weights._replace(
        policy=(weights.policy[0], layer._replace(weight=layer.weight.T), weights.policy[2])
    )
    for _ in range(2):
        expect(turned)
        layer.weight.mul_(0.9)
    expect(weights)
    expect(weights._replace(log_std_max=0.5))
    with pytest.raises(ValueError, match="policy layer 1 weight must be float32 for the cpu"):
        plan.publish(
            weights._replace(
                policy=(
                    weights.policy[0],
                    layer._replace(weight=layer.weight.view(torch.int32)),
                    weights.policy[2],
                )
            )
        )


def test_a_view_is_made_once_for_weights_that_stay(make_weights, monkeypatch):
    made = []
    monkeypatch.setattr(
        "iqmpc.kernels.cpu.model_view", lambda w, build=model_view: made.append(w) or build(w)
    )
    weights = make_weights(5, 3)
    plan = cpu(weights)
    for _ in range(3):
        plan.publish(weights)
        plan.publish(weights._replace())  # the same tensors in another tuple
    assert len(made) == 1
    plan.publish(snapshot(weights))
    assert len(made) == 2


def test_a_view_keeps_the_weights_that_it_shows(make_weights):
    """Packed after its tensors are gone, it is still of them and of nothing that came after."""
    weights, obs = make_weights(5, 3, hidden=300), torch.randn(1, 5)
    plan = cpu(weights)
    expected = first_plan(plan, obs)
    view = model_view(weights)
    del weights
    others = [make_weights(5, 3, hidden=300, seed=s) for s in range(1, 6)]
    plan.publish(others[0])
    assert not torch.equal(first_plan(plan, obs), expected)
    plan.native.publish(view)
    assert torch.equal(first_plan(plan, obs), expected)


def test_plans_of_one_planner_from_two_threads_wait_for_each_other(make_weights):
    weights, obs = make_weights(5, 3), torch.randn(1, 5)
    shared, alone = cpu(weights), cpu(weights)
    results = []
    threads = [
        threading.Thread(target=lambda: [results.append(shared(obs).action) for _ in range(20)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [alone(obs).action for _ in range(40)]
    assert shared.step == 40
    # In some order: steps are taken one by one, each with its own draws.
    key = [tuple(a.ravel().tolist()) for a in expected]
    assert sorted(tuple(a.ravel().tolist()) for a in results) == sorted(key)


def test_a_published_model_must_be_alike(make_weights):
    plan = cpu(make_weights(5, 3))
    with pytest.raises(ValueError, match="action_dim must be 3 as the planner's, got 4"):
        plan.publish(make_weights(5, 4))
    with pytest.raises(ValueError, match=r"widest layer \(padded\) must be .* as the planner's"):
        plan.publish(make_weights(5, 3, hidden=500))
    half = CpuWeights(make_weights(5, 3), precision="bf16")
    with pytest.raises(ValueError, match="must be float32 for .* as the planner's, got bf16"):
        plan.native.publish(half.native)


def test_stacked_critics_are_checked(make_weights):
    weights = make_weights(5, 3)
    parts = {
        part: layer_arrays(part, getattr(weights, part))
        for part in ("encoder", "dynamics", "policy", "critics")
    }
    settings = {"simnorm_dim": 8, "log_std_min": -10.0, "log_std_max": 2.0}
    weight, *rest = parts["critics"][1]
    for layer, message in (
        (
            (weight[:2], *rest),
            r"critics layer 1 weight must be float32 with shape \[3, O, I\], "
            r"got float32 \[2, ",
        ),
        ((weight[:, :, 1:], *rest), "critics layer 1 weight must be C-contiguous and aligned"),
        ((weight, rest[0][0], *rest[1:]), r"critics layer 1 bias must be float32 with shape \[3, "),
        ((weight[0], *rest), r"critics layer 1 weight must be float32 with shape \[3, O, I\]"),
        ((), r"critics layer 1 must be \(weight, bias\) or .*, got 0 arrays"),
    ):
        critics = [parts["critics"][0], layer, parts["critics"][2]]
        with pytest.raises(ValueError, match=message):
            _C.ModelView(**(parts | {"critics": critics}), **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(elites=41), "elites must be at most samples = 40, got 41"),
        (dict(samples=0), "samples must be at least 1, got 0"),
        (dict(problems=0), "problems must be at least 1, got 0"),
        (dict(std_min=0.0), "std_min must be positive, got 0"),
        (dict(std_max=float("nan")), "std_max must be finite and at least std_min, got nan"),
        (dict(discount=1.5), r"discount must be in \[0, 1\], got 1.5"),
        (dict(threads=0), r"threads must lie in \[1, 1024\], got 0"),
        (dict(budget_us=-1.0), "budget_us must be 0 or more microseconds, got -1"),
    ],
)
def test_settings_are_checked_by_the_library_too(make_weights, change, message):
    with pytest.raises(ValueError, match=message):
        _C.Planner(CpuWeights(make_weights(5, 3)).native, **(NATIVE | {"seed": 0} | change))


def test_arrays_and_problems_that_do_not_fit_are_named(make_weights):
    plan = cpu(make_weights(5, 3), problems=2)
    obs, action = np.zeros((2, 5), np.float32), np.zeros((2, 3), np.float32)
    for arguments, message in (
        ((obs[:1], False, action), r"obs must be float32 with shape \[2, 5\], got .* \[1, 5\]"),
        ((obs, False, action[:, :2]), r"action must be float32 with shape \[2, 3\]"),
        ((obs.astype(np.float64), False, action), r"obs must be .* got float64 \[2, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.native.plan(*arguments)
    with pytest.raises(IndexError, match=r"problem must lie in \[0, 2\), got 2"):
        plan.reset(2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_policy_trajectories_keep_their_score(make_weights, backend):
    """With policy trajectories only, every iteration ranks the same scores: one is enough."""
    weights, obs = make_weights(5, 3), torch.randn(1, 5)
    config = dataclasses.replace(CONFIG, policy_trajectories=40)
    plans = []
    for iterations in (1, 3):
        plan = BACKENDS[backend](
            weights, dataclasses.replace(config, iterations=iterations), discount=0.97, seed=1
        )
        plan(obs)
        plans.append(plan.mean.clone())
    torch.testing.assert_close(plans[0], plans[1])


@pytest.mark.parametrize("isa", LEVELS)
def test_images_are_planned_for_as_the_reference_does(isa):
    weights = image_model()
    meaning, plan = reference(weights, problems=2), cpu(weights, problems=2, isa=isa)
    actions = []
    for step in range(3):
        if step == 2:  # the encoder is published with the rest
            weights = image_model(seed=1)
            plan.publish(weights)
            meaning.publish(weights)
        obs = images(2)
        action, mean = meaning.compute(
            meaning.weights, obs, meaning.mean, its_draws(plan, "advantage", explore=True)
        )
        done = plan(obs, explore=True)
        torch.testing.assert_close(done.action.double(), action[:, :-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plan.mean.double(), mean, rtol=1e-4, atol=1e-4)
        meaning.mean.copy_(mean)
        actions.append(done.action)
    assert not torch.equal(actions[0], actions[1])


def test_a_plan_is_of_the_published_encoder():
    weights, obs = image_model(), images(1)
    plan = cpu(weights)
    weights.encoder[0].weight.data.zero_()  # not published: the snapshot is a copy
    first = plan(obs).action
    plan.reset()
    plan.step = 0
    plan.publish(weights)
    assert not torch.equal(plan(obs).action, first)


def test_without_an_encoder_latents_are_planned_for(make_weights):
    weights = make_weights(5, 3, latent=24)
    arrays = {
        part: layer_arrays(part, getattr(weights, part))
        for part in ("dynamics", "policy", "critics")
    }
    settings = {"simnorm_dim": 8, "log_std_min": -10.0, "log_std_max": 2.0}
    model = _C.WorldModel(_C.ModelView(encoder=[], **arrays, **settings))
    assert model.obs_dim == model.latent_dim == 24
    with pytest.raises(ValueError, match="dynamics: expected at least 2 layers, got 0"):
        _C.WorldModel(_C.ModelView(encoder=[], **(arrays | {"dynamics": []}), **settings))
    plan = cpu(weights, CONFIG)
    obs = torch.randn(1, 5)
    latent = CpuPlan(weights, CONFIG, discount=0.97, entropy_coef=1e-3, seed=7)
    latent.native = _C.Planner(model, **NATIVE, seed=7)
    torch.testing.assert_close(
        latent(layers.encode(weights, obs)).action, plan(obs).action, rtol=1e-4, atol=1e-4
    )
