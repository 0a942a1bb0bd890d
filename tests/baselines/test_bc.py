"""Behavioural cloning: its loss by hand, and that it clones."""

import numpy as np
import pytest
import torch

from iqmpc import Agent, evaluate
from iqmpc.baselines.bc import BehaviouralCloning, cloning_loss
from iqmpc.errors import ConfigError
from tests.baselines.hand import hand_mlp
from tests.runs import train

BC = {"agent.name": "bc", "agent.hidden_dim": 16, "learner.horizon": 1, "train.random_steps": 0}


def test_the_loss_is_its_formula(small_config):
    learner = BehaviouralCloning(3, 2, small_config.replace(BC))
    learner.model.double()
    obs, action = torch.randn(5, 3).double(), torch.rand(5, 2).double()
    with torch.no_grad():
        by_hand = np.mean((np.tanh(hand_mlp(learner.model.policy, obs)) - action.numpy()) ** 2)
        loss = cloning_loss(learner.model.weights(), obs, action)
    assert float(loss) == pytest.approx(by_hand, rel=1e-12)


def test_it_clones_the_demonstrator(tmp_path, small_config, point_env, point_demonstrations):
    config = small_config.replace(
        BC | {"train.initial_updates": 500, "learner.lr": 3e-3, "learner.batch": 32}
    )
    summary = train(config, point_env, point_demonstrations, tmp_path / "run")
    assert summary["ratio"] > 0.9 and summary["success_rate"] == 1
    agent = Agent.load(tmp_path / "run")
    assert evaluate(agent, point_env, episodes=3).success_rate == 1
    with pytest.raises(ConfigError, match="agent.name=bc learns no reward to decode"):
        agent.decode_reward(np.zeros(2), np.zeros(2), np.zeros(2))
