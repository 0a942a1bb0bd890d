import dataclasses

import pytest
import torch

from iqmpc import Planner, WorldModel
from iqmpc.config import ModelConfig, PlannerConfig
from iqmpc.errors import BackendError
from iqmpc.kernels import layers

MODEL = ModelConfig(encoder_dim=16, hidden_dim=16, latent_dim=16, critics=3)
CONFIG = PlannerConfig(samples=32, elites=8, policy_trajectories=4, iterations=3,
                       backend="reference")


def make(config=CONFIG, *, num_envs=1, seed=0, action_dim=2, model=MODEL):
    torch.manual_seed(3)
    model = WorldModel(5, action_dim, model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return Planner(model.weights(), config, discount=0.95, beta=1e-3, num_envs=num_envs,
                   seed=seed), model


@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize("score", ["advantage", "unrolled"])
@pytest.mark.parametrize("shape", [dict(), dict(horizon=1), dict(samples=1, elites=1,
                                                                policy_trajectories=0),
                                   dict(policy_trajectories=32), dict(policy_trajectories=0)])
def test_actions_are_in_range(shape, score, explore):
    planner, _ = make(dataclasses.replace(CONFIG, score=score, **shape), num_envs=3, action_dim=1)
    for _ in range(4):
        action = planner.plan(torch.randn(3, 5) * 10, explore=explore)
        assert action.shape == (3, 1) and action.dtype == torch.float32
        assert action.isfinite().all() and action.abs().max() <= 1
    assert planner.nonfinite_plans == 0


def test_the_plan_beats_the_prior_by_the_models_own_critic():
    """What MPPI is for: looking one step ahead, its action has a higher Q than the policy's."""
    config = dataclasses.replace(CONFIG, horizon=1, iterations=6, samples=256, elites=16)
    planner, model = make(config, model=dataclasses.replace(MODEL, critics=2))
    obs = torch.randn(20, 5)
    z = model.encode(obs)

    def q(action):
        return model.q(z, action).amin(0)

    planned = torch.cat([planner.plan(o[None]) for o in obs])
    uniform = torch.stack([q(torch.rand(20, 2) * 2 - 1) for _ in range(64)])
    assert q(planned).mean() > q(torch.tanh(model.pi(z)[0])).mean()
    assert (q(planned) > uniform.quantile(0.9, dim=0)).float().mean() > 0.9


def test_same_seed_same_plans_other_seed_other_plans():
    obs = torch.randn(6, 1, 5)
    runs = []
    for seed in (0, 0, 1):
        planner, _ = make(seed=seed)
        runs.append(torch.cat([planner.plan(o, explore=True) for o in obs]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_warm_start_shifts_and_reset_forgets():
    planner, _ = make(num_envs=2)
    seen = []
    compute = planner._compute
    planner._compute = lambda w, obs, previous, noise: seen.append(previous.clone()) or compute(
        w, obs, previous, noise)
    planner.plan(torch.randn(2, 5))
    left = planner.mean.clone()
    planner.plan(torch.randn(2, 5))
    assert seen[0].count_nonzero() == 0 and torch.equal(seen[1], left)
    planner.reset(0)
    assert planner.mean[0].count_nonzero() == 0 and planner.mean[1].count_nonzero() > 0
    planner.reset()
    assert planner.mean.count_nonzero() == 0


def test_the_shifted_mean_is_where_sampling_starts():
    """With no iteration to move it and std at its floor, samples lie around the shifted mean."""
    planner, _ = make(dataclasses.replace(
        CONFIG, iterations=1, std_max=0.05, policy_trajectories=0, elites=32))
    planner.mean[0] = torch.tensor([[0.9, 0.9], [0.5, -0.5], [0.1, 0.2]])
    planner.plan(torch.randn(1, 5))
    expected = torch.tensor([[0.5, -0.5], [0.1, 0.2], [0.0, 0.0]])
    torch.testing.assert_close(planner.mean[0], expected, atol=0.06, rtol=0)


def test_problems_in_a_batch_are_independent():
    planner, _ = make(num_envs=3)
    noise = planner._draw()
    obs = torch.randn(3, 5)
    together, _ = planner._compute(planner.weights, obs, planner.mean, noise)
    changed = obs.clone()
    changed[1] += 5
    other, _ = planner._compute(planner.weights, changed, planner.mean, noise)
    torch.testing.assert_close(together[[0, 2]], other[[0, 2]])
    assert not torch.allclose(together[1], other[1])


@pytest.mark.parametrize("part", ["encoder", "dynamics", "policy", "critics"])
def test_nan_weights_never_reach_the_action(part):
    planner, model = make(num_envs=2)
    for p in getattr(model, part).parameters():
        p.data.fill_(torch.nan)
    planner.publish(model.weights())
    with pytest.warns(RuntimeWarning, match="no trajectory of a plan has a finite score"):
        action = planner.plan(torch.randn(2, 5), explore=True)
    assert action.isfinite().all() and action.abs().max() <= 1
    assert planner.nonfinite_plans == 2
    _, sound = make()
    planner.publish(sound.weights())
    planner.plan(torch.randn(2, 5))
    assert planner.nonfinite_plans == 2  # nothing of the bad plan was kept


def test_the_fallback_is_the_policys_mean_action():
    planner, model = make()
    for p in model.critics.parameters():
        p.data.fill_(torch.nan)
    planner.publish(model.weights())
    obs = torch.randn(1, 5)
    with pytest.warns(RuntimeWarning):
        action = planner.plan(obs)
    torch.testing.assert_close(action, torch.tanh(model.pi(model.encode(obs))[0]))


def test_nan_observations_fall_back_too():
    planner, _ = make()
    with pytest.warns(RuntimeWarning):
        action = planner.plan(torch.full((1, 5), torch.nan))
    assert torch.equal(action, torch.zeros(1, 2)) and planner.nonfinite_plans == 1


def test_publish_takes_a_copy():
    planner, model = make()
    obs, before = torch.randn(1, 5), planner.state_dict()["generator"]
    first = planner.plan(obs)
    for p in model.parameters():
        p.data.normal_()
    planner.reset()
    planner.generator.set_state(before)
    assert torch.equal(planner.plan(obs), first)
    planner.publish(model.weights())
    planner.reset()
    planner.generator.set_state(before)
    assert not torch.equal(planner.plan(obs), first)


def test_without_planning_the_prior_acts():
    planner, model = make(dataclasses.replace(CONFIG, enabled=False))
    obs = torch.randn(1, 5)
    torch.testing.assert_close(
        planner.plan(obs), torch.tanh(layers.policy(model.weights(), model.encode(obs))[0]))
    assert not torch.equal(planner.plan(obs, explore=True), planner.plan(obs, explore=True))


@pytest.mark.slow
def test_compiled_is_eager():
    eager, _ = make(num_envs=2)
    compiled, _ = make(dataclasses.replace(CONFIG, mode="compile"), num_envs=2)
    for _ in range(3):
        obs = torch.randn(2, 5)
        torch.testing.assert_close(compiled.plan(obs), eager.plan(obs), rtol=1e-4, atol=1e-4)


def test_iterations_follow_the_action_size():
    free = dataclasses.replace(CONFIG, iterations=None)
    assert make(free, action_dim=19)[0].iterations == 6
    assert make(free, action_dim=20)[0].iterations == 8


def test_wrong_observations_and_backends_are_named():
    planner, _ = make(num_envs=2)
    with pytest.raises(ValueError, match=r"obs must be \[2, 5\], got \[1, 5\]"):
        planner.plan(torch.randn(1, 5))
    with pytest.raises(BackendError, match="backend 'cuda' cannot run"):
        make(dataclasses.replace(CONFIG, backend="cuda"))
