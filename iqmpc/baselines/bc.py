"""Behavioural cloning (Pomerleau, 1988): the demonstrations' actions, regressed.

The policy is deterministic, a = tanh(π(s)), and the loss the squared error: demonstrators of
locomotion act at the bounds of [-1, 1], where a squashed Gaussian has no finite density.
"""

from __future__ import annotations

from torch import Tensor

from iqmpc.baselines.learner import BaselineLearner, Transitions
from iqmpc.baselines.model import PolicyModel, PolicyWeights
from iqmpc.losses import Batch
from iqmpc.replay import SliceReplay


def cloning_loss(w: PolicyWeights, obs: Tensor, action: Tensor) -> Tensor:
    """mean over rows and action dimensions of (tanh π(s) - a)²: obs [N, O], action [N, A]."""
    return (w.act(obs) - action).square().mean()


class DeterministicModel(PolicyModel):
    """A policy without a density."""

    deterministic = True


class BehaviouralCloning(BaselineLearner):
    """Learns from the demonstrations alone; what it does in the environment is only watched."""

    model_class = DeterministicModel

    def set_up(self) -> None:
        self._policy = self.optimiser("policy", list(self.model.policy.parameters()))

    def draw(self, experts: SliceReplay, behaviour: SliceReplay) -> Batch:
        size = self.settings.batch
        return experts.sample(size, self.sampler)._replace(experts=size)

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        loss = cloning_loss(self.weights, batch.obs, batch.action)
        norm, _ = self.step(loss, self._policy)
        return {"policy_loss": loss.detach(), "policy_grad_norm": norm}
