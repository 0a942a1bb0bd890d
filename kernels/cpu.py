"""What the C++ backend's operations share: packed weights, and tensors as the arrays it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from iqmpc.kernels.weights import Layer, Weights


class CpuWeights:
    """A read-only copy of a world model in the C++ kernels' layout, made once and used often.

    `precision` is "float32" or "bf16": the operands of matrix products. `isa` names one of
    `iqmpc._C.isa_levels()`; by default it is the best one, or the one named by the environment
    variable IQMPC_ISA. Weights that are not finite are taken. An encoder of images is left out:
    a planner is then given latents, and `obs_dim` is Z. Raises `ValueError` for tensors that are
    not float32 on the CPU and for sizes that do not fit together.
    """

    def __init__(self, weights: Weights, *, precision: str = "float32", isa: str | None = None):
        # Here, so that the package can be imported, and the reference used, without the extension.
        from iqmpc import _C

        self.native = _C.WorldModel(model_view(weights), precision=precision, isa=isa)
        self.obs_dim: int = self.native.obs_dim
        self.action_dim: int = self.native.action_dim
        self.latent_dim: int = self.native.latent_dim
        self.num_critics: int = self.native.num_critics
        self.precision: str = self.native.precision
        self.isa: str = self.native.isa


def as_array(name: str, tensor: Tensor) -> np.ndarray:
    """The memory of a float32 CPU tensor; `ValueError` for another."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU for the cpu backend, got {tensor.device}")
    # Here rather than in the extension, since NumPy lacks some of torch's dtypes.
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name} must be float32 for the cpu backend, got {tensor.dtype}")
    return tensor.detach().numpy()


def refuse_grad(**tensors: Tensor) -> None:
    """Raise `ValueError` where autograd would expect a gradient through one of the tensors."""
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad and the cpu backend has no backward: use "
                "backend='reference' or torch.no_grad()"
            )


class LiveView:
    """The view of weights that are packed again and again: made anew only where they have moved."""

    def __init__(self) -> None:
        self._view: Any = None
        self._key: tuple | None = None

    def of(self, weights: Weights) -> Any:
        """`model_view(weights)`, or the one of the call before if it shows the same memory.

        That it does is asked of every tensor, since a tensor's memory may be exchanged. No other
        tensor can have come to lie there, because a view keeps what it shows.
        """
        tensors = weights.tensors()
        key = (
            weights.simnorm_dim,
            weights.log_std_min,
            weights.log_std_max,
            *(len(part) for part in weights[:4]),
            [t.data_ptr() for t in tensors],
            [t.shape for t in tensors],
            [t.dtype for t in tensors],
        )
        contiguous = all(t.is_contiguous() for t in tensors)
        if self._key is None or key != self._key or not contiguous:
            self._view = model_view(weights)
            self._key = key if contiguous else None  # else it shows a copy
        return self._view


def model_view(weights: Weights) -> Any:
    """The weights as an `iqmpc._C.ModelView`, without a copy of those that are contiguous.

    An encoder of images, which the C++ library does not know, is left out. Raises `ValueError` for
    tensors that are not float32 on the CPU and for layers that are none.
    """
    from iqmpc import _C

    return _C.ModelView(
        encoder=[] if weights.encodes_images else layer_arrays("encoder", weights.encoder),
        **{
            part: layer_arrays(part, getattr(weights, part))
            for part in ("dynamics", "policy", "critics", "termination")
        },
        simnorm_dim=weights.simnorm_dim,
        log_std_min=weights.log_std_min,
        log_std_max=weights.log_std_max,
    )


def layer_arrays(part: str, layers: tuple[Layer, ...]) -> list[tuple[np.ndarray, ...]]:
    """(weight, bias[, gamma, beta]) of each layer."""
    return [
        tuple(
            as_array(f"{part} layer {i} {name}", t.contiguous())
            for name, t in zip(Layer._fields, layer, strict=True)
            if t is not None
        )
        for i, layer in enumerate(layers)
    ]
