"""The Triton backend of `mppi_rollout`, on a GPU; under TRITON_INTERPRET=1, slowly, on the CPU.

Two schedules run the same jobs (`triton_jobs`), on tiles of rows; a row is a sample of a problem:

- `throughput`, one launch: a program carries a tile through the whole trajectory, one job after
  the other, with its activations in scratch memory of its own. No program waits for another.
- `latency`, a chain of launches: the outputs of a layer are split over programs, and layers that
  do not depend on each other share a launch. A layer stores its pre-activations, and the sums of
  their squares 64 columns at a time, in a fixed order; whoever reads them normalises them.

In both, z_0's part of the first layers is computed first, by one launch, a row a problem.

This module imports Triton: import it where it is used, not before (`iqmpc.kernels.backends`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.cache import get_cache_manager

from iqmpc.kernels import layers
from iqmpc.kernels import triton_tiles as tiles
from iqmpc.kernels.mppi_rollout import triton_jobs as tables
from iqmpc.kernels.triton_launch import (
    COUNTED,
    INTERPRETED,
    LAUNCH,
    check_tensors,
    device_time,
    multiprocessors,
    tuned,
)
from iqmpc.kernels.triton_tiles import power_of_two
from iqmpc.kernels.triton_weights import PAD, VECTORS, TritonWeights
from iqmpc.kernels.weights import Weights

SCHEDULES = ("throughput", "latency")
# Rows that a multiprocessor has in flight in the throughput schedule, so that their scratch memory
# stays near the second-level cache. No tile is taller, in either schedule.
_TALLEST = 128
_KEPT = "iqmpc.schedule.txt"  # in Triton's cache
_KERNELS = Path(__file__).parents[1]
_LARGEST = 4 << 30  # bytes of scratch memory beyond which the latency schedule is not considered

# Arguments whose values no kernel is compiled for: they vary from call to call.
_SIZES = ["job_count", "rows", "samples", "horizon", "pitch", "noise_stride", "critics", "raw_size",
          "tuned_for"]
_EPS = tl.constexpr(1e-5)  # LayerNorm's, as in torch
_LOG2_E = tl.constexpr(1.4426950408889634)
_PAD = tl.constexpr(PAD)
_VECTORS = tl.constexpr(VECTORS)
_INTERPRETED = tl.constexpr(INTERPRETED)
_MISH, _SIMNORM, _HEAD, _POLICY, _ACT, _ROOT, _RAW = (
    tl.constexpr(v) for v in (tables.MISH, tables.SIMNORM, tables.HEAD, tables.POLICY, tables.ACT,
                              tables.ROOT, tables.RAW))
_ROOTS = tl.constexpr(tables.ROOTS)
_READY = tl.constexpr(-1)  # x needs no normalisation
_SHARED, _SAVED = tl.constexpr(tables.SHARED), tl.constexpr(tables.SAVED)
_NONE, _GIVEN = tl.constexpr(tables.NONE), tl.constexpr(tables.GIVEN)
_FIELDS = tl.constexpr(len(tables.Job._fields))
(_KIND, _SLOT, _WEIGHT, _INPUTS, _OUTPUTS, _VECTOR, _FEATURES, _ACTION_WEIGHT, _ACTION, _STEP,
 _INIT, _SOURCE, _SAVE, _X, _OUT, _POLICY_ACTION, _IN_VECTORS, _IN_FEATURES) = (
    tl.constexpr(i) for i in range(len(tables.Job._fields)))


@triton.jit
def _place(field):
    """An offset or size in a table: whole blocks of _PAD, which lets loads and stores be wide."""
    return tl.multiple_of(tl.load(field), _PAD)


@triton.jit
def _operand(x, dtype: tl.constexpr):
    """x [M, N] float32 in the dtype of a product's operands, rounded to nearest."""
    if _INTERPRETED:  # it would cut the digits off
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(x, y, acc, PRECISION: tl.constexpr):
    """acc [M, N] + x [M, K] y [K, N]."""
    if _INTERPRETED:  # it takes bf16 for integers
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


# One instruction each, within two units in the last place, denormal numbers being 0: every block
# of columns normalises its rows again, and Triton's own take several.
@triton.jit
def _exp2(x):
    if _INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _reciprocal(x):
    if _INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _exp(x):
    return _exp2(x * _LOG2_E)


@triton.jit
def _minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _mish(x):
    """As in `iqmpc.kernels.layers.mish`; a NaN stays one, being the factor."""
    e = _exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * (n * _reciprocal(n + 2.0))


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 * _reciprocal(_exp(2.0 * x) + 1.0)


