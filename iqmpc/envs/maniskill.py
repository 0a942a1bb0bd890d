"""ManiSkill2's table-top tasks, from states, on machines without a graphics card too."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np

from iqmpc.config import TaskConfig
from iqmpc.envs.extras import import_extra, quiet
from iqmpc.envs.gym import ControlEnv
from iqmpc.errors import TaskError

# name of the task -> ManiSkill2's class
TASKS = {"lift-cube": "LiftCubeEnv", "pick-cube": "PickCubeEnv"}

_log = logging.getLogger(__name__)


def make(
    task: TaskConfig, *, seed: int | None = None, render_mode: str | None = None
) -> ControlEnv:
    """The task's environment: state observations, `pd_ee_delta_pos` control, normalised reward.

    `info["success"]` is ManiSkill2's; no episode ends early. Where no Vulkan device is found the
    environment is made without a renderer, which is logged once.
    Raises `TaskError` for an unknown task, for a `render_mode` that cannot be had, and where
    ManiSkill2 is missing.
    """
    if task.name not in TASKS:
        raise TaskError(f"unknown ManiSkill2 task {task.name!r} (known: {', '.join(TASKS)})")
    renders = _vulkan_devices() > 0
    if render_mode is not None and not renders:
        raise TaskError(
            f"{task.name} cannot be rendered on this machine, where no Vulkan device is found: "
            f"got render_mode={render_mode!r}"
        )
    cls = getattr(_import_tasks(), TASKS[task.name])
    if not renders:
        cls = _without_renderer(cls)
    with quiet(), contextlib.nullcontext() if renders else _null_renderer():
        env = cls(
            obs_mode="state",
            control_mode="pd_ee_delta_pos",
            reward_mode="normalized_dense",
            render_mode=render_mode,
        )
    return ControlEnv(_Rebuilt(env), task, seed=seed, terminates=False)


class _Rebuilt(gymnasium.Wrapper):
    """Every episode in a scene of its own (30 ms).

    The simulator's contacts outlive ManiSkill2's own reset, and an episode would depend on the one
    before it.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        return self.env.reset(seed=seed, options={**(options or {}), "reconfigure": True})


def _import_tasks() -> Any:
    flags = sys.getdlopenflags()
    if not _has_vulkan():
        _load_null_vulkan()
        # Functions of Vulkan, which the null library lacks, are looked for when they are called.
        sys.setdlopenflags(os.RTLD_LAZY)
    try:
        return import_extra("mani_skill2.envs.pick_and_place.pick_cube", "ManiSkill2", "maniskill")
    finally:
        sys.setdlopenflags(flags)


@functools.cache
def _has_vulkan() -> bool:
    """Whether Vulkan's library is installed, which SAPIEN is linked with."""
    try:
        ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return False
    return True


def _load_null_vulkan() -> None:
    found = importlib.util.find_spec("iqmpc._null_vulkan")
    try:
        if found is None or found.origin is None:
            raise OSError("there is no iqmpc._null_vulkan")
        ctypes.CDLL(found.origin, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TaskError(
            "ManiSkill2 needs Vulkan's library (Debian: apt-get install libvulkan1), and iqmpc's "
            f"replacement for it was not built: {error}"
        ) from error


class _InstanceInfo(ctypes.Structure):
    """VkInstanceCreateInfo: everything but the type may be zero."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.c_void_p),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    ]


@functools.cache
def _vulkan_devices() -> int:
    """How many devices Vulkan finds; 0 without Vulkan. SAPIEN's renderer needs one."""
    if not _has_vulkan():
        return 0
    vulkan = ctypes.CDLL("libvulkan.so.1")
    instance, count = ctypes.c_void_p(), ctypes.c_uint32()
    create_info = _InstanceInfo(type=1)  # VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO
    if vulkan.vkCreateInstance(ctypes.byref(create_info), None, ctypes.byref(instance)):
        return 0
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    vulkan.vkDestroyInstance(instance, None)
    return count.value


@functools.cache
def _without_renderer(cls: type) -> type:
    """ManiSkill2's class, with nothing in its scene that only a renderer would use."""
    _log.warning(
        "no Vulkan device was found: ManiSkill2 runs without a renderer, which states do not need"
    )

    class Headless(cls):
        def _add_ground(self, altitude: float = 0.0, render: bool = True) -> Any:
            return super()._add_ground(altitude, render=False)

        def _build_cube(
            self,
            half_size: np.ndarray,
            *_: Any,
            name: str = "cube",
            static: bool = False,
            **__: Any,
        ) -> Any:
            builder = self._scene.create_actor_builder()
            builder.add_box_collision(half_size=half_size)
            return builder.build_static(name) if static else builder.build(name)

        def _setup_cameras(self) -> None:
            self._cameras, self._render_cameras = {}, {}

        def _setup_lighting(self) -> None:
            pass

    return Headless


class _Engine:
    """SAPIEN's engine, which is not told of a renderer."""

    def __init__(self, engine: Any):
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def set_renderer(self, renderer: None) -> None:
        pass


class _Renderer:
    """In the place of SAPIEN's; whatever draws with it is left out of the scene."""

    def set_log_level(self, level: str) -> None:
        pass


@contextlib.contextmanager
def _null_renderer() -> Iterator[None]:
    """ManiSkill2's base class makes a renderer whatever it is asked for: give it one of ours."""
    from mani_skill2.envs import sapien_env

    sapien = sapien_env.sapien

    class Sapien:
        SapienRenderer = staticmethod(lambda **_: _Renderer())
        Engine = staticmethod(lambda: _Engine(sapien.Engine()))

        def __getattr__(self, name: str) -> Any:
            return getattr(sapien, name)

    sapien_env.sapien = Sapien()
    try:
        yield
    finally:
        sapien_env.sapien = sapien
