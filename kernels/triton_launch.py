"""What the Triton kernels share: tile sizes tuned once per machine, checks of their arguments.

Imports Triton. Under the environment variable TRITON_INTERPRET=1, set before Triton is imported,
the kernels run on CPU tensors in Triton's interpreter: slowly, untuned, to show what they compute.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

from iqmpc.kernels.triton_tiles import Target, Tile, usable

INTERPRETED: bool = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"  # where a kernel's tensors lie
# Of every launch. Said outright because Triton 3.10 changes what it does unasked.
LAUNCH = dict(enable_fp_fusion=True)
COUNTED = 2**31  # elements of a tensor that the kernels' offsets cannot reach
_TUNING_MS = 5  # of each repetition in which a choice is timed


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 1 for the interpreter, so that small shapes take several turns there."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def target(device: torch.device) -> Target:
    """What the tile sizes must fit."""
    found = torch.cuda.get_device_properties(device)
    return Target(found.shared_memory_per_block_optin, found.major >= 9)


def tuned(
    tiles: list[Tile], *, interpreted: Tile, key: list[str]
) -> Callable[[Any], Any]:
    """Decorate a kernel: the fastest of `tiles` for each value of the arguments in `key`.

    The choices are compiled side by side and then timed; the timings are kept in Triton's cache
    directory, for later processes. Choices that need more shared memory than the device has are
    passed over. The interpreter takes `interpreted`.
    """
    if INTERPRETED:
        return triton.autotune([_config(interpreted)], key=key)

    def decorate(kernel: Any) -> Any:
        def prune(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
            chosen = _usable(configs, arguments, **constants)
            if len(chosen) > 1:
                compile_all(kernel, chosen, arguments, constants)
            return chosen

        return triton.autotune(
            [_config(tile) for tile in tiles], key=key, cache_results=True, do_bench=device_time,
            prune_configs_by={"early_config_prune": prune})(kernel)

    return decorate


def compile_all(
    kernel: Any, configs: list[Any], arguments: dict[str, Any], constants: dict[str, Any]
) -> None:
    """Compile a kernel in each of its configurations, as many at a time as there are cores.

    What does not compile is left to who launches it.
    """
    constants = {k: v for k, v in constants.items() if k not in ("grid", "warmup")}
    with (ThreadPoolExecutor(len(os.sched_getaffinity(0))) as cores,
          triton.AsyncCompileMode(cores, ignore_errors=True)):
        for config in configs:
            kernel.warmup(**arguments, **constants, **config.all_kwargs(), grid=(1,))


def _config(tile: Tile) -> Any:
    return triton.Config(dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n),
                         num_warps=tile.num_warps, num_stages=tile.num_stages)


def device_time(
    call: Callable[[], object], quantiles: tuple[float, ...] = (0.5,)
) -> float | list[float]:
    """Milliseconds of `call` on the GPU, by default the median: in a CUDA graph, so without the
    host's work, and with what the cache holds from the call before, as in a plan."""
    torch.cuda.synchronize()  # another stream takes over
    return triton.testing.do_bench_cudagraph(call, rep=_TUNING_MS, quantiles=quantiles)


def _usable(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    matrices = arguments.get("matrices")
    if matrices is None:  # no products
        return configs
    tiles = {_tile(c): c for c in configs}
    return [tiles[t] for t in usable(
        [*tiles], target(matrices.device), itemsize=matrices.element_size(),
        block_k=constants["BLOCK_K"], widest=constants["WIDTH"], rows=constants["rows"])]


def _tile(config: Any) -> Tile:
    return Tile(config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"], config.num_warps,
                config.num_stages)


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
    for tensor in (*tensors.values(), *(() if beside is None else (beside,))):
        if tensor.device != device or device.type != DEVICE:
            raise ValueError(
                f"the triton backend takes tensors on one {DEVICE} device, got {device} and "
                f"{tensor.device}")
