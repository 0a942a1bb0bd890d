"""Whole runs on a task that is learnt in seconds."""

import csv
import dataclasses
import json

import gymnasium
import numpy as np
import pytest
import torch

from iqmpc import Agent, Config, Trainer, evaluate, threads
from iqmpc.demos import DemonstrationError
from iqmpc.errors import CheckpointError, ConfigError, TaskError
from iqmpc.kernels.weights import snapshot
from iqmpc.run_folder import RunFolder
from iqmpc.seeding import stream_seed
from tests.runs import LEARNING, Watched, assert_same_state, modes, planned_steps, train


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
        "interface.json",
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
        "checkpoint",
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
    config = small_config.replace(LEARNING)

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


def test_terminations_reach_the_replay(tmp_path, small_config, point_env, point_demonstrations):
    class Ends(gymnasium.Wrapper):
        def step(self, action):
            obs, reward, _, truncated, info = self.env.step(action)
            return obs, reward, self.unwrapped.steps >= 7, truncated, info

    trainer = Trainer(small_config, Ends(point_env), point_demonstrations, run=tmp_path / "run")
    trainer.train()
    assert trainer.behaviour._rows["terminated"].sum() == 14  # 100 steps, 7 each, the last cut


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
    with pytest.raises(DemonstrationError, match="no demonstrations ship for 'point'"):
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


def test_a_run_is_evaluated_in_episodes_of_its_own_seed(
    tmp_path, small_config, point_env, point_demonstrations
):
    class Watched(type(point_env)):
        def reset(self, *, seed=None, options=None):
            seeds.append(seed)
            return super().reset(seed=seed)

    seeds = []
    config = small_config.replace({"seed": 5, "train.final_episodes": 2, "train.eval_every": 1000})
    train(config, point_env, point_demonstrations, tmp_path / "run", eval_env=Watched())
    assert seeds == [stream_seed(5, "eval", index) for index in range(2)]


def test_random_actions_come_first(tmp_path, small_config, point_env, point_demonstrations):
    trainer = Trainer(small_config, point_env, point_demonstrations, run=tmp_path / "run")
    assert planned_steps(trainer) == list(range(40, 100))


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


def test_config_is_written(tmp_path, small_config, point_env, point_demonstrations):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    assert RunFolder(tmp_path / "run").load_config() == small_config
    assert isinstance(RunFolder(tmp_path / "run").load_config(), Config)


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


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"learner.mode": "fused"}, 1),
        ({"learner.mode": "auto"}, 1),
        ({"learner.mode": "eager"}, 3),
        ({"learner.mode": "fused", "planner.backend": "reference"}, 3),
    ],
)
def test_torch_has_one_thread_where_the_library_plans_and_learns(
    tmp_path, small_config, point_env, point_demonstrations, changes, left
):
    """As the backends were chosen, whatever they were asked for as."""
    config = small_config.replace({"threads": 3, "planner.backend": "auto", **changes})
    Trainer(config, point_env, point_demonstrations, run=tmp_path)
    found = threads.threads(), torch.get_num_threads()
    torch.set_num_threads(1)  # as the other tests want it
    assert found == (3, left)
