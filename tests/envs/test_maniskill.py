import importlib.util
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from iqmpc import make_env
from iqmpc.envs import TASKS, check_spaces, maniskill
from iqmpc.errors import TaskError
from iqmpc.observation import ObservationSpec

if importlib.util.find_spec("mani_skill2") is None:
    pytest.skip("needs the extra 'maniskill'", allow_module_level=True)

DIMENSIONS = {"lift-cube": (42, 4), "pick-cube": (51, 4)}
STILL = np.array([0, 0, 0, 1], np.float32)  # the gripper open, the arm where it is


@pytest.mark.parametrize("task", DIMENSIONS)
def test_dimensions_dtype_horizon_and_determinism(task, episode):
    env = make_env(task, episode_length=12)
    obs_dim, action_dim = DIMENSIONS[task]
    assert check_spaces(env, task) == (ObservationSpec((obs_dim,)), action_dim)
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 4)).astype(np.float32)
    actions[:, 2] = -1  # down, to touch cube and table: contacts must not outlive a reset
    first, rewards, terminated, truncated, info = episode(env, 7, actions)
    assert first.dtype == np.float32 and env.observation_space.contains(first[-1])
    assert (terminated, truncated) == (False, True) and info["success"] is False
    assert not np.array_equal(episode(env, 8, actions[:11])[0], first[:12])
    again, rewards_again, *_ = episode(env, 7, actions)
    np.testing.assert_array_equal(first, again)
    assert rewards == rewards_again and all(0 <= r <= 2 for r in rewards)


def test_horizon_and_action_repeat_are_the_papers():
    env = make_env("lift-cube")
    env.reset(seed=0)
    for step in range(100):
        *_, terminated, truncated, info = env.step(STILL)
        assert (terminated, truncated) == (False, step == 99)
    assert info["elapsed_steps"] == 200  # each action twice


def test_success_is_of_that_step_and_ends_nothing():
    import sapien.core as sapien

    env = make_env("lift-cube")
    env.reset(seed=0)
    assert env.step(STILL)[4]["success"] is False
    cube = env.unwrapped.obj
    cube.set_pose(sapien.Pose([0.2, 0.2, 0.6]))  # in free fall, above the goal for two steps
    _, reward, terminated, truncated, info = env.step(STILL)
    assert info["success"] is True and not (terminated or truncated)
    assert reward == 2.0  # 1 a simulator's step, normalised


def test_the_action_moves_the_gripper_in_its_own_frame():
    env = make_env("lift-cube")
    env.reset(seed=0)
    start = env.unwrapped.tcp.pose.p
    for _ in range(5):
        env.step(np.array([0, 0, -1, 1], np.float32))
    moved = env.unwrapped.tcp.pose.p - start
    assert moved[2] > 0.1 and abs(moved[2]) > 3 * max(abs(moved[:2]))  # it points down: z is up


def test_tasks_repeat_actions_and_ask_for_the_penalty_as_in_the_paper():
    for name in DIMENSIONS:
        assert TASKS[name].action_repeat == 2 and TASKS[name].gradient_penalty


def test_rendering_where_nothing_can(monkeypatch):
    monkeypatch.setattr(maniskill, "_vulkan_devices", lambda: 0)
    with pytest.raises(TaskError, match="lift-cube cannot be rendered on this machine"):
        make_env("lift-cube", render_mode="rgb_array")


def test_the_missing_renderer_is_said_once():
    code = textwrap.dedent("""
        import logging, sys
        from iqmpc import make_env
        from iqmpc.envs import maniskill
        maniskill._vulkan_devices = lambda: 0
        logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
        for _ in range(2):
            make_env("lift-cube").reset(seed=0)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "WARNING no Vulkan device was found: ManiSkill2 runs without a "
        "renderer, which states do not need\n"
    )
