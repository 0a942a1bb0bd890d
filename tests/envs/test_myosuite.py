import os
import subprocess
import sys

import numpy as np
import pytest

from iqmpc import make_env
from iqmpc.envs import TASKS, check_spaces
from iqmpc.errors import TaskError
from iqmpc.observation import ObservationSpec

pytest.importorskip("myosuite", reason="needs the extra 'myosuite'")

DIMENSIONS = {"myo-key-turn": (93, 39), "myo-obj-hold": (91, 39), "myo-pen-twirl": (83, 39)}


@pytest.mark.parametrize("task", DIMENSIONS)
def test_dimensions_dtype_horizon_and_determinism(task, episode):
    env = make_env(task)
    obs_dim, action_dim = DIMENSIONS[task]
    assert check_spaces(env, task) == (ObservationSpec((obs_dim,)), action_dim)
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 39)).astype(np.float32)
    first, rewards, terminated, truncated, info = episode(env, 7, actions)
    assert first.dtype == np.float32 and env.observation_space.contains(first[-1])
    assert (terminated, truncated) == (False, True) and info["success"] is False
    assert not episode(env, 8, actions[:99])[3]  # the horizon is 100 steps, none fewer
    again, rewards_again, *_ = episode(env, 7, actions)
    np.testing.assert_array_equal(first, again)
    assert rewards == rewards_again


def test_success_is_solved_at_that_step_and_ends_nothing():
    env = make_env("myo-key-turn")
    env.reset(seed=0)
    data = env.unwrapped.sim.data
    data.qpos[-1] = np.pi  # the key, turned by half a round
    _, _, terminated, truncated, info = env.step(np.zeros(39, np.float32))
    assert info["solved"] and info["success"] is True and not (terminated or truncated)
    data.qpos[-1] = 0.0
    assert env.step(np.zeros(39, np.float32))[4]["success"] is False


def test_dropping_the_object_ends_nothing_either():
    """MyoSuite would end the episode there; the paper's have their full length."""
    env = make_env("myo-obj-hold")
    env.reset(seed=0)
    env.unwrapped.sim.data.qpos[-7:-4] += 1.0  # the object, a metre away
    result = env.step(np.zeros(39, np.float32))
    assert result[4]["done"] and result[2:4] == (False, False)


def test_muscles_take_the_actions_as_they_are():
    env = make_env("myo-key-turn")
    env.reset(seed=0)
    env.step(np.full(39, 0.5, np.float32))
    np.testing.assert_allclose(env.unwrapped.last_ctrl, 1 / (1 + np.exp(-5 * (0.5 - 0.5))))


def test_tasks_repeat_actions_and_ask_for_the_penalty_as_in_the_paper():
    for name in DIMENSIONS:
        assert TASKS[name].action_repeat == 1 and TASKS[name].gradient_penalty


def test_it_is_not_rendered():
    with pytest.raises(TaskError, match="myo-key-turn is not rendered here, got render_mode='rgb"):
        make_env("myo-key-turn", render_mode="rgb_array")


def test_nothing_is_printed_when_it_is_made():
    code = "from iqmpc import make_env; make_env('myo-key-turn').reset(seed=0)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "MUJOCO_GL": "disabled"},
        check=True,
    )
    assert done.stdout == "" and "Overriding" not in done.stderr
