"""Whole Triton plans against the float64 reference (`tests.kernels.on_triton`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iqmpc.config import PlannerConfig
from iqmpc.errors import BackendError
from iqmpc.kernels import layers
from iqmpc.kernels.mppi_plan import PlanNoise, ReferencePlan
from iqmpc.kernels.triton_weights import TritonWeights
from iqmpc.kernels.weights import Layer, Weights, snapshot
from tests.kernels.contract import GAMMA, drawn, ending_half, image_model, images
from tests.kernels.on_triton import (
    INTERPRETED,
    SCHEDULES,
    all_nan,
    device,
    needs_gpu,
    needs_triton,
    to_device,
)

SMALL = PlannerConfig(samples=6, elites=2, policy_trajectories=2, horizon=2, iterations=1)


unlikely = pytest.mark.filterwarnings("ignore:divide by zero")  # the logarithm of weight 0


def planner(weights: Weights, config: PlannerConfig = SMALL, *, move: bool = True, **settings: Any):
    from iqmpc.kernels.mppi_plan.triton import TritonPlan

    settings = dict(discount=GAMMA, seed=7) | settings
    return TritonPlan(to_device(weights) if move else weights, config, **settings)


def exact(weights: Weights, config: PlannerConfig, plan, obs, mean):
    """The float64 reference's answer to the last plan's draws: action, marks and mean."""
    config = dataclasses.replace(config, precision="float64", score="advantage", capture=None)
    weights = snapshot(to_device(weights), torch.float64)
    reference = ReferencePlan(weights, config, discount=GAMMA, problems=len(obs))
    *drawn, pair = plan.draws()
    marked, mean = reference.compute(
        weights,
        obs.to(device()).double(),
        mean.double(),
        PlanNoise(*(t.double() for t in drawn), pair),
    )
    return marked[:, :-1].cpu(), marked[:, -1].cpu(), mean


@needs_triton
@unlikely
@pytest.mark.parametrize(
    ("envs", "action_dim", "horizon", "shape", "iterations", "simnorm", "explore"),
    [
        (1, 3, 3, (12, 4, 5), 2, 8, True),
        (3, 1, 2, (9, 3, 4), 2, 3, False),
        (2, 17, 1, (9, 9, 0), 2, 8, True),  # no policy trajectories, no dynamics
        (1, 5, 2, (5, 5, 5), 1, 8, False),  # nothing but policy trajectories
    ],
)
def test_plan_is_the_reference(
    make_weights, envs, action_dim, horizon, shape, iterations, simnorm, explore
):
    samples, elites, trajectories = shape
    weights = make_weights(70, action_dim, latent=24, hidden=37, simnorm=simnorm)
    config = PlannerConfig(
        samples=samples,
        elites=elites,
        policy_trajectories=trajectories,
        horizon=horizon,
        iterations=iterations,
        score="unrolled",
    )
    plan = planner(weights, config, problems=envs, schedule=SCHEDULES[(horizon + trajectories) % 2])
    before = plan.mean.uniform_(-0.5, 0.5).clone()
    obs = torch.randn(envs, 70)
    done = plan(obs, explore=explore)
    action, _, mean = exact(weights, config, plan, obs, before)
    torch.testing.assert_close(done.action.double(), action, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plan.mean.double(), mean, rtol=1e-4, atol=1e-5)
    assert (done.nonfinite, done.iterations, done.missed) == (0, iterations, False)
    assert (plan.draws().explore != 0).any() == explore and plan.step == 1


@needs_triton
@unlikely
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_plan_with_a_termination_head_is_the_reference(make_weights, schedule):
    weights = make_weights(5, 2, latent=24, termination=True)
    weights = ending_half(weights, drawn(weights, 2, 3, 50))
    config = dataclasses.replace(SMALL, samples=12, policy_trajectories=5, horizon=3)
    plan, obs = planner(weights, config, problems=2, schedule=schedule), torch.randn(2, 5)
    before = plan.mean.uniform_(-0.5, 0.5).clone()
    done = plan(obs, explore=True)
    action, _, mean = exact(weights, config, plan, obs, before)
    torch.testing.assert_close(done.action.double(), action, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plan.mean.double(), mean, rtol=1e-4, atol=1e-5)
    *_, bare = exact(weights._replace(termination=()), config, plan, obs, before)
    assert not torch.allclose(bare, mean, rtol=1e-3)


@needs_triton
@unlikely
def test_images_are_planned_for_as_the_reference_does():
    """Through a snapshot of the convolutions, which is published with the rest."""
    plan = planner(image_model(), problems=2, schedule="latency")
    for seed in (0, 1):
        weights, obs = image_model(seed), images(2)
        plan.publish(to_device(weights))
        weights.encoder[0].weight.data.add_(1)  # not published: the snapshot is a copy
        weights = image_model(seed)
        before = plan.mean.clone()
        done = plan(obs, explore=True)
        action, _, mean = exact(weights, SMALL, plan, obs, before)
        torch.testing.assert_close(done.action.double(), action, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plan.mean.double(), mean, rtol=1e-4, atol=1e-4)


@needs_triton
@unlikely
def test_the_report_tells_a_wrong_plan(make_weights):
    """What benchmarks/gpu_report.py times is right: its check takes this plan and no other."""
    from benchmarks import checks

    config = dataclasses.replace(SMALL, samples=8)
    weights, obs = to_device(make_weights(5, 3)), torch.randn(1, 5)
    other = to_device(make_weights(5, 3, seed=1))
    plan = planner(weights, config, schedule="throughput")
    checks.plan(plan, config, weights, obs, GAMMA, elites=0.95)
    with pytest.raises(checks.Wrong, match="from the float64 reference, allowed 1e-04"):
        checks.plan(plan, config, other, obs, GAMMA)
    with pytest.raises(checks.Wrong, match="returns: "):
        checks.plan(plan, config, weights._replace(critics=other.critics), obs, GAMMA)


@needs_triton
@unlikely
@all_nan
def test_a_problem_without_a_finite_score_falls_back(make_weights):
    weights, obs = make_weights(5, 3), torch.randn(2, 5)
    plan = planner(weights, problems=2)
    sound = plan(obs, explore=True).action
    plan.step, obs[1] = 0, torch.nan
    plan.mean.zero_()
    done = plan(obs, explore=True)
    assert torch.equal(done.action[0], sound[0]) and done.nonfinite == 1
    assert done.action[1].tolist() == [0, 0, 0]  # π(z_0) is not finite either
    assert plan.mean[0].any() and not plan.mean[1].any()

    weights.critics[1].weight[:] = torch.nan
    plan.publish(to_device(weights))  # in place: what was captured reads it too
    done = plan(torch.ones(2, 5), explore=True)
    mean, _ = layers.policy(weights, layers.encode(weights, torch.ones(2, 5)))
    torch.testing.assert_close(done.action, torch.tanh(mean), rtol=1e-4, atol=1e-5)
    assert done.nonfinite == 2 and not plan.mean.any()


@needs_triton
@unlikely
def test_a_plan_follows_from_seed_step_and_mean(make_weights):
    from iqmpc import Planner

    weights, obs = to_device(make_weights(5, 3)), torch.randn(2, 5)
    config = dataclasses.replace(SMALL, backend="triton")
    one, other = (Planner(weights, config, discount=GAMMA, problems=2, seed=s) for s in (1, 2))
    first, state = one.plan(obs, explore=True), one.state_dict()
    second = one.plan(obs, explore=True)
    assert first.device.type == "cpu" and not torch.equal(first, second)
    assert not torch.equal(other.plan(obs, explore=True), first)
    one.load_state_dict(state)
    assert one.step == 1 and torch.equal(one.plan(obs, explore=True), second)
    one.load_state_dict(state)
    one.reset(0)
    assert not one.mean[0].any() and one.mean[1].any()
    assert torch.equal(one.plan(obs, explore=True)[1], second[1])  # the other's is as it was


@needs_triton
def test_publishing_the_same_memory_again_is_one_graph(make_weights):
    """Weights that a learner changes in place are keyed alike, others and moved ones are not."""
    keys = []

    class Step:
        def __call__(self, refresh, key):
            refresh()
            keys.append(key)

    plan = planner(make_weights(5, 3))
    plan._refresh = Step()
    live, other = (to_device(make_weights(5, 3, seed=s)) for s in (1, 2))
    for weights in (live, live, other, live):
        live.critics[0].weight.add_(1)
        plan.publish(weights)
    assert keys[0] == keys[1] == keys[3] != keys[2]
    assert plan._published is live  # kept while a graph may read it
    assert torch.equal(plan.weights.matrices, TritonWeights(live).matrices)


@needs_triton
def test_the_draws_are_random(make_weights):
    many, few = (
        planner(make_weights(5, 3), dataclasses.replace(SMALL, samples=n), problems=2)
        for n in (600, 6)
    )

    def drawn(step, seed=7, plan=many):
        plan._seed = seed
        plan._control.copy_(torch.tensor([seed - 2**64 * (seed >= 2**63), step, 1]))
        plan._draw()
        return plan._normal.clone().double(), plan._uniform.clone(), plan._pair.clone()

    x, uniform, _ = drawn(0)
    assert torch.equal(drawn(0)[0], x)
    bound = 5 / len(x) ** 0.5
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < bound * spread**0.5
    others = [drawn(1)[0], drawn(2**32)[0], drawn(0, seed=8)[0], drawn(0, seed=2**63 + 7)[0]]
    quarters = x.view(4, -1)
    for y, z in (
        *((x, y) for y in others),
        (x[1:], x[:-1]),
        (quarters[0], quarters[1]),
        (quarters[0], quarters[2]),
    ):
        assert abs((y * z).mean()) < 5 / len(y) ** 0.5
    pairs, all_uniform = [], []
    for step in range(150):
        _, uniform, pair = drawn(step, plan=few)
        pairs.append(tuple(pair.tolist()))
        all_uniform.append(uniform)
    counts = {pair: pairs.count(pair) for pair in pairs}
    assert len(counts) == 6 and min(counts.values()) > 10  # of three critics, 25 each
    u = torch.cat(all_uniform).ravel()
    assert 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 5 / (12 * len(u)) ** 0.5


@needs_triton
@unlikely
def test_bf16_plans_nearly_the_same(make_weights):
    weights, obs = make_weights(17, 6, latent=64, hidden=64), torch.randn(1, 17)
    config = dataclasses.replace(SMALL, samples=24, elites=12, horizon=1)
    plans = [
        planner(weights, dataclasses.replace(config, precision=p), schedule="latency")
        for p in ("float32", "bf16")
    ]
    for plan in plans:
        plan(obs)
    assert 0 < (plans[0].mean - plans[1].mean).abs().max() < 0.1


@needs_triton
def test_without_planning_the_policy_acts_on_the_device(make_weights):
    weights, obs = make_weights(5, 3), torch.randn(2, 5)
    plan = planner(weights, dataclasses.replace(SMALL, enabled=False), problems=2)
    z = layers.encode(weights, obs)
    for explore in (False, True):
        done = plan(obs, explore=explore)
        expected = layers.policy_action(weights, z, plan.draws().explore.cpu())
        torch.testing.assert_close(done.action, expected, rtol=1e-4, atol=1e-5)
        assert done.iterations == done.nonfinite == 0
    obs[1] = torch.nan
    done = plan(obs)
    assert done.nonfinite == 1 and done.action[1].tolist() == [0, 0, 0]


class Launches(TorchDispatchMode):
    """Stands in for every kernel of a plan, and refuses what would make the host wait or choose."""

    ALLOWED = {"empty", "new_empty", "slice", "select", "view", "detach", "alias", "as_strided"}

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        from iqmpc.kernels.mppi_plan import triton as plan
        from iqmpc.kernels.mppi_rollout import triton as rollout

        self.names: list[str] = []
        for module in (plan, rollout):
            for name in vars(module):
                if name.endswith("_kernel"):
                    monkeypatch.setattr(module, name, self.recorder(name))

    def recorder(self, name: str):
        class Kernel:
            def __getitem__(_, grid):
                return lambda *arguments, **named: self.names.append(name)

        return Kernel()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function._schema.name.removeprefix("aten::") in self.ALLOWED, function
        return function(*arguments, **(named or {}))


@pytest.mark.skipif(not INTERPRETED, reason="on the CPU, in the process that imports Triton")
@pytest.mark.parametrize(
    ("schedule", "launches"),
    [("latency", 1 + 5 + 1 + 15 + 8 * (11 + 1 + 1)), ("throughput", 1 + 5 + 1 + 15 + 8 * 2)],
)
def test_a_plan_is_launches_and_nothing_else(make_weights, monkeypatch, schedule, launches):
    """No synchronisation, no copy and no arithmetic outside the kernels, and not many of them."""
    plan = planner(make_weights(5, 39), PlannerConfig(), schedule=schedule)
    recorded = Launches(monkeypatch)
    plan._plan()  # the tables of jobs are copied once, before a capture
    recorded.names.clear()
    with recorded:
        plan._plan()
    assert len(recorded.names) == launches, Counter(recorded.names)


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_the_interpreter_captures_nothing(make_weights):
    with pytest.raises(
        BackendError, match="interpreter captures no CUDA graph, got planner.capture=true"
    ):
        planner(make_weights(5, 3), dataclasses.replace(SMALL, capture=True))


@needs_triton
def test_what_a_plan_cannot_take_is_named(make_weights):
    weights = make_weights(5, 3)
    bare = weights._replace(policy=(*weights.policy[:-2], Layer(*weights.policy[-2][:2])))
    with pytest.raises(ValueError, match="policy: the triton backend takes three layers, LayerN"):
        planner(bare)
    with pytest.raises(ValueError, match="takes weights on a c[a-z]+ device, got meta"):
        planner(weights.map(lambda t: t.to("meta")), move=False)
    with pytest.raises(
        ValueError,
        match="for 1000000000 problems at once needs 57000000000 random "
        "numbers or actions, and the triton backend counts to",
    ):
        planner(weights, problems=10**9)


def pairs_of_plans(make_weights, *configs: PlannerConfig, envs: int = 2, **sizes: Any):
    """Planners alike but for their settings, and observations for some steps."""
    weights = make_weights(17, 6, **(dict(latent=64, hidden=128) | sizes))
    plans = [planner(weights, config, problems=envs) for config in configs]
    return plans, torch.randn(4, envs, 17)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bf16", "tf32"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_captured_plan_is_the_uncaptured_one(make_weights, precision, enabled):
    config = PlannerConfig(precision=precision, enabled=enabled)
    (captured, launched), observations = pairs_of_plans(
        make_weights, config, dataclasses.replace(config, capture=False)
    )
    assert captured._graph is not None and launched._graph is None
    seen = []
    for step, obs in enumerate(observations):
        if step == 2:  # a new episode, and new weights: neither is captured again
            graph = captured._graph
            for plan in (captured, launched):
                plan.reset(1)
                plan.publish(to_device(make_weights(17, 6, latent=64, hidden=128, seed=1)))
        one, other = (plan(obs, explore=step % 2 == 1) for plan in (captured, launched))
        assert torch.equal(one.action, other.action) and one.nonfinite == other.nonfinite == 0
        assert torch.equal(captured.mean, launched.mean)
        for x, y in zip(captured.draws(), launched.draws(), strict=True):
            assert torch.equal(x, y)
        seen.append(captured.draws().sample_noise.clone())
    assert captured._graph is graph and captured.step == 4
    assert all(not torch.equal(x, y) for x, y in zip(seen, seen[1:], strict=False))  # new draws


@needs_gpu
def test_capturing_leaves_no_trace_and_a_step_can_be_repeated(make_weights):
    (one, other), observations = pairs_of_plans(make_weights, PlannerConfig(), PlannerConfig())
    assert one.step == 0 and not one.mean.any()
    first = [one(obs, explore=True).action for obs in observations]
    other.step = 2
    other(observations[0])
    other.step = 0
    other.reset()
    assert all(
        torch.equal(other(obs, explore=True).action, action)
        for obs, action in zip(observations, first, strict=True)
    )
    from_device = planner(make_weights(17, 6, latent=64, hidden=128), PlannerConfig(), problems=2)
    assert torch.equal(from_device(observations[0].cuda(), explore=True).action, first[0])


@needs_gpu
def test_new_weights_change_the_captured_plan(make_weights):
    old, new = (make_weights(17, 6, latent=64, hidden=128, seed=s) for s in (0, 1))
    refreshed, fresh = planner(old, PlannerConfig()), planner(new, PlannerConfig())
    obs = torch.randn(1, 17)
    before = refreshed(obs).action
    refreshed.publish(to_device(new))
    refreshed.reset()
    refreshed.step = 0
    after = refreshed(obs).action
    assert torch.equal(after, fresh(obs).action) and not torch.equal(after, before)


@needs_gpu
@pytest.mark.parametrize("kind", ["termination", "images"])
def test_a_captured_plan_of_every_model_is_the_uncaptured_one(make_weights, kind):
    if kind == "images":
        weights, obs = image_model(), images(2)
    else:
        weights = make_weights(17, 6, latent=64, hidden=128, termination=True)
        obs = torch.randn(2, 17)
    captured, launched = (
        planner(weights, PlannerConfig(capture=capture), problems=2) for capture in (None, False)
    )
    for step in range(3):
        one, other = (plan(obs, explore=step == 1) for plan in (captured, launched))
        assert torch.equal(one.action, other.action) and one.nonfinite == 0


@needs_gpu
def test_a_captured_publish_is_the_uncaptured_one(make_weights):
    live = to_device(make_weights(17, 6, latent=64, hidden=128))
    plan = planner(live, PlannerConfig())
    for number in range(4):  # the first as it is, the second captures, the others replay
        for t in live.tensors():
            t.mul_(1 + number / 100)
        plan.publish(live)
        expected = TritonWeights(live, precision="bf16")
        assert torch.equal(plan.weights.matrices, expected.matrices)
        assert torch.equal(plan.weights.vectors, expected.vectors)
    assert plan._refresh.captures == 1


@needs_gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("envs", [1, 8])
def test_a_plan_at_the_sizes_in_use(make_weights, envs, schedule):
    weights = make_weights(91, 39, latent=512, hidden=512, encoder=256, critics=5)
    config = PlannerConfig(precision="float32")
    plan, obs = planner(weights, config, problems=envs, schedule=schedule), torch.randn(envs, 91)
    for _ in range(2):
        before = plan.mean.clone()
        done = plan(obs, explore=True)
        action, _, mean = exact(weights, config, plan, obs, before)
        # An elite at the edge may be another one in float32.
        assert (plan.mean - mean).square().mean().sqrt() < 1e-2
        assert (done.action - action).abs().amax(1).lt(1e-3).float().mean() >= 0.5


@needs_gpu
def test_auto_plans_with_triton_on_the_gpu(make_weights):
    from iqmpc import Planner

    weights = to_device(make_weights(5, 3))
    assert planner(make_weights(5, 3), PlannerConfig()).precision == "bf16"  # what a GPU is for
    for precision, backend in dict(
        float32="triton", tf32="triton", bf16="triton", float64="reference"
    ).items():
        made = Planner(weights, PlannerConfig(precision=precision), discount=GAMMA)
        action = made.plan(torch.randn(1, 5))
        assert made.backend == backend and action.device.type == "cpu"
