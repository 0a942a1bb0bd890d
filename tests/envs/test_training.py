"""Runs in several environments, in this process and in workers."""

import csv
import functools
import os
import signal

import gymnasium
import numpy as np
import pytest
import torch

from iqmpc import Agent, Trainer, evaluate
from iqmpc.envs.vector import VectorEnv
from iqmpc.envs.workers import WorkerVectorEnv
from iqmpc.errors import ConfigError, TaskError, WorkerError
from iqmpc.run_folder import RunFolder
from tests.runs import LEARNING, Marked, assert_same_state, marked, tensors_of, train


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
    config = three.replace(LEARNING)
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
    RunFolder(run).save_config(small_config, new=True)
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
