"""The meaning of `iq_update`: the losses under autograd, Adam and moving averages, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc import losses
from iqmpc.kernels.iq_update.types import UpdateSettings, UpdateState
from iqmpc.kernels.weights import frozen, layer_tensors
from iqmpc.losses import Batch, ModelNoise, PolicyNoise


def iq_update_reference(
    state: UpdateState,
    batch: Batch,
    model_noise: ModelNoise,
    policy_noise: PolicyNoise,
    settings: UpdateSettings,
    *,
    model_steps: int,
    policy_steps: int,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One update of `state` in place, on the draws given, in the state's own dtype.

    Parameters are leaves that require grad. Returns the metrics and the gradients before clipping:
    of encoder, dynamics, critics, termination and policy, in the order of `Weights`' layers.
    """
    s, w = settings, state.weights
    loss, latents, metrics = losses.model_loss(
        w, state.targets, batch, model_noise, s, s.discount, s.entropy_coef, s.c_gp > 0
    )
    encoder = layer_tensors(w.encoder)
    others = [t for part in (w.dynamics, w.critics, w.termination) for t in layer_tensors(part)]
    rates = [s.lr * s.encoder_lr_scale] * len(encoder) + [s.lr] * len(others)
    gradients, norm = _step(state, loss, encoder + others, rates, model_steps, s.grad_clip)

    policy_loss, policy_metrics = losses.policy_loss(
        w,
        latents,
        policy_noise,
        s.rho,
        s.entropy_coef,
        s.entropy,
        *losses.cloning(batch, metrics, s.c_bc),
    )
    policy = layer_tensors(w.policy)
    policy_gradients, policy_norm = _step(
        state, policy_loss, policy, [s.lr] * len(policy), policy_steps, s.grad_clip
    )

    with torch.no_grad():
        critics = layer_tensors(frozen(w.critics))
        for old, new in zip(layer_tensors(state.targets), critics, strict=True):
            old.lerp_(new, s.tau)
        if state.average is not None:
            for old, new in zip(state.average.tensors(), w.tensors(), strict=True):
                old.lerp_(new, s.average_rate)
    metrics |= policy_metrics | {"model_grad_norm": norm, "policy_grad_norm": policy_norm}
    return metrics, gradients + policy_gradients


def _step(
    state: UpdateState,
    loss: Tensor,
    parameters: list[Tensor],
    rates: list[float],
    steps: int,
    clip: float,
) -> tuple[list[Tensor], Tensor]:
    """One step of Adam at torch's defaults; the gradients and their norm, both before clipping."""
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    scale = (clip / (norm + 1e-6)).clamp(max=1)
    with torch.no_grad():
        for p, g, rate in zip(parameters, gradients, rates, strict=True):
            m, v = state.first(p), state.second(p)
            m.lerp_(g * scale, 0.1)
            v.lerp_((g * scale).square(), 0.001)
            unbiased = (v / (1 - 0.999 ** (steps + 1))).sqrt() + 1e-8
            p -= rate / (1 - 0.9 ** (steps + 1)) * m / unbiased
    return list(gradients), norm
