"""Learning beside an environment that does not wait."""

import threading
import time

import numpy as np
import pytest

from iqmpc import Agent, Trainer
from iqmpc.errors import ConfigError
from iqmpc.run_folder import RunFolder
from tests.runs import Marked, train


@pytest.fixture
def fast(small_config):
    """The small configuration, planned and learnt by the C++ library, at 1,000 ticks a second."""
    return small_config.replace(
        {
            "learner.mode": "fused",
            "planner.backend": "cpu",
            "train.control_hz": 1000.0,
            "train.checkpoint_every": 1000,
        }
    )


def make(config, env, demonstrations, run, **options):
    return Trainer(config, env, demonstrations, run=run, **options)


class Paced:
    """Steps that take a millisecond at least, so that a learner gets its turn."""

    def __init__(self, env):
        self._step, env.step = env.step, self.step

    def step(self, action):
        time.sleep(0.001)
        return self._step(action)


def test_every_step_reaches_the_replay_once(tmp_path, fast, point_env, point_demonstrations):
    """Parts of 25 steps, episodes of 70: as many slices as of whole episodes, the same steps."""
    env = Marked(1, 70, terminates=True)
    config = fast.replace(
        {"train.steps": 200, "train.random_steps": 200, "task.episode_length": 100}
    )
    trainer = make(config, env, point_demonstrations, tmp_path / "run")
    trainer.train()
    replay = trainer.behaviour
    assert replay.slices == 2 * (70 - 2) + (60 - 2)
    starts = replay._rows["obs"][replay._starts]  # (episode, step) of each slice's first
    assert len(starts.unique(dim=0)) == replay.slices
    ends = replay._rows["terminated"].nonzero().flatten()
    assert replay._rows["obs"][ends, 1].tolist() == [69, 69]


def test_acting_does_not_wait_for_an_update(tmp_path, fast, point_env, point_demonstrations):
    """Thirty ticks within an episode beside one update, which then ends the run."""
    config = fast.replace({"train.steps": 100_000, "task.episode_length": 100_000})
    env = Marked(1, 45 * 100)  # parts of its only episode are learnt from
    trainer = make(config, env, point_demonstrations, tmp_path / "run")
    learn, act, enough, acted = trainer.learner.learn, trainer.agent.act, threading.Event(), []

    def hanging(*replays):
        if trainer.learner.updates == 20:
            enough.wait(60)
            raise RuntimeError("the thirty were made" if enough.is_set() else "they were not")
        return learn(*replays)

    def acting(obs, **options):
        acted.append(trainer.learner.updates)
        if acted.count(20) == 30:
            enough.set()
        return act(obs, **options)

    trainer.learner.learn, trainer.agent.act = hanging, acting
    Paced(env)
    with pytest.raises(RuntimeError, match="the thirty were made"):
        trainer.train()


def test_what_is_reported(tmp_path, fast, point_env, point_demonstrations):
    Paced(point_env)
    summary = train(fast, point_env, point_demonstrations, tmp_path / "run")
    assert summary["env_steps"] == 100 and 0 < summary["updates"] <= 65
    assert summary["ticks"] == 100 - 5  # what follows a reset is none
    assert summary["tick_p50_ms"] <= summary["tick_p99_ms"] <= summary["tick_max_ms"]
    assert 0 <= summary["late_ticks"] <= 95 and summary["weights_age_max_ms"] > 0
    assert summary["weights_age_max_updates"] >= 0
    # nothing was evaluated on the robot
    assert summary["episodes"] == 0 and summary["return_mean"] is None
    assert Agent.load(tmp_path / "run").facts["env_steps"] == 100


def test_an_environment_of_its_own_is_evaluated_in(tmp_path, fast, point_env, point_demonstrations):
    env = type(point_env)()
    Paced(env)
    run = tmp_path / "run"
    summary = train(fast, env, point_demonstrations, run, eval_env=point_env)
    assert summary["episodes"] == 2 and summary["return_mean"] > 0
    assert Agent.load(run, checkpoint="best").facts["env_steps"] in (40, 80, 100)


