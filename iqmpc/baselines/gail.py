"""GAIL (Ho & Ermon, 2016) with SAC in the place of TRPO: the reward is a classifier's.

D = sigmoid(f) is learnt to be 1 on demonstrations and 0 on the replay of behaviour, and the reward
is -log(1 - D) = softplus(f).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from iqmpc.baselines.adversarial import AdversarialLearner
from iqmpc.baselines.learner import Transitions


def classifier_loss(experts: Tensor, behaviour: Tensor) -> Tensor:
    """-mean_E log D - mean_π log(1 - D), of logits [N_E] and [N_π]."""
    return F.softplus(-experts).mean() + F.softplus(behaviour).mean()


class Gail(AdversarialLearner):
    """Its SAC learns from behaviour alone."""

    def score_loss(self, experts: Tensor, behaviour: Tensor) -> Tensor:
        return classifier_loss(experts, behaviour)

    def rl_rows(self, batch: Transitions) -> Transitions:
        return batch.behaviour()

    def reward_of(self, batch: Transitions) -> Tensor:
        return F.softplus(super().reward_of(batch))
