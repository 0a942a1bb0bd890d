"""SQIL (Reddy et al., 2020): SAC on a reward of 1 for demonstrations and 0 for behaviour."""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.baselines.learner import Transitions
from iqmpc.baselines.sac import SacLearner


class Sqil(SacLearner):
    """Its batches are half demonstrations, half behaviour, as they are for every method."""

    def reward_of(self, batch: Transitions) -> Tensor:
        return sqil_reward(len(batch.obs), batch.experts, batch.obs)


def sqil_reward(rows: int, experts: int, like: Tensor) -> Tensor:
    """[rows]: 1 for the first `experts` of them, else 0."""
    return (torch.arange(rows, device=like.device) < experts).to(like.dtype)
