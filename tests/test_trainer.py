"""Whole runs on a task that is learnt in seconds, and the exact continuation of one."""

import csv
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import gymnasium
import numpy as np
import pytest
import torch

from iqmpc import Agent, Config, Trainer, WorldModel, checkpoint, evaluate
from iqmpc.envs.vector import VectorEnv
from iqmpc.envs.workers import WorkerVectorEnv
from iqmpc.errors import CheckpointError, ConfigError, Interrupted, TaskError, WorkerError
from iqmpc.evaluation import reward_correlation
from iqmpc.frames import stacked
from iqmpc.kernels import layers
from iqmpc.kernels.weights import snapshot
from iqmpc.seeding import stream_seed


def train(config, env, demonstrations, run, **options):
    return Trainer(config, env, demonstrations, run=run, **options).train()


def test_a_run_folder_is_complete(tmp_path, small_config, point_env, point_demonstrations):
    messages, progress = [], []
    summary = train(
        small_config,
        point_env,
        point_demonstrations,
        tmp_path / "run",
        on_message=messages.append,
        on_progress=progress.append,
    )
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "tensorboard",
        "checkpoints",
        "summary.json",
    }
    assert json.loads((run / "summary.json").read_text()) == summary
    assert list(summary) == [
        "task",
        "seed",
        "env_steps",
        "updates",
        "skipped_updates",
        "wall_s",
        "episodes",
        "return_mean",
        "return_std",
        "success_rate",
        "success_any_rate",
        "demonstrator_return",
        "ratio",
        "last5_return_mean",
        "last5_return_min",
        "last5_success_mean",
        "last5_success_min",
        "backend",
        "nonfinite_plans",
        "missed_plans",
        "late_plans",
        "env_restarts",
        "threads",
        "machine",
        "commit",
    ]
    assert summary["env_steps"] == 100 and summary["updates"] == 5 + 60
    assert summary["demonstrator_return"] == point_demonstrations.return_mean
    assert summary["ratio"] == summary["return_mean"] / summary["demonstrator_return"]
    assert 0 <= summary["success_rate"] <= summary["success_any_rate"] <= 1
    assert summary["nonfinite_plans"] == summary["skipped_updates"] == 0
    rows = list(csv.DictReader(open(run / "metrics.csv", newline="")))
    assert [int(r["env_steps"]) for r in rows if r["return"]] == [20, 40, 60, 80, 100]
    assert [int(r["env_steps"]) for r in rows if r["eval_return_mean"]] == [40, 80, 100]
    on_the_way = [float(r["eval_return_mean"]) for r in rows if r["eval_return_mean"]][:2]
    assert summary["last5_return_mean"] == pytest.approx(np.mean(on_the_way))
    assert summary["last5_return_min"] == min(on_the_way)
    assert summary["episodes"] == 2 and summary["threads"] == 1
    assert all(r["consistency"] for r in rows if r["return"] and int(r["env_steps"]) > 40)
    assert list((run / "tensorboard").glob("events.*"))
    assert any("demonstrator" in m for m in messages) and progress[-1]["env_steps"] == 100


def test_a_short_run_improves_its_return(tmp_path, small_config, point_env, point_demonstrations):
    """From demonstrations alone: a point learns to walk to the origin; the reward is never seen."""
    config = small_config.replace(
        {
            "train.steps": 1000,
            "train.random_steps": 100,
            "train.initial_updates": 100,
            "train.final_episodes": 10,
            "train.eval_every": 1000,
            "learner.batch": 32,
            "learner.lr": 1e-3,
            "planner.samples": 64,
            "planner.elites": 8,
        }
    )

    class Blind(gymnasium.Wrapper):
        """Rewards that would mislead whoever reads them."""

        def step(self, action):
            obs, reward, *rest = self.env.step(action)
            return obs, -1e6, *rest

    train(config, Blind(point_env), point_demonstrations, tmp_path / "run")
    agent = Agent.load(tmp_path / "run")
    learnt = evaluate(agent, point_env, episodes=10)
    untrained = evaluate(
        Agent(type(agent.model)(2, 2, config.model), config), point_env, episodes=10
    )
    expert = point_demonstrations.return_mean
    assert untrained.return_mean < 0.4 * expert
    assert learnt.return_mean > 0.7 * expert and learnt.success_rate >= 0.8


def test_td_learns_from_the_reward_without_demonstrations(
    tmp_path, small_config, point_env, point_demonstrations
):
    config = small_config.replace(
        {
            "learner.objective": "td",
            "train.steps": 600,
            "train.random_steps": 200,
            "train.initial_updates": 200,
            "train.final_episodes": 10,
            "train.eval_every": 1000,
            "learner.batch": 32,
            "learner.lr": 1e-3,
            "planner.samples": 64,
            "planner.elites": 8,
        }
    )
    summary = train(config, point_env, None, tmp_path / "run")
    assert summary["return_mean"] > 0.7 * point_demonstrations.return_mean
    assert summary["demonstrator_return"] is None and summary["ratio"] is None


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


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())


def test_terminations_reach_the_replay(tmp_path, small_config, point_env, point_demonstrations):
    class Ends(gymnasium.Wrapper):
        def step(self, action):
            obs, reward, _, truncated, info = self.env.step(action)
            return obs, reward, self.unwrapped.steps >= 7, truncated, info

    trainer = Trainer(small_config, Ends(point_env), point_demonstrations, run=tmp_path / "run")
    trainer.train()
    assert trainer.behaviour._rows["terminated"].sum() == 14  # 100 steps, 7 each, the last cut


def tensors_of(run):
    _, tensors, meta = checkpoint.newest(run)
    del meta["wall_s"], meta["settings"]  # such as how updates overlap
    return tensors, meta


def assert_same_state(one, two):
    (a, meta_a), (b, meta_b) = tensors_of(one), tensors_of(two)
    assert meta_a == meta_b and a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


@pytest.mark.parametrize(
    "mode", ["eager", "fused", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_resume_is_exact(tmp_path, small_config, point_env, point_demonstrations, mode):
    """40 + 60 steps are 100 steps, evaluations in between or not."""
    config = small_config.replace(
        {
            "planner.mode": "compile" if mode == "compile" else "eager",
            "learner.mode": mode,
            "agent.average": "always",
        }
    )
    train(config, point_env, point_demonstrations, tmp_path / "straight")
    first = config.replace({"train.steps": 40, "train.eval_every": 20})
    train(first, point_env, point_demonstrations, tmp_path / "parts")
    train(config, point_env, point_demonstrations, tmp_path / "parts", resume=True)
    one, two = (tensors_of(tmp_path / n)[0] for n in ("straight", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)


_WORKER = """
import sys, time, yaml, importlib.util
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec); spec.loader.exec_module(shared)
import iqmpc
run, resume, slow = sys.argv[2], sys.argv[3] == "resume", float(sys.argv[4])
config = iqmpc.Config.from_dict(yaml.safe_load(open(sys.argv[5])))
class Slow(shared.PointEnv):
    def step(self, action):
        time.sleep(slow)
        return super().step(action)
iqmpc.Trainer(config, Slow(), iqmpc.Demonstrations.load(sys.argv[6]), run=run,
              resume=resume).train()
"""


def test_kill_and_resume_is_exact(tmp_path, small_config, point_demonstrations):
    """SIGKILL in the middle of an episode: the continuation equals the run that was never cut."""
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_config.to_dict()))
    point_demonstrations.save(tmp_path / "demos.h5")
    shared = os.path.join(os.path.dirname(__file__), "conftest.py")

    def start(run, mode, slow):
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                _WORKER,
                shared,
                str(tmp_path / run),
                mode,
                str(slow),
                str(tmp_path / "config.yaml"),
                str(tmp_path / "demos.h5"),
            ]
        )

    assert start("straight", "new", 0).wait(120) == 0
    cut = start("cut", "new", 0.05)
    first = tmp_path / "cut" / "checkpoints" / "step_000000040.safetensors"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline and cut.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)  # some steps into the next episode
    cut.send_signal(signal.SIGKILL)
    assert cut.wait(10) == -signal.SIGKILL and first.exists()
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert start("cut", "resume", 0).wait(120) == 0
    assert_same_state(tmp_path / "straight", tmp_path / "cut")
    rows = {
        run: [
            {k: v for k, v in r.items() if k != "wall_s"}
            for r in csv.DictReader(open(tmp_path / run / "metrics.csv", newline=""))
        ]
        for run in ("straight", "cut")
    }
    assert rows["straight"] == rows["cut"]


