"""HyPE (Ren et al., 2024): hybrid inverse RL, model-free.

The reward is f itself, learnt by moment matching, and SAC learns from demonstrations and behaviour
in equal parts: the policy need not find what the demonstrator does by exploring.
"""

from __future__ import annotations

from torch import Tensor

from iqmpc.baselines.adversarial import AdversarialLearner


def moment_loss(experts: Tensor, behaviour: Tensor) -> Tensor:
    """mean_π f - mean_E f, of [N_π] and [N_E]."""
    return behaviour.mean() - experts.mean()


class Hype(AdversarialLearner):
    """The policy is optimised for longer than f moves: f makes every tenth step."""

    every = 10

    def score_loss(self, experts: Tensor, behaviour: Tensor) -> Tensor:
        return moment_loss(experts, behaviour)
