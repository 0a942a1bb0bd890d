"""Any gymnasium environment with Box observations and a Box action space."""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from iqmpc.config import TaskConfig
from iqmpc.envs.actions import scaled
from iqmpc.envs.pixels import FrameStack, resized
from iqmpc.errors import TaskError


class ControlEnv(gymnasium.Wrapper):
    """Observations float32 [O], actions float32 [A] in [-1, 1], control steps counted.

    Images, uint8 [H, W, 3] or [H, W, 1], are left as they are. Dictionaries of Boxes are flattened
    in the order of their keys. An action is scaled to the environment's range and repeated
    `action_repeat` times, rewards summed, unless the episode ends before. `terminated` is the
    environment's own; `truncated` too, or after `episode_length` control steps. With a `seed`, the
    first `reset()` uses it.

    What a suite calls `success` (some say `is_success`) is given as `info["success"]` too. With
    `terminates=False` an end that the environment announces is ignored: the episode has its full
    length, and `terminated` is always False.
    """

    def __init__(
        self, env: gymnasium.Env, task: TaskConfig, *, seed: int | None = None,
        success: str = "is_success", terminates: bool = True,
    ):
        _check_box(env.action_space, f"{task.name}: the action space")
        low, high = env.action_space.low, env.action_space.high
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise TaskError(
                f"{task.name}: the action space must be bounded, got {env.action_space}")
        if isinstance(env.observation_space, Dict):
            env = gymnasium.wrappers.FlattenObservation(env)
        images = _is_image(env.observation_space)
        if not images:
            _check_box(env.observation_space, f"{task.name}: the observation space")
        super().__init__(env)
        self.config = task
        self._low, self._high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        self._dtype = np.uint8 if images else np.float32
        self.observation_space = env.observation_space if images else Box(
            -np.inf, np.inf, env.observation_space.shape, np.float32)
        self.action_space = Box(-1.0, 1.0, env.action_space.shape, np.float32)
        self._success, self._terminates = success, terminates
        self._seed, self._steps = seed, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is None:
            seed, self._seed = self._seed, None
        self._steps = 0
        obs, info = self.env.reset(seed=seed, options=options)
        return np.asarray(obs, self._dtype), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        command = scaled(action, self._low, self._high).astype(self.env.action_space.dtype)
        total = 0.0
        for _ in range(self.config.action_repeat):
            obs, reward, terminated, truncated, info = self.env.step(command)
            total += float(reward)
            terminated = bool(terminated) and self._terminates
            if terminated or truncated:
                break
        self._steps += 1
        truncated = bool(truncated) or self._steps >= self.config.episode_length
        success = "success" if "success" in info else self._success
        if success in info:
            info = {**info, "success": bool(info[success])}
        return np.asarray(obs, self._dtype), total, terminated, truncated, info


def make(
    task: TaskConfig, *, seed: int | None = None, render_mode: str | None = None
) -> gymnasium.Env:
    """The environment that `task.env_id` names: a gymnasium id or a `module:function`.

    Where it observes images, they are resized to 64 × 64 and three are stacked. The function takes
    `render_mode` where it is asked for, and nothing else.
    Raises `TaskError` for an id or function that is not there, a package that does not import, and
    spaces other than Boxes.
    """
    if task.env_id is None:
        raise TaskError("suite 'gym' needs task.env_id: a gymnasium id or module:function")
    options = {} if render_mode is None else {"render_mode": render_mode}
    # "module:Name-v0" is gymnasium's own way of importing what registers an id
    if ":" in task.env_id and not re.search(r"-v\d+$", task.env_id):
        env = _entry_point(task.env_id)(**options)
        if not isinstance(env, gymnasium.Env):
            raise TaskError(f"{task.env_id} must return a gymnasium.Env, got {type(env).__name__}")
    else:
        env = _registered(task.env_id, options)
    env = ControlEnv(env, task, seed=seed)
    if _is_image(env.observation_space):
        return FrameStack(env, resized, env.observation_space.shape[2])
    if task.obs == "pixels":
        raise TaskError(f"{task.name}: obs=pixels needs an environment that observes images, uint8 "
                        f"[H, W, 3] or [H, W, 1], got {env.observation_space}")
    return env


def _registered(env_id: str, options: dict[str, Any]) -> gymnasium.Env:
    try:
        return gymnasium.make(env_id, **options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise TaskError(f"{env_id} needs a package that is not installed: {error}") from error
    except gymnasium.error.Error as error:
        near = difflib.get_close_matches(env_id, gymnasium.registry, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"gymnasium makes no {env_id!r}: {error}{hint}") from error
    except ModuleNotFoundError as error:
        raise TaskError(f"{env_id} cannot be imported: {error}") from error


def _entry_point(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise TaskError(f"{path} cannot be imported: {error}") from error
    except AttributeError:
        raise TaskError(f"{path}: the module has no {name!r}") from None


def _is_image(space: gymnasium.Space) -> bool:
    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3 \
        and space.shape[2] in (1, 3)


def _check_box(space: gymnasium.Space, what: str) -> None:
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise TaskError(f"{what} must be a flat Box (for observations also a Dict of Boxes, or "
                        f"uint8 images [H, W, 3] or [H, W, 1]), got "
                        f"{space}")