def test_a_damaged_newest_checkpoint_falls_back(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.warns(RuntimeWarning, match=newest.name):
        trainer = Trainer(
            small_config, point_env, point_demonstrations, run=tmp_path / "run", resume=True
        )
    assert trainer.env_steps == 80
    with pytest.warns(RuntimeWarning, match=newest.name):
        Agent.load(tmp_path / "run")


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"

    class Wide(gymnasium.Wrapper):
        action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)

    with pytest.raises(TaskError, match=r"actions must lie in \[-1, 1\], got \[-2, 2\]; wrap it"):
        Trainer(small_config, Wide(point_env), point_demonstrations, run=run)
    discrete = gymnasium.make("CartPole-v1")
    with pytest.raises(TaskError, match="the action space must be a flat Box, got Discrete"):
        Trainer(small_config, discrete, point_demonstrations, run=run)
    with pytest.raises(ConfigError, match="learns from demonstrations: none were given"):
        Trainer(small_config, point_env, None, run=run)
    other = gymnasium.make("Pendulum-v1")
    other = gymnasium.wrappers.RescaleAction(other, -1.0, 1.0)
    with pytest.raises(ConfigError, match="are of task 'point', the run's is 'line'"):
        Trainer(
            small_config.replace({"task.name": "line"}), point_env, point_demonstrations, run=run
        )
    with pytest.raises(
        ConfigError,
        match=r"have observations \[2\] and 2 actions, the "
        r"environment has \[3\] and 1",
    ):
        Trainer(small_config, other, point_demonstrations, run=run)
    long = small_config.replace({"learner.horizon": 30, "task.episode_length": 40})
    with pytest.raises(ConfigError, match="no demonstration is as long as learner.horizon=30"):
        Trainer(long, point_env, point_demonstrations, run=run)
    with pytest.raises(CheckpointError, match="is no run folder"):
        Trainer(small_config, point_env, point_demonstrations, run=run, resume=True)
    assert not run.exists()


def test_demonstrations_may_name_a_gym_task_by_its_env_id(
    tmp_path, small_config, point_env, point_demonstrations
):
    config = small_config.replace({"task.name": "gym-point-v0"})
    named = dataclasses.replace(point_demonstrations, task="Point-v0")
    trainer = Trainer(config, point_env, named, run=tmp_path / "run")
    assert trainer.experts.slices
    with pytest.raises(ConfigError, match="are of task 'Point-v1', the run's is 'gym-point-v0'"):
        Trainer(
            config, point_env, dataclasses.replace(named, task="Point-v1"), run=tmp_path / "run"
        )


