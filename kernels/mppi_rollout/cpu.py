"""The C++ backend of `mppi_rollout`: float32 tensors, weights in float32 or bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.kernels.cpu import CpuWeights, as_array, refuse_grad
from iqmpc.kernels.weights import Weights


def mppi_rollout_cpu(
    weights: Weights | CpuWeights,
    z0: Tensor,  # [E, Z]
    actions: Tensor,  # [E, H, S, A]
    score_noise: Tensor,  # [E, H-1, S, A] (advantage) or [E, H+1, S, A] (unrolled)
    critic_pair: Tensor,  # [2] int64
    discount: float,
    score: str,
    entropy_coef: float = 0.0,
) -> Tensor:  # [E, S]
    """See `iqmpc.kernels.mppi_rollout.mppi_rollout`. C-contiguous float32 CPU tensors.

    Runs on `torch.get_num_threads()` threads; the returns do not depend on their number.
    """
    from iqmpc import _C

    refuse_grad(z0=z0, actions=actions, score_noise=score_noise)
    if isinstance(weights, Weights):
        refuse_grad(weights=weights.encoder[0].weight)
        weights = CpuWeights(weights)
    returns = torch.empty(actions.shape[0], actions.shape[2])
    _C.rollout(
        weights.native,
        as_array("z0", z0),
        as_array("actions", actions),
        as_array("score_noise", score_noise),
        tuple(critic_pair.tolist()),
        discount,
        score,
        entropy_coef,
        returns.numpy(),
        torch.get_num_threads(),
    )
    return returns
