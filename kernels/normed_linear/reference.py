"""The meaning of `normed_linear`, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def normed_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor
) -> Tensor:
    """mish(layer_norm(x W^T + b) * γ + β): x [N, I], weight [O, I], the others [O] -> [N, O].

    Any floating dtype, any device, differentiable. LayerNorm runs over the O outputs with ε = 1e-5.
    """
    y = F.layer_norm(F.linear(x, weight, bias), bias.shape, gamma, beta, eps=1e-5)
    return F.mish(y)
