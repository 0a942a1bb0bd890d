"""The losses, as pure functions of weights, a batch and explicit noise (IQ-MPC, eq. 11-14).

Every random draw is an input, so eager, compiled and hand-written versions compute the same thing
on the same draws. Batches are time-major; the first `batch.experts` columns are demonstrations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iqmpc.config import LearnerConfig
from iqmpc.kernels import layers
from iqmpc.kernels.weights import Layer, PolicyLayers, Weights, frozen

if TYPE_CHECKING:
    from iqmpc.kernels.iq_update.types import UpdateSettings

Critics = tuple[Layer, ...]


class Batch(NamedTuple):
    """Slices of length H: obs [H+1, B, O], action [H, B, A], reward and terminated [H, B].

    Images are obs uint8 [H+1, B, 3C, 64, 64].
    `experts` counts the leading columns that come from demonstrations (0 for `objective: td`).
    `reward` is read by `td` alone; demonstrations carry zeros there.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    experts: int


class ModelNoise(NamedTuple):
    """Draws of one model and critic step.

    target [H, B, A] and initial [H, B, A] (`v_diff`; else [1, B, A]) are standard normal;
    keep [K, H·B, hidden] are dropout multipliers or None; mix [H, B_E, 1] ~ U(0, 1) or None;
    pair [2] int64 are the critics drawn for Q_min; shift [H+1, B, 2] int64 moves each observation,
    where they are images, by so many rows and columns, or is None.

    The others are dropout multipliers of `learner.dropout: always`, else None: keep_target
    [2, H·B, hidden] in V̄, keep_value in the value term's V ([2, B_E, hidden] for V(z_0),
    [2, H·B_π, hidden] for `v_diff`, None for `td`), both in the order of `pair`, and keep_penalty
    [K, H·B_E, hidden]. Rows are time-major, t·B + b, as everywhere.
    """

    target: Tensor
    initial: Tensor
    keep: Tensor | None
    mix: Tensor | None
    pair: Tensor
    shift: Tensor | None = None
    keep_target: Tensor | None = None
    keep_value: Tensor | None = None
    keep_penalty: Tensor | None = None


class PolicyNoise(NamedTuple):
    """Draws of one policy step: action [H+1, B, A] standard normal, pair [2] int64.

    keep [2, (H+1)·B, hidden] are dropout multipliers of `learner.dropout: always`, else None.
    """

    action: Tensor
    pair: Tensor
    keep: Tensor | None = None


def horizon_weights(rho: float, steps: int, like: Tensor) -> Tensor:
    """λ^t for t = 0..steps-1."""
    return rho ** torch.arange(steps, dtype=like.dtype, device=like.device)


def soft_value(
    weights: PolicyLayers,
    pair: Critics,
    z: Tensor,
    noise: Tensor,
    entropy_coef: float | Tensor,
    form: Literal["exact", "presquash"] = "exact",
    keep: Tensor | None = None,
) -> Tensor:
    """V(z) = Q_min(z, a) - β log π(a|z), a ~ π(·|z), with π held fixed: z [..., Z] -> [...].

    `form` of log π as in `layers.policy_sample`, `keep` as in `layers.q_min`.
    """
    with torch.no_grad():
        action, log_prob = layers.policy_sample(weights, z, noise, form)
    return layers.q_min(pair, z, action, keep) - entropy_coef * log_prob


def consistency_loss(predicted: Tensor, target: Tensor, rho: float) -> Tensor:
    """(1/H) Σ_t λ^t mean (z_{t+1} - ẑ_{t+1})², the mean over batch and latent dimensions.

    predicted, target [H, B, Z].
    """
    error = (predicted - target).square().mean((1, 2))
    return (horizon_weights(rho, len(error), error) * error).mean()


def iq_loss(residual: Tensor, value_term: Tensor, experts: int, alpha: float, rho: float) -> Tensor:
    """Inverse soft-Q objective, (1/(H K)) Σ_k Σ_t λ^t ℓ(k, t), without the gradient penalty.

    residual [K, H, B]: Q_k(z_t,a_t) - γ(1-d) V̄(ẑ_{t+1}), the reward each critic implies.
    value_term [H] (or a scalar): (1-γ) mean V(z_0), or the value difference of `v_diff`.
    ℓ = -mean over experts of the residual + value term + 1/(4α) mean of its square over all.
    """
    push = -residual[..., :experts].mean(-1)
    chi2 = residual.square().mean(-1) / (4 * alpha)
    return (horizon_weights(rho, residual.shape[1], residual) * (push + value_term + chi2)).mean()


