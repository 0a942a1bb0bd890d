import os
import subprocess
import sys

import gymnasium.utils.env_checker
import numpy as np
import pytest

from iqmpc import make_env
from iqmpc.envs import check_spaces
from iqmpc.errors import TaskError
from iqmpc.observation import ObservationSpec

DIMENSIONS = {
    "hopper-hop": (15, 4),
    "cheetah-run": (17, 6),
    "walker-walk": (24, 6),
    "walker-run": (24, 6),
    "quadruped-run": (78, 12),
    "humanoid-walk": (67, 21),
    "dog-stand": (223, 38),
    "dog-walk": (223, 38),
    "dog-trot": (223, 38),
    "dog-run": (223, 38),
}


@pytest.mark.parametrize("task", sorted(DIMENSIONS))
def test_dimensions_dtype_and_determinism(task):
    env = make_env(task, episode_length=4)
    obs_dim, action_dim = DIMENSIONS[task]
    assert check_spaces(env, task) == (ObservationSpec((obs_dim,)), action_dim)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, DIMENSIONS[task][1]))
    runs = []
    for seed in (7, 8, 7):
        obs, _ = env.reset(seed=seed)
        rows, rewards, flags = [obs], [], []
        for action in actions:
            obs, reward, terminated, truncated, info = env.step(action)
            rows.append(obs)
            rewards.append(reward)
            flags.append((terminated, truncated))
            assert "success" not in info
        assert flags == [(False, False)] * 3 + [(False, True)]
        assert obs.dtype == np.float32 and env.observation_space.contains(obs)
        runs.append((np.array(rows), rewards))
    np.testing.assert_array_equal(runs[0][0], runs[2][0])
    assert runs[0][1] == runs[2][1]
    assert not np.array_equal(runs[0][0], runs[1][0])


def test_horizon_and_action_repeat_are_the_papers():
    env = make_env("walker-walk")
    env.reset(seed=0)
    steps = 0
    truncated = False
    while not truncated:
        _, reward, _, truncated, _ = env.step(np.zeros(6))
        steps += 1
        assert 0 <= reward <= 2  # two simulator steps of at most 1
    assert steps == 500
    assert env._env.physics.data.time == pytest.approx(25.0)  # the suite's own 1000 steps


def test_it_is_a_gymnasium_env():
    env = make_env("cheetah-run", seed=3)
    gymnasium.utils.env_checker.check_env(env, skip_render_check=True)


def test_a_seed_given_at_the_start_is_the_first_resets():
    first, _ = make_env("walker-walk", seed=5).reset()
    second, _ = make_env("walker-walk").reset(seed=5)
    third, _ = make_env("walker-walk", seed=6).reset()
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, third)


def test_recorded_rewards_come_back():
    """The packaged demonstrations replay to their own rewards: same task, same action repeat.

    The recording's first observation sets positions and velocities only for tasks whose
    observation is their state: cheetah-run's holds all but the forward position.
    """
    from iqmpc import Demonstrations

    episode = Demonstrations.packaged("cheetah-run").episodes[0]
    env = make_env("cheetah-run")
    env.reset(seed=0)
    physics = env._env.physics
    for t in (0, 50, 300):
        physics.data.qpos[1:] = episode.observations[t, :8]
        physics.data.qvel[:] = episode.observations[t, 8:]
        physics.forward()
        physics.data.qacc_warmstart[:] = physics.data.qacc
        obs, reward, *_ = env.step(episode.actions[t])
        np.testing.assert_allclose(obs, episode.observations[t + 1], rtol=0.05, atol=0.05)
        assert reward == pytest.approx(episode.rewards[t], abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_env("walker-wlak"), "unknown task 'walker-wlak'; did you mean 'walker-walk'"),
        (lambda: make_env("walker-walk", render_mode="human"), "render_mode must be None or"),
    ],
)
def test_what_does_not_exist_is_named(call, message):
    with pytest.raises(TaskError, match=message):
        call()


def test_a_process_without_gl_says_so_when_asked_to_render():
    code = (
        "import iqmpc\niqmpc.make_env('cheetah-run')\n"
        "iqmpc.make_env('cheetah-run', render_mode='rgb_array')"
    )
    env = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "TaskError: this process loaded dm_control without GL" in done.stderr


def test_wrong_actions_are_named():
    env = make_env("walker-walk")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must have shape \(6,\), got \(5,\)"):
        env.step(np.zeros(5))


@pytest.mark.parametrize("gl", ["disabled", "egl", "osmesa", None])
def test_triton_and_gl_live_in_one_process(gl):
    """Triton loaded after Mesa's GL ends the process: the order must hold whatever is imported."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    if gl is not None:
        env["MUJOCO_GL"] = gl
    code = (
        "import iqmpc\n"
        "try:\n"
        "    env = iqmpc.make_env('cheetah-run', render_mode='rgb_array')\n"
        "    env.reset(seed=0); print('frame', env.render().shape)\n"
        "except Exception as error:\n"
        "    print('no GL:', type(error).__name__)\n"
        "import triton, triton.compiler\n"
        "print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.endswith("alive\n"), done.stderr[-500:]
