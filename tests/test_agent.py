"""Trained agents: decoded rewards, and acting in several environments."""

import numpy as np
import pytest
import torch

from iqmpc import Agent, WorldModel, checkpoint, evaluate
from iqmpc.errors import CheckpointError
from iqmpc.evaluation import reward_correlation
from iqmpc.kernels import layers
from iqmpc.run_folder import RunFolder
from tests.runs import pearson, train


def test_decoded_reward_ranks_the_expert_above_its_opposite(
    tmp_path, small_config, point_env, point_demonstrations
):
    config = small_config.replace(
        {
            "train.steps": 600,
            "train.random_steps": 100,
            "train.initial_updates": 100,
            "train.eval_every": 1000,
            "learner.batch": 32,
            "learner.lr": 1e-3,
        }
    )
    train(config, point_env, point_demonstrations, tmp_path / "run")
    agent = Agent.load(tmp_path / "run")
    angle = np.linspace(0, 2 * np.pi, 64, dtype=np.float32)
    obs = 0.8 * np.stack([np.cos(angle), np.sin(angle)], 1)
    toward, away = (np.clip(sign * obs / 0.2, -1, 1) for sign in (-1, 1))
    good = agent.decode_reward(obs, toward, obs + 0.2 * toward)
    bad = agent.decode_reward(obs, away, obs + 0.2 * away)
    assert good.shape == (64,) and good.mean() > bad.mean() + 0.1
    ends = agent.decode_reward(obs, toward, obs + 0.2 * toward, terminated=np.arange(64) == 3)
    assert np.flatnonzero(ends != good).tolist() == [3]
    episodes = evaluate(agent, point_env, episodes=4).episodes
    decoded = np.concatenate(
        [agent.decode_reward(e.observations[:-1], e.actions, e.observations[1:]) for e in episodes]
    )
    assert reward_correlation(agent, episodes) == pytest.approx(
        pearson(decoded, np.concatenate([e.rewards for e in episodes])), rel=1e-4
    )
    single = agent.decode_reward(obs[0], toward[0], (obs + 0.2 * toward)[0])
    assert single == pytest.approx(good[0], rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match=r"action must be \[64, 2\], got \[1, 2\]"):
        agent.decode_reward(obs, toward[:1], obs)


@pytest.mark.parametrize("entropy", ["exact", "presquash"])
def test_the_decoded_reward_is_its_formula(small_config, entropy):
    """Q - γ (1 - d) mean of (Q - β A log π) over draws of the prior; log π as it was trained."""
    config = small_config.replace(
        {"learner.entropy": entropy, "learner.beta": 0.5, "learner.discount": 0.8}
    )
    model = WorldModel(2, 2, config.model)
    torch.nn.init.normal_(model.critics[-1].weight)
    obs, action, after = torch.randn(5, 2), torch.rand(5, 2), torch.randn(5, 2)
    ends = torch.arange(5) == 2
    weights, z = model.weights(), model.encode(after)
    values = []
    for noise in torch.randn(16, 1, 2, generator=torch.Generator().manual_seed(0)):
        prior, log_prob = layers.policy_sample(weights, z, noise.expand(5, 2), entropy)
        values.append(model.q(z, prior).mean(0) - 0.5 * 2 * log_prob)
    expected = model.q(model.encode(obs), action).mean(0) - 0.8 * (~ends).float() * torch.stack(
        values
    ).mean(0)
    decoded = Agent(model, config).decode_reward(
        *(x.numpy() for x in (obs, action, after)), terminated=ends.numpy()
    )
    np.testing.assert_allclose(decoded, expected.detach(), rtol=1e-4, atol=1e-5)


def test_an_agent_of_several_environments_is_loaded(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    agent = Agent.load(tmp_path / "run", num_envs=3)
    here, there = np.zeros((2, 3, 2), np.float32), np.ones((3, 2), np.float32)
    there[0] = 0
    one, other = agent.act(here[0]), Agent.load(tmp_path / "run", num_envs=3).act(there)
    assert one.shape == (3, 2) and np.abs(one).max() <= 1
    # Each is planned by itself, with draws of its own.
    np.testing.assert_array_equal(one[0], other[0])
    assert len({*map(bytes, one)}) == 3 and (one[1:] != other[1:]).all()
    # An episode that starts in one environment leaves the others' plans warm.
    again = Agent.load(tmp_path / "run", num_envs=3)
    again.act(here[0])
    again.reset(1)
    changed = (again.act(here[0]) != agent.act(here[0])).all(1)
    assert changed.tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"\[3, 2\], got \[2, 2\]"):
        agent.act(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="got 0"):
        Agent.load(tmp_path / "run", num_envs=0)


def test_a_batch_acts_as_one_does(tmp_path, small_config, point_env, point_demonstrations):
    """By the prior, which draws nothing: each row as the agent of one environment."""
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    prior = {"planner.enabled": False}
    obs = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    batch = Agent.load(tmp_path / "run", changes=prior, num_envs=4).act(obs)
    single = Agent.load(tmp_path / "run", changes=prior)
    np.testing.assert_allclose(batch, [single.act(row) for row in obs], atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ([2**40], r"encoder\.0\.weight has the shape \(32, 2\), expected \(32, 1099511627776\)"),
        ([3], r"encoder\.0\.weight has the shape \(32, 2\), expected \(32, 3\)"),
        ([2**62], "they describe no model"),
    ],
)
def test_a_model_is_made_of_the_sizes_that_its_weights_have(
    tmp_path, small_config, point_env, point_demonstrations, shape, said
):
    """Sizes that a file only claims take no memory."""
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    path, tensors, meta = RunFolder(tmp_path / "run").newest()
    checkpoint.save(path, tensors, {**meta, "obs_shape": shape})
    with pytest.raises(CheckpointError, match=f"does not fit its settings.*{said}"):
        Agent.load(tmp_path / "run")
