"""MyoSuite's hand, a musculoskeletal model with 39 muscles, as gymnasium environments."""

from __future__ import annotations

import os
from typing import Any

import gymnasium

from iqmpc.config import TaskConfig
from iqmpc.envs.extras import import_extra, quiet
from iqmpc.envs.gym import ControlEnv
from iqmpc.errors import TaskError

# name of the task -> MyoSuite's id
TASKS = {
    "myo-key-turn": "myoHandKeyTurnFixed-v0",
    "myo-obj-hold": "myoHandObjHoldFixed-v0",
    "myo-pen-twirl": "myoHandPenTwirlFixed-v0",
}


class _Seeded(gymnasium.Wrapper):
    """MyoSuite's `reset` takes a seed and does not use it."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            env: Any = self.unwrapped
            env.seed(seed)
        return self.env.reset()


def make(
    task: TaskConfig, *, seed: int | None = None, render_mode: str | None = None
) -> ControlEnv:
    """The task's environment. `info["success"]` is MyoSuite's `solved`; no episode ends early.

    Raises `TaskError` for an unknown task, for a `render_mode` and where MyoSuite is missing.
    """
    if task.name not in TASKS:
        raise TaskError(f"unknown MyoSuite task {task.name!r} (known: {', '.join(TASKS)})")
    if render_mode is not None:
        raise TaskError(f"{task.name} is not rendered here, got render_mode={render_mode!r}")
    # It imports dm_control, which chooses its graphics library once (iqmpc.envs.dmcontrol).
    os.environ.setdefault("MUJOCO_GL", "disabled")
    import_extra("myosuite", "MyoSuite", "myosuite")  # registers the ids
    with quiet():
        # unwrapped: its own limits, 50 to 200 steps, are not the paper's
        env = gymnasium.make(TASKS[task.name]).unwrapped
    return ControlEnv(_Seeded(env), task, seed=seed, success="solved", terminates=False)
