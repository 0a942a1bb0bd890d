"""The Triton backend of `mppi_refit`: one launch, nothing leaves the device.

This module imports Triton: import it where it is used, not before (`iqmpc.kernels.backends`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iqmpc.kernels.triton_launch import LAUNCH, check_tensors, power_of_two

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # the rank of what is not finite
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Elements of the elites' actions that one program holds at a time.
_HELD = 8192
_BLOCK = 64  # returns that are ranked at a time


@triton.jit
def _ranked(pointer, mask):
    """Returns [N], those that are not finite as the lowest number, those masked below that."""
    g = tl.load(pointer, mask=mask, other=0.0)
    g = tl.where(tl.abs(g) <= -_LOWEST, g, _LOWEST)
    return tl.where(mask, g, float("-inf"))


@triton.jit
def _refit_kernel(
    actions,  # [E, H, S, A]
    returns,  # [E, S]
    mean, std,  # [E, H, A]
    index,  # [E, elites] int64
    weight,  # [E, elites]
    samples, action_dim, elites, temperature, std_min, std_max,
    ELITES: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid: problems, steps, blocks of actions. Every program ranks for itself.

    The programs of a problem all write the same index and weight, and each reads what it wrote.
    """
    e, t = tl.program_id(0), tl.program_id(1)
    horizon = tl.num_programs(1)
    returns += e * samples
    index += e * elites
    for first in range(0, samples, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mine = _ranked(returns + i, i < samples)
        better = tl.zeros((BLOCK, BLOCK), tl.int32)
        for other in range(0, samples, BLOCK):
            j = other + tl.arange(0, BLOCK)
            theirs = _ranked(returns + j, j < samples)
            before = (theirs[None, :] > mine[:, None]) | (
                (theirs[None, :] == mine[:, None]) & (j[None, :] < i[:, None]))
            better += before.to(tl.int32)
        rank = tl.sum(better, 1)
        tl.store(index + rank, i.to(tl.int64), mask=(i < samples) & (rank < elites))
    tl.debug_barrier()  # the index is read by other threads than wrote it

    k = tl.arange(0, ELITES)
    elite = k < elites
    chosen = tl.load(index + k, mask=elite, other=0)
    g = _ranked(returns + chosen, elite)
    best = tl.max(g, 0)
    w = tl.where(g > _LOWEST, tl.exp(temperature * (g - best)), 0.0)
    w = w / tl.maximum(tl.sum(w, 0), _TINY)
    tl.store(weight + e * elites + k, w, mask=elite)

    a = tl.program_id(2) * BLOCK_A + tl.arange(0, BLOCK_A)
    line = (e * horizon + t).to(tl.int64) * samples + chosen
    x = tl.load(actions + line[:, None] * action_dim + a[None, :],
                mask=elite[:, None] & (a < action_dim)[None, :], other=0.0)
    x = tl.where(tl.abs(x) <= -_LOWEST, x, 0.0)  # weight 0 does not silence a NaN
    centre = tl.sum(w[:, None] * x, 0)
    away = x - centre[None, :]
    spread = tl.sqrt(tl.sum(w[:, None] * away * away, 0))
    at = (e * horizon + t) * action_dim + a
    tl.store(mean + at, centre, mask=a < action_dim)
    tl.store(std + at, tl.minimum(tl.maximum(spread, std_min), std_max), mask=a < action_dim)


def mppi_refit_triton(
    actions: Tensor,  # [E, H, S, A]
    returns: Tensor,  # [E, S]
    elites: int,
    temperature: float,
    std_min: float,
    std_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `iqmpc.kernels.mppi_refit.mppi_refit`. float32 tensors on one device.

    Equal returns rank by their place; actions that are not finite count as 0. Can be captured in a
    CUDA graph, after one call with the same shapes that was not.
    """
    check_tensors(actions=actions, returns=returns)
    envs, horizon, samples, action_dim = actions.shape
    mean, std = actions.new_empty(2, envs, horizon, action_dim)
    index = torch.empty(envs, elites, dtype=torch.int64, device=actions.device)
    weight = returns.new_empty(envs, elites)
    rows = power_of_two(elites)
    block_a = max(1, min(power_of_two(action_dim), _HELD // rows))
    with torch.no_grad(), torch.cuda.device_of(actions):
        _refit_kernel[(envs, horizon, triton.cdiv(action_dim, block_a))](
            actions.contiguous(), returns.contiguous(), mean, std, index, weight, samples,
            action_dim, elites, temperature, std_min, std_max, ELITES=rows, BLOCK_A=block_a,
            BLOCK=_BLOCK, num_warps=8, **LAUNCH)
    return mean, std, index, weight
