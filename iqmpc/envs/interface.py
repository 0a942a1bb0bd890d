"""What an environment gives, checked before anything is learnt from it.

Every path to an environment (this process, workers, evaluation, recordings, `task=gym`) steps it
through these functions, so that the same fault is the same error everywhere.
"""

from __future__ import annotations

import contextlib
import math
import sys
import traceback
from collections.abc import Iterator
from typing import Any, Protocol

import gymnasium
import numpy as np

from iqmpc.config import shortened
from iqmpc.errors import TaskError
from iqmpc.observation import LARGEST

_CALLS = {"reset": "reset(*, seed=None, options=None)", "step": "step(action)"}
_RESET = "(observation, info)"
_STEP = "(observation, reward, terminated, truncated, info)"


class HasSpaces(Protocol):
    """What has an environment's spaces: one itself, or what stands for one elsewhere."""

    @property
    def observation_space(self) -> gymnasium.Space: ...

    @property
    def action_space(self) -> gymnasium.Space: ...


def reset(env: gymnasium.Env, **how: Any) -> tuple[Any, dict[str, Any]]:
    """`env.reset(**how)`; `TaskError` where it is not what gymnasium's interface wants."""
    with _of_gymnasium("reset", _RESET):
        result = env.reset(**how)
    obs, info = _parts(result, "reset", _RESET)
    return obs, info


def step(env: gymnasium.Env, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    """`env.step` of a copy of the action, which an environment may change in place.

    The reward is a number or an array of one. Raises `TaskError` where what is given is not what
    gymnasium's interface wants.
    """
    with _of_gymnasium("step", _STEP):
        result = env.step(np.array(action))
    obs, reward, terminated, truncated, info = _parts(result, "step", _STEP)
    return (
        obs,
        number(reward),
        flag("terminated", terminated),
        flag("truncated", truncated),
        info,
    )


def observation(obs: Any, space: gymnasium.Space) -> np.ndarray:
    """A copy of what was observed: float32 [O], or an image of the space's dtype, whether it is
    stacked already or not. A copy, since an environment may write its next observation there.

    Raises `TaskError` for another shape, for an image of another type, and for a value that is
    not finite or beyond ±`LARGEST`, by its index.
    """
    if isinstance(obs, dict):
        raise TaskError(
            f"the observation is a dictionary of {', '.join(map(str, obs))}, its space {space}"
        )
    found = _array(obs)
    if found.dtype.kind not in "biuf":
        raise TaskError(
            f"the observation is a {type(obs).__name__} of no numbers, its space {space}"
        )
    if found.shape != space.shape:
        raise TaskError(f"the observation has shape {found.shape}, its space {space.shape}")
    flat = found.ndim == 1
    if not flat and found.dtype != space.dtype:
        raise TaskError(f"the image is {found.dtype}, its space {space.dtype}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf
        found = np.array(found, np.float32 if flat else None)
    if found.dtype.kind == "f":
        sound = np.abs(found) <= LARGEST  # false for NaN
        if not sound.all():
            index = int(np.argmin(sound))
            raise TaskError(
                f"the observation is {found[index]:g} at index {index}, expected a "
                f"finite value within ±{LARGEST:g}"
            )
    return found


def success(info: dict[str, Any], key: str = "is_success") -> bool | None:
    """What the environment says of the task: `info["success"]`, else `info[key]`, else None.

    Raises `TaskError` for what is neither true nor false; None is nothing said.
    """
    for name in ("success", key):
        value = info.get(name)
        if value is None:
            continue
        found = np.asarray(value)
        if found.size and found.dtype.kind in "biuf" and np.isfinite(found).all():
            return bool(np.all(found))
        raise TaskError(f"info[{name!r}] is {shortened(value)}, expected true or false")
    return None


def taken_over(info: dict[str, Any], space: Any) -> np.ndarray | None:
    """The action of a person who took over in this step, `info["intervene_action"]`: float32 [A].

    None where the agent's own acted: the key is absent or None. Raises `TaskError` for what is no
    action of `space`, a Box.
    """
    value = info.get("intervene_action")
    if value is None:
        return None
    found = _array(value)
    sound = found.dtype.kind in "biuf" and found.shape == space.shape
    if not sound or not ((space.low <= found) & (found <= space.high)).all():  # false for NaN
        raise TaskError(
            f"info['intervene_action'] is {shortened(value)}, expected an action of {space}"
        )
    return found.astype(np.float32)


def number(value: Any) -> float:
    """A reward; `TaskError` for what is no finite number."""
    try:
        found = np.asarray(value)
        reward = float(found.item()) if found.dtype.kind in "biuf" else None
    except (ValueError, TypeError, RuntimeError):
        reward = None
    if reward is None:
        shape = f" of shape {np.shape(value)}" if isinstance(value, np.ndarray) else ""
        raise TaskError(f"the reward is a {type(value).__name__}{shape}, expected a number")
    if not math.isfinite(reward) or abs(reward) > np.finfo(np.float32).max:
        raise TaskError(f"the reward is {reward:g}, expected a finite number")
    return reward


def flag(name: str, value: Any) -> bool:
    """Whether an episode is `terminated` or `truncated`; `TaskError` for what is no flag."""
    found = np.asarray(value)
    if found.size == 1 and found.dtype.kind in "biuf":
        return bool(found.item())
    raise TaskError(f"{name} is a {type(value).__name__}, expected true or false")


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Say where it was, such as "point, episode 3, step 17", in a `TaskError` from inside."""
    try:
        yield
    except TaskError as error:
        raise TaskError(f"{place}: {error}") from error


def _array(value: Any) -> np.ndarray:
    """`value` as an array, one of no numbers where it is none."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # rows of different lengths, tensors
        return np.array(None)


def _parts(result: Any, function: str, expected: str) -> tuple:
    if not isinstance(result, tuple) or len(result) != expected.count(",") + 1:
        length = (
            f"a tuple of {len(result)}"
            if isinstance(result, tuple)
            else f"a {type(result).__name__}"
        )
        raise TaskError(
            f"{function}() gave {length}, gymnasium's interface wants {expected}"
            + (
                " (an environment of the older gym has another)"
                if function == "step" or not isinstance(result, tuple)
                else ""
            )
        )
    if not isinstance(result[-1], dict):
        raise TaskError(
            f"{function}() gave a {type(result[-1]).__name__} for info, gymnasium's "
            f"interface wants {expected} with a dictionary"
        )
    return result


@contextlib.contextmanager
def _of_gymnasium(function: str, expected: str) -> Iterator[None]:
    """An error that gymnasium's own wrappers raise, or the call itself, is about the interface.

    An environment that ends the program would end it as if all were well.
    """
    try:
        yield
    except SystemExit as error:
        raise TaskError(f"{function}() asked the program to end (SystemExit: {error})") from error
    except (ValueError, TypeError, AttributeError, AssertionError, gymnasium.error.Error) as error:
        frames = traceback.walk_tb(sys.exc_info()[2])
        raised_in = [frame.f_globals.get("__name__", "") for frame, _ in frames][-1]
        called = isinstance(error, TypeError) and f"{function}()" in str(error)
        if called and "argument" in str(error) and raised_in.startswith("iqmpc."):
            raise TaskError(
                f"{function}() cannot be called as gymnasium's interface has it, "
                f"{_CALLS[function]}: {error} (an environment of the older gym has another)"
            ) from error
        if not raised_in.startswith(("gymnasium.wrappers.", "gymnasium.utils.", "gymnasium.core")):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TaskError(
            f"{function}() does not give what gymnasium's interface wants, {expected}: {said}"
        ) from error
