"""Signals and errors that end a run: nothing is lost."""

import os
import signal

import gymnasium
import numpy as np
import pytest

from iqmpc import Trainer
from iqmpc.errors import Interrupted, TaskError
from iqmpc.run_folder import RunFolder
from tests.runs import assert_same_state, interrupted_at, rows_of, train


@pytest.mark.parametrize(
    ("number", "step", "saved", "overlap"),
    [
        (signal.SIGINT, 75, 60, "off"),
        (signal.SIGTERM, 79, 80, "off"),  # in the last step of an episode
        (signal.SIGHUP, 79, 80, "async"),
    ],
)
def test_a_signal_ends_a_run_after_the_step_and_loses_nothing(
    tmp_path, small_config, point_env, point_demonstrations, number, step, saved, overlap
):
    """In a run that would not have saved before step 100; the continuation is exact."""
    config = small_config.replace(
        {"train.checkpoint_every": 1000, "train.eval_every": 1000, "train.overlap": overlap}
    )
    messages = []
    trainer = interrupted_at(
        Trainer(
            config,
            point_env,
            point_demonstrations,
            run=tmp_path / "cut",
            on_message=messages.append,
        ),
        step,
        number,
    )
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        trainer.train()
    assert caught.value.signal == number and trainer.env_steps == step + 1
    assert signal.getsignal(number) == before
    assert RunFolder(tmp_path / "cut").newest()[2]["env_steps"] == saved
    name = signal.Signals(number).name
    assert messages[-2].startswith(f"{name}: ending after this step")
    assert messages[-1] == f"saved as of step {saved}, the end of the last whole episode"
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
    assert RunFolder(tmp_path / "run").newest()[2]["env_steps"] == 40
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
    path, tensors, meta = RunFolder(tmp_path / "run").newest()
    assert meta["env_steps"] == 80
    assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())
    train(config, point_env, point_demonstrations, tmp_path / "run", resume=True)
