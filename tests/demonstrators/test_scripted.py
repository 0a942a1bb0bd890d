"""Controllers by hand."""

import numpy as np
import pytest

from iqmpc import make_env
from iqmpc.demonstrators import scripted


@pytest.mark.parametrize("task", ["lift-cube", "pick-cube"])
def test_the_controllers_solve_their_tasks(task, solves):
    pytest.importorskip("mani_skill2")
    policy, env = scripted.CubeController(task, generator=np.random.default_rng(0)), make_env(task)
    for seed in range(2):
        policy.reset()
        assert solves(env, policy, seed)


def test_a_vector_in_a_turned_frame():
    half = np.sqrt(0.5)
    turned = np.array([half, 0, 0, half])  # a quarter about z
    np.testing.assert_allclose(
        scripted._rotate_back(turned, np.array([1.0, 0, 3])), [0, -1, 3], atol=1e-12
    )
    down = np.array([0.0, 1, 0, 0])  # half a turn about x: the gripper's
    np.testing.assert_allclose(
        scripted._rotate_back(down, np.array([1.0, 2, 3])), [1, -2, -3], atol=1e-12
    )
