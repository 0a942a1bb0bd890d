"""The CUDA C++ backend of `mppi_rollout`: float32 tensors, weights in float32 or bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.kernels.cuda import CudaWeights
from iqmpc.kernels.weights import Weights


def mppi_rollout_cuda(
    weights: Weights | CudaWeights,
    z0: Tensor,  # [E, Z]
    actions: Tensor,  # [E, H, S, A]
    score_noise: Tensor,  # [E, H-1, S, A] (advantage) or [E, H+1, S, A] (unrolled)
    critic_pair: Tensor,  # [2] int64
    discount: float,
    score: str,
    entropy_coef: float = 0.0,
) -> Tensor:  # [E, S]
    """See `iqmpc.kernels.mppi_rollout.mppi_rollout`. C-contiguous float32 CUDA tensors.

    Enqueued on torch's current stream; nothing waits for the device, except to copy a
    `critic_pair` that lies on the CPU, which is checked. One on the device is not: a critic that
    does not exist gives returns of NaN.
    """
    from iqmpc import _C

    if isinstance(weights, Weights):
        weights = CudaWeights(weights, device=z0.device if z0.is_cuda else None)
    if critic_pair.device.type == "cpu":
        for k in critic_pair.tolist():
            if not 0 <= k < weights.num_critics:
                raise ValueError(f"critic_pair must lie in [0, {weights.num_critics}), got {k}")
        critic_pair = critic_pair.to(weights.device, torch.int64)
    problems, horizon, samples, _ = actions.shape
    returns = torch.empty(problems, samples, device=weights.device)
    # From torch's allocator, which knows the stream: freed at once, reused after the kernels.
    work = torch.empty(
        weights.native.work_bytes(problems), dtype=torch.uint8, device=weights.device
    )
    _C.cuda_rollout(
        weights.native,
        problems=problems,
        horizon=horizon,
        samples=samples,
        z0=weights.address("z0", z0),
        actions=weights.address("actions", actions),
        score_noise=weights.address("score_noise", score_noise),
        critic_pair=weights.address("critic_pair", critic_pair, torch.int64),
        discount=discount,
        score=score,
        entropy_coef=entropy_coef,
        returns=returns.data_ptr(),
        work=work.data_ptr(),
        stream=torch.cuda.current_stream(weights.device).cuda_stream,
    )
    return returns
