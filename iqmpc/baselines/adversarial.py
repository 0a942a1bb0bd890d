"""Rewards learnt against the policy, for SAC: what GAIL, HyPE and HyPER share.

f(s, a) is a network of its own, learnt so that demonstrations have more of it than behaviour, with
a gradient penalty that keeps its slope near 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.baselines.learner import Transitions
from iqmpc.baselines.sac import SacLearner, SacModel
from iqmpc.config import Config
from iqmpc.kernels import layers
from iqmpc.losses import gradient_penalty
from iqmpc.model import layer_views
from iqmpc.observation import ObservationSpec
from iqmpc.scaling import ObservationScaling

PENALTY = 10.0  # weight of the gradient penalty, as usual (Gulrajani et al., 2017)


class RewardModel(SacModel):
    """SAC's networks and f, 0 at first."""

    def __init__(self, spec: ObservationSpec, action_dim: int, config: Config):
        super().__init__(spec, action_dim, config)
        # A stack of one, as the critics are a stack of two.
        self.score = self.network(self.obs_dim + action_dim, 1, members=1, zero=True)

    def f(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [N, O], action [N, A] -> f [N]."""
        return layers.critics(layer_views(self.score), obs, action)[0]

    def reward(
        self, obs: Tensor, action: Tensor, next_obs: Tensor, terminated: Tensor, noise: Tensor
    ) -> Tensor:
        return self.f(obs, action)


class AdversarialLearner(SacLearner):
    """Every `every`-th update begins with a step of f; then comes SAC's, on `rl_rows`.

    A method says what f's loss is, what reward is made of it and which rows SAC learns from.
    """

    every = 1
    model: RewardModel

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
        self._score = self.optimiser("score", list(self.model.score.parameters()))
        self._reward_loss = torch.zeros((), device=self.device)  # of its last step
        self.others.register_buffer("reward_loss", self._reward_loss)

    @staticmethod
    def make_model(
        obs_shape: ObservationSpec,
        action_dim: int,
        config: Config,
        *,
        termination: bool | None = None,
    ) -> RewardModel:
        return RewardModel(obs_shape, action_dim, config)

    def score_loss(self, experts: Tensor, behaviour: Tensor) -> Tensor:
        """The loss of f on both sides, [N_E] and [N_π], without the gradient penalty."""
        raise NotImplementedError

    def rl_rows(self, batch: Transitions) -> Transitions:
        """What SAC learns from."""
        return batch

    def reward_of(self, batch: Transitions) -> Tensor:
        with torch.no_grad():
            return self.model.f(batch.obs, batch.action)

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        if self.updates % self.every == 0:
            mix = torch.rand(1, batch.experts, 1, device=self.device, generator=self.generator)
            f = self.model.f(batch.obs, batch.action)
            loss = self.score_loss(f[: batch.experts], f[batch.experts :])
            penalty = gradient_penalty(
                layer_views(self.model.score), batch.obs[None], batch.action[None], mix, rho=1.0
            )
            self.step(loss + PENALTY * penalty, self._score)
            self._reward_loss.copy_(loss.detach())
        return super().update(self.rl_rows(batch)) | {"reward_loss": self._reward_loss.clone()}
