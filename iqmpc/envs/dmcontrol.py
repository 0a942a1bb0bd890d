"""DeepMind Control Suite tasks as gymnasium environments."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import sys
from typing import Any

import gymnasium
import numpy as np

from iqmpc.config import TaskConfig
from iqmpc.envs.actions import scaled
from iqmpc.envs.description import indexed
from iqmpc.envs.extras import GL_ADVICE, cannot_render, import_extra
from iqmpc.envs.pixels import FrameStack
from iqmpc.errors import TaskError
from iqmpc.observation import SIZE
from iqmpc.task_interface import TaskInterface

# name of the task -> (domain, task) of dm_control
TASKS = {
    "hopper-hop": ("hopper", "hop"),
    "cheetah-run": ("cheetah", "run"),
    "walker-walk": ("walker", "walk"),
    "walker-run": ("walker", "run"),
    "quadruped-run": ("quadruped", "run"),
    "humanoid-walk": ("humanoid", "walk"),
    "dog-stand": ("dog", "stand"),
    "dog-walk": ("dog", "walk"),
    "dog-trot": ("dog", "trot"),
    "dog-run": ("dog", "run"),
}


def import_suite(render: bool) -> Any:
    """Import `dm_control.suite`, with GL only where something will be rendered.

    dm_control chooses its GL library once, when it is first imported, by MUJOCO_GL. Where the user
    has not set that, it is `disabled` for state tasks; for rendering without a screen it is EGL or
    OSMesa, whichever is installed; `TaskError` where neither is.
    """
    if "MUJOCO_GL" not in os.environ and "dm_control" not in sys.modules:
        if not render:
            os.environ["MUJOCO_GL"] = "disabled"
        elif not os.environ.get("DISPLAY"):
            found = [name for name in ("EGL", "OSMesa") if ctypes.util.find_library(name)]
            if not found:
                raise TaskError(f"no graphics library was found: {GL_ADVICE}")
            os.environ["MUJOCO_GL"] = found[0].lower()
    # With software Mesa, loading Triton after GL ends the process (two LLVMs in one process), and
    # torch loads Triton lazily, from a compile or an optimiser: so Triton comes first.
    if os.environ.get("MUJOCO_GL") != "disabled" and importlib.util.find_spec("triton"):
        importlib.import_module("triton")
    try:
        return import_extra("dm_control.suite", "DMControl", "dmcontrol")
    except Exception as error:  # every graphics library fails in its own way
        if not render or importlib.util.find_spec("dm_control") is None:
            raise
        raise TaskError(
            f"dm_control cannot be imported with MUJOCO_GL="
            f"{os.environ.get('MUJOCO_GL')}: {error} ({GL_ADVICE})"
        ) from error


class DMControlEnv(gymnasium.Env):
    """One task of the suite, observations flattened in the suite's own order.

    observation: float32 [O]; action: float32 [A] in [-1, 1], rescaled to the task's range and
    repeated `action_repeat` times with the rewards summed. `terminated` is always False;
    `truncated` after `episode_length` control steps. `reset(seed=s)` gives the same episode
    whatever came before it. `frame()` is the image of `obs: pixels` (`make` stacks three).
    """

    def __init__(
        self,
        task: TaskConfig,
        *,
        seed: int | None = None,
        render_mode: str | None = None,
        render_size: int = 256,
    ):
        if render_mode not in (None, "rgb_array"):
            raise TaskError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        render = render_mode is not None or task.obs == "pixels"
        suite = import_suite(render)
        if render and os.environ.get("MUJOCO_GL") == "disabled":
            raise TaskError(
                "this process loaded dm_control without GL, for a task that is not rendered (or "
                "MUJOCO_GL=disabled is set): set MUJOCO_GL=egl or MUJOCO_GL=osmesa before the "
                "first environment is made"
            )
        domain, name = TASKS[task.name]
        self.config, self.render_mode, self._render_size = task, render_mode, render_size
        self._env = suite.load(
            domain,
            name,
            # the suite's own limit counts simulator time; ours counts control steps
            task_kwargs={"random": np.random.RandomState(seed), "time_limit": float("inf")},
        )
        if task.fast_render:  # before the first frame, for which buffers are made
            self._env.physics.model.vis.quality.offsamples = 0
        spec = self._env.action_spec()
        self._low, self._high = spec.minimum, spec.maximum
        size = sum(int(np.prod(s.shape)) for s in self._env.observation_spec().values())
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, spec.shape, np.float32)
        fps = round(1 / (self._env.control_timestep() * task.action_repeat))
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        self._seed, self._steps = seed, 0

    def describe_interface(self) -> TaskInterface:
        model, spec = self._env.physics.model, self._env.action_spec()
        return TaskInterface(
            tuple(
                name
                for key, part in self._env.observation_spec().items()
                for name in indexed(key, part.shape)
            ),
            tuple(model.id2name(i, "actuator") for i in range(spec.shape[0])),
            tuple(map(float, self._low)),
            tuple(map(float, self._high)),
            self.config.action_repeat,
            self._env.control_timestep() * self.config.action_repeat,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed, self._seed = self._seed, None
        if seed is not None:
            # the task holds one RandomState for its lifetime: reseed it in place
            self._env.task.random.seed(seed)
        self._steps = 0
        return self._flat(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        command = scaled(action, self._low, self._high)
        reward = 0.0
        for _ in range(self.config.action_repeat):
            step = self._env.step(command)
            reward += step.reward
        self._steps += 1
        truncated = self._steps >= self.config.episode_length
        return self._flat(step.observation), reward, False, truncated, {}

    def render(self) -> np.ndarray:
        """An RGB frame, uint8 [render_size, render_size, 3]; needs `render_mode="rgb_array"`."""
        return self._image(self._render_size)

    def frame(self) -> np.ndarray:
        """The RGB frame that is observed, uint8 [3, 64, 64]."""
        return np.ascontiguousarray(self._image(SIZE).transpose(2, 0, 1))

    def _image(self, size: int) -> np.ndarray:
        camera = 2 if self.config.name.startswith("quadruped") else 0
        flags = {"shadow": False} if self.config.fast_render else None
        try:
            return self._env.physics.render(
                size, size, camera_id=camera, render_flag_overrides=flags
            )
        except Exception as error:
            raise cannot_render(error) from error

    def close(self) -> None:
        self._env.close()

    @staticmethod
    def _flat(observation: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([np.ravel(v) for v in observation.values()]).astype(np.float32)


def make(task: TaskConfig, *, seed: int | None = None, **options: Any) -> gymnasium.Env:
    """A `DMControlEnv`, under a `FrameStack` with `obs: pixels`; `options` are passed to it."""
    if task.name not in TASKS:
        raise TaskError(f"unknown DMControl task {task.name!r} (known: {', '.join(TASKS)})")
    env = DMControlEnv(task, seed=seed, **options)
    return FrameStack(env, lambda obs: env.frame()) if task.obs == "pixels" else env
