"""What the Triton kernels share: tile sizes tuned once per machine, checks of their arguments.

Imports Triton. Under the environment variable TRITON_INTERPRET=1, set before Triton is imported,
the kernels run on CPU tensors in Triton's interpreter: slowly, untuned, to show what they compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
# Of every launch. Said outright because Triton 3.10 changes what it does unasked.
LAUNCH = dict(enable_fp_fusion=True)
_TUNING_MS = 5  # of each repetition in which a choice is timed


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 1 for the interpreter, so that small shapes take several turns there."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def tuned(
    choices: list[dict[str, int]], *, interpreted: dict[str, int], key: list[str]
) -> Callable[[Any], Any]:
    """Decorate a kernel: the fastest of `choices` for each value of the arguments in `key`.

    A choice gives a kernel's constants, `num_warps` and `num_stages`. The timings are kept in
    Triton's cache directory, for later processes. Choices that need more shared memory than the
    device has are passed over. The interpreter takes `interpreted`.
    """
    if INTERPRETED:
        return triton.autotune([triton.Config(interpreted)], key=key)
    configs = [
        triton.Config(
            {k: v for k, v in choice.items() if k.startswith("BLOCK")},
            num_warps=choice["num_warps"], num_stages=choice["num_stages"])
        for choice in choices]
    return triton.autotune(
        configs, key=key, cache_results=True, do_bench=device_time,
        prune_configs_by={"early_config_prune": _usable})


def device_time(
    call: Callable[[], object], quantiles: tuple[float, ...] = (0.5,)
) -> float | list[float]:
    """Milliseconds of `call` on the GPU, by default the median: in a CUDA graph, so without the
    host's work, and with what the cache holds from the call before, as in a plan."""
    torch.cuda.synchronize()  # another stream takes over
    return triton.testing.do_bench_cudagraph(call, rep=_TUNING_MS, quantiles=quantiles)


class Target(NamedTuple):
    """What a GPU has: bytes of shared memory for one program, and Hopper's products or later."""

    shared: int
    hopper: bool


def fits(config: Any, target: Target, itemsize: int, block_k: int, widest: int) -> bool:
    """Whether a choice is worth trying: its operands fit the shared memory, its sums the registers,
    and its columns are not mostly padding. itemsize: of an operand."""
    m, n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    lines = config.num_stages * (m + n)
    # Sums a thread beyond which the compiler was seen to spill inside the loop: before Hopper the
    # operands pass through registers too, and float32's are two, with the low digits.
    sums = 128 if target.hopper else 64
    if itemsize == 4:
        lines += n  # the weights' low digits
        sums //= 2
    return (lines * block_k * itemsize <= target.shared and m * n <= sums * 32 * config.num_warps
            and n <= max(64, power_of_two(widest)))


def _usable(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    matrices = arguments.get("matrices")
    if matrices is None:  # no products
        return configs
    device = torch.cuda.get_device_properties(matrices.device)
    target = Target(device.shared_memory_per_block_optin, device.major >= 9)
    usable = [c for c in configs if fits(
        c, target, matrices.element_size(), constants["BLOCK_K"], constants["WIDTH"])]
    lowest = min((c.kwargs["BLOCK_M"] for c in usable), default=0)
    tallest = max(lowest, power_of_two(constants["rows"]))  # taller ones are mostly padding
    return [c for c in usable if c.kwargs["BLOCK_M"] <= tallest]


def check_tensors(beside: Tensor | None = None, **tensors: Tensor) -> None:
    """Raise `ValueError` for tensors that are not float32, on one device, outside autograd.

    beside: a tensor of another dtype that must lie on the same device.
    """
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} must be float32 for the triton backend, got {tensor.dtype}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad and the triton backend has no backward: use "
                "backend='reference' or torch.no_grad()")
    expected = "cpu" if INTERPRETED else "cuda"
    for tensor in (*tensors.values(), *(() if beside is None else (beside,))):
        if tensor.device != device or device.type != expected:
            raise ValueError(
                f"the triton backend takes tensors on one {expected} device, got {device} and "
                f"{tensor.device}")