def test_a_run_is_not_overwritten(tmp_path, small_config, point_env, point_demonstrations):
    config = small_config.replace({"train.steps": 20})
    train(config, point_env, point_demonstrations, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run: continue it with resume="):
        Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    # two that start at once: only one gets the folder
    one, two = (
        Trainer(config, point_env, point_demonstrations, run=tmp_path / "both") for _ in range(2)
    )
    one.train()
    with pytest.raises(ConfigError, match="already holds a run"):
        two.train()


def test_another_models_checkpoint_is_refused(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(
        small_config.replace({"train.steps": 20}), point_env, point_demonstrations, tmp_path / "run"
    )
    wider = small_config.replace({"model.hidden_dim": 40})
    with pytest.raises(
        ConfigError,
        match="what a run learns cannot change when it is resumed: model.hidden_dim is 40, was 32",
    ):
        Trainer(wider, point_env, point_demonstrations, run=tmp_path / "run", resume=True)


def test_evaluation_is_repeatable_and_episode_seeds_differ(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    one, two = (
        evaluate(Agent.load(tmp_path / "run"), point_env, episodes=3).returns for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)
    seeds = {
        stream_seed(s, stream, i)
        for s in range(3)
        for stream in ("train", "eval")
        for i in range(50)
    }
    assert len(seeds) == 300


def planned_steps(trainer):
    """Train, and the environment steps at which the planner acted."""
    planned = []
    act = trainer.agent.act
    trainer.agent.act = lambda obs, **k: planned.append(trainer.env_steps) or act(obs, **k)
    trainer._evaluate = lambda episodes: None
    trainer._finish = dict
    trainer.train()
    return planned


def test_random_actions_come_first(tmp_path, small_config, point_env, point_demonstrations):
    trainer = Trainer(small_config, point_env, point_demonstrations, run=tmp_path / "run")
    assert planned_steps(trainer) == list(range(40, 100))


def test_the_initial_updates_see_all_random_steps(
    tmp_path, small_config, point_env, point_demonstrations
):
    trainer = Trainer(small_config, point_env, point_demonstrations, run=tmp_path / "run")
    held = []
    update = trainer.learner.update
    trainer.learner.update = lambda batch: held.append(len(trainer.behaviour)) or update(batch)
    trainer.train()
    assert held[:6] == [40] * 6 and trainer.learner.updates == 5 + 60


def test_short_random_phases_lose_no_updates(
    tmp_path, small_config, point_env, point_demonstrations
):
    """Until an episode has ended there is nothing to learn from: act at random, then catch up."""
    config = small_config.replace({"train.random_steps": 5})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    assert planned_steps(trainer) == list(range(20, 100)) and trainer.learner.updates == 5 + 95


def test_updates_on_the_demonstrations_alone(
    tmp_path, small_config, point_env, point_demonstrations
):
    config = small_config.replace({"train.demo_updates": 7, "train.steps": 60})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    at = []
    update = trainer.learner.update
    trainer.learner.update = lambda batch: at.append(trainer.env_steps) or update(batch)
    trainer.train()
    assert at[:7] == [0] * 7 and trainer.learner.updates == 7 + 5 + 20
    with pytest.raises(ConfigError, match="demo_updates needs demonstrations"):
        config.replace({"learner.objective": "td"})


def test_an_environment_may_reuse_its_observation(
    tmp_path, small_config, point_env, point_demonstrations
):
    class Reusing(gymnasium.Wrapper):
        buffer = np.zeros(2, np.float32)

        def reset(self, **k):
            self.buffer[:], info = self.env.reset(**k)
            return self.buffer, info

        def step(self, action):
            self.buffer[:], *rest = self.env.step(action)
            return self.buffer, *rest

    config = small_config.replace({"train.steps": 20})
    for name, env in (("plain", point_env), ("reusing", Reusing(point_env))):
        train(config, env, point_demonstrations, tmp_path / name)
    assert_same_state(tmp_path / "plain", tmp_path / "reusing")


def test_a_run_cut_before_its_first_checkpoint_starts_again(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.save_config(run, small_config, new=True)
    train(small_config, point_env, point_demonstrations, run, resume=True)
    train(small_config, point_env, point_demonstrations, tmp_path / "straight")
    assert_same_state(run, tmp_path / "straight")


def test_resume_refuses_what_is_no_continuation(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    train(small_config, point_env, point_demonstrations, run)
    with pytest.raises(CheckpointError, match="was trained on other demonstrations"):
        Trainer(small_config, point_env, point_demonstrations.select(5), run=run, resume=True)
    with pytest.raises(ConfigError, match="train.steps must be at least the 100"):
        Trainer(
            small_config.replace({"train.steps": 60}),
            point_env,
            point_demonstrations,
            run=run,
            resume=True,
        )


def test_a_finished_run_resumed_says_the_same_again(
    tmp_path, small_config, point_env, point_demonstrations
):
    """Also with a line of metrics.csv that a crash left incomplete."""
    run = tmp_path / "run"
    first = train(small_config, point_env, point_demonstrations, run)
    rows = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(rows + "100,6")
    second = train(small_config, point_env, point_demonstrations, run, resume=True)
    again = (run / "metrics.csv").read_text().splitlines()
    assert [r.split(",")[0] for r in again] == [r.split(",")[0] for r in rows.splitlines()]
    del first["wall_s"], second["wall_s"]
    assert first == second


def test_config_is_written(tmp_path, small_config, point_env, point_demonstrations):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    assert checkpoint.load_config(tmp_path / "run") == small_config
    assert isinstance(checkpoint.load_config(tmp_path / "run"), Config)


class Watched(gymnasium.Wrapper):
    """Keeps what was observed and done."""

    def __init__(self, env):
        super().__init__(env)
        self.seen = []

    def reset(self, **how):
        self.obs, info = self.env.reset(**how)
        return self.obs, info

    def step(self, action):
        self.seen.append((self.obs, np.array(action)))
        self.obs, *rest = self.env.step(action)
        return self.obs, *rest


def modes(weights, seen):
    """The prior's mean actions where `seen` was, and what was done there."""
    obs, actions = (torch.tensor(np.array(x)) for x in zip(*seen, strict=True))
    return torch.tanh(layers.policy(weights, layers.encode(weights, obs))[0]), actions


@pytest.mark.parametrize("average", ["off", "evaluation", "always"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_the_average_acts_where_it_should(
    tmp_path, small_config, point_env, point_demonstrations, average, num_envs
):
    """A prior that hardly explores shows by its actions whose they are: an average that has not
    moved yet, or the live weights.
    """
    config = small_config.replace(
        {
            "planner.enabled": False,
            "model.log_std_min": -11.0,
            "model.log_std_max": -10.0,
            "learner.lr": 1e-2,
            "train.num_envs": num_envs,
            "train.updates_per_step": 3,
            "agent.average": average,
            "agent.average_rate": 1e-9,
        }
    )
    envs = [Watched(type(point_env)()) for _ in range(num_envs)]
    eval_env = Watched(point_env)
    trainer = Trainer(config, envs, point_demonstrations, run=tmp_path / "run", eval_env=eval_env)
    initial = snapshot(trainer.learner.weights)
    tick, during = trainer._tick, []

    def watched():
        live, before = snapshot(trainer.learner.weights), len(envs[0].seen)
        random = trainer.env_steps < 40
        ended = tick()
        if not random:
            for env in envs:
                during.append(
                    [
                        (a - b).abs().max().item() < 1e-3
                        for a, b in (modes(w, env.seen[before:]) for w in (initial, live))
                    ]
                )
        return ended

    trainer._tick = watched
    trainer.train()
    live = trainer.learner.weights
    acted, evaluated = (
        np.array(during).mean(0),
        [
            (a - b).abs().max().item() < 1e-3
            for a, b in (modes(w, eval_env.seen[-40:]) for w in (initial, live))
        ],
    )
    assert acted.tolist() == ([1, 0] if average == "always" else [0, 1])
    assert evaluated == ([False, True] if average == "off" else [True, False])

    loaded = Agent.load(tmp_path / "run")
    weights = trainer.learner.evaluation_weights()
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.model.weights().tensors(), weights.tensors(), strict=True)
    )
    obs = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    mode, _ = modes(weights, [(o, o) for o in obs])
    np.testing.assert_allclose([loaded.act(o) for o in obs], mode.detach(), atol=1e-5)
    what = obs, np.clip(obs, -1, 1), obs
    acting = snapshot(trainer.learner.acting_weights())
    for agent, of in ((loaded, weights), (trainer.agent, acting)):
        by_hand = Agent(type(loaded.model)(2, 2, config.model), config)
        by_hand.publish(of)
        np.testing.assert_array_equal(agent.decode_reward(*what), by_hand.decode_reward(*what))
    if average != "off":  # what a loaded agent acts with may be chosen
        other = Agent.load(tmp_path / "run", changes={"agent.average": "off"})
        assert all(
            torch.equal(a, b)
            for a, b in zip(other.model.weights().tensors(), live.tensors(), strict=True)
        )
    else:
        with pytest.raises(CheckpointError, match="holds no average of the weights"):
            Agent.load(tmp_path / "run", changes={"agent.average": "always"})


@pytest.mark.parametrize("average", ["evaluation", "always"])
def test_a_run_with_an_average_continues_exactly(
    tmp_path, small_config, point_env, point_demonstrations, average
):
    config = small_config.replace({"agent.average": average, "agent.average_rate": 0.1})
    train(config, point_env, point_demonstrations, tmp_path / "straight")
    train(
        config.replace({"train.steps": 60, "train.eval_every": 20}),
        point_env,
        point_demonstrations,
        tmp_path / "parts",
    )
    train(config, point_env, point_demonstrations, tmp_path / "parts", resume=True)
    one, two = (tensors_of(tmp_path / n)[0] for n in ("straight", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    averages, live = (
        {k.removeprefix(prefix) for k in one if k.startswith(prefix)}
        for prefix in ("learner.average.", "learner.model.")
    )
    assert averages == live and averages
    if average == "evaluation":  # it leaves no trace in training
        train(small_config, point_env, point_demonstrations, tmp_path / "off")
        off = tensors_of(tmp_path / "off")[0]
        assert {k for k in one if not k.startswith("learner.average.")} == off.keys()
        assert all(torch.equal(one[k], off[k]) for k in off)


def test_a_checkpoint_from_before_updates_were_skipped_is_continued(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    path, tensors, meta = checkpoint.newest(tmp_path / "run")
    del tensors["learner.skipped_updates"]
    checkpoint.save(tmp_path / "run", 100, tensors, meta)
    trainer = Trainer(
        small_config, point_env, point_demonstrations, run=tmp_path / "run", resume=True
    )
    assert trainer.learner.skipped_updates == 0 and trainer.learner.updates == 65


def test_skipped_updates_are_counted_and_said_once(
    tmp_path, small_config, point_env, point_demonstrations
):
    """In summary.json, metrics.csv and checkpoints, over a continuation."""
    trainer = Trainer(small_config, point_env, point_demonstrations, run=tmp_path / "run")
    update = trainer.learner.update

    def spoilt(batch):
        if trainer.learner.updates in (3, 10, 40):
            batch.obs[1, 2] = np.inf
        return update(batch)

    trainer.learner.update = spoilt
    with pytest.warns(RuntimeWarning, match="is not finite and was left out") as warned:
        summary = trainer.train()
    assert len([w for w in warned if "left out" in str(w.message)]) == 1
    assert summary["skipped_updates"] == 3 and summary["updates"] == 65
    tensors, _ = tensors_of(tmp_path / "run")
    assert tensors["learner.skipped_updates"] == 3
    assert all(v.isfinite().all() for k, v in tensors.items() if k.startswith("learner."))
    counted = [r["skipped_updates"] for r in rows_of(tmp_path / "run") if r["return"]]
    assert counted == ["", "1", "2", "3", "3"]  # after 5, 25, 45 and 65 updates
    with pytest.warns(RuntimeWarning, match="was left out"):
        resumed = train(
            small_config.replace({"train.steps": 120}),
            point_env,
            point_demonstrations,
            tmp_path / "run",
            resume=True,
        )
    assert resumed["skipped_updates"] == 3


class Marked(gymnasium.Env):
    """Observes (which environment and episode it is, the step): what belongs together shows."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, mark, length, *, terminates=False, fails_at=None):
        self.mark, self.length, self.terminates = mark, length, terminates
        self.left, self.seeds = fails_at, []

    def obs(self):
        return np.array([self.mark + len(self.seeds) / 128, self.steps], np.float32)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.steps = 0
        return self.obs(), {}

    def step(self, action):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        self.steps += 1
        ended = self.steps >= self.length
        return (
            self.obs(),
            float(self.steps),
            ended and self.terminates,
            ended and not self.terminates,
            {},
        )


def marked(**options):
    """Episodes of 5, 7 and 11 steps; the 7 end in a terminal state."""
    return [Marked(1, 5), Marked(2, 7, terminates=True), Marked(3, 11, **options)]


@pytest.fixture
def three(small_config):
    return small_config.replace({"train.num_envs": 3})


def test_three_environments_are_planned_in_one_call(
    tmp_path, three, point_env, point_demonstrations
):
    envs = [type(point_env)(length) for length in (5, 8, 20)]
    trainer = Trainer(three, envs, point_demonstrations, run=tmp_path / "run", eval_env=point_env)
    ticks, shapes, updates = [], [], []
    plan, step, update = trainer.agent.planner.plan, trainer.envs.step, trainer.learner.update
    trainer.agent.planner.plan = lambda obs, **k: shapes.append(list(obs.shape)) or plan(obs, **k)
    trainer.envs.step = lambda actions: ticks.append(len(actions)) or step(actions)
    trainer.learner.update = lambda batch: updates.append(trainer.env_steps) or update(batch)
    summary = trainer.train()
    assert ticks == [3] * 33 + [1] and summary["env_steps"] == 100  # and no step more
    assert shapes == [[3, 2]] * 20  # from step 42 on
    assert summary["updates"] == 5 + 60
    assert updates == [42] * (5 + 2) + [s for s in range(45, 100, 3) for _ in range(3)] + [100]
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv", newline="")))
    ends = [int(r["env_steps"]) for r in rows if r["return"]]
    assert (
        ends
        == sorted(3 * t for length in (5, 8, 20) for t in range(length, 34, length)) + [100] * 3
    )  # the unfinished ones
    assert [int(r["env_steps"]) for r in rows if r["eval_return_mean"]] == [45, 90, 100]
    assert all(r["consistency"] for r in rows if r["return"] and int(r["env_steps"]) > 40)


def test_three_environments_train(tmp_path, three, point_env, point_demonstrations):
    config = three.replace(
        {
            "train.steps": 1000,
            "train.random_steps": 100,
            "train.initial_updates": 100,
            "train.final_episodes": 10,
            "train.eval_every": 1000,
            "learner.batch": 32,
            "learner.lr": 1e-3,
            "planner.samples": 64,
            "planner.elites": 8,
        }
    )
    summary = train(
        config,
        [type(point_env)() for _ in range(3)],
        point_demonstrations,
        tmp_path / "run",
        eval_env=point_env,
    )
    assert summary["ratio"] > 0.7 and summary["success_rate"] >= 0.8
    learnt = evaluate(Agent.load(tmp_path / "run"), point_env, episodes=10)
    assert learnt.return_mean == summary["return_mean"]


def test_episodes_of_several_environments_are_not_mixed(
    tmp_path, three, point_env, point_demonstrations
):
    trainer = Trainer(
        three, marked(), point_demonstrations, run=tmp_path / "run", eval_env=point_env
    )
    trainer.train()
    # 34, 33, 33 steps: 6, 4 and 3 whole episodes, and 4, 5 and 0 steps at the end
    assert len(trainer.behaviour) == 100 and trainer.episodes == 13 + 2
    rows, starts = trainer.behaviour._rows, trainer.behaviour._starts
    lengths = [5] * 6 + [4] + [7] * 4 + [5] + [11] * 3
    assert len(starts) == sum(length - 3 + 1 for length in lengths)
    for start in starts.tolist():
        of, at = rows["obs"][start : start + 4].T
        assert of.unique().numel() == 1 and (at - at[0]).tolist() == [0, 1, 2, 3]
        assert rows["reward"][start : start + 3].tolist() == at[1:].tolist()
        ends = [bool(2 <= m < 3 and t == 7) for m, t in zip(of[1:], at[1:], strict=True)]
        assert rows["terminated"][start : start + 3].tolist() == ends
    assert rows["terminated"].sum() == 4


def test_each_environments_plan_is_forgotten_at_its_episodes_end(
    tmp_path, three, point_env, point_demonstrations
):
    trainer = Trainer(
        three, marked(), point_demonstrations, run=tmp_path / "run", eval_env=point_env
    )
    reset, act, resets, ticks = trainer.agent.planner.reset, trainer._act, [], []
    trainer.agent.planner.reset = lambda env=None: resets.append(env) or reset(env)

    def seen(obs):
        first = np.flatnonzero(obs[:, 1] == 0).tolist()  # those at the first step of an episode
        ticks.append(first == resets)
        resets.clear()
        return act(obs)

    trainer._act = seen
    trainer.train()
    assert ticks == [True] * 34


def test_evaluation_leaves_no_trace_beside_three_environments(
    tmp_path, three, point_env, point_demonstrations
):
    for name, every in (("often", 10), ("never", 1000)):
        train(
            three.replace({"train.eval_every": every}),
            marked(),
            point_demonstrations,
            tmp_path / name,
            eval_env=point_env,
        )
    one, two = (tensors_of(tmp_path / n)[0] for n in ("often", "never"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_resume_is_exact_where_episodes_end_together(
    tmp_path, three, point_env, point_demonstrations
):
    config = three.replace({"train.steps": 180})

    def go(config, run, **options):
        train(
            config,
            [type(point_env)() for _ in range(3)],
            point_demonstrations,
            tmp_path / run,
            eval_env=point_env,
            **options,
        )

    go(config, "straight")
    go(config.replace({"train.steps": 120}), "parts")
    go(config, "parts", resume=True)
    one, two = (tensors_of(tmp_path / n)[0] for n in ("straight", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_resume_drops_unfinished_episodes_of_the_others(
    tmp_path, three, point_env, point_demonstrations
):
    """Cut in tick 31; the checkpoint of tick 28 holds what had ended by then."""
    config = three.replace({"train.checkpoint_every": 80})
    before, after = marked(fails_at=30), marked()
    killed = Trainer(config, before, point_demonstrations, run=tmp_path / "run", eval_env=point_env)
    killed._rescue = lambda: None  # which a killed process has no time for
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    trainer = Trainer(
        config, after, point_demonstrations, run=tmp_path / "run", eval_env=point_env, resume=True
    )
    assert trainer.env_steps == 84 and len(trainer.behaviour) == 25 + 28 + 22
    assert trainer.episodes == 5 + 4 + 2
    # by the checkpoint: the first two have begun one more since
    used = {seed for env in before for seed in env.seeds[:-1]} | {before[2].seeds[-1]}
    summary = trainer.train()
    assert summary["env_steps"] == 100 and summary["updates"] == 5 + 60
    # 6, 5 and 5 steps more; the sixth begins an episode that is too short for a slice
    assert len(trainer.behaviour) == 25 + 28 + 22 + 5 + 5 + 5
    assert not used & {seed for env in after for seed in env.seeds}


def test_wrong_environments_are_refused(
    tmp_path, small_config, three, point_env, point_demonstrations
):
    run, envs = tmp_path / "run", [type(point_env)() for _ in range(3)]

    def make(config, env, **options):
        return Trainer(config, env, point_demonstrations, run=run, **options)

    with pytest.raises(ConfigError, match="train.num_envs=3 needs 3 environments, got 1"):
        make(three, point_env, eval_env=point_env)
    with pytest.raises(ConfigError, match="train.num_envs=1 needs 1 environments, got 3"):
        make(small_config, envs)
    with pytest.raises(ConfigError, match="train.num_envs=3 needs an eval_env of its own"):
        make(three, envs)
    with pytest.raises(ConfigError, match="needs an eval_env of its own"):
        make(three, envs, eval_env=envs[1])
    other = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)
    with pytest.raises(
        TaskError, match="point: environment 2 and environment 0 differ in observation_space.shape"
    ):
        make(three, [*envs[:2], other], eval_env=point_env)
    with pytest.raises(TaskError, match="point: eval_env and environment 0 differ in"):
        make(three, envs, eval_env=other)
    with pytest.raises(ConfigError, match="train.num_envs must be at least 1, got 0"):
        three.replace({"train.num_envs": 0})
    assert not run.exists()
    run.mkdir()
    checkpoint.save_config(run, small_config, new=True)
    with pytest.raises(
        ConfigError, match="num_envs cannot change when a run is resumed: it is 1, got 3"
    ):
        make(three, envs, eval_env=point_env, resume=True)


def test_one_environment_may_come_in_a_list_and_with_another_for_evaluation(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(small_config, point_env, point_demonstrations, tmp_path / "plain")
    train(
        small_config,
        [type(point_env)()],
        point_demonstrations,
        tmp_path / "list",
        eval_env=type(point_env)(),
    )
    assert_same_state(tmp_path / "plain", tmp_path / "list")


def overlapping(config, schedule, **changes):
    return config.replace({"train.overlap": schedule, **changes})


def rows_of(run):
    return [
        {k: v for k, v in row.items() if k != "wall_s"}
        for row in csv.DictReader(open(run / "metrics.csv", newline=""))
    ]


def test_overlapped_is_the_same_schedule_in_line(
    tmp_path, small_config, point_env, point_demonstrations
):
    """`async` is `sync` bit for bit, resumed or not; `off` is another schedule, and the default."""

    def go(name, schedule, steps=100, **options):
        config = overlapping(small_config, schedule, **{"train.steps": steps})
        train(config, point_env, point_demonstrations, tmp_path / name, **options)

    for name in ("sync", "async", "off"):
        go(name, name)
    assert_same_state(tmp_path / "sync", tmp_path / "async")
    assert rows_of(tmp_path / "sync") == rows_of(tmp_path / "async")
    for first, then in (("async", "async"), ("sync", "async")):
        go(f"{first}-{then}", first, 60)
        go(f"{first}-{then}", then, 100, resume=True)
        one, two = (tensors_of(tmp_path / n)[0] for n in ("sync", f"{first}-{then}"))
        assert all(torch.equal(one[k], two[k]) for k in one)
    go("default", None)
    assert_same_state(tmp_path / "default", tmp_path / "off")
    one, two = (tensors_of(tmp_path / n)[0] for n in ("sync", "off"))
    assert not torch.equal(one["behaviour.action"], two["behaviour.action"])


def test_overlapped_is_the_same_schedule_with_three_environments(
    tmp_path, three, point_env, point_demonstrations
):
    """Also where episodes end at different times, with two updates a step and none at first."""
    for name in ("sync", "async"):
        config = overlapping(
            three,
            name,
            **{"train.updates_per_step": 2, "train.initial_updates": 0, "train.demo_updates": 3},
        )
        train(config, marked(), point_demonstrations, tmp_path / name, eval_env=point_env)
    assert_same_state(tmp_path / "sync", tmp_path / "async")
    assert rows_of(tmp_path / "sync") == rows_of(tmp_path / "async")


@pytest.mark.parametrize("rate", [0.25, 0.3, 1.5])
def test_a_fraction_of_an_update_for_each_step(
    tmp_path, small_config, point_env, point_demonstrations, rate
):
    """As many as are due at each tick, by each schedule, resumed or not."""
    for schedule in ("off", "sync", "async"):
        config = overlapping(small_config, schedule, **{"train.updates_per_step": rate})
        trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / schedule)
        tick, made, messages = trainer._tick, [], []
        trainer._on_message = messages.append
        trainer._tick = lambda tick=tick, made=made, trainer=trainer: (
            tick(),
            made.append(trainer.learner.updates),
        )[0]
        trainer.train()
        # 40 random steps, then 5 updates and those for each step since
        due = [0] * 39 + [5 + math.floor((n - 40) * Fraction(str(rate))) for n in range(40, 101)]
        late = [n for n, (d, m) in enumerate(zip(due, made, strict=True), 1) if d != m]
        assert all(due[n - 1] - made[n - 1] <= math.ceil(rate) and n % 20 for n in late)
        assert bool(late) == (schedule != "off") and made[-1] == due[-1]
        assert len([m for m in messages if "updates on the first" in m]) == 1
        first = config.replace({"train.steps": 60})
        train(first, point_env, point_demonstrations, tmp_path / f"{schedule}-parts")
        train(config, point_env, point_demonstrations, tmp_path / f"{schedule}-parts", resume=True)
        assert_same_state(tmp_path / schedule, tmp_path / f"{schedule}-parts")
    assert_same_state(tmp_path / "sync", tmp_path / "async")


@pytest.mark.parametrize("schedule", ["off", "sync", "async"])
def test_a_plan_lacks_the_updates_of_one_tick_at_most(
    tmp_path, small_config, point_env, point_demonstrations, schedule
):
    trainer = Trainer(
        overlapping(small_config, schedule), point_env, point_demonstrations, run=tmp_path / "run"
    )
    planner, lacking, saved = trainer.agent.planner, {}, []
    plan, publish, save = planner.plan, planner.publish, trainer._save
    published = 0

    def publish_(weights):
        nonlocal published
        published = trainer.learner.updates
        publish(weights)

    def plan_(obs, explore=False):
        if explore:  # not an evaluation
            lacking[trainer.env_steps] = 5 + trainer.env_steps - 40 - published
        return plan(obs, explore=explore)

    planner.publish, planner.plan = publish_, plan_
    trainer._save = lambda: saved.append((trainer.learner.updates, published)) or save()
    trainer.train()
    # the initial updates (step 40) and those of an episode's last step are waited for
    late = 0 if schedule == "off" else 1
    assert lacking == {step: late if step % 20 else 0 for step in range(40, 100)}
    assert saved == [(5, 5), (45, 45), (65, 65)]


def test_the_environment_steps_while_the_learner_learns(
    tmp_path, small_config, point_env, point_demonstrations
):
    began, stepped = threading.Event(), threading.Event()

    class Waits(gymnasium.Wrapper):
        def step(self, action):
            if trainer.env_steps == 50:
                assert began.wait(60), "no update has begun beside this step"
                stepped.set()
            return self.env.step(action)

    trainer = Trainer(
        overlapping(small_config, "async"),
        Waits(point_env),
        point_demonstrations,
        run=tmp_path / "run",
    )
    update, names = trainer.learner.update, set()

    def update_(batch):
        names.add(threading.current_thread().name)
        if trainer.learner.updates == 14:  # the one of the step before
            began.set()
            assert stepped.wait(60), "the environment waits for the learner"
        return update(batch)

    trainer.learner.update = update_
    trainer.train()
    assert stepped.is_set() and names == {"iqmpc-learner_0"}
    assert not [t for t in threading.enumerate() if t.name.startswith("iqmpc-learner")]


def test_an_error_in_the_learners_thread_is_raised(
    tmp_path, small_config, point_env, point_demonstrations
):
    trainer = Trainer(
        overlapping(small_config, "async"), point_env, point_demonstrations, run=tmp_path / "run"
    )
    update = trainer.learner.update

    def fail(batch):
        if trainer.learner.updates == 20:
            raise FloatingPointError("at update 20")
        return update(batch)

    trainer.learner.update = fail
    with pytest.raises(FloatingPointError, match="at update 20"):
        trainer.train()
    assert trainer.env_steps == 56  # raised in the tick beside which it happened
    assert not [t for t in threading.enumerate() if t.name.startswith("iqmpc-learner")]


@pytest.mark.parametrize("initial", [5, 10**9])
def test_interrupting_an_overlapped_run(
    tmp_path, small_config, point_env, point_demonstrations, initial
):
    """Ctrl-C beside a step, or while the initial updates are waited for: it ends, and resumes."""
    config = overlapping(small_config, "async", **{"train.initial_updates": initial})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    update = trainer.learner.update

    def interrupting(batch):
        if trainer.learner.updates == 14:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return update(batch)

    trainer.learner.update = interrupting
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.learner.updates < 1000
    assert not [t for t in threading.enumerate() if t.name.startswith("iqmpc-learner")]
    if initial == 5:
        train(config, point_env, point_demonstrations, tmp_path / "run", resume=True)
        train(config, point_env, point_demonstrations, tmp_path / "straight")
        assert_same_state(tmp_path / "run", tmp_path / "straight")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_overlapped_is_the_same_schedule_on_a_gpu(
    tmp_path, small_config, point_env, point_demonstrations, mode
):
    config = small_config.replace({"device": "cuda", "learner.mode": mode})
    assert Trainer(config, point_env, point_demonstrations, run=tmp_path).overlap == "async"
    for name in ("sync", "async"):
        train(overlapping(config, name), point_env, point_demonstrations, tmp_path / name)
    train(
        overlapping(config, "async", **{"train.steps": 60}),
        point_env,
        point_demonstrations,
        tmp_path / "parts",
    )
    train(
        overlapping(config, "async"),
        point_env,
        point_demonstrations,
        tmp_path / "parts",
        resume=True,
    )
    assert_same_state(tmp_path / "sync", tmp_path / "async")
    one, two = (tensors_of(tmp_path / n)[0] for n in ("sync", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)


# What makes the environments of `marked`, in worker processes too.
MAKERS = [
    functools.partial(Marked, 1, 5),
    functools.partial(Marked, 2, 7, terminates=True),
    functools.partial(Marked, 3, 11),
]


def test_worker_processes_give_the_same_run(tmp_path, three, point_env, point_demonstrations):
    train(three, marked(), point_demonstrations, tmp_path / "given", eval_env=point_env)
    for name, workers, kind in (("serial", False, VectorEnv), ("workers", None, WorkerVectorEnv)):
        trainer = Trainer(
            three.replace({"train.env_workers": workers}),
            MAKERS,
            point_demonstrations,
            run=tmp_path / name,
            eval_env=point_env,
        )
        assert type(trainer.envs) is kind
        trainer.train()
        assert_same_state(tmp_path / "given", tmp_path / name)


def test_a_worker_killed_in_the_middle_of_training(
    tmp_path, three, point_env, point_demonstrations
):
    """After tick 20, nine steps into the second episode of 11 steps."""
    messages = []
    trainer = Trainer(
        three,
        MAKERS,
        point_demonstrations,
        run=tmp_path / "run",
        eval_env=point_env,
        on_message=messages.append,
    )
    update, killed, forgotten = trainer.learner.update, [], []
    trainer.agent.planner.reset = lambda env: forgotten.append((trainer.env_steps, env))

    def kill(batch):
        if trainer.env_steps == 60 and not killed:
            killed.append(trainer.envs.envs[2].process)
            os.kill(killed[0].pid, signal.SIGKILL)
        return update(batch)

    trainer.learner.update = kill
    summary = trainer.train()
    assert killed[0].exitcode == -signal.SIGKILL
    assert summary["env_restarts"] == 1 and summary["env_steps"] == 100
    assert summary["updates"] == 5 + 60
    (said,) = (m for m in messages if "SIGKILL" in m)
    assert said.startswith(f"worker 2 of point (process {killed[0].pid}) was ended by SIGKILL")
    assert said.endswith("restarted (1 of at most 10), its unfinished episode of 9 steps dropped")
    # tick 21 is lost to it; then a whole episode, and one step that is too short for a slice
    assert len(trainer.behaviour) == 34 + 33 + 11 + 11
    of = trainer.behaviour._rows["obs"][trainer.behaviour._starts][:, 0].floor()
    assert [(of == mark).sum().item() for mark in (1, 2, 3)] == [6 * 3 + 2, 4 * 5 + 3, 2 * 9]
    assert [at for at, env in forgotten if env == 2] == [0, 33, 63, 96]
    again = train(
        three.replace({"train.steps": 110}),
        MAKERS,
        point_demonstrations,
        tmp_path / "run",
        eval_env=point_env,
        resume=True,
    )
    assert again["env_restarts"] == 1 and again["env_steps"] == 110


def test_a_worker_that_always_fails_ends_the_run(tmp_path, three, point_env, point_demonstrations):
    config = three.replace({"train.env_restarts": 1})
    makers = [*MAKERS[:2], functools.partial(Marked, 3, 11, fails_at=4)]
    trainer = Trainer(
        config, makers, point_demonstrations, run=tmp_path / "run", eval_env=point_env
    )
    with pytest.raises(
        WorkerError,
        match=r"worker 2 of point [\s\S]*KeyboardInterrupt\nafter 1 "
        "restarts of workers, .* train.env_restarts=1",
    ):
        trainer.train()
    assert trainer.env_steps == 3 * 9  # the restarted one had four steps again


def test_workers_need_functions(tmp_path, small_config, three, point_env, point_demonstrations):
    def make(config, env, **options):
        return Trainer(config, env, point_demonstrations, run=tmp_path / "run", **options)

    with pytest.raises(
        ConfigError,
        match="train.env_workers=true needs functions that make the "
        "environments, got 3 environments among 3",
    ):
        make(three.replace({"train.env_workers": True}), marked(), eval_env=point_env)
    with pytest.raises(ConfigError, match="1 of 3 environments are made already"):
        make(three, [*MAKERS[:2], Marked(3, 11)], eval_env=point_env)
    here = make(small_config, MAKERS[0])  # made in this process, once
    assert type(here.envs) is VectorEnv and here.envs.envs == [here.eval_env]
    one = make(small_config.replace({"train.env_workers": True}), MAKERS[0])
    assert isinstance(one.envs, WorkerVectorEnv) and isinstance(one.eval_env, Marked)
    one.envs.close()
    for key, value, message in (
        ("env_timeout_s", 0, "must be positive, got 0"),
        ("env_restarts", -1, "must be at least 0, got -1"),
        ("env_workers", 3, "must be bool, got 3"),
    ):
        with pytest.raises(ConfigError, match=f"train.{key} {message}"):
            three.replace({f"train.{key}": value})


@pytest.mark.parametrize("num_envs", [1, 2])
def test_images_train_resume_and_act(
    tmp_path, small_config, make_image_point, image_demonstrations, num_envs
):
    """40 + 40 steps are 80, from frames; the loaded agent acts and decodes rewards."""
    config = small_config.replace({"train.steps": 80, "train.num_envs": num_envs})

    def go(config, run, **options):
        envs = [make_image_point() for _ in range(num_envs + 1)]
        return train(
            config,
            envs[1:] if num_envs > 1 else envs[0],
            image_demonstrations,
            tmp_path / run,
            eval_env=envs[0],
            **options,
        )

    summary = go(config, "straight")
    go(config.replace({"train.steps": 40}), "parts")
    go(config, "parts", resume=True)
    one, two = (tensors_of(tmp_path / n)[0] for n in ("straight", "parts"))
    assert one["behaviour.obs"].dtype == torch.uint8
    assert one["behaviour.obs"].shape == (84, 1, 64, 64)  # four episodes, every frame once
    assert all(torch.equal(one[k], two[k]) for k in one)

    agent = Agent.load(tmp_path / "straight")
    result = evaluate(agent, make_image_point(), episodes=2, seed=0)
    assert result.return_mean == pytest.approx(summary["return_mean"])
    assert result.episodes[0].observations.shape == (21, 1, 64, 64)
    assert -1 <= reward_correlation(agent, result.episodes) <= 1
    obs = stacked(result.episodes[0].observations)
    agent.reset()
    assert agent.act(obs[0]).shape == (2,)
    with pytest.raises(ValueError, match="images must be uint8, got torch.float32"):
        agent.act(obs[0] / np.float32(255))
    with pytest.raises(ValueError, match="next_obs must be uint8"):
        agent.decode_reward(obs[0], np.zeros(2), obs[1].astype(np.float32))


def test_images_that_do_not_fit_are_refused(
    tmp_path, small_config, point_env, image_point_env, point_demonstrations, image_demonstrations
):
    with pytest.raises(
        ConfigError,
        match=r"have observations \[2\] and 2 actions, the environment "
        r"has \[3, 64, 64\] and 2",
    ):
        Trainer(small_config, image_point_env, point_demonstrations, run=tmp_path)
    with pytest.raises(ConfigError, match=r"have observations \[3, 64, 64\] and 2 actions"):
        Trainer(small_config, point_env, image_demonstrations, run=tmp_path)

    class Flickering(gymnasium.ObservationWrapper):
        def observation(self, obs):
            return np.random.default_rng().integers(0, 256, obs.shape, np.uint8)

    with pytest.raises(TaskError, match="must be its last three frames each"):
        train(small_config, Flickering(image_point_env), image_demonstrations, tmp_path / "run")


def interrupted_at(trainer, step, number):
    """Send this process a signal in the step after `step`."""
    act = trainer._act

    def acting(obs):
        if trainer.env_steps == step:
            os.kill(os.getpid(), number)
        return act(obs)

    trainer._act = acting
    return trainer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_the_step_and_loses_nothing(
    tmp_path, small_config, point_env, point_demonstrations, number
):
    """In step 76 of a run that would not have saved before 100; the continuation is exact."""
    config = small_config.replace({"train.checkpoint_every": 1000})
    messages = []
    trainer = interrupted_at(
        Trainer(
            config,
            point_env,
            point_demonstrations,
            run=tmp_path / "cut",
            on_message=messages.append,
        ),
        75,
        number,
    )
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        trainer.train()
    assert caught.value.signal == number and trainer.env_steps == 76
    assert signal.getsignal(number) == before
    assert checkpoint.newest(tmp_path / "cut")[2]["env_steps"] == 60
    name = signal.Signals(number).name
    assert messages[-2].startswith(f"{name}: ending after this step")
    assert messages[-1] == "saved as of step 60, the end of the last whole episode"
    train(config, point_env, point_demonstrations, tmp_path / "cut", resume=True)
    train(config, point_env, point_demonstrations, tmp_path / "straight")
    assert_same_state(tmp_path / "cut", tmp_path / "straight")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "straight")


def test_a_signal_during_an_evaluation_and_one_that_is_handled_elsewhere(
    tmp_path, small_config, point_env, point_demonstrations
):
    class Stops(type(point_env)):
        def step(self, action):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().step(action)

    config = small_config.replace({"train.checkpoint_every": 1000})
    trainer = Trainer(
        config, point_env, point_demonstrations, run=tmp_path / "run", eval_env=Stops()
    )
    with pytest.raises(Interrupted):
        trainer.train()
    assert checkpoint.newest(tmp_path / "run")[2]["env_steps"] == 40
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        trainer = Trainer(
            config,
            point_env,
            point_demonstrations,
            run=tmp_path / "run",
            eval_env=Stops(),
            resume=True,
        )
        assert trainer.train()["env_steps"] == 100 and came
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_error_of_the_environment_saves_the_last_whole_episode(
    tmp_path, small_config, point_env, point_demonstrations
):
    class Once(gymnasium.ObservationWrapper):
        seen = 0

        def observation(self, obs):
            Once.seen += 1
            return obs * np.nan if Once.seen == 90 else obs

    config = small_config.replace({"train.checkpoint_every": 1000, "train.eval_every": 1000})
    with pytest.raises(TaskError, match="point, episode 4, step 5: the observation is nan at"):
        train(config, Once(point_env), point_demonstrations, tmp_path / "run")
    path, tensors, meta = checkpoint.newest(tmp_path / "run")
    assert meta["env_steps"] == 80
    assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())
    train(config, point_env, point_demonstrations, tmp_path / "run", resume=True)


def test_a_replay_that_was_overwritten_is_not_saved_as_it_was(
    tmp_path, small_config, point_env, point_demonstrations
):
    """The interruption comes when the next episode has taken the place of an older one."""
    config = small_config.replace(
        {"train.capacity": 64, "train.checkpoint_every": 1000, "train.eval_every": 1000}
    )
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    keep = trainer._keep

    def keeping(episode):
        keep(episode)
        if trainer.env_steps == 80:
            raise KeyboardInterrupt

    trainer._keep = keeping
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.behaviour.overwritten == 1 and not checkpoint.exists(tmp_path / "run")


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path, small_config, point_env, point_demonstrations
):
    trainer = Trainer(small_config, point_env, point_demonstrations, run=tmp_path / "run")
    update = trainer.learner.update

    def spoil(batch):
        metrics = update(batch)
        if trainer.env_steps == 70:
            with torch.no_grad():
                trainer.learner.model.encoder[0].weight[0, 0] = torch.nan
        return metrics

    trainer.learner.update = spoil
    with (
        pytest.raises(CheckpointError, match="step 80: .* tensors of the learner are not finite"),
        pytest.warns(RuntimeWarning, match="no trajectory of a plan"),
    ):
        trainer.train()
    assert checkpoint.newest(tmp_path / "run")[2]["env_steps"] == 40


def test_two_processes_do_not_resume_one_run(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    train(small_config.replace({"train.steps": 40}), point_env, point_demonstrations, run)
    one, two = (
        Trainer(small_config, point_env, point_demonstrations, run=run, resume=True)
        for _ in range(2)
    )
    with (
        checkpoint.locked(run),
        pytest.raises(ConfigError, match="run is being trained by another process"),
    ):
        one.train()
    one.train()
    with pytest.raises(ConfigError, match="was continued by another process since step_000000040"):
        two.train()


def test_what_a_kill_has_left_is_removed_at_resume(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    train(small_config, point_env, point_demonstrations, run)
    folder = run / "checkpoints"
    first = folder / "step_000000080.safetensors"
    kept = [folder / "step_best.safetensors", folder / "mine.tmp"]
    left = [
        folder / ".step_000000120.safetensors.0123abcd.tmp",
        run / ".config.yaml.00000000.tmp",
        folder / "step_000000020.safetensors",
    ]
    for path in (*kept, *left):
        path.write_bytes(first.read_bytes())
    train(
        small_config.replace({"train.steps": 120}),
        point_env,
        point_demonstrations,
        run,
        resume=True,
    )
    assert all(path.exists() for path in kept) and not any(path.exists() for path in left)
    assert checkpoint.newest(run)[2]["env_steps"] == 120


def test_settings_that_differ_from_the_checkpoints_are_named(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    train(small_config, point_env, point_demonstrations, run)
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("rho: 0.5", "rho: 0.7"))
    said = "config.yaml is not what step_000000100.safetensors was made with: learner.rho is 0.7, "
    with pytest.raises(CheckpointError, match=said + "was 0.5"):
        Agent.load(run)
    with pytest.raises(CheckpointError, match=said):
        Trainer(small_config, point_env, point_demonstrations, run=run, resume=True)
    path.write_text(
        path.read_text()
        .replace("rho: 0.7", "rho: 0.5")
        .replace("checkpoint_every: 40", "checkpoint_every: 41")
    )
    messages = []
    Trainer(
        small_config.replace({"train.checkpoint_every": 41, "demos.path": "elsewhere.h5"}),
        point_env,
        point_demonstrations,
        run=run,
        resume=True,
        on_message=messages.append,
    )
    assert messages[0].endswith("train.checkpoint_every is 41, was 40")


def test_another_way_of_computing_is_said_and_another_agent_refused(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    train(small_config, point_env, point_demonstrations, run)

    def resumed(changes):
        messages = []
        Trainer(
            small_config.replace(changes),
            point_env,
            point_demonstrations,
            run=run,
            resume=True,
            on_message=messages.append,
        )
        return messages

    assert resumed({"threads": 1}) == ["continuing from step_000000100.safetensors"]
    fused = "the run was made with learner.mode=eager and goes on with fused: not bit for bit"
    assert fused in resumed({"learner.mode": "fused"})
    assert fused in resumed({"learner.mode": "auto"})  # what it comes to here
    assert resumed({"learner.mode": "fused", "learner.precision": "bf16"})[:2] == [
        fused,
        "the run was made with learner.precision=float32 and goes on with bf16: not bit for bit",
    ]
    for changes in ({"agent.average": "always"}, {"agent.average_rate": 0.5}):
        with pytest.raises(ConfigError, match="cannot change when it is resumed: agent.average"):
            resumed(changes)


@pytest.mark.parametrize("mode", ["auto", "fused"])
def test_what_auto_comes_to_stands_in_the_checkpoint(
    tmp_path, small_config, point_env, point_demonstrations, mode
):
    config = small_config.replace({"learner.mode": mode, "train.steps": 60})
    train(config, point_env, point_demonstrations, tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run")[2]["mode"] == "fused"
    messages = []
    Trainer(
        config.replace({"learner.mode": "auto"}),
        point_env,
        point_demonstrations,
        run=tmp_path / "run",
        resume=True,
        on_message=messages.append,
    )
    assert messages == ["continuing from step_000000060.safetensors"]


def test_a_run_of_another_device_goes_on_and_acts_here(
    tmp_path, small_config, point_env, point_demonstrations, monkeypatch
):
    run = tmp_path / "run"
    train(small_config.replace({"train.steps": 40}), point_env, point_demonstrations, run)
    path, tensors, meta = checkpoint.newest(run)
    meta["device"], meta["settings"]["device"] = "cuda", "cuda"
    meta["settings"]["planner"]["precision"] = "tf32"
    for name in ("learner.generator", "trainer.generator"):
        tensors[name] = torch.zeros(16, dtype=torch.uint8)
    checkpoint.save(run, 40, tensors, meta)
    changed = small_config.replace({"device": "cuda", "planner.precision": "tf32"})
    checkpoint.save_config(run, changed, new=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.warns(RuntimeWarning, match="which is not here: acting on the CPU"),
        pytest.warns(RuntimeWarning, match="acting with planner.backend=auto in float32"),
    ):
        agent = Agent.load(run)
    assert evaluate(agent, point_env, episodes=1).returns.shape == (1,)
    with pytest.raises(ConfigError, match="device=cuda was asked for"):
        Agent.load(run, changes={"device": "cuda"})
    messages = []
    train(
        small_config, point_env, point_demonstrations, run, resume=True, on_message=messages.append
    )
    assert any("made on cuda and goes on on cpu: not bit for bit" in m for m in messages)


def test_episodes_that_are_all_too_short_are_an_error(
    tmp_path, small_config, point_env, point_demonstrations
):
    messages = []
    with pytest.raises(
        TaskError,
        match="point: all 20 episodes were shorter than "
        "learner.horizon=3, so nothing can be learnt",
    ):
        train(
            small_config,
            type(point_env)(2),
            point_demonstrations,
            tmp_path / "run",
            on_message=messages.append,
        )
    assert "an episode of 2 steps is shorter than learner.horizon=3" in messages[0]

    class Some(type(point_env)):
        def reset(self, **how):
            self.episode_length = 2 if self.episode_length == 20 else 20
            return super().reset(**how)

    messages.clear()
    train(
        small_config,
        Some(),
        point_demonstrations,
        tmp_path / "some",
        on_message=messages.append,
        eval_env=point_env,
    )
    assert sum("shorter than learner.horizon" in m for m in messages) == 2


def test_an_environment_that_never_ends_is_cut(
    tmp_path, small_config, point_env, point_demonstrations
):
    messages = []
    summary = train(
        small_config,
        type(point_env)(10**9),
        point_demonstrations,
        tmp_path / "run",
        on_message=messages.append,
    )
    assert summary["updates"] == 5 + 60
    assert sum("cut after task.episode_length=20" in m for m in messages) == 1


def test_a_negative_return_is_said_without_a_percentage(
    tmp_path, small_config, point_env, point_demonstrations
):
    costs = dataclasses.replace(
        point_demonstrations,
        episodes=tuple(
            dataclasses.replace(e, rewards=e.rewards - 100) for e in point_demonstrations.episodes
        ),
    )
    messages = []
    summary = train(small_config, point_env, costs, tmp_path / "run", on_message=messages.append)
    assert summary["ratio"] is None
    assert any(f"(the demonstrator's is {costs.return_mean:.1f})" in m for m in messages)


def test_torch_is_set_as_the_settings_say(tmp_path, small_config, point_env, point_demonstrations):
    assert torch.tensor([1e-40]).mul(1.0).item() != 0
    Trainer(small_config.replace({"threads": 1}), point_env, point_demonstrations, run=tmp_path)
    assert torch.get_num_threads() == 1 and torch.tensor([1e-40]).mul(1.0).item() == 0


def test_an_agent_of_several_environments_is_loaded(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(
        small_config.replace({"train.steps": 20}), point_env, point_demonstrations, tmp_path / "run"
    )
    agent = Agent.load(tmp_path / "run", num_envs=3)
    assert agent.act(np.zeros((3, 2), np.float32)).shape == (3, 2)
