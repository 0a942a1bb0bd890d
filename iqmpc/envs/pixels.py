"""Images as observations: three stacked frames of any environment that has frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, SupportsFloat, TypeGuard

import gymnasium
import numpy as np

from iqmpc.observation import SIZE, STACK, ObservationSpec


class FrameStack(gymnasium.Wrapper):
    """Observations uint8 [3C, 64, 64]: the last three frames, the oldest first.

    `frame(obs)` makes a frame uint8 [C, 64, 64] of the wrapped environment's observation. After
    `reset` the first frame stands three times.
    """

    def __init__(self, env: gymnasium.Env, frame: Callable[[Any], np.ndarray], channels: int = 3):
        super().__init__(env)
        spec = ObservationSpec.of_frames(channels)
        self.observation_space = gymnasium.spaces.Box(0, 255, spec.shape, spec.dtype)
        self._frame, self._frames = frame, deque[np.ndarray](maxlen=STACK)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self._frames.extend([self._frame(obs)] * STACK)
        return np.concatenate(self._frames), info

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._frames.append(self._frame(obs))
        return np.concatenate(self._frames), reward, terminated, truncated, info


class FrameRecorder(gymnasium.Wrapper):
    """Leaves observations as they are and keeps the frames that a `FrameStack` would observe.

    For DMControl tasks.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self._frames: list[np.ndarray] = []

    @property
    def frames(self) -> np.ndarray:
        """Those of the latest episode, uint8 [T+1, 3, 64, 64]."""
        return np.stack(self._frames)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        result = self.env.reset(seed=seed, options=options)
        self._frames = [self._drawn()]
        return result

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        self._frames.append(self._drawn())
        return result

    def _drawn(self) -> np.ndarray:
        env: Any = self.unwrapped
        return env.frame()


def is_raw_image(space: gymnasium.Space) -> TypeGuard[gymnasium.spaces.Box]:
    """Whether a space is of images as `resized` takes them, not of frames that are stacked."""
    return (
        isinstance(space, gymnasium.spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) == 3
        and space.shape[2] in (1, 3)
    )


def resized(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] -> [C, 64, 64]: torch's antialiased bilinear interpolation, rounded."""
    # Not before it is needed: worker processes of other environments load no torch.
    import torch
    import torch.nn.functional as F

    frame = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if frame.shape[1:] != (SIZE, SIZE):
        frame = (
            F.interpolate(
                frame[None].float(),
                (SIZE, SIZE),
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )[0]
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
        )
    return frame.numpy().copy()
