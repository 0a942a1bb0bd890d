"""Observations scaled by the demonstrations' moments, for the encoder's sake (`normalise_obs`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iqmpc.kernels.weights import Weights

LEAST_STD = 0.01  # what hardly varies in the demonstrations is not blown up without limit
_FIRST = ("encoder.0.weight", "encoder.0.bias")


class ObservationScaling(NamedTuple):
    """The map x = (s − mean) / std of flat observations, mean and std float32 [O].

    What learns sees x: the replays keep it. What acts sees s: `folded` moves the map into the
    encoder's first layer, W x + b = (W / std) s + (b − W mean / std), so that no planner, exported
    file or kernel knows of it.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, observations: Iterable[np.ndarray]) -> ObservationScaling:
        """By mean and standard deviation over all rows of [T+1, O] each, std at least 0.01."""
        rows = np.concatenate(list(observations)).astype(np.float64)
        std = np.maximum(rows.std(0), LEAST_STD)
        return cls(*(torch.from_numpy(x.astype(np.float32)) for x in (rows.mean(0), std)))

    def to(self, device: torch.device | str) -> ObservationScaling:
        return ObservationScaling(self.mean.to(device), self.std.to(device))

    def __call__(self, obs: Tensor) -> Tensor:
        """obs [..., O] -> x [..., O]."""
        return (obs - self.mean) / self.std

    def inverse(self) -> ObservationScaling:
        """The map back, s = x std + mean: with it, folding undoes itself."""
        mean, std = self.mean.double(), self.std.double()
        return ObservationScaling(-mean / std, 1 / std)

    def folded(self, weights: Weights) -> Weights:
        """The model of s that does with s what `weights` does with x; shares all else with it."""
        first = weights.encoder[0]
        weight, bias = self._fold(first.weight, first.bias)
        first = first._replace(weight=weight, bias=bias)
        return weights._replace(encoder=(first, *weights.encoder[1:]))

    def folded_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same of a `WorldModel`'s state dict."""
        weight, bias = self._fold(*(state[name] for name in _FIRST))
        return {**state, _FIRST[0]: weight, _FIRST[1]: bias}

    @torch.no_grad()
    def _fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scaled = weight.double() / self.std.double()  # mean / std may be large
        return scaled.to(weight.dtype), (bias - scaled @ self.mean.double()).to(bias.dtype)
