"""Between the method's actions and an environment's."""

from __future__ import annotations

import numpy as np


def scaled(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """action [A] in [-1, 1] -> float64 [A] in [low, high]; `ValueError` for another shape."""
    action = np.asarray(action, dtype=np.float64)
    if action.shape != low.shape:
        raise ValueError(f"action must have shape {low.shape}, got {action.shape}")
    return low + (action + 1) * 0.5 * (high - low)


def unscaled(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """action [A] in [low, high] -> float32 [A] in [-1, 1], 0 where there is no choice."""
    width = high - low
    share = (np.asarray(action, np.float64) - low) / np.where(width > 0, width, np.inf)
    return np.where(width > 0, np.clip(2 * share - 1, -1, 1), 0).astype(np.float32)
