"""What stands in for a CUDA graph on a CPU: operations recorded, and done again on their memory."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A number or a shape that comes from the device, and a tensor made of the host's numbers.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.lift_fresh.default,
}


class Recorder(TorchDispatchMode):
    """Every operation of a function, with its operands: what a CUDA graph keeps of it.

    Replayed, each reads and writes the memory it did when it was recorded, whatever the program
    has done since; what the host knew then is a constant, and only generators are asked again.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op in WAITING:
            raise RuntimeError(f"{op} makes the host wait for the device")
        result = op(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        made = [t for t in tensors(result) if t.untyped_storage().data_ptr() not in inputs]
        if made or op._schema.is_mutable:  # the others are views
            self.operations.append((op, args, kwargs, result))
        return result

    def replay(self):
        with torch.no_grad():
            for op, args, kwargs, result in self.operations:
                again = op(*args, **kwargs)
                if not op._schema.is_mutable:
                    for old, new in zip(tensors(result), tensors(again), strict=True):
                        old.copy_(new)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