def test_a_run_goes_on(tmp_path, fast, point_env, point_demonstrations):
    run = tmp_path / "run"
    first = train(fast, point_env, point_demonstrations, run)
    config = fast.replace({"train.steps": 160})
    trainer = make(config, point_env, point_demonstrations, run, resume=True)
    assert trainer.env_steps == 100 and trainer.learner.updates == first["updates"]
    assert len(trainer.behaviour) == 100
    assert trainer.train()["env_steps"] == 160
    assert RunFolder(run).newest()[2]["env_steps"] == 160


def test_nothing_is_learnt_while_a_checkpoint_is_written(
    tmp_path, fast, point_env, point_demonstrations
):
    """A replay of two episodes, which the next one overwrites: a checkpoint holds no half of it."""
    Paced(point_env)
    config = fast.replace({"train.capacity": 45, "train.checkpoint_every": 20})
    trainer = make(config, point_env, point_demonstrations, tmp_path / "run")
    save, moved = trainer._state.save, []

    def slow(snapshot):
        before = trainer.learner.updates, trainer.behaviour.overwritten
        assert snapshot.overwritten == before[1]
        trainer.updates._parts.append(point_demonstrations.episodes[0])
        trainer.updates._wake.set()
        time.sleep(0.05)
        moved.append(before != (trainer.learner.updates, trainer.behaviour.overwritten))
        return save(snapshot)

    trainer._state.save = slow
    trainer.train()
    assert len(moved) == 5 and not any(moved)


def test_an_error_of_the_learner_ends_the_run(tmp_path, fast, point_env, point_demonstrations):
    Paced(point_env)
    trainer = make(
        fast.replace({"train.steps": 100_000}), point_env, point_demonstrations, tmp_path / "run"
    )

    def fail(*_):
        raise RuntimeError("no more")

    trainer.learner.learn = fail
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    assert 40 <= trainer.env_steps < 1000


def test_an_action_of_its_own_until_there_is_an_agent(
    tmp_path, fast, point_env, point_demonstrations
):
    Paced(point_env)
    seen, acted = [], []
    still = np.zeros((1, 2), np.float32)
    trainer = make(
        fast,
        point_env,
        point_demonstrations,
        tmp_path / "run",
        idle_action=lambda obs: seen.append(obs.shape) or still,
    )
    act = trainer.agent.act
    trainer.agent.act = lambda obs, **k: acted.append(trainer.learner.updates) or act(obs, **k)
    trainer.train()
    assert len(seen) >= 40 and set(seen) == {(1, 2)} and len(seen) + len(acted) == 100
    assert not acted or min(acted) >= 5  # the initial updates
    assert (trainer.behaviour._rows["action"][:40] == 0).all()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train.overlap": "async"}, "train.overlap must be left alone with train.control_hz"),
        ({"train.updates_at": "episode_end"}, "train.updates_at must be left alone"),
        ({"train.env_workers": True}, "train.env_workers must be left alone"),
        ({"train.control_hz": 0.0}, "train.control_hz must be positive"),
        ({"planner.backend": "reference"}, "which planner.backend=cpu does; these settings come"),
    ],
)
def test_what_cannot_be(tmp_path, fast, point_env, point_demonstrations, changes, said):
    with pytest.raises(ConfigError, match=said):
        make(fast.replace(changes), point_env, point_demonstrations, tmp_path / "run")


def test_updates_at_the_end_of_an_episode(tmp_path, small_config, point_env, point_demonstrations):
    """The same number of updates as otherwise, all between episodes."""
    config = small_config.replace({"train.updates_at": "episode_end"})
    trainer = make(config, point_env, point_demonstrations, tmp_path / "run")
    update, at = trainer.learner.update, []
    trainer.learner.update = lambda batch: at.append(trainer.env_steps) or update(batch)
    assert trainer.train()["updates"] == 65
    assert {step: at.count(step) for step in at} == {40: 5, 60: 20, 80: 20, 100: 20}
