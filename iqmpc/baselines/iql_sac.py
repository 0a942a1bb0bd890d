"""IQ-Learn (Garg et al., 2021) with SAC: critics whose implied reward tells demonstrations apart.

The critics' loss is IQ-MPC's own (`iqmpc.losses.iq_loss`) on single steps, with what is observed in
the place of latents and twin critics in that of the ensemble:

    -mean_E[Q - γ(1-d)V̄(s')] + value term + 1/(4α) mean_{E ∪ π}[(Q - γ(1-d)V̄(s'))²]

The value term is (1-γ) mean_E V(s) with `learner.objective: iq`, the initial-state form, and
mean_π[V(s) - γ(1-d)V̄(s')] with `v_diff`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from iqmpc.baselines.learner import Transitions
from iqmpc.baselines.model import PolicyWeights
from iqmpc.baselines.sac import CriticNoise, Critics, SacLearner, backup, sides
from iqmpc.kernels import layers
from iqmpc.losses import gradient_penalty, iq_loss, soft_value


def iq_critic_loss(
    w: PolicyWeights,
    targets: Critics,
    batch: Transitions,
    noise: CriticNoise,
    *,
    objective: Literal["iq", "v_diff"],
    alpha: float,
    discount: float,
    temperature: Tensor | float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of both critics, without gradient penalty, and metrics."""
    n = batch.experts
    backed_up = backup(w, targets, batch, noise.target, discount, temperature)
    q = layers.critics(w.critics, batch.obs, batch.action)
    rows = slice(0, n) if objective == "iq" else slice(n, None)
    value = soft_value(w, w.critics, batch.obs[rows], noise.value[rows], temperature)
    if objective == "iq":
        value_term = (1 - discount) * value.mean()
    else:
        value_term = (value - backed_up[n:]).mean()
    residual = q - backed_up
    loss = iq_loss(residual.unsqueeze(1), value_term, n, alpha, rho=1.0)
    return loss, sides(q, residual, n) | {"value_term": value_term.detach()}


class IqLearnSac(SacLearner):
    """SAC with `iq_critic_loss`, and the gradient penalty where there is one."""

    temperature = 0.01  # IQ-Learn's, fixed, for control of continuous actions

    def critic_loss(
        self, batch: Transitions, noise: CriticNoise, temperature: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        s, config = self.settings, self.config
        assert s.objective != "td"  # the schema refuses it
        loss, metrics = iq_critic_loss(
            self.weights,
            self.targets,
            batch,
            noise,
            objective=s.objective,
            alpha=s.alpha,
            discount=config.discount,
            temperature=temperature,
        )
        if config.gradient_penalty and s.c_gp:
            mix = torch.rand(1, batch.experts, 1, device=self.device, generator=self.generator)
            penalty = gradient_penalty(
                self.weights.critics, batch.obs[None], batch.action[None], mix, rho=1.0
            )
            loss = loss + s.c_gp * penalty
            metrics["gradient_penalty"] = penalty.detach()
        return loss, metrics