@triton.jit
def _simnorm(x, GROUP: tl.constexpr):
    """Softmax in each group of neighbours: x [M, N] -> [M, N].

    Without taking the maximum out, a fifth of the instructions: x comes from LayerNorm, so
    |x| is at most |gain| sqrt(N) + |bias|. What is above 79.7 counts as that (below -87, as 0).
    """
    y = tl.reshape(x, (x.shape[0], x.shape[1] // GROUP, GROUP))
    y = _exp2(_minimum(y * _LOG2_E, 115.0))
    y = y * _reciprocal(tl.sum(y, 2) + 1e-37)[:, :, None]
    return tl.reshape(y, (x.shape[0], x.shape[1]))


@triton.jit
def _member(job, pair, critics):
    """Which of the stacked critics the job is for: 0 where it is for none."""
    slot = tl.load(job + _SLOT)
    drawn = tl.load(pair + tl.maximum(slot, 0)).to(tl.int32)
    # Out of range is answered with NaN at the end; nothing may be read out of range for it.
    return tl.where(slot < 0, 0, tl.minimum(tl.maximum(drawn, 0), critics - 1))


@triton.jit
def _layer(
    job,  # [_FIELDS]
    member,
    cols,  # [N] of the layer's outputs
    row,  # [M] pointers to lines of scratch memory; for RAW, to the lines of what is encoded
    rstd,  # [M] 1 / deviation of x's pre-activations, where IN says that x is to be normalised
    m,  # [M] sample, counted over all problems
    live,  # [M]
    matrices, vectors,  # `TritonWeights`'
    root,  # [E, _ROOTS * WIDTH] z_0's part of the first layers
    actions,  # [E, H, pitch, A], from the first of the S samples
    policy_action,  # [M, A] of this tile: ã_t
    samples, horizon, pitch,
    raw_size,  # of a line that RAW reads
    IN: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr,
    ACTIONS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Pre-activations [M, N] of a job. Columns beyond the layer's outputs are 0."""
    inputs = _place(job + _INPUTS)
    outputs = _place(job + _OUTPUTS)
    dtype: tl.constexpr = matrices.dtype.element_ty
    real = cols < outputs
    init = tl.load(job + _INIT)
    source = _place(job + _SOURCE)
    acc = tl.zeros((row.shape[0], cols.shape[0]), tl.float32)
    if init == _SHARED:
        acc += tl.load(root + (m // samples)[:, None] * (_ROOTS * WIDTH) + (source + cols)[None, :],
                       mask=live[:, None] & real[None, :], other=0.0)
    elif init == _SAVED:
        acc += tl.load(row[:, None] + (source + cols)[None, :],
                       mask=real[None, :], other=0.0).to(tl.float32)
    else:
        bias = vectors + _place(job + _VECTOR) + member * outputs * _VECTORS
        acc += tl.load(bias + cols, mask=real, other=0.0)[None, :]

    ks = tl.arange(0, BLOCK_K)
    x = row + _place(job + _X)
    weight = matrices + _place(job + _WEIGHT) + member * outputs * inputs
    # A critic's x comes from the same critic, unless it is the latent.
    source_member = member if IN == _MISH else 0
    scale = vectors + _place(job + _IN_VECTORS) + source_member * inputs * _VECTORS + inputs
    for k0 in range(0, inputs, BLOCK_K):
        k = k0 + ks
        if IN == _RAW:
            tile = tl.load(row[:, None] + k[None, :],
                           mask=live[:, None] & (k < raw_size)[None, :], other=0.0)
        else:
            tile = tl.load(x[:, None] + k[None, :])
        if IN == _MISH or IN == _SIMNORM:
            y = tile.to(tl.float32) * rstd[:, None] * tl.load(scale + k)[None, :]
            y += tl.load(scale + inputs + k)[None, :]
            tile = _mish(y) if IN == _MISH else _simnorm(y, GROUP)
        w = tl.load(weight + cols[None, :] * inputs + k[:, None], mask=real[None, :], other=0.0)
        if IN == _READY:
            acc = _dot(tile, w, acc, PRECISION)
        else:
            acc = _dot(_operand(tile, dtype), w, acc, PRECISION)

    if tl.load(job + _SAVE) >= 0:
        save = _place(job + _SAVE)
        tl.store(row[:, None] + (save + cols)[None, :], _operand(acc, dtype), mask=real[None, :])
    action = tl.load(job + _ACTION)
    if action != _NONE:
        a = tl.arange(0, ACTIONS)
        step = tl.load(job + _STEP)
        given = (m // samples * horizon + step) * pitch + m % samples
        size = tl.where(action == _GIVEN, A, 0)  # one of the two loads is of nothing
        taken = tl.load(actions + given[:, None] * A + a[None, :],
                        mask=live[:, None] & (a < size)[None, :], other=0.0)
        taken += tl.load(policy_action[:, None] + a[None, :],
                         mask=live[:, None] & (a < A - size)[None, :], other=0.0)
        weight = matrices + _place(job + _ACTION_WEIGHT)
        weight += member * outputs * ACTIONS
        w = tl.load(weight + cols[None, :] * ACTIONS + a[:, None], mask=real[None, :], other=0.0)
        acc = _dot(_operand(taken, dtype), w, acc, PRECISION)
    return acc


@triton.jit
def squashed(mean, spread, eps, log_std_min, log_std_max):
    """tanh(μ + σ ε), of log σ before its tanh."""
    log_std = log_std_min + 0.5 * (log_std_max - log_std_min) * (_tanh(spread) + 1.0)
    return _tanh(mean + _exp(log_std) * eps)


@triton.jit
def _draw(
    acc,  # [M, N] μ_j and log σ_j before its tanh, in turns
    first,  # column of acc's first
    noise, out,  # [M] pointers to lines of ε and of the actions
    live, log_std_min, log_std_max, A: tl.constexpr,
):
    N: tl.constexpr = acc.shape[1] // 2
    mean, spread = tl.split(tl.reshape(acc, (acc.shape[0], N, 2)))
    j = first // 2 + tl.arange(0, N)
    mask = live[:, None] & (j < A)[None, :]
    eps = tl.load(noise[:, None] + j[None, :], mask=mask, other=0.0)
    tl.store(out[:, None] + j[None, :], squashed(mean, spread, eps, log_std_min, log_std_max),
             mask=mask)


@triton.jit
def _score_noise(
    score_noise,  # [E, T, S, A], at the draws for z_1
    noise_stride,  # of a problem
    job, m, samples, A: tl.constexpr,
):
    """[M] pointers to the draws of ã_t, t >= 1."""
    step = tl.load(job + _STEP)
    return score_noise + m // samples * noise_stride + ((step - 1) * samples + m % samples) * A


@triton.jit
def _finish(
    acc,  # [M, N] pre-activations
    rstd,  # [M]
    job, member, cols, row, vectors,  # as in `_layer`
    kind, GROUP: tl.constexpr,
):
    """LayerNorm, activation, and the store or, of a critic's head, its part of the sum: [M]."""
    outputs = _place(job + _OUTPUTS)
    vector = vectors + _place(job + _VECTOR) + member * outputs * _VECTORS + cols
    real = cols < outputs
    y = acc * rstd[:, None] * tl.load(vector + outputs, mask=real, other=0.0)[None, :]
    y += tl.load(vector + 2 * outputs, mask=real, other=0.0)[None, :]
    q = tl.zeros_like(rstd)
    if kind == _SIMNORM:
        y = _simnorm(y, GROUP)
    else:
        y = _mish(y)
    if kind == _HEAD:
        q += tl.sum(y * tl.load(vector + 3 * outputs, mask=real, other=0.0)[None, :], 1)
    else:
        out = row + _place(job + _OUT)
        tl.store(out[:, None] + cols[None, :], _operand(y, row.dtype.element_ty),
                 mask=real[None, :])
    return q


@triton.jit
def _valid(pair, critics):
    first, second = tl.load(pair), tl.load(pair + 1)
    return (first >= 0) & (first < critics) & (second >= 0) & (second < critics)


@tuned(
    tiles.CHAIN, interpreted=tiles.Tile(16, 64, 4, 1),
    key=["tuned_for", "WIDTH", "PRECISION"],
)
@triton.jit(do_not_specialize=_SIZES)
def _chain_kernel(
    matrices, vectors,  # `TritonWeights`'
    jobs,  # [job_count, _FIELDS] int32
    pair,  # [2] int64
    root,  # [E, _ROOTS * WIDTH] float32
    actions,  # [E, H, pitch, A], from the first of the S samples
    score_noise,  # [E, T, S, A], at the draws for z_1
    scratch,  # [programs * BLOCK_M, 4 * WIDTH], the operands' dtype
    policy_actions,  # [programs * BLOCK_M, A] float32
    returns,  # [E, pitch], from the first of the S samples
    job_count, rows, samples, horizon, pitch, noise_stride, critics,
    discount, log_std_min, log_std_max,
    tuned_for,  # what the choice of tiles depends on
    GROUP: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, ACTIONS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The throughput schedule: tiles of rows, each carried through all jobs by one program."""
    WHOLE: tl.constexpr = BLOCK_N >= WIDTH
    line = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = scratch + line.to(tl.int64) * (4 * WIDTH)
    policy_action = policy_actions + line.to(tl.int64) * A
    dtype: tl.constexpr = scratch.dtype.element_ty
    valid = _valid(pair, critics)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        live = m < rows
        total = tl.zeros((BLOCK_M,), tl.float32)
        other_given = tl.zeros((BLOCK_M,), tl.float32)  # Q of the pair's first critic
        other_policy = tl.zeros((BLOCK_M,), tl.float32)
        alive = tl.full((BLOCK_M,), 1.0, tl.float32)  # 0 where a z_s up to here was terminal
        factor = tl.full((), 1.0, tl.float32)
        for i in range(0, job_count):
            job = jobs + i * _FIELDS
            kind = tl.load(job + _KIND)
            outputs = _place(job + _OUTPUTS)
            features = tl.load(job + _FEATURES).to(tl.float32)
            member = _member(job, pair, critics)
            square = tl.zeros((BLOCK_M,), tl.float32)
            q = tl.zeros((BLOCK_M,), tl.float32)
            if WHOLE:
                cols = tl.arange(0, BLOCK_N)
                acc = _layer(
                    job, member, cols, row, square, m, live, matrices, vectors, root, actions,
                    policy_action, samples, horizon, pitch, 0, _READY, GROUP, WIDTH, A, ACTIONS,
                    PRECISION, BLOCK_K)
                if kind == _POLICY:
                    _draw(acc, 0, _score_noise(score_noise, noise_stride, job, m, samples, A),
                          policy_action, live, log_std_min, log_std_max, A)
                else:
                    rstd = tl.rsqrt(tl.sum(acc * acc, 1) / features + _EPS)
                    q += _finish(acc, rstd, job, member, cols, row, vectors, kind, GROUP)
            else:
                out = row + _place(job + _OUT)
                for n0 in range(0, outputs, BLOCK_N):
                    cols = n0 + tl.arange(0, BLOCK_N)
                    acc = _layer(
                        job, member, cols, row, square, m, live, matrices, vectors, root, actions,
                        policy_action, samples, horizon, pitch, 0, _READY, GROUP, WIDTH, A, ACTIONS,
                        PRECISION, BLOCK_K)
                    if kind == _POLICY:
                        _draw(acc, n0, _score_noise(score_noise, noise_stride, job, m, samples, A),
                              policy_action, live, log_std_min, log_std_max, A)
                    else:
                        square += tl.sum(acc * acc, 1)
                        tl.store(out[:, None] + cols[None, :], _operand(acc, dtype),
                                 mask=(cols < outputs)[None, :])
                tl.debug_barrier()
                if kind != _POLICY:
                    rstd = tl.rsqrt(square / features + _EPS)
                    for n0 in range(0, outputs, BLOCK_N):
                        cols = n0 + tl.arange(0, BLOCK_N)
                        acc = tl.load(out[:, None] + cols[None, :],
                                      mask=(cols < outputs)[None, :], other=0.0).to(tl.float32)
                        q += _finish(acc, rstd, job, member, cols, row, vectors, kind, GROUP)
            if kind == _HEAD:
                bias = vectors + _place(job + _VECTOR) + member * outputs * _VECTORS
                q += tl.load(bias + 4 * outputs)
                drawn = tl.load(job + _POLICY_ACTION) == 1
                slot = tl.load(job + _SLOT)
                if slot < 0:
                    alive = tl.where(q > 0, 0.0, alive)
                elif slot == 0:
                    other_policy = tl.where(drawn, q, other_policy)
                    other_given = tl.where(drawn, other_given, q)
                else:  # Q(z_t, ã_t) comes before Q(z_t, a_t), the last of its t
                    best = _minimum(q, tl.where(drawn, other_policy, other_given))
                    # What is NaN vanishes with the rest.
                    total += tl.where(alive > 0, factor * tl.where(drawn, -best, best), 0.0)
                    factor = tl.where(drawn, factor, factor * discount)
            # What this job stored is read by other threads in the next.
            tl.debug_barrier()
        tl.store(returns + m // samples * pitch + m % samples,
                 tl.where(valid, total, float("nan")), mask=live)


@tuned(
    tiles.STAGE, interpreted=tiles.Tile(16, 64, 4, 1),
    key=["tuned_for", "WIDTH", "IN", "PRECISION"],
)
@triton.jit(do_not_specialize=_SIZES)
def _stage_kernel(
    matrices, vectors, jobs, pair,  # as in `_chain_kernel`
    raw,  # [E, raw_size] float32 of a RAW stage: z_0 or observations
    root, actions, score_noise,  # as in `_chain_kernel`
    policy_noise,  # [E, H, S, A] draws of the actions that ACT takes
    scratch,  # [rows, columns], the operands' dtype
    squares,  # [rows, columns / _PAD] float32: sums over _PAD pre-activations
    policy_actions,  # [rows, A] float32
    rows, columns, samples, horizon, pitch, noise_stride, critics, raw_size,
    log_std_min, log_std_max,
    tuned_for,  # what the choice of tiles depends on
    IN: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    A: tl.constexpr, ACTIONS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """A stage of the latency schedule. Grid: tiles of rows, blocks of columns, jobs."""
    job = jobs + tl.program_id(2) * _FIELDS
    first = tl.program_id(1) * BLOCK_N
    outputs = _place(job + _OUTPUTS)
    if first >= outputs:
        return
    cols = first + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < rows
    line = m.to(tl.int64)
    policy_action = policy_actions + line * A
    member = _member(job, pair, critics)
    rstd = tl.zeros((BLOCK_M,), tl.float32)
    if IN == _RAW:
        line_in = raw + line * raw_size
    else:
        line_in = scratch + line * columns
        # Not masked by `live`: there is a line for every row of a tile.
        slot = tl.arange(0, SLOTS)
        at = line[:, None] * (columns // _PAD) + _place(job + _X) // _PAD + slot[None, :]
        parts = tl.load(
            squares + at, mask=(slot < _place(job + _INPUTS) // _PAD)[None, :], other=0.0)
        rstd += tl.rsqrt(tl.sum(parts, 1) / tl.load(job + _IN_FEATURES).to(tl.float32) + _EPS)
    acc = _layer(
        job, member, cols, line_in, rstd, m, live, matrices, vectors, root, actions, policy_action,
        samples, horizon, pitch, raw_size, IN, GROUP, WIDTH, A, ACTIONS, PRECISION, BLOCK_K)
    kind = tl.load(job + _KIND)
    if kind == _ROOT:
        tl.store(root + line[:, None] * (_ROOTS * WIDTH) + (_place(job + _OUT) + cols)[None, :],
                 acc, mask=live[:, None] & (cols < outputs)[None, :])
    elif kind == _POLICY:
        _draw(acc, first, _score_noise(score_noise, noise_stride, job, m, samples, A),
              policy_action, live, log_std_min, log_std_max, A)
    elif kind == _ACT:
        step = m // samples * horizon + tl.load(job + _STEP)
        _draw(acc, first, policy_noise + (step * samples + m % samples) * A,
              actions + (step * pitch + m % samples) * A, live, log_std_min, log_std_max, A)
    else:
        row = scratch + line * columns
        out = _place(job + _OUT)
        tl.store(row[:, None] + (out + cols)[None, :], _operand(acc, scratch.dtype.element_ty),
                 mask=(cols < outputs)[None, :])
        PARTS: tl.constexpr = BLOCK_N // _PAD
        part = first // _PAD + tl.arange(0, PARTS)
        own = line[:, None] * (columns // _PAD) + out // _PAD + part[None, :]
        tl.store(squares + own, tl.sum(tl.reshape(acc * acc, (BLOCK_M, PARTS, _PAD)), 2),
                 mask=(part < outputs // _PAD)[None, :])


@triton.jit
def _head(
    scratch, squares,  # as in `_stage_kernel`
    line, live,  # [M]
    at,  # column of its second layer's pre-activations
    columns,
    scale,  # that layer's vectors
    outputs, features, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The one output [M] of a head, from the layer before its last."""
    slot = tl.arange(0, SLOTS)
    parts = tl.load(squares + line[:, None] * (columns // _PAD) + at // _PAD + slot[None, :],
                    mask=live[:, None] & (slot < outputs // _PAD)[None, :], other=0.0)
    rstd = tl.rsqrt(tl.sum(parts, 1) / features + _EPS)
    q = tl.zeros((line.shape[0],), tl.float32) + tl.load(scale + 4 * outputs)
    for n0 in range(0, outputs, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        real = cols < outputs
        y = tl.load(scratch + line[:, None] * columns + (at + cols)[None, :],
                    mask=live[:, None] & real[None, :], other=0.0).to(tl.float32)
        y *= rstd[:, None] * tl.load(scale + outputs + cols, mask=real, other=0.0)[None, :]
        y += tl.load(scale + 2 * outputs + cols, mask=real, other=0.0)[None, :]
        w = tl.load(scale + 3 * outputs + cols, mask=real, other=0.0)
        q += tl.sum(_mish(y) * w[None, :], 1)
    return q


@tuned(
    tiles.SCORE, interpreted=tiles.Tile(8, 64, 4, 1),
    key=["tuned_for", "WIDTH", "ENDS"],
)
@triton.jit(do_not_specialize=_SIZES)
def _score_kernel(
    vectors, pair, scratch, squares,  # as in `_stage_kernel`
    returns,  # as in `_chain_kernel`
    rows, columns, samples, pitch, horizon, critics, heads, vector, outputs, features,
    end_vector, end_outputs, end_features, discount,
    tuned_for,  # what the choice of tiles depends on
    ENDS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The heads' last layers and the sum over the horizon, of the latency schedule.

    heads: column of the first head; vector, outputs, features: of the critics' layer before it;
    end_...: of the termination head's, where it ENDS what is imagined.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < rows
    line = m.to(tl.int64)
    total = tl.zeros((BLOCK_M,), tl.float32)
    alive = tl.full((BLOCK_M,), 1.0, tl.float32)  # 0 where a z_s up to here was terminal
    factor = tl.full((), 1.0, tl.float32)
    for number in range(0, 2 * horizon - 1):  # a_0, a_1, ã_1, a_2, ã_2, ...
        best = tl.full((BLOCK_M,), float("inf"), tl.float32)
        for c in tl.static_range(2):
            member = tl.minimum(tl.maximum(tl.load(pair + c).to(tl.int32), 0), critics - 1)
            q = _head(scratch, squares, line, live, heads + (2 * number + c) * WIDTH, columns,
                      vectors + vector + member * outputs * _VECTORS, outputs, features, SLOTS,
                      BLOCK_N)
            best = _minimum(best, q)
        if ENDS:
            if number % 2 == 1:
                end = heads + (2 * (2 * horizon - 1) + number // 2) * WIDTH
                logit = _head(scratch, squares, line, live, end, columns, vectors + end_vector,
                              end_outputs, end_features, SLOTS, BLOCK_N)
                alive = tl.where(logit > 0, 0.0, alive)
        given = (number == 0) | (number % 2 == 1)
        factor = tl.where(number % 2 == 1, factor * discount, factor)
        # What is NaN vanishes with the rest.
        total += tl.where(alive > 0, factor * tl.where(given, best, -best), 0.0)
    total = tl.where(_valid(pair, critics), total, float("nan"))
    tl.store(returns + m // samples * pitch + m % samples, total, mask=live)


def mppi_rollout_triton(
    weights: Weights | TritonWeights,
    z0: Tensor,  # [E, Z]
    actions: Tensor,  # [E, H, S, A]
    score_noise: Tensor,  # [E, H-1, S, A] (advantage) or [E, H+1, S, A] (unrolled)
    critic_pair: Tensor,  # [2] int64, on the same device: it is not fetched
    discount: float,
    score: str,
    entropy_coef: float = 0.0,
    *,
    schedule: str | None = None,
) -> Tensor:  # [E, S]
    """See `iqmpc.kernels.mppi_rollout.mppi_rollout`. float32 tensors, all on one device.

    `schedule` is "throughput", "latency", or None for `resolve_schedule`'s. `Weights` are packed on
    every call, in float32. The unrolled score is computed as the advantage form plus
    -β log π(ã_0|z_0), by which the two differ. A critic out of range makes every return NaN.

    Nothing waits for the device and nothing allocated depends on data, so that a call can be
    captured in a CUDA graph, after one call with the same shapes that was not: the first one
    compiles, tunes the tile sizes, times the schedules and stores the job tables.
    `TritonWeights.refresh` keeps the memory that a graph reads.
    """
    if schedule is not None and schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    check_tensors(critic_pair, z0=z0, actions=actions, score_noise=score_noise)
    problems, horizon, samples, _ = actions.shape
    largest = max(actions.numel(), score_noise.numel())
    if largest >= COUNTED:
        raise ValueError(
            f"actions and score_noise have {largest} numbers, and the triton backend counts to "
            f"{COUNTED - 1}: score fewer samples or problems at once")
    if isinstance(weights, Weights):
        check_tensors(critic_pair, weights=weights.dynamics[0].weight)
        weights = TritonWeights(weights)
    returns = actions.new_empty(problems, samples)
    first = score == "unrolled"  # of the draws, the one for z_1
    launch = Launch(
        weights, actions.contiguous(), score_noise.contiguous()[:, first:], critic_pair,
        float(discount), returns, new_root(weights, problems), samples)
    # Triton launches on the current device.
    with torch.no_grad(), torch.cuda.device_of(z0):
        root = _table(weights, tables.root_stage, horizon)
        _launch_stages(launch, root, problems, raw=weights.latents(z0))
        score_samples(launch, schedule or resolve_schedule(launch))
        if score == "unrolled":
            _, log_prob = layers.policy_sample(
                weights.as_policy(), z0, score_noise[:, 0, 0])
            returns.sub_((entropy_coef * log_prob).unsqueeze(1))
    return returns


class Launch(NamedTuple):
    """What a rollout is launched with. `score_noise` begins with the draws for z_1.

    `actions` and `returns` may be the first or last of the samples in a larger memory, with `pitch`
    samples in a row.
    """

    weights: TritonWeights
    actions: Tensor  # [E, H, S, A]
    score_noise: Tensor  # [E, T, S, A]
    pair: Tensor  # [2]
    discount: float
    returns: Tensor  # [E, S]
    root: Tensor  # [E, ROOTS * width]
    pitch: int
    policy_noise: Tensor | None = None  # [E, H, S, A] draws for the actions that ACT takes

    def sizes(self) -> tuple[int, int, int]:
        """E, H, S"""
        return self.actions.shape[:3]

    def constants(self) -> dict[str, Any]:
        """Arguments that all layers' kernels take."""
        w = self.weights
        return dict(
            noise_stride=self.score_noise.stride(0), pitch=self.pitch, critics=w.num_critics,
            log_std_min=w.log_std_min, log_std_max=w.log_std_max, GROUP=w.group, WIDTH=w.width,
            A=w.action_dim, ACTIONS=w.actions, PRECISION=w.product, BLOCK_K=w.block)


def new_root(w: TritonWeights, problems: int) -> Tensor:
    """Memory for what the samples of a problem share, [E, ROOTS * width]."""
    return torch.empty(problems, tables.ROOTS * w.width, device=w.device)


def start(r: Launch, obs: Tensor, *, imagine: bool = True) -> None:
    """obs [E, O], or images -> the root of `r`: π(z_0) and, if `imagine`, z_0's part of the first
    layers."""
    w, (problems, horizon, _) = r.weights, r.sizes()
    raw = obs if w.encoder else w.encode(obs)
    _launch_stages(r, _table(w, tables.start, horizon if imagine else 0), problems, raw=raw)


def score_trajectories(r: Launch) -> None:
    """Roll π through d from the a_0 in `r.actions`, and score the trajectories."""
    _latency(r, tables.trajectories)


def score_samples(r: Launch, schedule: str) -> None:
    """Score the actions of `r`, whose root is there."""
    _throughput(r) if schedule == "throughput" else _latency(r, tables.stages)


_measured: dict[tuple[object, ...], str] = {}


def resolve_schedule(r: Launch, timer: Callable[[Callable[[], None]], float] | None = None) -> str:
    """The faster schedule for rollouts of this size on this device, timed once.

    The answer is kept in the process and, as those of the tile sizes, in Triton's cache directory,
    so that later processes compute the same. timer: gives the time of a call, in any unit; by
    default the device's time in a CUDA graph, which includes no work of the host. `choose_schedule`
    answers untimed in the interpreter, inside a capture, and where the latency schedule's scratch
    memory would be too large.
    """
    w, (problems, horizon, samples) = r.weights, r.sizes()
    rows = problems * samples
    guess = choose_schedule(problems, samples, w.device)
    columns = _table(w, tables.stages, horizon)[0].columns
    if rows * columns * w.dtype.itemsize > _LARGEST:
        return "throughput"
    if timer is None and (INTERPRETED or torch.cuda.is_current_stream_capturing()) or not rows:
        return guess
    name = torch.cuda.get_device_name(w.device) if w.device.type == "cuda" else "cpu"
    key = (name, w.precision, w.width, w.latent_size, w.action_dim, w.group,
           bool(w.termination), horizon,
           power_of_two(rows))
    if key not in _measured:
        code = triton.__version__, sources(_KERNELS)
        kept = get_cache_manager(hashlib.sha256(repr((key, code)).encode()).hexdigest())
        path = kept.get_file(_KEPT)
        if path is None:
            timer = timer or device_time
            times = {s: timer(functools.partial(score_samples, r, s)) for s in SCHEDULES}
            path = kept.put(min(times, key=times.get), _KEPT, binary=False)
        _measured[key] = Path(path).read_text()
    return _measured[key]


def sources(folder: Path) -> str:
    """The text of all files that the Triton kernels are made of: what a timing depends on."""
    return "".join(path.read_text("utf-8") for path in sorted(folder.rglob("triton*.py")))


def choose_schedule(problems: int, samples: int, device: torch.device) -> str:
    """A guess: `throughput` where tiles of 64 rows give every multiprocessor one, else `latency`.

    With fewer tiles, whole trajectories would leave multiprocessors idle.
    """
    tiles = -(-problems * samples // 64)
    return "throughput" if tiles >= multiprocessors(device) else "latency"


def _throughput(r: Launch) -> None:
    w, (problems, horizon, samples) = r.weights, r.sizes()
    chain, table = _table(w, tables.chain, horizon)
    rows, lines = problems * samples, _TALLEST * multiprocessors(w.device)
    lines = min(lines, rows + _TALLEST)  # with the last tile's padding
    scratch = w.matrices.new_empty(lines, chain.columns)
    policy_actions = w.vectors.new_empty(lines, w.action_dim)
    _chain_kernel[lambda meta: (
        min(triton.cdiv(rows, meta["BLOCK_M"]), lines // meta["BLOCK_M"]),)](
        w.matrices, w.vectors, table, r.pair, r.root, r.actions, r.score_noise, scratch,
        policy_actions, r.returns, job_count=len(chain.jobs), rows=rows, samples=samples,
        horizon=horizon,
        discount=r.discount, tuned_for=power_of_two(rows), **r.constants(), **LAUNCH)


def _latency(r: Launch, program: Callable[[TritonWeights, int], tables.Stages]) -> None:
    w, (problems, horizon, samples) = r.weights, r.sizes()
    rows = problems * samples
    program, *stages = _table(w, program, horizon)
    scratch, squares = _launch_stages(r, (program, *stages), rows)
    before = w.critics[1]
    end = w.termination[1] if w.termination else before
    _score_kernel[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]),)](
        w.vectors, r.pair, scratch, squares, r.returns, rows=rows, columns=program.columns,
        samples=samples, pitch=r.pitch, horizon=horizon, critics=w.num_critics,
        heads=program.heads, vector=before.vectors, outputs=before.outputs,
        features=before.features, end_vector=end.vectors, end_outputs=end.outputs,
        end_features=end.features, ENDS=bool(w.termination), discount=r.discount,
        tuned_for=power_of_two(rows), WIDTH=w.width, SLOTS=w.slots, **LAUNCH)


def _launch_stages(
    r: Launch, table: tuple[Any, ...], rows: int, *, raw: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run a program of stages on `rows` lines: scratch memory and sums of squares.

    raw: [rows, ...] float32, what a first stage that is RAW reads.
    """
    w, (_, horizon, samples) = r.weights, r.sizes()
    program, *stages = table
    lines = -(-rows // _TALLEST) * _TALLEST
    scratch = w.matrices.new_empty(lines, program.columns)
    squares = w.vectors.new_empty(lines, max(1, program.columns // PAD))
    policy_actions = w.vectors.new_empty(lines, w.action_dim)
    raw = r.root if raw is None else raw.contiguous()
    policy_noise = r.score_noise if r.policy_noise is None else r.policy_noise
    for stage, jobs in zip(program.stages, stages, strict=True):
        widest = max(job.outputs for job in stage.jobs)
        count = len(stage.jobs)
        _stage_kernel[lambda meta, widest=widest, count=count: (
            triton.cdiv(rows, meta["BLOCK_M"]), triton.cdiv(widest, meta["BLOCK_N"]), count)](
            w.matrices, w.vectors, jobs, r.pair, raw, r.root, r.actions, r.score_noise,
            policy_noise, scratch, squares, policy_actions, rows=rows, columns=program.columns,
            samples=samples, horizon=horizon, raw_size=raw.shape[1],
            tuned_for=power_of_two(rows * count), IN=stage.inputs,
            SLOTS=w.slots, **r.constants(), **LAUNCH)
    return scratch, squares


def _table(
    w: TritonWeights, program: Callable[[TritonWeights, int], Any], horizon: int
) -> tuple[Any, ...]:
    """A program of jobs and its tables on the device, one [jobs, _FIELDS] int32 a stage."""
    key = (program.__name__, horizon)
    if key not in w.tables:
        made = program(w, horizon)
        parts = made.stages if isinstance(made, tables.Stages) else [made]
        w.tables[key] = (made, *(
            torch.tensor(part.jobs, dtype=torch.int32, device=w.device) for part in parts))
    return w.tables[key]
