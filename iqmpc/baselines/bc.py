"""Behavioural cloning (Pomerleau, 1988): the demonstrations' actions, regressed.

The policy is deterministic, a = tanh(π(s)), and the loss the squared error: demonstrators of
locomotion act at the bounds of [-1, 1], where a squashed Gaussian has no finite density.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.baselines.learner import BaselineLearner, Transitions
from iqmpc.baselines.model import PolicyModel, PolicyWeights
from iqmpc.config import Config
from iqmpc.losses import Batch
from iqmpc.observation import ObservationSpec
from iqmpc.replay import SliceReplay
from iqmpc.scaling import ObservationScaling


def cloning_loss(w: PolicyWeights, obs: Tensor, action: Tensor) -> Tensor:
    """mean over rows and action dimensions of (tanh π(s) - a)²: obs [N, O], action [N, A]."""
    return (w.act(obs) - action).square().mean()


class BehaviouralCloning(BaselineLearner):
    """Learns from the demonstrations alone; what it does in the environment is only watched."""

    def __init__(
        self,
        obs_shape: ObservationSpec | tuple[int, ...] | int,
        action_dim: int,
        config: Config,
        device: torch.device | str = "cpu",
        *,
        sampler: torch.Generator | None = None,
        scaling: ObservationScaling | None = None,
    ):
        super().__init__(obs_shape, action_dim, config, device, sampler=sampler, scaling=scaling)
        self._policy = self.optimiser("policy", list(self.model.policy.parameters()))

    @staticmethod
    def make_model(
        obs_shape: ObservationSpec,
        action_dim: int,
        config: Config,
        *,
        termination: bool | None = None,
    ) -> PolicyModel:
        return PolicyModel(obs_shape, action_dim, config, deterministic=True)

    def draw(self, experts: SliceReplay, behaviour: SliceReplay) -> Batch:
        size = self.settings.batch
        return experts.sample(size, self.sampler)._replace(experts=size)

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        loss = cloning_loss(self.weights, batch.obs, batch.action)
        norm, _ = self.step(loss, self._policy)
        return {"policy_loss": loss.detach(), "policy_grad_norm": norm}
