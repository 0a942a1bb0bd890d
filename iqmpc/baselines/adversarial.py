"""Rewards learnt against the policy, for SAC: what GAIL, HyPE, HyPER and CFIL share, and the first
three's form of it.

There f(s, a) is a network, learnt so that demonstrations have more of it than behaviour, with a
gradient penalty that keeps its slope near 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iqmpc.baselines.learner import Transitions
from iqmpc.baselines.sac import SacLearner, SacModel
from iqmpc.config import Config
from iqmpc.kernels import layers
from iqmpc.losses import gradient_penalty
from iqmpc.model import layer_views
from iqmpc.observation import ObservationSpec

PENALTY = 10.0  # weight of the gradient penalty, as usual (Gulrajani et al., 2017)


class RewardModel(SacModel):
    """SAC's networks and f(s, a), of which the reward is made; `learnt` names f's part."""

    learnt: str

    def f(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [N, O], action [N, A] -> f [N]."""
        raise NotImplementedError

    def reward(
        self, obs: Tensor, action: Tensor, next_obs: Tensor, terminated: Tensor, noise: Tensor
    ) -> Tensor:
        return self.f(obs, action)


class RewardLearner(SacLearner):
    """Every `every`-th update begins with a step of f; then comes SAC's, on `rl_rows`.

    A method says what f's loss is, what reward is made of it and which rows SAC learns from.
    """

    every = 1
    model: RewardModel

    def set_up(self) -> None:
        super().set_up()
        part: nn.Module = getattr(self.model, self.model.learnt)
        self._learnt = self.optimiser(self.model.learnt, list(part.parameters()))
        self._reward_loss = torch.zeros((), device=self.device)  # of its last step
        self.others.register_buffer("reward_loss", self._reward_loss)

    def reward_loss(self, batch: Transitions) -> tuple[Tensor, Tensor | float]:
        """The loss of f, and what is added to it for its step but not shown."""
        raise NotImplementedError

    def rl_rows(self, batch: Transitions) -> Transitions:
        """What SAC learns from."""
        return batch

    def reward_of(self, batch: Transitions) -> Tensor:
        with torch.no_grad():
            return self.model.f(batch.obs, batch.action)

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        if self.updates % self.every == 0:
            loss, more = self.reward_loss(batch)
            self.step(loss + more, self._learnt)
            self._reward_loss.copy_(loss.detach())
        return super().update(self.rl_rows(batch)) | {"reward_loss": self._reward_loss.clone()}


class ScoreModel(RewardModel):
    """f is a network, 0 at first."""

    learnt = "score"

    def __init__(self, spec: ObservationSpec, action_dim: int, config: Config):
        super().__init__(spec, action_dim, config)
        # A stack of one, as the critics are a stack of two.
        self.score = self.network(self.obs_dim + action_dim, 1, members=1, zero=True)

    def f(self, obs: Tensor, action: Tensor) -> Tensor:
        return layers.critics(layer_views(self.score), obs, action)[0]


class AdversarialLearner(RewardLearner):
    """f of a `ScoreModel`, with a gradient penalty between the sides."""

    model_class = ScoreModel
    model: ScoreModel

    def score_loss(self, experts: Tensor, behaviour: Tensor) -> Tensor:
        """The loss of f on both sides, [N_E] and [N_π], without the gradient penalty."""
        raise NotImplementedError

    def reward_loss(self, batch: Transitions) -> tuple[Tensor, Tensor | float]:
        mix = torch.rand(1, batch.experts, 1, device=self.device, generator=self.generator)
        f = self.model.f(batch.obs, batch.action)
        penalty = gradient_penalty(
            layer_views(self.model.score), batch.obs[None], batch.action[None], mix, rho=1.0
        )
        return self.score_loss(f[: batch.experts], f[batch.experts :]), PENALTY * penalty