def td_loss(residual: Tensor, reward: Tensor, rho: float) -> Tensor:
    """Regression of Q_k on r + γ(1-d) V̄: residual [K, H, B] against reward [H, B]."""
    error = (residual - reward).square().mean(-1)
    return (horizon_weights(rho, residual.shape[1], residual) * error).mean()


def termination_loss(
    logit: Tensor, terminated: Tensor, rho: float, weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(1/H) Σ_t λ^t mean of the cross-entropy of d̂(z_{t+1}), terminal rows `weight` times.

    logit, terminated [H, B]. The metrics are the loss, and the recall and precision of the
    threshold that planning uses (NaN where the batch has nothing to find, or nothing was claimed).
    """
    entropy = F.binary_cross_entropy_with_logits(
        logit, terminated, pos_weight=logit.new_full((), weight), reduction="none"
    ).mean(1)
    loss = (horizon_weights(rho, len(entropy), entropy) * entropy).mean()
    claimed = (logit.detach() > 0).to(terminated.dtype)
    found = (claimed * terminated).sum()
    return loss, {
        "termination_loss": loss,
        "termination_recall": found / terminated.sum(),
        "termination_precision": found / claimed.sum(),
    }


def gradient_penalty(
    critics: Critics,
    z: Tensor,
    action: Tensor,
    mix: Tensor,
    rho: float,
    keep: Tensor | None = None,
) -> Tensor:
    """(1/(H K)) Σ_k Σ_t λ^t mean (‖∇_(z,a) Q_k‖₂ - 1)² between expert and behaviour rows.

    z [H, 2·B_E, Z] and action [H, 2·B_E, A], experts first, the second half their partners;
    mix [H, B_E, 1] in [0, 1] is the expert's share; keep [K, H·B_E, hidden] are dropout multipliers
    or None. Latents are taken as given: the penalty shapes the critics, not the encoder.
    """
    horizon, experts = mix.shape[:2]
    x = torch.cat([z, action], dim=-1).detach()
    x = (mix * x[:, :experts] + (1 - mix) * x[:, experts:]).flatten(0, 1)
    # A copy of the rows for each critic: then the gradient of one sum is every row's own gradient.
    x = x.repeat(critics[0].weight.shape[0], 1, 1)
    gradient = torch.func.grad(lambda x: layers.ensemble(critics, x, keep).sum())
    slopes = gradient(x)  # [K, H·B_E, Z+A]
    # The root's gradient is infinite at 0, and the critics start there (zero last layer).
    error = (slopes.square().sum(-1).clamp_min(1e-12).sqrt() - 1).square()
    error = error.unflatten(1, (horizon, experts)).mean(-1)
    return (horizon_weights(rho, horizon, error) * error).mean()


def model_loss(
    weights: Weights,
    targets: Critics,
    batch: Batch,
    noise: ModelNoise,
    config: LearnerConfig | UpdateSettings,
    discount: float,
    entropy_coef: float,
    penalise: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The encoder's, dynamics' and critics' loss, and the termination head's; π is fixed.

    Returns the loss, the imagined latents z [H+1, B, Z] and metrics (0-dim tensors).
    `entropy_coef` is the coefficient in force, β or β·A; `penalise` adds the gradient penalty.
    """
    horizon = batch.action.shape[0]
    obs = batch.obs if noise.shift is None else layers.shifted(batch.obs, noise.shift)
    with torch.no_grad():
        encoded = layers.encode(weights, obs[1:])
        target_value = soft_value(
            weights,
            layers.draw_pair(targets, noise.pair),
            encoded,
            noise.target,
            entropy_coef,
            config.entropy,
            noise.keep_target,
        )
        backup = discount * (1 - batch.terminated) * target_value
    imagined = [layers.encode(weights, obs[0])]
    for t in range(horizon):
        imagined.append(layers.dynamics(weights, imagined[-1], batch.action[t]))
    latents = torch.stack(imagined)

    consistency = consistency_loss(latents[1:], encoded, config.rho)
    q = layers.critics(weights.critics, latents[:-1], batch.action, noise.keep)
    residual = q - backup
    metrics = {
        "consistency": consistency,
        "q_behaviour": q[..., batch.experts :].mean(),
        "target_value": target_value.mean(),
    }
    if config.objective == "td":
        critic = td_loss(residual, batch.reward, config.rho)
    else:
        n = batch.experts
        pair = layers.draw_pair(weights.critics, noise.pair)
        if config.objective == "iq":
            value = soft_value(
                weights,
                pair,
                latents[0, :n],
                noise.initial[0, :n],
                entropy_coef,
                config.entropy,
                noise.keep_value,
            )
            value_term = (1 - discount) * value.mean()
        else:
            value = soft_value(
                weights,
                pair,
                latents[:-1, n:],
                noise.initial[:, n:],
                entropy_coef,
                config.entropy,
                noise.keep_value,
            )
            value_term = (value - backup[:, n:]).mean(-1)
        critic = iq_loss(residual, value_term, n, config.alpha, config.rho)
        metrics |= {
            "q_expert": q[..., :n].mean(),
            "q_difference": q[..., :n].mean() - q[..., n:].mean(),
            "reward_expert": residual[..., :n].mean(),
            "reward_behaviour": residual[..., n:].mean(),
            "value_term": value_term.mean(),
        }
        if penalise:
            assert noise.mix is not None  # drawn where there is a penalty
            penalty = gradient_penalty(
                weights.critics,
                latents[:-1],
                batch.action,
                noise.mix,
                config.rho,
                noise.keep_penalty,
            )
            critic = critic + config.c_gp * penalty
            metrics["gradient_penalty"] = penalty
    metrics["critic_loss"] = critic
    loss = config.c_cons * consistency + config.c_iq * critic
    if weights.termination:
        ends, ends_metrics = termination_loss(
            layers.termination(weights, latents[1:]),
            batch.terminated,
            config.rho,
            config.termination_weight,
        )
        loss = loss + config.c_termination * ends
        metrics |= ends_metrics
    return loss, latents.detach(), {k: v.detach() for k, v in metrics.items()}


def cloning(
    batch: Batch, metrics: dict[str, Tensor], c_bc: float
) -> tuple[Tensor, Tensor] | tuple[()]:
    """What `policy_loss` is given to imitate, [H, B_E, A], and its weight, c_bc (1 + |its mean Q|).

    The scale is that of the other term, as in TD3+BC (Fujimoto and Gu, 2021); `metrics` are those
    of `model_loss` on the same batch. Nothing where c_bc is 0 or nothing was demonstrated.
    """
    if not (c_bc and batch.experts):
        return ()
    return batch.action[:, : batch.experts], c_bc * (1 + metrics["q_expert"].detach().abs())


def policy_loss(
    weights: Weights,
    latents: Tensor,
    noise: PolicyNoise,
    rho: float,
    entropy_coef: float,
    form: Literal["exact", "presquash"] = "exact",
    demonstrated: Tensor | None = None,
    weight: Tensor | float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ_{t=0..H} λ^t mean[β log π(a|z_t) - Q_min(z_t, a)] / (H+1); critics and latents fixed.

    latents [H+1, B, Z]; `form` of log π as in `layers.policy_sample`. With `demonstrated`, the
    actions [H, B_E, A] of the leading columns, `weight` Σ_{t<H} λ^t mean (a - a_t)² / H is added.
    Returns the loss and metrics; `entropy` is -mean log π of that form.
    """
    pair = layers.draw_pair(frozen(weights.critics), noise.pair)
    action, log_prob = layers.policy_sample(weights, latents.detach(), noise.action, form)
    q = layers.q_min(pair, latents.detach(), action, noise.keep)
    loss = (entropy_coef * log_prob - q).mean(1)
    loss = (horizon_weights(rho, len(loss), loss) * loss).mean()
    metrics = {"entropy": -log_prob.detach().mean(), "q_policy": q.detach().mean()}
    if demonstrated is not None:
        horizon, experts = demonstrated.shape[:2]
        error = (action[:horizon, :experts] - demonstrated).square().mean((1, 2))
        error = (horizon_weights(rho, horizon, error) * error).mean()
        loss = loss + weight * error
        metrics["cloning_error"] = error.detach()
    return loss, {"policy_loss": loss.detach(), **metrics}
