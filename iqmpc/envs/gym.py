"""Any gymnasium environment with Box observations and a Box action space."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from iqmpc.config import TaskConfig
from iqmpc.envs import interface
from iqmpc.envs.actions import scaled, unscaled
from iqmpc.envs.description import indexed, seconds
from iqmpc.envs.pixels import FrameStack, is_raw_image, resized
from iqmpc.errors import TaskError
from iqmpc.task_interface import TaskInterface


class FlatObservation(gymnasium.ObservationWrapper):
    """A dictionary of Boxes as one array [O], its members side by side in sorted order of the keys.

    That is the order of demonstrations, at every level (`FlattenObservation` of gymnasium takes the
    order in which the space was declared). `keys` chooses members, in their order: "agent/qpos" for
    nested ones. One member alone may be an image, which is left as it is.

    Raises `TaskError` that names a member that is no Box, an image among others, or not there.
    """

    def __init__(self, env: gymnasium.Env, keys: tuple[str, ...] | None = None):
        super().__init__(env)
        if not isinstance(env.observation_space, Dict):
            raise TaskError(f"the observation space must be a Dict, got {env.observation_space}")
        members = dict(_members(env.observation_space))
        self._keys = tuple(members) if keys is None else keys
        self._image, self.names = False, ()
        for key in self._keys:
            if key not in members:
                raise TaskError(f"the observation has no {key!r} (it has: {', '.join(members)})")
            space = members[key]
            if len(self._keys) == 1 and is_raw_image(space):
                self._image, self.observation_space = True, space
                return
            number = isinstance(space, Box) and space.dtype.kind in "biuf"
            if not number or len(space.shape) > 2 - (space.dtype == np.uint8):
                what = "an image" if number else "no Box"
                raise TaskError(
                    f"the observation's {key!r} is {what}, {space}: choose the members to observe, "
                    f"task.obs_keys={','.join(k for k in members if k != key) or 'A,B'}"
                )
        self.names = tuple(name for key in self._keys for name in indexed(key, members[key].shape))
        size = sum(int(np.prod(members[key].shape)) for key in self._keys)
        self.observation_space = Box(-np.inf, np.inf, (size,), np.float32)

    def observation(self, observation: Any) -> np.ndarray:
        parts = []
        for key in self._keys:
            part = observation
            for name in key.split("/"):
                if not isinstance(part, Mapping) or name not in part:
                    raise TaskError(f"the observation has no {key!r}, which its space has")
                part = part[name]
            parts.append(np.asarray(part))
        return parts[0] if self._image else np.concatenate([np.ravel(part) for part in parts])


def _members(space: Dict, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key in sorted(space.spaces):
        member = space.spaces[key]
        if isinstance(member, Dict):
            found += _members(member, f"{prefix}{key}/")
        else:
            found.append((prefix + key, member))
    return found


class ControlEnv(gymnasium.Wrapper):
    """Observations float32 [O], actions float32 [A] in [-1, 1], control steps counted.

    Images, uint8 [H, W, 3] or [H, W, 1], are left as they are. Dictionaries of Boxes are flattened
    by `FlatObservation`, of `task.obs_keys` if these are given. An action is scaled to the
    environment's range and repeated `action_repeat` times, rewards summed, unless the episode ends
    before. `terminated` is the environment's own; `truncated` too, or after `episode_length`
    control steps. With a `seed`, the first `reset()` uses it.

    What a suite calls `success` (some say `is_success`) is given as `info["success"]` too. With
    `terminates=False` an end that the environment announces is ignored: the episode has its full
    length, and `terminated` is always False.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        task: TaskConfig,
        *,
        seed: int | None = None,
        success: str = "is_success",
        terminates: bool = True,
    ):
        _check_box(env.action_space, f"{task.name}: the action space")
        actions: Any = env.action_space
        low, high = actions.low, actions.high
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise TaskError(
                f"{task.name}: the action space must be bounded, got {env.action_space}"
            )
        keys = None if task.obs_keys is None else tuple(task.obs_keys.split(","))
        if isinstance(env.observation_space, Dict):
            with interface.at(task.name):
                env = FlatObservation(env, keys)
        elif keys is not None:
            raise TaskError(
                f"{task.name}: task.obs_keys chooses from a dictionary of "
                f"observations, the environment's are {env.observation_space}"
            )
        images = is_raw_image(env.observation_space)
        if not images:
            _check_box(env.observation_space, f"{task.name}: the observation space")
        super().__init__(env)
        self.config = task
        self._low, self._high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        self.observation_space = (
            env.observation_space
            if images
            else Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
        )
        self.action_space = Box(-1.0, 1.0, env.action_space.shape, np.float32)
        self._success, self._terminates = success, terminates
        self._seed, self._steps = seed, 0

    def describe_interface(self) -> TaskInterface:
        period = seconds(self.unwrapped)
        return TaskInterface(
            self.env.names
            if isinstance(self.env, FlatObservation)
            else indexed("obs", self.observation_space.shape or ()),
            indexed("action", self.action_space.shape or ()),
            tuple(map(float, self._low)),
            tuple(map(float, self._high)),
            self.config.action_repeat,
            None if period is None else period * self.config.action_repeat,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is None:
            seed, self._seed = self._seed, None
        self._steps = 0
        obs, info = interface.reset(self.env, seed=seed, options=options)
        return interface.observation(obs, self.observation_space), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        command = scaled(action, self._low, self._high).astype(self.env.action_space.dtype)
        total, person = 0.0, None
        for _ in range(self.config.action_repeat):
            obs, reward, terminated, truncated, info = interface.step(self.env, command)
            total += reward
            taken_over = interface.taken_over(info, self.env.action_space)
            person = person if taken_over is None else taken_over
            terminated = terminated and self._terminates
            if terminated or truncated:
                break
        self._steps += 1
        truncated = truncated or self._steps >= self.config.episode_length
        success = interface.success(info, self._success)
        if success is not None:
            info = {**info, "success": success}
        if person is not None:  # in one of the repeats at least
            info = {**info, "intervene_action": unscaled(person, self._low, self._high)}
        obs = interface.observation(obs, self.observation_space)
        return obs, total, terminated, truncated, info


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
        env = _called(task.env_id, options)
        if not isinstance(env, gymnasium.Env):
            raise TaskError(f"{task.env_id} must return a gymnasium.Env, got {type(env).__name__}")
    else:
        env = _registered(task.env_id, options)
    env = ControlEnv(env, task, seed=seed)
    if is_raw_image(env.observation_space):
        return FrameStack(env, resized, env.observation_space.shape[2])
    if task.obs == "pixels":
        raise TaskError(
            f"{task.name}: obs=pixels needs an environment that observes images, uint8 "
            f"[H, W, 3] or [H, W, 1], got {env.observation_space}"
        )
    return env


def _registered(env_id: str, options: dict[str, Any]) -> gymnasium.Env:
    try:
        with warnings.catch_warnings():
            if options:  # an environment that cannot draw itself says so in an error below
                warnings.simplefilter("ignore")
            return gymnasium.make(env_id, **options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise TaskError(f"{env_id} needs a package that is not installed: {error}") from error
    except gymnasium.error.Error as error:
        near = difflib.get_close_matches(env_id, gymnasium.registry, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"gymnasium makes no {env_id!r}: {error}{hint}") from error
    except ModuleNotFoundError as error:
        raise TaskError(f"{env_id} cannot be imported: {error}") from error
    except TypeError as error:
        if "render_mode" not in str(error):
            raise
        raise TaskError(f"{env_id} takes no render_mode, so it cannot be drawn: {error}") from error


def _called(path: str, options: dict[str, Any]) -> Any:
    """What the function `module:function` returns."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise TaskError(f"{path} cannot be imported: {error}") from error
    except AttributeError:
        raise TaskError(f"{path}: the module has no {name!r}") from None
    if not callable(function):
        raise TaskError(
            f"{path} must be a function that makes an environment, got a {type(function).__name__}"
        )
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        wanted = "called with render_mode='rgb_array'" if options else "called without arguments"
        raise TaskError(f"{path} must be a function that can be {wanted}: {error}") from None
    except ValueError:  # a builtin, which has no signature
        pass
    return function(**options)


def _check_box(space: gymnasium.Space, what: str) -> None:
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise TaskError(
            f"{what} must be a flat Box (for observations also a Dict of Boxes, or "
            f"uint8 images [H, W, 3] or [H, W, 1]), got "
            f"{space}"
        )
