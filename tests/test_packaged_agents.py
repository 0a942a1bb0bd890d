"""The trained agents that ship, as `packaged:TASK`."""

import json
from pathlib import Path

import numpy as np
import pytest

from iqmpc import Agent, agent_file
from iqmpc.commands.train import anywhere
from iqmpc.composition import compose
from iqmpc.envs import TASKS
from iqmpc.errors import CheckpointError
from iqmpc.evaluation import open_run, rollout

NAMES = ["myo-key-turn", "walker-run", "walker-walk"]


def test_they_are_small_and_say_nothing_of_where_they_were_made():
    assert agent_file.packaged_tasks() == NAMES
    paths = [agent_file.located(f"packaged:{name}") for name in NAMES]
    assert sum(path.stat().st_size for path in paths) < 6 * 2**20
    for name, path in zip(NAMES, paths, strict=True):
        found = agent_file.load(path)
        said = json.dumps([found.config.to_dict(), found.provenance])
        assert "/" not in said.replace("/s", "") and found.provenance["commit"]
        assert found.config.task.name == found.about["task"] == name
        assert found.config.demos.path is found.config.run_dir is found.config.threads is None
        assert found.provenance["evaluation"]["ratio"] > 0.95


@pytest.mark.parametrize("name", NAMES)
def test_they_act(name):
    agent = Agent.load(f"packaged:{name}", num_envs=2)
    obs = np.random.default_rng(0).normal(size=(2, *agent.model.observation_spec.shape))
    action = agent.act(obs.astype(np.float32))
    assert action.shape == (2, agent.model.action_dim) and (np.abs(action) <= 1).all()
    assert agent.config.task.suite == TASKS[name].suite


def test_the_walker_walks():
    pytest.importorskip("dm_control")
    agent, env = open_run("packaged:walker-walk", {})
    walk = rollout(agent, env, seed=1, episode_length=150)
    assert walk.rewards[50:].mean() > 1.8  # of 2; it has got up by then


def test_which_ship_is_said():
    with pytest.raises(CheckpointError, match=f"no agent ships for 'hop'; .* {', '.join(NAMES)}"):
        Agent.load("packaged:hop")
    with pytest.raises(CheckpointError, match="is one agent and has no checkpoint 'best'"):
        Agent.load("packaged:walker-walk", checkpoint="best")


def test_a_run_starts_from_one():
    """By its name, which no folder's path is made of."""
    config = anywhere(compose(["init=packaged:walker-walk"]), Path())
    assert config.init.path == "packaged:walker-walk"
