"""The rollout's reference against the formulas, one trajectory at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqmpc import WorldModel
from iqmpc.config import ModelConfig
from iqmpc.kernels import layers
from iqmpc.kernels.mppi_rollout import mppi_rollout, noise_steps
from tests.kernels.contract import (
    BETA,
    GAMMA,
    drawn,
    ending_half,
)


def problem(envs, horizon, samples, action_dim, latent_dim, score, seed=0, ends=False):
    torch.manual_seed(seed)
    model = WorldModel(
        3,
        action_dim,
        ModelConfig(
            encoder_dim=7, hidden_dim=11, latent_dim=latent_dim, critics=4, termination=ends
        ),
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model = model.double()
    steps = noise_steps(horizon, score)
    return (
        model.weights(),
        torch.rand(envs, latent_dim).double(),
        torch.rand(envs, horizon, samples, action_dim).double() * 2 - 1,
        torch.randn(envs, steps, samples, action_dim).double(),
        torch.tensor([3, 1]),
    )


def one_by_one(weights, z0, actions, noise, pair, score):
    """The returns by the definition, a sample at a time, with rewards and values spelt out."""
    envs, horizon, samples, _ = actions.shape
    returns = np.zeros((envs, samples))

    def q(z, a):
        return layers.critics(weights.critics, z[None], a[None])[pair, 0].min().item()

    for e in range(envs):
        for s in range(samples):
            z, ends, c = [z0[e]], [0], [1]
            for t in range(horizon):
                z.append(layers.dynamics(weights, z[-1], actions[e, t, s]))
                chance = layers.termination(weights, z[-1]).sigmoid() if weights.termination else 0
                ends.append(int(chance > 0.5))
                c.append(c[-1] * (1 - ends[-1]))
            if score == "advantage":
                total = q(z[0], actions[e, 0, s])
                for t in range(1, horizon):
                    sampled = layers.policy_action(weights, z[t], noise[e, t - 1, s])
                    total += GAMMA**t * c[t] * (q(z[t], actions[e, t, s]) - q(z[t], sampled))
            else:
                drawn = [
                    layers.policy_sample(weights, z[t], noise[e, t, 0 if t == 0 else s])
                    for t in range(horizon + 1)
                ]
                value = [q(z[t], a) - BETA * lp.item() for t, (a, lp) in enumerate(drawn)]
                total = GAMMA**horizon * c[horizon] * value[horizon]
                for t in range(horizon):
                    reward = q(z[t], actions[e, t, s]) - GAMMA * (1 - ends[t + 1]) * value[t + 1]
                    total += GAMMA**t * c[t] * (reward - BETA * drawn[t][1].item())
            returns[e, s] = total
    return returns


@settings(deadline=None, max_examples=25)
@given(
    envs=st.integers(1, 3),
    horizon=st.integers(1, 4),
    samples=st.integers(1, 5),
    action_dim=st.integers(1, 4),
    groups=st.integers(1, 3),
    score=st.sampled_from(["advantage", "unrolled"]),
    seed=st.integers(0, 1000),
    ends=st.booleans(),
)
def test_reference_is_the_definition(envs, horizon, samples, action_dim, groups, score, seed, ends):
    draws = problem(envs, horizon, samples, action_dim, 8 * groups, score, seed, ends)
    returns = mppi_rollout(*draws, GAMMA, score, entropy_coef=BETA, backend="reference")
    np.testing.assert_allclose(returns.detach(), one_by_one(*draws, score), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("horizon", "ends"), [(1, False), (3, False), (5, False), (1, True), (3, True), (5, True)]
)
def test_scores_differ_by_one_constant_per_problem(horizon, ends):
    """Also where some samples end on the way."""
    weights, z0, actions, noise, pair = problem(2, horizon, 40, 2, 16, "unrolled", ends=ends)
    if ends:
        weights = ending_half(weights, (z0, actions))
    unrolled = mppi_rollout(
        weights, z0, actions, noise, pair, GAMMA, "unrolled", entropy_coef=BETA, backend="reference"
    )
    advantage = mppi_rollout(
        weights, z0, actions, noise[:, 1:-1], pair, GAMMA, "advantage", backend="reference"
    )
    _, log_prob = layers.policy_sample(weights, z0, noise[:, 0, 0])
    torch.testing.assert_close(
        unrolled - advantage, (-BETA * log_prob)[:, None].expand_as(advantage)
    )
    assert torch.equal(unrolled.argsort(1), advantage.argsort(1))
    assert advantage.std() > 1e-3  # the equality above says nothing about equal returns


def test_float32_is_within_the_contract():
    weights, *draws = problem(3, 3, 64, 5, 24, "advantage")
    exact = mppi_rollout(weights, *draws, GAMMA, backend="reference")
    single = weights.map(torch.Tensor.float)
    z0, actions, noise, pair = draws
    close = mppi_rollout(
        single, z0.float(), actions.float(), noise.float(), pair, GAMMA, backend="reference"
    )
    torch.testing.assert_close(close.double(), exact, rtol=1e-4, atol=1e-4)


def test_what_follows_an_end_is_nothing_even_where_it_is_not_finite(make_weights):
    """All imagined latents terminal: the first Q is what remains, whatever critics say later."""
    weights = make_weights(5, 3, termination=True)
    weights.termination[-1].bias.fill_(1e3)
    z0, actions, noise, pair = drawn(weights, 2, 4, 9)
    actions[:, 2] = torch.nan
    expected = mppi_rollout(
        weights, z0, actions[:, :1], noise[:, :0], pair, GAMMA, backend="reference"
    )
    for backend in ("reference", "cpu"):
        returns = mppi_rollout(weights, z0, actions, noise, pair, GAMMA, backend=backend)
        torch.testing.assert_close(returns, expected, rtol=1e-5, atol=1e-5)
        weights.termination[-1].bias.fill_(-1e3)  # none is: NaN is seen
        other = mppi_rollout(weights, z0, actions, noise, pair, GAMMA, backend=backend)
        assert other.isnan().all()
        weights.termination[-1].bias.fill_(1e3)
