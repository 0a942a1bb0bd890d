"""Environments: every suite behind one factory, each a `gymnasium.Env`."""

from __future__ import annotations

import dataclasses
import difflib
from importlib import resources
from operator import attrgetter
from typing import Any

import gymnasium
import numpy as np
import yaml
from gymnasium.spaces import Box, Dict

from iqmpc.config import TaskConfig
from iqmpc.envs import dmcontrol, gym, maniskill, myosuite
from iqmpc.envs.interface import HasSpaces
from iqmpc.envs.noise import TransitionNoise
from iqmpc.errors import TaskError
from iqmpc.observation import SIZE, STACK, ObservationSpec

_SUITES = {
    "dmcontrol": dmcontrol.make,
    "myosuite": myosuite.make,
    "maniskill": maniskill.make,
    "gym": gym.make,
}


def _declared() -> dict[str, TaskConfig]:
    """The tasks of configs/task, by name; `gym` is none before it is told which environment."""
    files = sorted(
        (f for f in (resources.files("iqmpc.configs") / "task").iterdir() if f.name != "gym.yaml"),
        key=attrgetter("name"),
    )
    tasks = (TaskConfig(**yaml.safe_load(f.read_text())) for f in files)
    return {task.name: task for task in tasks}


TASKS = _declared()


def make_env(task: str | TaskConfig, *, seed: int | None = None, **options: Any) -> gymnasium.Env:
    """Make a task's environment: float32 observations [O], actions [A] in [-1, 1].

    With `obs="pixels"` observations are uint8 [9, 64, 64], three frames, the oldest first.

    `task` is a name such as `walker-walk` or a `TaskConfig`; `options` replace fields of that
    config (`episode_length`, `obs`, `transition_noise`, …) or are passed to the suite
    (`render_mode`). With a `seed`, the first `reset()` uses it. Any gymnasium environment:
    `make_env(TaskConfig(name="gym", suite="gym", env_id="HalfCheetah-v4", episode_length=1000))`.

    Raises `TaskError` for an unknown task (with the nearest name) and for a missing extra (with
    the command that installs it).
    """
    if isinstance(task, str):
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TaskError(f"unknown task {task!r}{hint} (known: {', '.join(TASKS)})")
        task = TASKS[task]
    fields = {f.name for f in dataclasses.fields(TaskConfig)}
    task = dataclasses.replace(task, **{k: v for k, v in options.items() if k in fields})
    options = {k: v for k, v in options.items() if k not in fields}
    if task.suite not in _SUITES:
        raise TaskError(
            f"{task.name!r} belongs to suite {task.suite!r}, whose environments are not made here "
            f"(known: {', '.join(_SUITES)}); evaluate your own with iqmpc.evaluate(agent, env)"
        )
    if task.obs == "pixels" and task.suite not in ("dmcontrol", "gym"):
        raise TaskError(
            f"obs=pixels is for the suites dmcontrol and gym, {task.name!r} belongs to "
            f"{task.suite!r}"
        )
    env = _SUITES[task.suite](task, seed=seed, **options)
    return TransitionNoise(env, task.transition_noise) if task.transition_noise else env


def check_spaces(env: HasSpaces, name: str) -> tuple[ObservationSpec, int]:
    """What is observed, and A; `TaskError` where an environment's spaces do not fit the method."""
    obs, action = env.observation_space, env.action_space
    spec = _observation_spec(obs)
    if spec is None:
        hint = "; wrap it: iqmpc.envs.gym.FlatObservation(env)" if isinstance(obs, Dict) else ""
        raise TaskError(
            f"{name}: the observation space must be a flat Box, or one of uint8 images "
            f"[{STACK}C, {SIZE}, {SIZE}], got {obs}{hint}"
        )
    if not isinstance(action, Box) or len(action.shape) != 1:
        raise TaskError(f"{name}: the action space must be a flat Box, got {action}")
    if not (np.all(action.low == -1) and np.all(action.high == 1)):
        raise TaskError(
            f"{name}: actions must lie in [-1, 1], got [{action.low.min():g}, "
            f"{action.high.max():g}]; wrap it: gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)"
        )
    return spec, action.shape[0]


def _observation_spec(space: gymnasium.Space) -> ObservationSpec | None:
    """What a space describes; None where it is neither a flat Box nor one of stacked images."""
    if not isinstance(space, Box):
        return None
    try:
        spec = ObservationSpec(space.shape)
    except ValueError:
        return None
    return None if spec.images and space.dtype != spec.dtype else spec
