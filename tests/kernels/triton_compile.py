"""Compile the Triton kernels for GPUs that need not be there: a script, run by test_triton.py.

    python tests/kernels/triton_compile.py --arch 90 [--size paper] [--precision bf16] [--every]

One line of JSON a kernel: bytes of shared memory a program, registers and bytes of stack a thread
(a stack means spilt registers), the tensor-core instruction it uses, and of the machine code how
many instructions each innermost loop with products has (`loops`): counts, not times. Without
`--every`, only the first and the last choice of tile sizes that fit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from iqmpc.kernels.mppi_plan import triton as plan
from iqmpc.kernels.mppi_refit import triton as refit
from iqmpc.kernels.mppi_rollout import triton as rollout
from iqmpc.kernels.mppi_rollout import triton_jobs as tables
from iqmpc.kernels.triton_launch import LAUNCH, _tile
from iqmpc.kernels.triton_tiles import Target, fits, power_of_two
from iqmpc.kernels.triton_weights import PRECISIONS, TritonWeights
from iqmpc.kernels.weights import Layer, Weights

TARGETS = {80: Target(163 * 1024, False), 90: Target(227 * 1024, True)}
# A, Z, hidden
SIZES = {"paper": (39, 512, 512), "small": (6, 128, 384), "narrow": (1, 32, 48)}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Types of the arguments that are neither float32 tensors nor int32.
OPERANDS = ("matrices", "scratch")
TYPES = {"jobs": "*i32", "pair": "*i64", "index": "*i64", "control": "*i64"} | dict.fromkeys(
    ("discount", "log_std_min", "log_std_max", "temperature", "std_min", "std_max"), "fp32"
)
TENSORS = (
    "vectors",
    "root",
    "actions",
    "score_noise",
    "policy_actions",
    "returns",
    "raw",
    "squares",
    "mean",
    "std",
    "weight",
    "normal",
    "uniform",
    "explore",
    "out",
    "policy_noise",
    "sample_noise",
)


class Case(NamedTuple):
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages
    operands: torch.dtype
    name: dict[str, str]


def model(size: str, precision: str) -> TritonWeights:
    action_dim, latent, hidden = SIZES[size]

    def layer(inputs: int, outputs: int, normed: bool, *lead: int) -> Layer:
        vector = torch.zeros(*lead, outputs)
        return Layer(torch.zeros(*lead, outputs, inputs), vector, *([vector] * 2 * normed))

    def stack(inputs: int, outputs: int, normed: bool, *lead: int) -> tuple[Layer, ...]:
        return (
            layer(inputs, hidden, True, *lead),
            layer(hidden, hidden, True, *lead),
            layer(hidden, outputs, normed, *lead),
        )

    return TritonWeights(
        Weights(
            (layer(1, latent, True),),
            stack(latent + action_dim, latent, True),
            stack(latent, 2 * action_dim, False),
            stack(latent + action_dim, 1, False, 2),
            8,
            -10.0,
            2.0,
        ),
        precision=precision,
    )


def cases(size: str, precision: str, arch: int, every: bool) -> Iterator[Case]:
    w = model(size, precision)
    name = dict(arch=str(arch), size=size, precision=precision)
    layer = dict(
        GROUP=w.group,
        WIDTH=w.width,
        A=w.action_dim,
        ACTIONS=w.actions,
        PRECISION=w.product,
        BLOCK_K=w.block,
    )
    inputs = (tables.MISH, tables.SIMNORM, tables.RAW)
    for kernel, constants in (
        (rollout._chain_kernel, layer),
        *((rollout._stage_kernel, layer | dict(IN=i, SLOTS=w.slots)) for i in inputs),
        (rollout._score_kernel, dict(WIDTH=w.width, SLOTS=w.slots, ENDS=True)),
    ):
        configs = [
            c
            for c in kernel.configs
            if "BLOCK_K" not in constants
            or fits(_tile(c), TARGETS[arch], w.dtype.itemsize, w.block, w.width)
        ]
        for c in configs if every else {0: configs[0], 1: configs[-1]}.values():
            yield Case(
                kernel.fn,
                constants | c.kwargs,
                dict(num_warps=c.num_warps, num_stages=c.num_stages),
                w.dtype,
                name | dict(choice=str(c)),
            )
    block_a = min(power_of_two(w.action_dim), refit.HELD // 64)
    yield Case(
        refit._refit_kernel,
        dict(SAMPLES=512, ELITES=64, BLOCK_A=block_a),
        dict(num_warps=8),
        w.dtype,
        name,
    )
    if (size, precision) != ("paper", "float32"):
        return  # what follows is float32 in any precision
    sizes = dict(A=w.action_dim, WIDTH=w.width)
    yield Case(plan._draw_kernel, dict(CRITICS=8, BLOCK=plan._BLOCK), {}, w.dtype, name)
    yield Case(plan._begin_kernel, sizes | dict(BLOCK=plan._BLOCK), {}, w.dtype, name)
    yield Case(plan._act_kernel, sizes | dict(BLOCK=power_of_two(w.action_dim)), {}, w.dtype, name)
    for choose in (False, True):
        for block in (8, 32):
            yield Case(
                plan._improve_kernel,
                sizes
                | dict(CHOOSE=choose, SAMPLES=512, ELITES=64, BLOCK_A=block, LINES=2048 // block),
                dict(num_warps=8),
                w.dtype,
                name | dict(choice=f"{choose=} {block=}"),
            )


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    operands = "*bf16" if case.operands == torch.bfloat16 else "*fp32"
    kernel, signature, aligned = case.kernel, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        kind = TYPES.get(argument, "*fp32" if argument in TENSORS else "i32")
        if argument in OPERANDS:
            kind = operands
        signature[argument] = "constexpr" if argument in case.constants else kind
        if kind.startswith("*") or argument == "columns":
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=case.constants, attrs=aligned)
    start = time.perf_counter()
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options | LAUNCH)
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        code = disassembled(file.name)
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    instruction = re.search(r"wgmma\.mma_async|mma\.sync", done.asm["ptx"])
    return dict(
        kernel=kernel.__name__,
        inputs=case.constants.get("IN"),
        **case.name,
        shared=done.metadata.shared,
        registers=int(found["REG"]),
        stack=int(found["STACK"]),
        local=int(found["LOCAL"]),
        tensor_core=instruction and instruction[0],
        loops=product_loops(code),
        barriers=done.asm["ptx"].count("bar.sync"),
        seconds=round(seconds, 1),
    )


def disassembled(cubin: str) -> list[tuple[int, str]]:
    """Address and text of each instruction."""
    sass = subprocess.run(
        [TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    found, labels, address = [], {}, 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = None  # of the next instruction
        elif instruction := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", line):
            address = int(instruction[1], 16)
            labels = {k: address if v is None else v for k, v in labels.items()}
            found.append((address, instruction[2]))
    return [
        (at, re.sub(r"`\((\.L\w+)\)", lambda m: hex(labels.get(m[1]) or 0), text))
        for at, text in found
    ]


def product_loops(code: list[tuple[int, str]]) -> list[int]:
    """Instructions of each innermost loop with tensor-core products, in the order of the code."""
    spans = []
    for at, text in code:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    inner = [
        (a, b)
        for a, b in spans
        if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in spans)
    ]
    bodies = [[text for at, text in code if a <= at <= b] for a, b in inner]
    return [len(body) for body in bodies if any(re.search(r"\bH?G?MMA", x) for x in body)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, choices=TARGETS, required=True)
    parser.add_argument("--size", choices=SIZES, nargs="*", default=["paper", "small"])
    parser.add_argument("--precision", choices=PRECISIONS, nargs="*", default=["float32", "bf16"])
    parser.add_argument("--every", action="store_true")
    given = parser.parse_args()
    for size in given.size:
        for precision in given.precision:
            for case in cases(size, precision, given.arch, given.every):
                print(json.dumps(compile_case(case, given.arch)), flush=True)


if __name__ == "__main__":
    main()
