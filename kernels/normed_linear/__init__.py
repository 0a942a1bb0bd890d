"""Linear, LayerNorm and Mish in one pass: the layer all of the world model's MLPs are made of."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from iqmpc.kernels.backends import resolve_backend
from iqmpc.kernels.cpu import refuse_grad
from iqmpc.kernels.normed_linear.cpu import PackedNormedLinear
from iqmpc.kernels.normed_linear.reference import normed_linear_reference

__all__ = ["BACKENDS", "normed_linear", "normed_linear_reference", "pack_normed_linear"]

BACKENDS = ("reference", "cpu")


def normed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """y = mish(layer_norm(x W^T + b) * γ + β) (IQ-MPC, Appendix A.1).

    Shapes: x [N, I], weight [O, I], bias, gamma, beta [O] -> y [N, O]. LayerNorm runs over the O
    outputs of each row with ε = 1e-5. The cpu backend takes C-contiguous float32 CPU tensors with
    finite parameters and has no backward; it packs the weights on every call, so a layer used more
    than once is better packed with `pack_normed_linear`.

    Raises `ValueError` for arguments that do not fit and `BackendError` for a backend that cannot
    run.
    """
    _check_parameters(weight, bias, gamma, beta)
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must have shape [N, {weight.shape[1]}], got {list(x.shape)}")
    if _resolve(backend, weight) == "reference":
        return normed_linear_reference(x, weight, bias, gamma, beta)
    refuse_grad(x=x, weight=weight, bias=bias, gamma=gamma, beta=beta)
    return PackedNormedLinear(weight, bias, gamma, beta)(x)


def pack_normed_linear(
    weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, *, backend: str = "auto"
) -> Callable[[Tensor], Tensor]:
    """A read-only snapshot of the layer: a function from x [N, I] to y [N, O].

    Later changes of the parameters do not reach it, nor do gradients. Arguments and errors are
    `normed_linear`'s.
    """
    _check_parameters(weight, bias, gamma, beta)
    if _resolve(backend, weight) == "cpu":
        return PackedNormedLinear(weight, bias, gamma, beta)
    parameters = [p.detach().clone() for p in (weight, bias, gamma, beta)]
    return lambda x: normed_linear_reference(x, *parameters)


def _check_parameters(weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [O, I], got {list(weight.shape)}")
    for name, tensor in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        if tensor.shape != weight.shape[:1]:
            raise ValueError(
                f"{name} must have shape [{weight.shape[0]}], got {list(tensor.shape)}"
            )


def _resolve(backend: str, weight: Tensor) -> str:
    # "auto" passes over a backend that could not take tensors from where these are.
    usable = BACKENDS if backend != "auto" or weight.device.type == "cpu" else ("reference",)
    return resolve_backend(backend, usable)
