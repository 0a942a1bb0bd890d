"""Transition noise: the paper's study of robustness."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np


class TransitionNoise(gymnasium.Wrapper):
    """With probability p, a step acts with a uniform action instead of the one given.

    The actions in [-1, 1] are those of the wrapped environment; p lies in [0, 1]. Draws follow from
    the seed of `reset`, so an episode can be repeated; without a seed they go on.
    `info["replaced"]` says whether the action was.
    """

    def __init__(self, env: gymnasium.Env, p: float):
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {p}")
        super().__init__(env)
        self.p = p
        self._random = np.random.default_rng()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self._random = np.random.default_rng([seed, 1])
        return self.env.reset(seed=seed, options=options)

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        # Both draws at every step, so that p changes how many are used and not which.
        uniform = self._random.uniform(-1, 1, self.action_space.shape).astype(np.float32)
        replaced = bool(self._random.random() < self.p)
        obs, reward, terminated, truncated, info = self.env.step(uniform if replaced else action)
        return obs, reward, terminated, truncated, {**info, "replaced": replaced}
