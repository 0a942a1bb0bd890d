"""The rollout's reference against a trajectory-by-trajectory evaluation of the formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqmpc import WorldModel
from iqmpc.config import ModelConfig
from iqmpc.errors import BackendError
from iqmpc.kernels import layers
from iqmpc.kernels.mppi_rollout import mppi_rollout, noise_steps

GAMMA, BETA = 0.96, 0.03


def problem(envs, horizon, samples, action_dim, latent_dim, score, seed=0):
    torch.manual_seed(seed)
    model = WorldModel(3, action_dim, ModelConfig(
        encoder_dim=7, hidden_dim=11, latent_dim=latent_dim, critics=4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model = model.double()
    steps = noise_steps(horizon, score)
    return (model.weights(), torch.rand(envs, latent_dim).double(),
            torch.rand(envs, horizon, samples, action_dim).double() * 2 - 1,
            torch.randn(envs, steps, samples, action_dim).double(), torch.tensor([3, 1]))


def one_by_one(weights, z0, actions, noise, pair, score):
    """The returns by the definition, a sample at a time, with rewards and values spelt out."""
    envs, horizon, samples, _ = actions.shape
    returns = np.zeros((envs, samples))

    def q(z, a):
        return layers.critics(weights.critics, z[None], a[None])[pair, 0].min().item()

    for e in range(envs):
        for s in range(samples):
            z = [z0[e]]
            for t in range(horizon):
                z.append(layers.dynamics(weights, z[-1], actions[e, t, s]))
            if score == "advantage":
                total = q(z[0], actions[e, 0, s])
                for t in range(1, horizon):
                    prior = layers.policy_action(weights, z[t], noise[e, t - 1, s])
                    total += GAMMA**t * (q(z[t], actions[e, t, s]) - q(z[t], prior))
            else:
                drawn = [layers.policy_sample(weights, z[t], noise[e, t, 0 if t == 0 else s])
                         for t in range(horizon + 1)]
                value = [q(z[t], a) - BETA * lp.item() for t, (a, lp) in enumerate(drawn)]
                total = GAMMA**horizon * value[horizon]
                for t in range(horizon):
                    reward = q(z[t], actions[e, t, s]) - GAMMA * value[t + 1]
                    total += GAMMA**t * (reward - BETA * drawn[t][1].item())
            returns[e, s] = total
    return returns


@settings(deadline=None, max_examples=25)
@given(envs=st.integers(1, 3), horizon=st.integers(1, 4), samples=st.integers(1, 5),
       action_dim=st.integers(1, 4), groups=st.integers(1, 3),
       score=st.sampled_from(["advantage", "unrolled"]), seed=st.integers(0, 1000))
def test_reference_is_the_definition(envs, horizon, samples, action_dim, groups, score, seed):
    draws = problem(envs, horizon, samples, action_dim, 8 * groups, score, seed)
    returns = mppi_rollout(*draws, GAMMA, score, entropy=BETA, backend="reference")
    np.testing.assert_allclose(returns.detach(), one_by_one(*draws, score), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_scores_differ_by_one_constant_per_problem(horizon):
    weights, z0, actions, noise, pair = problem(2, horizon, 40, 2, 16, "unrolled")
    unrolled = mppi_rollout(
        weights, z0, actions, noise, pair, GAMMA, "unrolled", entropy=BETA, backend="reference")
    advantage = mppi_rollout(
        weights, z0, actions, noise[:, 1:-1], pair, GAMMA, "advantage", backend="reference")
    _, log_prob = layers.policy_sample(weights, z0, noise[:, 0, 0])
    torch.testing.assert_close(
        unrolled - advantage, (-BETA * log_prob)[:, None].expand_as(advantage))
    assert torch.equal(unrolled.argsort(1), advantage.argsort(1))
    assert advantage.std() > 1e-3  # the equality above says nothing about equal returns


def test_float32_is_within_the_contract():
    weights, *draws = problem(3, 3, 64, 5, 24, "advantage")
    exact = mppi_rollout(weights, *draws, GAMMA, backend="reference")
    single = weights._replace(**{
        part: tuple(type(x)(*(t if t is None else t.float() for t in x)) for x in
                    getattr(weights, part))
        for part in ("encoder", "dynamics", "policy", "critics")})
    z0, actions, noise, pair = draws
    close = mppi_rollout(
        single, z0.float(), actions.float(), noise.float(), pair, GAMMA, backend="reference")
    torch.testing.assert_close(close.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("change", "message"), [
    (dict(z0=torch.zeros(2, 9)), r"z0 must be \[1, 16\], got \[2, 9\]"),
    (dict(actions=torch.zeros(1, 3, 4, 5)), r"actions must be \[E, H, S, 2\], got \[1, 3, 4, 5\]"),
    (dict(policy_noise=torch.zeros(1, 3, 4, 2)),
     r"policy_noise must be \[1, 2, 4, 2\], got \[1, 3, 4, 2\]"),
    (dict(critic_pair=torch.zeros(3)), r"critic_pair must be \[2\], got \[3\]"),
    (dict(score="both"), "score must be one of advantage, unrolled, got 'both'"),
])
def test_what_does_not_fit_is_named(change, message):
    weights, z0, actions, noise, pair = problem(1, 3, 4, 2, 16, "advantage")
    given_ = dict(z0=z0, actions=actions, policy_noise=noise, critic_pair=pair,
                  discount=GAMMA, score="advantage", backend="reference") | change
    with pytest.raises(ValueError, match=message):
        mppi_rollout(weights, **given_)


def test_a_backend_that_cannot_run_is_an_error():
    draws = problem(1, 3, 4, 2, 16, "advantage")
    with pytest.raises(BackendError, match="backend 'cuda' cannot run"):
        mppi_rollout(*draws, GAMMA, backend="cuda")
