"""Controllers by hand for ManiSkill2's cubes."""

from __future__ import annotations

import gymnasium
import numpy as np

# Where things lie in the state observations: joints 9 + 9, the robot's base 7, the gripper 7.
_GRIPPER, _ROTATION = slice(25, 28), slice(28, 32)
_REACH = 0.1  # metres that an action of 1 asks for


class CubeController:
    """Go above the cube, down to it, grasp it, carry it to the goal and rest there.

    On the way Gaussian noise of standard deviation `noise` is added to the actions. Call `reset`
    when an episode starts. Everything is read from the observation.
    """

    _CLOSING = 3  # steps that the fingers take

    def __init__(
        self, task: str, *, noise: float = 0.05, generator: np.random.Generator | None = None
    ):
        self.task, self.noise = task, noise
        self.generator = generator or np.random.default_rng()
        self.reset()

    def reset(self, env: gymnasium.Env | None = None) -> None:
        self._closed = 0
        self._start: np.ndarray | None = None

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """obs [42] of lift-cube or [51] of pick-cube -> action float32 [4]."""
        gripper = obs[_GRIPPER]
        if self.task == "lift-cube":
            cube = obs[32:35]
            if self._start is None:
                self._start = cube.copy()
            goal = self._start + [0, 0, 0.22]
        else:
            cube, goal = obs[38:41], obs[32:35]
        to_cube = cube - gripper
        level = np.linalg.norm(to_cube[:2])
        if self._closed and np.linalg.norm(to_cube) > 0.04:
            self._closed = 0  # it slipped: again
        if not self._closed and np.linalg.norm(to_cube) < 0.012:
            self._closed = 1
        if self._closed:
            move = np.zeros(3) if self._closed <= self._CLOSING else goal - cube
            self._closed += 1
        elif level > 0.015:
            move = to_cube + [0, 0, 0.06]  # above it first
        else:
            move = to_cube
        action = np.empty(4)
        action[:3] = _rotate_back(obs[_ROTATION], move) / _REACH
        action[3] = -1.0 if self._closed else 1.0
        arrived = self._closed > self._CLOSING and np.linalg.norm(move) < 0.02
        if not arrived:  # success asks for an arm at rest
            action += self.noise * self.generator.standard_normal(4)
        return np.clip(action, -1, 1).astype(np.float32)


def _rotate_back(quaternion: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """A vector of the world in the frame that `quaternion` [w, x, y, z] turns the world's into."""
    w, axis = quaternion[0], -quaternion[1:].astype(np.float64)
    return vector + 2 * np.cross(axis, np.cross(axis, vector) + w * vector)
