"""What several tests share: a small configuration and a task that is learnt in seconds."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
import torch

from iqmpc import Config, Demonstrations
from iqmpc.envs.pixels import FrameStack
from iqmpc.episode import EpisodeBuffer
from tests.demonstration_sets import (  # noqa: F401 - fixtures
    assert_same,
    demos,
    make_episode,
    write_format,
    write_npz,
)

# The tensors here are tiny: a second thread would only be waited for.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)  # which the command line turns on for its process


@pytest.fixture
def small_config() -> Config:
    """Every part present, nothing larger than it must be."""
    return Config.from_dict(
        {
            "task": {"name": "point", "episode_length": 20},
            "model": {"encoder_dim": 32, "hidden_dim": 32, "latent_dim": 16, "critics": 3},
            "planner": {"samples": 24, "elites": 6, "policy_trajectories": 4, "iterations": 2},
            "learner": {"batch": 8, "mode": "eager"},
            "train": {
                "steps": 100,
                "random_steps": 40,
                "initial_updates": 5,
                "eval_every": 40,
                "eval_episodes": 1,
                "final_episodes": 2,
                "checkpoint_every": 40,
            },
        }
    )


class PointEnv(gymnasium.Env):
    """A point on a plane: observe it, push it; the reward is its closeness to the origin."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, episode_length: int = 20):
        self.episode_length = episode_length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        angle = self.np_random.uniform(0, 2 * np.pi)
        self.position = np.array([np.cos(angle), np.sin(angle)], np.float32)
        self.steps = 0
        return self.position.copy(), {}

    def step(self, action):
        self.position = np.clip(self.position + 0.2 * np.asarray(action, np.float32), -2, 2)
        self.steps += 1
        distance = float(np.linalg.norm(self.position))
        return (
            self.position.copy(),
            max(0.0, 1 - distance),
            False,
            self.steps >= self.episode_length,
            {"success": distance < 0.2},
        )


@pytest.fixture
def point_env() -> PointEnv:
    return PointEnv()


def draw_point(position) -> np.ndarray:
    """The plane from above, uint8 [1, 64, 64]: a bright square on a grey slope."""
    frame = np.broadcast_to(np.arange(64, dtype=np.uint8), (1, 64, 64)).copy()
    x, y = (32 + 14 * np.clip(position, -2, 2)).astype(int)
    frame[:, y - 3 : y + 4, x - 3 : x + 4] = 255
    return frame


@pytest.fixture
def make_image_point() -> Callable[[], FrameStack]:
    """Makes a `PointEnv` seen from above: uint8 [3, 64, 64]."""
    return lambda: FrameStack(PointEnv(), draw_point, channels=1)


@pytest.fixture
def image_point_env(make_image_point) -> FrameStack:
    return make_image_point()


def straight_line(env: gymnasium.Env, seeds: range) -> Demonstrations:
    """Episodes of the controller that walks straight to the origin."""
    episodes = []
    for seed in seeds:
        obs, _ = env.reset(seed=seed)
        episode, done = EpisodeBuffer([obs]), False
        while not done:
            action = np.clip(-env.unwrapped.position / 0.2, -1, 1).astype(np.float32)
            obs, reward, _, done, info = env.step(action)
            episode.add(action, reward, obs)
        episodes.append(episode.finish(success=bool(info["success"])))
    return Demonstrations("point", tuple(episodes), {"demonstrator": "straight line"})


@pytest.fixture
def point_demonstrations() -> Demonstrations:
    return straight_line(PointEnv(), range(10))


@pytest.fixture
def image_demonstrations(image_point_env) -> Demonstrations:
    return straight_line(image_point_env, range(2))


@pytest.fixture
def three(small_config):
    return small_config.replace({"train.num_envs": 3})
