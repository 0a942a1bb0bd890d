"""The meaning of `mppi_rollout`, in plain torch: imagine H steps, score the soft return."""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.kernels import layers
from iqmpc.kernels.weights import Weights


def mppi_rollout_reference(
    weights: Weights,
    z0: Tensor,  # [E, Z]
    actions: Tensor,  # [E, H, S, A]
    score_noise: Tensor,  # [E, H-1, S, A] (advantage) or [E, H+1, S, A] (unrolled)
    critic_pair: Tensor,  # [2] int64
    discount: float,
    score: str,
    entropy_coef: float = 0.0,  # β (times A): the unrolled form's, it cancels in the advantage form
) -> Tensor:  # [E, S]
    """See `iqmpc.kernels.mppi_rollout.mppi_rollout`."""
    pair = layers.draw_pair(weights.critics, critic_pair)
    horizon, samples = actions.shape[1:3]
    z = z0.unsqueeze(1).expand(-1, samples, -1)
    alive = torch.ones_like(z[..., 0], dtype=torch.bool)  # c_t

    def after(z: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
        """c_t at the next latent z, and `term` where it is not zero (what is NaN vanishes too)."""
        if not weights.termination:
            return alive, term
        now = alive & ~(layers.termination(weights, z) > 0)
        return now, term.where(now, 0.0)

    if score == "advantage":
        total = layers.q_min(pair, z, actions[:, 0])
        for t in range(1, horizon):
            z = layers.dynamics(weights, z, actions[:, t - 1])
            policy_action = layers.policy_action(weights, z, score_noise[:, t - 1])
            advantage = layers.q_min(pair, z, actions[:, t]) - layers.q_min(pair, z, policy_action)
            alive, advantage = after(z, advantage)
            total = total + discount**t * advantage
        return total

    def value(z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        # The exact density, whatever `learner.entropy` is: all but that of ã_0 cancels, and that
        # one is common to all samples.
        policy_action, log_prob = layers.policy_sample(weights, z, noise)
        return layers.q_min(pair, z, policy_action) - entropy_coef * log_prob, log_prob

    # z_0 is one latent, so it takes one policy sample: the first of its row of noise.
    _, log_prob = value(z, score_noise[:, 0, :1].expand(-1, samples, -1))
    total = torch.zeros_like(log_prob)
    for t in range(horizon):
        q = layers.q_min(pair, z, actions[:, t])
        z = layers.dynamics(weights, z, actions[:, t])
        next_value, next_log_prob = value(z, score_noise[:, t + 1])
        next_alive, next_value = after(z, next_value)
        step = q - discount * next_value - entropy_coef * log_prob
        total = total + discount**t * step.where(alive, 0.0)
        alive, log_prob = next_alive, next_log_prob
    return total + discount**horizon * next_value
