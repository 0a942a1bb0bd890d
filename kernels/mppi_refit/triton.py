"""The Triton backend of `mppi_refit`: one launch, nothing leaves the device.

This module imports Triton: import it where it is used, not before (`iqmpc.kernels.backends`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iqmpc.kernels.triton_launch import LAUNCH, check_tensors
from iqmpc.kernels.triton_tiles import power_of_two

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # the rank of what is not finite
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Elements of the elites' actions that one program holds at a time.
HELD = 8192


@triton.jit
def _ordered(bits):
    """A float's bits as an integer that orders as the float does, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def elites_of(
    returns,  # [samples] of one problem
    samples, elites, temperature,
    SAMPLES: tl.constexpr, ELITES: tl.constexpr,  # powers of two, at least those numbers
):
    """Indices [ELITES] of the best, best first, and their normalised weights [ELITES].

    Equal returns rank by their place. Beyond `elites` both are 0.
    """
    i = tl.arange(0, SAMPLES)
    g = tl.load(returns + i, mask=i < samples, other=0.0)
    g = tl.where(tl.abs(g) <= -_LOWEST, g, _LOWEST)
    g = tl.where(g == 0, 0.0, g)  # -0 is 0
    rank = _ordered(g.to(tl.int32, bitcast=True)).to(tl.int64) << 32
    # The place in the low digits, counted backwards: the first of equals is the largest.
    best = tl.topk(tl.where(i < samples, rank | (0x7FFFFFFF - i).to(tl.int64), -(1 << 63)), ELITES)

    elite = tl.arange(0, ELITES) < elites
    chosen = tl.where(elite, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), 0)
    g = _ordered((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    g = tl.where(elite, g, _LOWEST)
    w = tl.where(g > _LOWEST, tl.exp(temperature * (g - tl.max(g, 0))), 0.0)
    return chosen, w / tl.maximum(tl.sum(w, 0), _TINY)


@triton.jit
def fit(
    actions,  # [S, A] of a problem and step
    chosen, w,  # [ELITES]
    a,  # [N] of the actions
    action_dim, elites, std_min, std_max, ELITES: tl.constexpr,
):
    """Mean and std [N] of the elites. Actions that are not finite count as 0."""
    elite = tl.arange(0, ELITES) < elites
    x = tl.load(actions + chosen[:, None] * action_dim + a[None, :],
                mask=elite[:, None] & (a < action_dim)[None, :], other=0.0)
    x = tl.where(tl.abs(x) <= -_LOWEST, x, 0.0)  # weight 0 does not silence a NaN
    centre = tl.sum(w[:, None] * x, 0)
    away = x - centre[None, :]
    spread = tl.sqrt(tl.sum(w[:, None] * away * away, 0))
    return centre, tl.minimum(tl.maximum(spread, std_min), std_max)


@triton.jit
def _refit_kernel(
    actions,  # [E, H, S, A]
    returns,  # [E, S]
    mean, std,  # [E, H, A]
    index,  # [E, elites] int64
    weight,  # [E, elites]
    samples, action_dim, elites, temperature, std_min, std_max,
    SAMPLES: tl.constexpr, ELITES: tl.constexpr, BLOCK_A: tl.constexpr,
):
    """Grid: problems, steps, blocks of actions. Every program ranks for itself, and the programs
    of a problem all write the same index and weight."""
    e, t = tl.program_id(0), tl.program_id(1)
    chosen, w = elites_of(returns + e * samples, samples, elites, temperature, SAMPLES, ELITES)
    k = tl.arange(0, ELITES)
    tl.store(index + e * elites + k, chosen.to(tl.int64), mask=k < elites)
    tl.store(weight + e * elites + k, w, mask=k < elites)
    a = tl.program_id(2) * BLOCK_A + tl.arange(0, BLOCK_A)
    line = (e * tl.num_programs(1) + t).to(tl.int64)
    centre, spread = fit(actions + line * samples * action_dim, chosen, w, a, action_dim, elites,
                         std_min, std_max, ELITES)
    tl.store(mean + line * action_dim + a, centre, mask=a < action_dim)
    tl.store(std + line * action_dim + a, spread, mask=a < action_dim)


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
    problems, horizon, samples, action_dim = actions.shape
    mean, std = actions.new_empty(2, problems, horizon, action_dim)
    index = torch.empty(problems, elites, dtype=torch.int64, device=actions.device)
    weight = returns.new_empty(problems, elites)
    rows = power_of_two(elites)
    block_a = max(1, min(power_of_two(action_dim), HELD // rows))
    with torch.no_grad(), torch.cuda.device_of(actions):
        _refit_kernel[(problems, horizon, triton.cdiv(action_dim, block_a))](
            actions.contiguous(), returns.contiguous(), mean, std, index, weight, samples,
            action_dim, elites, temperature, std_min, std_max, SAMPLES=power_of_two(samples),
            ELITES=rows, BLOCK_A=block_a, num_warps=8, **LAUNCH)
    return mean, std, index, weight
