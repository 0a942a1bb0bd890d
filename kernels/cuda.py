"""What the CUDA C++ backend's operations share: weights on a device, and tensors as addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.errors import BackendError
from iqmpc.kernels.backends import available_backends
from iqmpc.kernels.cpu import model_view
from iqmpc.kernels.weights import Weights


class CudaWeights:
    """A read-only copy of a world model in the CUDA kernels' layout, made once and used often.

    `precision` is "float32" or "bf16": the operands of matrix products. The copy lies on `device`,
    by default that of the weights, or the current CUDA device for weights on the CPU. Packing is
    the host's work, so weights on a GPU are fetched first. Weights that are not finite are taken.

    Raises `BackendError` where no CUDA kernel can run, and `ValueError` for tensors that are not
    float32, for sizes that do not fit together, for layers wider than the device's shared memory
    and for a model with a termination head.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        precision: str = "float32",
        device: torch.device | str | int | None = None,
    ):
        missing = available_backends()["cuda"]
        if missing is not None:
            raise BackendError(f"backend=cuda cannot run: {missing}")
        # Here, so that the package can be imported, and the reference used, without the extension.
        from iqmpc import _C

        if weights.termination:
            raise ValueError("the cuda backend takes no model with a termination head")
        for tensor in weights.tensors():
            if tensor.dtype != torch.float32:
                raise ValueError(
                    f"weights must be float32 for the cuda backend, got {_name(tensor.dtype)}"
                )
        self.device = _cuda_device(device, weights.encoder[0].weight.device)
        host = weights.map(lambda t: t.detach().cpu())
        self.native = _C.CudaWorldModel(
            model_view(host), precision=precision, device=self.device.index
        )
        self.action_dim: int = self.native.action_dim
        self.latent_dim: int = self.native.latent_dim
        self.num_critics: int = self.native.num_critics
        self.precision: str = self.native.precision

    def address(self, name: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Where the tensor's elements lie; `ValueError` for one that the kernels cannot read."""
        if tensor.device != self.device:
            raise ValueError(
                f"{name} must be on {self.device} for the cuda backend, got {tensor.device}"
            )
        if tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {_name(dtype)} for the cuda backend, got {_name(tensor.dtype)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be C-contiguous for the cuda backend, got strides of "
                f"{list(tensor.stride())} elements"
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad and the cuda backend has no backward: use "
                "backend='reference' or torch.no_grad()"
            )
        return tensor.data_ptr()


def _cuda_device(device: torch.device | str | int | None, default: torch.device) -> torch.device:
    chosen = (
        torch.device("cuda", device)
        if isinstance(device, int)
        else torch.device(device or (default if default.type == "cuda" else "cuda"))
    )
    if chosen.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {chosen}")
    if chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
