"""benchmarks.eager_unrolled: the baseline computes what the package's unrolled score means."""

from __future__ import annotations

import pytest
import torch

from benchmarks.eager_unrolled import EagerUnrolled, scores
from iqmpc.config import ModelConfig, PlannerConfig
from iqmpc.kernels.mppi_refit import mppi_refit
from iqmpc.kernels.mppi_rollout import mppi_rollout
from iqmpc.kernels.weights import Weights, snapshot
from iqmpc.model import WorldModel

ENVS, HORIZON, SAMPLES, OBS, LATENT, ACTIONS = 3, 4, 12, 5, 16, 2
DISCOUNT, ENTROPY = 0.95, 0.3


def weights(critics: int, dtype: torch.dtype = torch.float64) -> Weights:
    """Every parameter random: zero biases and unit scales would hide their absence."""
    model = WorldModel(
        OBS, ACTIONS, ModelConfig(encoder_dim=12, hidden_dim=20, latent_dim=LATENT, critics=critics)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    # Or one critic would always be the smallest.
    torch.nn.init.zeros_(model.critics[-1].bias)
    return snapshot(model.weights(), dtype)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(("critics", "pair"), [(2, [0, 1]), (5, [3, 2])])
def test_scores_are_the_unrolled_returns(critics: int, pair: list[int]) -> None:
    w, kept = weights(critics), torch.tensor(pair)
    z0 = normal(ENVS, LATENT).softmax(1)
    actions = normal(ENVS, HORIZON, SAMPLES, ACTIONS).clamp(-1, 1)
    noise = normal(ENVS, HORIZON + 1, SAMPLES, ACTIONS)
    expected = mppi_rollout(
        w, z0, actions, noise, kept, DISCOUNT, "unrolled", entropy_coef=ENTROPY, backend="reference"
    )
    assert expected.std(1).min() > 0.01  # the samples differ
    found = scores(w, z0, actions, noise, kept, DISCOUNT, ENTROPY)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def planner(w: Weights) -> EagerUnrolled:
    config = PlannerConfig(
        horizon=HORIZON, samples=SAMPLES, elites=5, policy_trajectories=3, iterations=2
    )
    return EagerUnrolled(
        w, config, discount=DISCOUNT, entropy_coef=ENTROPY, problems=ENVS, compiled=False
    )


def test_an_iteration_is_a_rollout_and_a_refit() -> None:
    w, pair = weights(4), torch.tensor([2, 0])
    baseline = planner(w)
    c = baseline.config
    z0 = normal(ENVS, LATENT).softmax(1)
    trajectories = normal(ENVS, HORIZON, c.policy_trajectories, ACTIONS).tanh()
    mean, std = normal(ENVS, HORIZON, ACTIONS).tanh(), normal(ENVS, HORIZON, ACTIONS).exp()
    draws = normal(ENVS, HORIZON, SAMPLES - c.policy_trajectories, ACTIONS)
    noise = normal(ENVS, HORIZON + 1, SAMPLES, ACTIONS)

    drawn = (mean.unsqueeze(2) + std.unsqueeze(2) * draws).clamp(-1, 1)
    actions = torch.cat([trajectories, drawn], dim=2)
    returns = mppi_rollout(
        w, z0, actions, noise, pair, DISCOUNT, "unrolled", entropy_coef=ENTROPY, backend="reference"
    )
    new_mean, new_std, index, weight = mppi_refit(
        actions,
        returns,
        elites=c.elites,
        temperature=c.temperature,
        std_min=c.std_min,
        std_max=c.std_max,
        backend="reference",
    )
    elites = torch.stack([actions[e][:, index[e]] for e in range(ENVS)])

    found = baseline.improve(z0, trajectories, mean, std, draws, noise, pair)
    for one, other in zip(found, (new_mean, new_std, elites, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_plan_is_an_action_and_warms_the_next() -> None:
    baseline = planner(weights(3, torch.float32))
    action = baseline.plan(torch.randn(ENVS, OBS))
    assert action.shape == (ENVS, ACTIONS)
    assert action.abs().max() <= 1
    assert baseline.mean.shape == (ENVS, HORIZON, ACTIONS)
    assert baseline.mean.abs().max() > 0
