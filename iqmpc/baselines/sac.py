"""Soft actor-critic (Haarnoja et al., 2018) on learnt rewards: what most baselines are made of.

Twin critics with slow targets, a squashed Gaussian policy, and an entropy whose weight is fixed or
learnt. A method says what the critics' loss or the reward is; the environment's reward is never
seen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from iqmpc.baselines.learner import BaselineLearner, Transitions
from iqmpc.baselines.model import PolicyModel, PolicyWeights
from iqmpc.config import Config
from iqmpc.kernels import layers
from iqmpc.kernels.weights import Layer, frozen, layer_tensors
from iqmpc.losses import soft_value
from iqmpc.model import layer_views
from iqmpc.observation import ObservationSpec
from iqmpc.optimisation import move

Critics = tuple[Layer, ...]


def backup(
    w: PolicyWeights,
    targets: Critics,
    batch: Transitions,
    noise: Tensor,
    discount: float,
    temperature: Tensor | float,
) -> Tensor:
    """γ (1 - d) V̄(s') [N], V̄(s') = min Q̄(s', a') - β log π(a'|s') of a'(noise [N, A])."""
    with torch.no_grad():
        value = soft_value(w, targets, batch.next_obs, noise, temperature)
    return discount * (1 - batch.terminated) * value


def td_critic_loss(q: Tensor, reward: Tensor, backed_up: Tensor) -> Tensor:
    """mean over critics and rows of (Q_k - r - γ (1 - d) V̄)²: q [2, N], the others [N]."""
    return (q - reward - backed_up).square().mean()


def policy_loss(
    w: PolicyWeights, obs: Tensor, noise: Tensor, temperature: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean of β log π(a|s) - min Q(s, a), with the critics held fixed, and log π and min Q [N]."""
    action, log_prob = layers.policy_sample(w, obs, noise)
    q = layers.q_min(frozen(w.critics), obs, action)
    return (temperature * log_prob - q).mean(), log_prob.detach(), q.detach()


def temperature_loss(log_temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """mean of -log β (log π + H̄): β grows where the entropy -log π [N] is below H̄."""
    return -(log_temperature * (log_prob + target_entropy)).mean()


class SacModel(PolicyModel):
    """A squashed Gaussian policy, twin critics (0 at first) and log β."""

    decodes_rewards = True

    def __init__(self, spec: ObservationSpec, action_dim: int, config: Config):
        super().__init__(spec, action_dim, config)
        self.discount = config.discount
        self.critics = self.network(self.obs_dim + action_dim, 1, members=2, zero=True)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def reward(
        self, obs: Tensor, action: Tensor, next_obs: Tensor, terminated: Tensor, noise: Tensor
    ) -> Tensor:
        """Q(s, a) - γ (1 - d) V(s'), the reward that the critics' mean implies."""
        w = self.weights()
        after = next_obs.expand(len(noise), -1, -1)
        next_action, log_prob = layers.policy_sample(w, after, noise)
        q_next = layers.critics(w.critics, after, next_action).mean(0)
        value = (q_next - self.log_temperature.exp() * log_prob).mean(0)
        q = layers.critics(w.critics, obs, action).mean(0)
        return q - self.discount * (1 - terminated) * value


class CriticNoise(NamedTuple):
    """Standard normal draws of a critics' step, [N, A] each: of V̄(s') and of V(s)."""

    target: Tensor
    value: Tensor


class SacLearner(BaselineLearner):
    """An update is a step of the critics, of the policy, of β, and of the targets by τ.

    A method gives `reward_of` a batch, or a `critic_loss` of its own. Both sides of a batch count,
    demonstrations and behaviour.
    """

    temperature: float | None = None  # where `agent.temperature` says none; None: learnt
    model_class = SacModel
    model: SacModel

    def set_up(self) -> None:
        model = self.model
        targets = model.network(model.obs_dim + model.action_dim, 1, members=2).to(self.device)
        targets.load_state_dict(model.critics.state_dict())
        self.others["targets"] = targets.requires_grad_(False)
        self.targets = layer_views(targets)
        self._critic = self.optimiser("critic", list(model.critics.parameters()))
        self._policy = self.optimiser("policy", list(model.policy.parameters()))
        fixed = self.temperature
        if self.config.agent.temperature is not None:
            fixed = self.config.agent.temperature
        self._temperature = None
        if fixed is None:
            self._temperature = self.optimiser("temperature", [model.log_temperature])
        else:
            nn.init.constant_(model.log_temperature, math.log(fixed))

    def reward_of(self, batch: Transitions) -> Tensor:
        """The reward of every row, [N], as the method has learnt it."""
        raise NotImplementedError

    def critic_loss(
        self, batch: Transitions, noise: CriticNoise, temperature: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critics' loss and metrics: regression on `reward_of` the batch."""
        reward = self.reward_of(batch)
        backed_up = backup(
            self.weights, self.targets, batch, noise.target, self.config.discount, temperature
        )
        q = layers.critics(self.weights.critics, batch.obs, batch.action)
        return td_critic_loss(q, reward, backed_up), sides(q, reward.expand_as(q), batch.experts)

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        temperature = self.model.log_temperature.detach().exp()
        noise = CriticNoise(self.normal(*batch.action.shape), self.normal(*batch.action.shape))
        loss, metrics = self.critic_loss(batch, noise, temperature)
        critic_norm, made = self.step(loss, self._critic)
        actor_loss, log_prob, q = policy_loss(
            self.weights, batch.obs, self.normal(*batch.action.shape), temperature
        )
        policy_norm, _ = self.step(actor_loss, self._policy)
        if self._temperature is not None:
            target = -float(batch.action.shape[-1])
            self.step(
                temperature_loss(self.model.log_temperature, log_prob, target), self._temperature
            )
        move(
            layer_tensors(self.targets),
            layer_tensors(frozen(self.weights.critics)),
            self.settings.tau * made,
        )
        return metrics | {
            "critic_loss": loss.detach(),
            "policy_loss": actor_loss.detach(),
            "q_policy": q.mean(),
            "entropy": -log_prob.mean(),
            "temperature": temperature,
            "model_grad_norm": critic_norm,
            "policy_grad_norm": policy_norm,
        }


def sides(q: Tensor, reward: Tensor, experts: int) -> dict[str, Tensor]:
    """Metrics of Q and of rewards [2, N], of behaviour and, where there are any, demonstrations."""
    q, reward = q.detach(), reward.detach()
    behaviour = q[:, experts:].mean()
    found = {"q_behaviour": behaviour, "reward_behaviour": reward[:, experts:].mean()}
    if experts:
        of_experts = q[:, :experts].mean()
        found |= {
            "q_expert": of_experts,
            "q_difference": of_experts - behaviour,
            "reward_expert": reward[:, :experts].mean(),
        }
    return found
