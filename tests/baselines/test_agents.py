"""What every baseline shares: the trainer, its run folder, an exact continuation, the `Agent`."""

from importlib.util import find_spec
from typing import get_args, get_type_hints

import gymnasium
import numpy as np
import pytest
import torch

from iqmpc import Agent, Config, Trainer, table
from iqmpc.composition import ablation, compose, options
from iqmpc.config import AgentConfig
from iqmpc.errors import ConfigError
from iqmpc.evaluation import mixed_correlation
from iqmpc.export import export
from tests.runs import rows_of, tensors_of, train

NAMES = [n for n in get_args(get_type_hints(AgentConfig)["name"]) if n != "iq_mpc"]
needs_zuko = pytest.mark.skipif(find_spec("zuko") is None, reason="the extra flows is absent")
TRAINED = [pytest.param(n, marks=needs_zuko if n == "cfil_sac" else ()) for n in NAMES]


@pytest.fixture
def baseline(small_config):
    """The small configuration of a method, by its name."""
    return lambda name: small_config.replace(
        {
            "agent.name": name,
            "agent.hidden_dim": 16,
            "learner.horizon": 1,
            "train.steps": 80,
            "train.random_steps": 20,
            "train.initial_updates": 3,
            "train.num_envs": 2,
            "model.normalise_obs": "demos",
        }
    )


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_resumes_exactly_and_its_agent_acts(
    tmp_path, baseline, point_env, point_demonstrations, monkeypatch, name
):
    config = baseline(name)
    make = type(point_env)
    envs, other = [make(), make()], make()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = train(config, envs, point_demonstrations, whole, eval_env=other)
    assert summary["updates"] == 3 + 60 and summary["skipped_updates"] == 0
    assert summary["backend"] == "policy" and summary["demonstrator_return"] is not None
    half = config.replace({"train.steps": 40})
    train(half, envs, point_demonstrations, cut, eval_env=other)
    train(config, envs, point_demonstrations, cut, eval_env=other, resume=True)
    one, two = tensors_of(whole)[0], tensors_of(cut)[0]
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    learnt = [r for r in rows_of(whole) if r["policy_loss"]]
    assert learnt and all(np.isfinite(float(r["policy_loss"])) for r in learnt)

    seen = np.concatenate([e.observations for e in point_demonstrations.episodes])
    obs_moments = seen.mean(0), np.maximum(seen.std(0), 0.01)
    agent = Agent.load(whole, num_envs=2)
    obs = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)
    action = agent.act(obs)
    scaled = torch.tensor((obs - obs_moments[0]) / obs_moments[1], dtype=torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(action, agent.weights.act(scaled), atol=1e-5)
    assert action.shape == (2, 2) and action.dtype == np.float32 and (abs(action) <= 1).all()
    np.testing.assert_array_equal(action, agent.act(obs))  # no draw without exploration
    alone = Agent.load(whole)
    np.testing.assert_allclose(alone.act(obs[0]), action[0], atol=1e-6)
    correlation = mixed_correlation(alone, point_env)
    assert correlation is None if name == "bc" else -1 <= correlation <= 1

    monkeypatch.setattr(
        table,
        "_in_own_process",
        lambda *_: {"env_steps": 80, "reward_correlation": correlation},
    )
    record = table.record(whole, episodes=2)
    assert record["agent"] == name and record["return_mean"] == pytest.approx(
        summary["return_mean"], abs=1e-3
    )
    with pytest.raises(
        ConfigError, match=f"world model .agent.name=iq_mpc., got agent.name={name}"
    ):
        export(whole, tmp_path / "agent.iqmpc")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_an_option_of_the_command_line(name):
    config = compose([f"agent={name}", "task=walker-walk"])
    assert (config.agent.name, config.agent.average, config.learner.horizon) == (name, "off", 1)
    assert ablation(config) == ""
    assert ablation(config.replace({"agent.hidden_dim": 64})) == "agent.hidden_dim=64"
    assert compose([f"agent={name}", "learner.horizon=3"]).learner.horizon == 3
    assert set(options("agent")) == {"iq_mpc", *NAMES}


def test_settings_of_before_are_of_iq_mpc():
    config = Config.restored({"agent": {"average": "always", "average_rate": 0.01}})
    assert config.agent.name == "iq_mpc" and config.agent.average == "always"


@pytest.mark.parametrize(
    "word",
    [
        "task.obs=pixels",
        "learner=td",
        "learner.mode=fused",
        "agent.average=always",
        "train.control_hz=50",
        "learner.precision=bf16",
        "learner.c_bc=0.5",
        "learner.matmul=bf16",
    ],
)
def test_what_a_baseline_has_not_is_refused(word):
    with pytest.raises(ConfigError, match=r"agent.name=bc has no .*\(agent.name=iq_mpc has\)"):
        compose(["agent=bc", word])


def test_an_action_that_is_not_finite_is_zero_and_counted(
    tmp_path, baseline, point_env, point_demonstrations
):
    train(baseline("bc").replace({"train.num_envs": 1}), point_env, point_demonstrations, tmp_path)
    agent = Agent.load(tmp_path)
    with pytest.warns(RuntimeWarning, match="acting with zeros"):
        np.testing.assert_array_equal(agent.act(np.array([np.nan, 0], np.float32)), [0, 0])
    assert agent.planner.summary()["nonfinite_plans"] == 1


def test_terminal_steps_and_their_successors_reach_the_method(
    tmp_path, baseline, point_env, point_demonstrations, monkeypatch
):
    """A transition is what was observed, what was done, and what came of it."""
    from iqmpc.baselines.bc import BehaviouralCloning
    from iqmpc.baselines.learner import BaselineLearner

    class Ends(gymnasium.Wrapper):
        def step(self, action):
            obs, reward, _, truncated, info = self.env.step(action)
            return obs, reward, self.unwrapped.steps >= 7, truncated, info

    seen = []
    update = BehaviouralCloning.update
    monkeypatch.setattr(BehaviouralCloning, "draw", BaselineLearner.draw)
    monkeypatch.setattr(
        BehaviouralCloning, "update", lambda self, batch: seen.append(batch) or update(self, batch)
    )
    config = baseline("bc").replace({"train.num_envs": 1, "learner.horizon": 2})
    trainer = Trainer(config, Ends(point_env), point_demonstrations, run=tmp_path / "run")
    trainer.train()
    batch = seen[-1]
    assert len(batch.obs) == 2 * 2 * config.learner.batch and batch.experts == len(batch.obs) // 2
    scaling = trainer.experts.scaling
    obs, next_obs = (x * scaling.std + scaling.mean for x in (batch.obs, batch.next_obs))
    moved = (obs + 0.2 * batch.action).clamp(-2, 2)
    np.testing.assert_allclose(next_obs, moved, atol=1e-6)
    ended = sum(float(b.terminated[b.experts :].sum()) for b in seen)
    assert ended and not any(b.terminated[: b.experts].any() for b in seen)
