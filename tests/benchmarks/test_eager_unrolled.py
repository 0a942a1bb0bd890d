"""benchmarks.eager_unrolled: a baseline that computes what the package's unrolled score means."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.eager_unrolled import EagerUnrolled, scores
from iqmpc.config import ModelConfig, PlannerConfig
from iqmpc.kernels.mppi_rollout import mppi_rollout
from iqmpc.kernels.weights import Weights, snapshot
from iqmpc.model import WorldModel

ENVS, HORIZON, SAMPLES, OBS, ACTIONS = 3, 4, 7, 5, 2


def weights(critics: int, dtype: torch.dtype = torch.float64) -> Weights:
    model = WorldModel(OBS, ACTIONS, ModelConfig(
        encoder_dim=12, hidden_dim=20, latent_dim=16, critics=critics))
    for name, tensor in model.named_parameters():
        if not name.endswith("gamma"):
            torch.nn.init.normal_(tensor, std=0.3)
    return snapshot(model.weights(), dtype)


@pytest.mark.parametrize(("critics", "pair"), [(2, [0, 1]), (5, [3, 1])])
def test_scores_are_the_unrolled_returns(critics: int, pair: list[int]) -> None:
    w = weights(critics)
    z0 = torch.rand(ENVS, 16, dtype=torch.float64)
    actions = torch.rand(ENVS, HORIZON, SAMPLES, ACTIONS, dtype=torch.float64) * 2 - 1
    noise = torch.randn(ENVS, HORIZON + 1, SAMPLES, ACTIONS, dtype=torch.float64)
    kept = torch.tensor(pair)
    expected = mppi_rollout(
        w, z0, actions, noise, kept, 0.95, "unrolled", entropy=0.3, backend="reference")
    found = scores(w, z0, actions, noise, kept, 0.95, 0.3)
    assert expected.std() > 0.01  # neither constant nor trivially zero
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_planner_climbs_the_score() -> None:
    config = PlannerConfig(samples=64, elites=8, policy_trajectories=4, iterations=4)
    w = weights(2, torch.float32)
    obs = torch.randn(ENVS, OBS)

    def improvement(iterations: int) -> torch.Tensor:
        planner = EagerUnrolled(
            w, dataclasses.replace(config, iterations=iterations), discount=0.95, entropy=0.0,
            num_envs=ENVS, compiled=False)
        action = planner.plan(obs)
        assert action.shape == (ENVS, ACTIONS)
        assert action.abs().max() <= 1
        return planner.mean
    ...
