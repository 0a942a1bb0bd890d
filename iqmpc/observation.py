"""What is observed: O numbers, or images of three stacked frames of 64 × 64.

An image is uint8 [3C, 64, 64], the oldest frame first; C is 3 for colour and 1 for grey. An
episode's first observation repeats its first frame, and an episode keeps every frame once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iqmpc.errors import TaskError

STACK, SIZE = 3, 64
# Of a flat observation: the squares of larger ones, of which norms and moments are made, leave
# float32.
LARGEST = 1e12


@dataclass(frozen=True)
class ObservationSpec:
    """The description of one observation: `shape` is (O,) where it is flat, (3C, 64, 64) of images.

    Raises `ValueError` for another shape.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        sound = len(self.shape) == 1 or (
            self.images and self.shape[1:] == (SIZE, SIZE) and self.shape[0] % STACK == 0
        )
        if not sound:
            raise ValueError(f"obs_shape must be (O,) or (3C, {SIZE}, {SIZE}), got {self.shape}")

    @classmethod
    def of(cls, given: ObservationSpec | int | Iterable[int]) -> ObservationSpec:
        """The description itself, or that of a shape; O alone is short for (O,)."""
        if isinstance(given, ObservationSpec):
            return given
        return cls((given,) if isinstance(given, int) else tuple(given))

    @classmethod
    def of_frames(cls, channels: int) -> ObservationSpec:
        """That of images whose frames have C channels."""
        return cls((STACK * channels, SIZE, SIZE))

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> ObservationSpec:
        """That of what an episode keeps: [T+1, O] or frames [T+1, C, 64, 64]."""
        return cls.of_frames(rows.shape[1]) if rows.ndim == 4 else cls(rows.shape[1:])

    @property
    def images(self) -> bool:
        """Whether observations are images and not flat."""
        return len(self.shape) == 3

    @property
    def dtype(self) -> type[np.uint8] | type[np.float32]:
        """The type of an observation's values: uint8 of images, else float32."""
        return np.uint8 if self.images else np.float32

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of what an episode keeps for one step: (O,), or a single frame's (C, 64, 64)."""
        return (self.shape[0] // STACK, *self.shape[1:]) if self.images else self.shape

    def cast(self, obs: Any) -> np.ndarray:
        """The observations as an array: float32 where they are flat, images as they are."""
        return np.asarray(obs, None if self.images else self.dtype)

    def rows(self, observations: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """What an episode keeps of its T+1 observations: themselves, or every frame once.

        Raises `TaskError` for images of which `observed` would not make the same again.
        """
        observations = self.cast(observations)
        return unstacked(observations) if self.images else observations

    def observed(self, rows: np.ndarray) -> np.ndarray:
        """What was observed, [T+1, *shape], of the rows that an episode keeps."""
        return stacked(rows) if self.images else rows

    def check(self, obs: Any, *lead: int, name: str = "obs", images: str = "images") -> None:
        """`ValueError` where `obs`, array or tensor, is not [*lead, *shape], or an image not uint8.

        The message calls it `name`, and an image of another type `images`.
        """
        self._check(obs, [*lead, *self.shape], name, images)

    def check_rows(self, rows: Any, count: int) -> None:
        """`ValueError` where an episode does not keep `count` such rows."""
        self._check(rows, [count, *self.row_shape], "obs", "frames")

    def _check(self, given: Any, shape: list[int], name: str, images: str) -> None:
        if list(given.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(given.shape)}")
        if self.images and str(given.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(f"{images} must be uint8, got {given.dtype}")


def stacked(frames: np.ndarray) -> np.ndarray:
    """Of an episode's frames [T+1, C, 64, 64] what was observed, [T+1, 3C, 64, 64]."""
    rows = np.arange(len(frames))[:, None] + np.arange(1 - STACK, 1)
    return frames[rows.clip(min=0)].reshape(len(frames), -1, *frames.shape[2:])


def unstacked(stacks: np.ndarray) -> np.ndarray:
    """Every frame of an episode's observations [T+1, 3C, 64, 64] once, [T+1, C, 64, 64].

    Raises `TaskError` where `stacked` would not make the same again of them.
    """
    frames = stacks[:, -(stacks.shape[1] // STACK) :]
    if not np.array_equal(stacked(frames), stacks):
        raise TaskError(
            "an episode's images must be its last three frames each, the oldest first, and at its "
            "start the first frame three times: this environment's are not"
        )
    return frames
