"""Image observations: three frames of 64 × 64, stacked; kept once each, stacked when needed.

An observation is uint8 [3C, 64, 64], the oldest frame first; C is 3 for colour and 1 for grey. An
episode's first observation repeats its first frame.
"""

from __future__ import annotations

import numpy as np

from iqmpc.errors import TaskError

STACK, SIZE = 3, 64
# Of a flat observation: the squares of larger ones, of which norms and moments are made, leave
# float32.
LARGEST = 1e12


def is_image(obs_shape: tuple[int, ...]) -> bool:
    """Whether observations of this shape are stacked frames and not flat."""
    return len(obs_shape) == 3


def newest(stacks: np.ndarray) -> np.ndarray:
    """[T+1, 3C, 64, 64] -> every frame once, [T+1, C, 64, 64]."""
    return stacks[:, -(stacks.shape[1] // STACK) :]


def stacked(frames: np.ndarray) -> np.ndarray:
    """An episode's frames [T+1, C, 64, 64] -> what was observed, [T+1, 3C, 64, 64]."""
    rows = np.arange(len(frames))[:, None] + np.arange(1 - STACK, 1)
    return frames[rows.clip(min=0)].reshape(len(frames), -1, *frames.shape[2:])


def unstacked(stacks: np.ndarray) -> np.ndarray:
    """`newest`, of which `stacked` makes the same again; `TaskError` where it would not."""
    frames = newest(stacks)
    if not np.array_equal(stacked(frames), stacks):
        raise TaskError(
            "an episode's images must be its last three frames each, the oldest first, and at its "
            "start the first frame three times: this environment's are not"
        )
    return frames


def observed(obs: np.ndarray) -> np.ndarray:
    """A copy, since an environment may write its next observation there: float32 where flat."""
    return np.array(obs, np.float32 if np.ndim(obs) == 1 else None)
