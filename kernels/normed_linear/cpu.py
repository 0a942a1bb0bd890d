"""The C++ backend of `normed_linear`: float32, inference only."""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.kernels.cpu import as_array, refuse_grad


class PackedNormedLinear:
    """A read-only snapshot of one layer in the C++ kernel's layout.

    weight [O, I], bias, gamma and beta [O]: float32, C-contiguous, on the CPU, finite. `isa` names
    one of `iqmpc._C.isa_levels()`; by default it is the best one, or the one named by the
    environment variable IQMPC_ISA. Raises `ValueError` for arguments that do not fit.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, *, isa: str | None = None
    ) -> None:
        # Here, so that the package can be imported, and the reference used, without the extension.
        from iqmpc import _C

        named = {"weight": weight, "bias": bias, "gamma": gamma, "beta": beta}
        arrays = {name: as_array(name, tensor) for name, tensor in named.items()}
        self._layer = _C.NormedLinear(**arrays, isa=isa)

    @property
    def isa(self) -> str:
        """The instruction-set level the layer was packed for."""
        return self._layer.isa

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [N, I] -> [N, O], written into `out` where one is given; the two must not overlap.

        float32, C-contiguous, on the CPU; `ValueError` otherwise. Outside autograd: an `x` that
        requires grad is refused while grad mode is on. A row with a value that is not finite comes
        out as NaN, the others unaffected.
        """
        refuse_grad(x=x)
        if out is None:
            rows = x.shape[0] if x.dim() else 0
            out = torch.empty(rows, self._layer.out_features, dtype=torch.float32)
        self._layer.forward(as_array("x", x), as_array("out", out))
        return out
