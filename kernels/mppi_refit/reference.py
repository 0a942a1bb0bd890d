"""The meaning of `mppi_refit`, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def mppi_refit_reference(
    actions: Tensor,  # [E, H, S, A]
    returns: Tensor,  # [E, S]
    elites: int,
    temperature: float,
    std_min: float,
    std_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `iqmpc.kernels.mppi_refit.mppi_refit`."""
    lowest = torch.finfo(returns.dtype).min
    ranked = torch.where(returns.isfinite(), returns, lowest)
    best, index = ranked.topk(elites, dim=1)
    weight = torch.exp(temperature * (best - best[:, :1])) * (best > lowest)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    rows = index[:, None, :, None].expand(-1, actions.shape[1], -1, actions.shape[3])
    chosen = actions.gather(2, rows).nan_to_num(0)  # weight 0 does not silence a NaN
    w = weight[:, None, :, None]
    mean = (w * chosen).sum(2)
    std = (w * (chosen - mean.unsqueeze(2)).square()).sum(2).sqrt().clamp(std_min, std_max)
    return mean, std, index, weight
