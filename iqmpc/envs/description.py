"""Asking an environment what its numbers are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np

from iqmpc.config import TaskConfig
from iqmpc.task_interface import TaskInterface


def describe(env: gymnasium.Env, task: TaskConfig) -> TaskInterface:
    """The interface of a task's environment; of one that says nothing of itself, by numbers."""
    obs: Any = env.observation_space  # Boxes, as `check_spaces` has seen to
    action: Any = env.action_space
    try:
        found = env.get_wrapper_attr("describe_interface")()
    except AttributeError:
        found = None
    if not isinstance(found, TaskInterface):  # of somebody else's environment
        found = TaskInterface(
            indexed("obs", obs.shape),
            indexed("action", action.shape),
            tuple(map(float, action.low)),
            tuple(map(float, action.high)),
            task.action_repeat,
            None,
        )
    return dataclasses.replace(found, observation_names=()) if len(obs.shape) == 3 else found


def indexed(name: str, shape: Iterable[int]) -> tuple[str, ...]:
    """Names of an array's numbers in their order: `name`, or `name[0,1]` where it has sides."""
    places = np.ndindex(*shape)
    return tuple(f"{name}[{','.join(map(str, p))}]" if p else name for p in places)


def seconds(env: Any) -> float | None:
    """From one step of an unwrapped environment to the next, where it says so."""
    step: Any = getattr(env, "dt", None)
    frequency: Any = getattr(env, "control_freq", None)
    if step is None:
        step = 1 / frequency if frequency else 0.0
    try:
        found = float(step)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and found > 0 else None
