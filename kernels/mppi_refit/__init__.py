"""Refit the sampling distribution of MPPI to its elites (IQ-MPC, Algorithm 1).

A plan's backends refit inside a plan of their own and do not call `mppi_refit`. The operation is
the contract that holds the reference and Triton to one meaning (`tests/kernels/mppi_refit`); the
C++ planner's refit is held to the same reference by the tests of whole plans.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iqmpc.kernels.backends import resolve_backend
from iqmpc.kernels.mppi_refit.reference import mppi_refit_reference


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Importing Triton's library after Mesa's has ended processes: not before it is needed.
    from iqmpc.kernels.mppi_refit.triton import mppi_refit_triton

    return mppi_refit_triton(*arguments)


BACKENDS = {"reference": mppi_refit_reference, "triton": _triton}


def mppi_refit(
    actions: Tensor,
    returns: Tensor,
    *,
    elites: int,
    temperature: float,
    std_min: float,
    std_max: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the best `elites` of S samples and refit with weights exp(η (G - max G)).

    Shapes: actions [E, H, S, A], returns [E, S]. Returns mean [E, H, A], std [E, H, A] in
    [std_min, std_max], elite indices [E, elites] best first, and their normalised weights
    [E, elites]. A return that is not finite ranks last with weight 0; where none is finite all
    weights are 0.

    The triton backend takes float32 CUDA tensors and has no backward; "auto" takes it for those.

    Raises `ValueError` for shapes that do not fit and `BackendError` for a backend that cannot run.
    """
    if actions.dim() != 4 or list(returns.shape) != [actions.shape[0], actions.shape[2]]:
        raise ValueError(
            f"actions must be [E, H, S, A] and returns [E, S], got {list(actions.shape)} and "
            f"{list(returns.shape)}"
        )
    if not 1 <= elites <= returns.shape[1]:
        raise ValueError(f"elites must lie in [1, {returns.shape[1]}], got {elites}")
    usable = BACKENDS
    if backend == "auto" and not (actions.is_cuda and actions.dtype == torch.float32):
        usable = ("reference",)
    run = BACKENDS[resolve_backend(backend, usable)]
    return run(actions, returns, elites, temperature, std_min, std_max)
