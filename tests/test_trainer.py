"""Whole runs on a task that is learnt in seconds, and the exact continuation of one."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
import torch

from iqmpc import Agent, Config, Trainer, checkpoint, evaluate
from iqmpc.errors import CheckpointError, ConfigError, TaskError
from iqmpc.evaluation import reward_correlation
from iqmpc.seeding import stream_seed


def train(config, env, demonstrations, run, **options):
    return Trainer(config, env, demonstrations, run=run, **options).train()


def test_a_run_folder_is_complete(tmp_path, small_config, point_env, point_demonstrations):
    messages, progress = [], []
    summary = train(small_config, point_env, point_demonstrations, tmp_path / "run",
                    on_message=messages.append, on_progress=progress.append)
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "metrics.csv", "tensorboard", "checkpoints", "summary.json"}
    assert json.loads((run / "summary.json").read_text()) == summary
    assert list(summary) == [
        "task", "seed", "env_steps", "updates", "wall_s", "return_mean", "return_std",
        "success_rate", "demonstrator_return", "ratio", "backend", "nonfinite_plans"]
    assert summary["env_steps"] == 100 and summary["updates"] == 5 + 60
    assert summary["demonstrator_return"] == point_demonstrations.return_mean
    assert summary["ratio"] == summary["return_mean"] / summary["demonstrator_return"]
    assert 0 <= summary["success_rate"] <= 1 and summary["nonfinite_plans"] == 0
    rows = list(csv.DictReader(open(run / "metrics.csv", newline="")))
    assert [int(r["env_steps"]) for r in rows if r["return"]] == [20, 40, 60, 80, 100]
    assert [int(r["env_steps"]) for r in rows if r["eval_return_mean"]] == [40, 80, 100]
    assert all(r["consistency"] for r in rows if r["return"] and int(r["env_steps"]) > 40)
    assert list((run / "tensorboard").glob("events.*"))
    assert any("demonstrator" in m for m in messages) and progress[-1]["env_steps"] == 100


def test_a_short_run_improves_its_return(tmp_path, small_config, point_env, point_demonstrations):
    """From demonstrations alone: a point learns to walk to the origin; the reward is never seen."""
    config = small_config.replace({
        "train.steps": 1000, "train.random_steps": 100, "train.initial_updates": 100,
        "train.final_episodes": 10, "train.eval_every": 1000, "learner.batch": 32,
        "learner.lr": 1e-3, "planner.samples": 64, "planner.elites": 8})

    class Blind(gymnasium.Wrapper):
        """Rewards that would mislead whoever reads them."""

        def step(self, action):
            obs, reward, *rest = self.env.step(action)
            return obs, -1e6, *rest

    train(config, Blind(point_env), point_demonstrations, tmp_path / "run")
    agent = Agent.load(tmp_path / "run")
    learnt = evaluate(agent, point_env, episodes=10)
    untrained = evaluate(Agent(type(agent.model)(2, 2, config.model), config), point_env,
                         episodes=10)
    expert = point_demonstrations.return_mean
    assert untrained.return_mean < 0.4 * expert
    assert learnt.return_mean > 0.7 * expert and learnt.success_rate >= 0.8


def test_td_learns_from_the_reward_without_demonstrations(tmp_path, small_config, point_env,
                                                          point_demonstrations):
    config = small_config.replace({
        "learner.objective": "td", "train.steps": 600, "train.random_steps": 200,
        "train.initial_updates": 200, "train.final_episodes": 10, "train.eval_every": 1000,
        "learner.batch": 32, "learner.lr": 1e-3, "planner.samples": 64, "planner.elites": 8})
    summary = train(config, point_env, None, tmp_path / "run")
    assert summary["return_mean"] > 0.7 * point_demonstrations.return_mean
    assert summary["demonstrator_return"] is None and summary["ratio"] is None


def test_decoded_reward_ranks_the_expert_above_its_opposite(
        tmp_path, small_config, point_env, point_demonstrations):
    config = small_config.replace({
        "train.steps": 600, "train.random_steps": 100, "train.initial_updates": 100,
        "train.eval_every": 1000, "learner.batch": 32, "learner.lr": 1e-3})
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
    decoded = np.concatenate([agent.decode_reward(
        e.observations[:-1], e.actions, e.observations[1:]) for e in episodes])
    assert reward_correlation(agent, episodes) == pytest.approx(
        pearson(decoded, np.concatenate([e.rewards for e in episodes])), rel=1e-4)
    single = agent.decode_reward(obs[0], toward[0], (obs + 0.2 * toward)[0])
    assert single == pytest.approx(good[0], rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match=r"action must be \[64, 2\], got \[1, 2\]"):
        agent.decode_reward(obs, toward[:1], obs)


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
    del meta["wall_s"]
    return tensors, meta


def assert_same_state(one, two):
    (a, meta_a), (b, meta_b) = tensors_of(one), tensors_of(two)
    assert meta_a == meta_b and a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


@pytest.mark.parametrize("mode", [
    "eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_resume_is_exact(tmp_path, small_config, point_env, point_demonstrations, mode):
    """40 + 60 steps are 100 steps, evaluations in between or not."""
    config = small_config.replace({"planner.mode": mode, "learner.mode": mode})
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
        return subprocess.Popen([
            sys.executable, "-c", _WORKER, shared, str(tmp_path / run), mode, str(slow),
            str(tmp_path / "config.yaml"), str(tmp_path / "demos.h5")])

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
    rows = {run: [{k: v for k, v in r.items() if k != "wall_s"} for r in
                  csv.DictReader(open(tmp_path / run / "metrics.csv", newline=""))]
            for run in ("straight", "cut")}
    assert rows["straight"] == rows["cut"]


def test_a_damaged_newest_checkpoint_falls_back(tmp_path, small_config, point_env,
                                                point_demonstrations):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.warns(RuntimeWarning, match=newest.name):
        trainer = Trainer(small_config, point_env, point_demonstrations, run=tmp_path / "run",
                          resume=True)
    assert trainer.env_steps == 80
    newest.with_name(newest.name + ".damaged").rename(newest)  # set aside by the resumed run
    with pytest.warns(RuntimeWarning, match=newest.name):
        Agent.load(tmp_path / "run")


def test_what_does_not_fit_is_refused_before_anything_is_written(
        tmp_path, small_config, point_env, point_demonstrations):
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
        Trainer(small_config.replace({"task.name": "line"}), point_env, point_demonstrations,
                run=run)
    with pytest.raises(ConfigError, match="have 2 observations and 2 actions, the environment "
                                          "has 3 and 1"):
        Trainer(small_config, other, point_demonstrations, run=run)
    long = small_config.replace({"learner.horizon": 30, "task.episode_length": 40})
    with pytest.raises(ConfigError, match="no demonstration is as long as learner.horizon=30"):
        Trainer(long, point_env, point_demonstrations, run=run)
    with pytest.raises(CheckpointError, match="is no run folder"):
        Trainer(small_config, point_env, point_demonstrations, run=run, resume=True)
    assert not run.exists()


def test_a_run_is_not_overwritten(tmp_path, small_config, point_env, point_demonstrations):
    config = small_config.replace({"train.steps": 20})
    train(config, point_env, point_demonstrations, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run: continue it with resume="):
        Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    # two that start at once: only one gets the folder
    one, two = (Trainer(config, point_env, point_demonstrations, run=tmp_path / "both")
                for _ in range(2))
    one.train()
    with pytest.raises(ConfigError, match="already holds a run"):
        two.train()


def test_another_models_checkpoint_is_refused(tmp_path, small_config, point_env,
                                              point_demonstrations):
    train(small_config.replace({"train.steps": 20}), point_env, point_demonstrations,
          tmp_path / "run")
    wider = small_config.replace({"model.hidden_dim": 40})
    with pytest.raises(CheckpointError, match="does not fit this run's settings"):
        Trainer(wider, point_env, point_demonstrations, run=tmp_path / "run", resume=True)


def test_evaluation_is_repeatable_and_episode_seeds_differ(tmp_path, small_config, point_env,
                                                           point_demonstrations):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    one, two = (evaluate(Agent.load(tmp_path / "run"), point_env, episodes=3).returns
                for _ in range(2))
    np.testing.assert_array_equal(one, two)
    seeds = {stream_seed(s, stream, i) for s in range(3) for stream in ("train", "eval")
             for i in range(50)}
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


def test_the_initial_updates_see_all_random_steps(tmp_path, small_config, point_env,
                                                  point_demonstrations):
    trainer = Trainer(small_config, point_env, point_demonstrations, run=tmp_path / "run")
    held = []
    update = trainer.learner.update
    trainer.learner.update = lambda batch: held.append(len(trainer.behaviour)) or update(batch)
    trainer.train()
    assert held[:6] == [40] * 6 and trainer.learner.updates == 5 + 60


def test_short_random_phases_lose_no_updates(tmp_path, small_config, point_env,
                                             point_demonstrations):
    """Until an episode has ended there is nothing to learn from: act at random, then catch up."""
    config = small_config.replace({"train.random_steps": 5})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    assert planned_steps(trainer) == list(range(20, 100)) and trainer.learner.updates == 5 + 95


def test_updates_on_the_demonstrations_alone(tmp_path, small_config, point_env,
                                             point_demonstrations):
    config = small_config.replace({"train.demo_updates": 7, "train.steps": 60})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    at = []
    update = trainer.learner.update
    trainer.learner.update = lambda batch: at.append(trainer.env_steps) or update(batch)
    trainer.train()
    assert at[:7] == [0] * 7 and trainer.learner.updates == 7 + 5 + 20
    with pytest.raises(ConfigError, match="demo_updates needs demonstrations"):
        config.replace({"learner.objective": "td"})


def test_an_environment_may_reuse_its_observation(tmp_path, small_config, point_env,
                                                  point_demonstrations):
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
        tmp_path, small_config, point_env, point_demonstrations):
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.save_config(run, small_config, new=True)
    train(small_config, point_env, point_demonstrations, run, resume=True)
    train(small_config, point_env, point_demonstrations, tmp_path / "straight")
    assert_same_state(run, tmp_path / "straight")


def test_resume_refuses_what_is_no_continuation(tmp_path, small_config, point_env,
                                                point_demonstrations):
    run = tmp_path / "run"
    train(small_config, point_env, point_demonstrations, run)
    with pytest.raises(CheckpointError, match="was trained on other demonstrations"):
        Trainer(small_config, point_env, point_demonstrations.select(5), run=run, resume=True)
    with pytest.raises(ConfigError, match="train.steps must be at least the 100"):
        Trainer(small_config.replace({"train.steps": 60}), point_env, point_demonstrations,
                run=run, resume=True)


def test_a_finished_run_resumed_says_the_same_again(tmp_path, small_config, point_env,
                                                    point_demonstrations):
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
