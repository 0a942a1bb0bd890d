"""Roll out the latent dynamics and score the soft return of every MPPI sample (IQ-MPC, eq. 15).

A plan's backends do this inside a plan of their own and do not call `mppi_rollout`. The operation
is the contract: it holds the reference, Triton, the C++ library and its CUDA wing to one meaning on
the same draws (`tests/kernels/mppi_rollout`), and it is the door to the two libraries for whoever
wants to score action sequences alone.

The CUDA wing (`csrc/cuda`, backend "cuda") is for C++ programs with a GPU and no Python: a rollout,
measured and tested here, and no plan; `planner.backend` does not offer it. Planning on a GPU is the
Triton backend's (`iqmpc.kernels.mppi_plan`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from iqmpc.kernels.backends import resolve_backend
from iqmpc.kernels.cpu import CpuWeights
from iqmpc.kernels.cuda import CudaWeights
from iqmpc.kernels.mppi_rollout.cpu import mppi_rollout_cpu
from iqmpc.kernels.mppi_rollout.cuda import mppi_rollout_cuda
from iqmpc.kernels.mppi_rollout.reference import mppi_rollout_reference
from iqmpc.kernels.triton_weights import TritonWeights
from iqmpc.kernels.weights import Weights


def _triton(*arguments: Any) -> Tensor:
    # Importing Triton's library after Mesa's has ended processes: not before it is needed.
    from iqmpc.kernels.mppi_rollout.triton import mppi_rollout_triton

    return mppi_rollout_triton(*arguments)


BACKENDS = {
    "reference": mppi_rollout_reference,
    "cpu": mppi_rollout_cpu,
    "triton": _triton,
    "cuda": mppi_rollout_cuda,
}
SCORES = ("advantage", "unrolled")


def noise_steps(horizon: int, score: str) -> int:
    """How many latents need a policy sample: z_1..z_{H-1} (advantage) or z_0..z_H (unrolled)."""
    return horizon - 1 if score == "advantage" else horizon + 1


def mppi_rollout(
    weights: Weights | CpuWeights | TritonWeights | CudaWeights,
    z0: Tensor,
    actions: Tensor,
    score_noise: Tensor,
    critic_pair: Tensor,
    discount: float,
    score: str = "advantage",
    *,
    entropy_coef: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Soft returns of S action sequences for each of E independent problems.

    Shapes: z0 [E, Z], actions [E, H, S, A] in [-1, 1], score_noise [E, T, S, A] standard normal
    with T = H-1 for `advantage` and H+1 for `unrolled`, critic_pair [2] int64. Returns [E, S].

    advantage: G = Q(z_0,a_0) + Σ_{t=1}^{H-1} γ^t (Q(z_t,a_t) - Q(z_t,ã_t)),  ã_t ~ π(·|z_t).
    unrolled:  G = Σ_{t<H} γ^t (r(z_t,a_t) - β log π(ã_t|z_t)) + γ^H V(z_H), with
    r = Q(z_t,a_t) - γ V(z_{t+1}) and β given as `entropy_coef`. On the same draws the two differ by
    -β log π(ã_0|z_0), the same number for every sample.

    Where the model has a termination head, an imagined latent that it takes as terminal has no
    future: with c_t = Π_{1≤s≤t} (1 - d̂(z_s)) and d̂ = 1 where the head's logit is above 0, the
    advantage at t counts c_t times, and in the unrolled form what happens at t c_t times and
    V(z_{t+1}) 1 - d̂(z_{t+1}) times. On the same draws the two still differ by that one number.

    The cpu backend takes C-contiguous float32 CPU tensors, the triton backend float32 CUDA tensors,
    the cuda backend C-contiguous ones; none has a backward. They pack `weights` on every call, in
    float32, unless they are `CpuWeights`, `TritonWeights` or `CudaWeights`, which only the one
    backend takes.

    Raises `ValueError` for arguments that do not fit and `BackendError` for a backend that cannot
    run.
    """
    _check(weights, z0, actions, score_noise, critic_pair, score)
    if backend == "auto" and isinstance(weights, CudaWeights):
        backend = "cuda"  # which "auto" takes for these weights alone
    run = BACKENDS[resolve_backend(backend, _usable(backend, weights, z0))]
    return run(weights, z0, actions, score_noise, critic_pair, discount, score, entropy_coef)


def _usable(
    backend: str, weights: Weights | CpuWeights | TritonWeights | CudaWeights, z0: Tensor
) -> Collection[str]:
    """The backends that could take these arguments; only "auto" passes over one."""
    if isinstance(weights, CpuWeights):
        return ("cpu",)
    if isinstance(weights, TritonWeights):
        return ("triton",)
    if isinstance(weights, CudaWeights):
        return ("cuda",)
    if backend != "auto":
        return BACKENDS
    if z0.dtype != torch.float32:
        return ("reference",)
    return {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}.get(
        z0.device.type, ("reference",)
    )


def _check(
    weights: Weights | CpuWeights | TritonWeights | CudaWeights,
    z0: Tensor,
    actions: Tensor,
    score_noise: Tensor,
    pair: Tensor,
    score: str,
) -> None:
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if actions.dim() != 4 or actions.shape[-1] != weights.action_dim:
        raise ValueError(
            f"actions must be [E, H, S, {weights.action_dim}], got {list(actions.shape)}"
        )
    problems, horizon, samples, action_dim = actions.shape
    for name, tensor, shape in (
        ("z0", z0, [problems, weights.latent_dim]),
        ("score_noise", score_noise, [problems, noise_steps(horizon, score), samples, action_dim]),
        ("critic_pair", pair, [2]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}")
