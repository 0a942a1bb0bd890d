"""How a case is computed: a new backend or mode is one more entry in a dictionary below."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import checks, flops
from benchmarks.cases import PlanCase, PublishCase, UpdateCase
from benchmarks.eager_unrolled import EagerUnrolled
from iqmpc.kernels.mppi_plan import BACKENDS
from iqmpc.kernels.weights import snapshot
from iqmpc.learner import Learner
from iqmpc.planner import Planner


@dataclass(frozen=True)
class Variant:
    """`build(case)` is what is timed, made ready; it may raise `BackendError` to be skipped.

    Where it is fast and a GPU's, it has been held against the reference: `checks.Wrong` says that
    its answer is another one. `flops(case)` counts what it computes, and `dtype` names the matrix
    product it is held against. `compiles`: torch.compile makes building it slow.
    """

    build: Callable[[Any], Callable[[], object]]
    flops: Callable[[Any], int]
    dtype: str = "float32"
    compiles: bool = False


def unrolled(case: PlanCase, *, compiled: bool) -> Callable[[], object]:
    """The planner of `benchmarks.eager_unrolled`: as fast as torch makes it, in tf32 on a GPU."""
    config = case.config
    planner = EagerUnrolled(
        snapshot(case.world_model().weights()),
        config.planner,
        discount=config.discount,
        entropy_coef=case.entropy_coef,
        problems=case.problems,
        compiled=compiled,
    )
    obs = case.observations()
    if case.device == "cpu":
        return functools.partial(planner.plan, obs)

    def run() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return planner.plan(obs.to(case.device)).cpu()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def package(case: PlanCase, **settings: Any) -> Callable[[], object]:
    """The package's planner with `settings` of its configuration replaced."""
    config = case.config
    planner = Planner(
        case.world_model().weights(),
        dataclasses.replace(config.planner, **settings),
        discount=config.discount,
        entropy_coef=case.entropy_coef,
        problems=case.problems,
    )
    return functools.partial(planner.plan, case.observations())


def triton(case: PlanCase, *, schedule: str | None = None, **settings: Any) -> Callable[[], object]:
    """The Triton plan in bf16, by the faster schedule or the one named, after it was checked."""
    config = dataclasses.replace(case.config.planner, precision="bf16", **settings)
    weights, obs, discount = case.world_model().weights(), case.observations(), case.config.discount
    how: dict[str, Any] = {} if schedule is None else {"schedule": schedule}

    def build(config: Any) -> Any:
        return BACKENDS["triton"](
            weights,
            config,
            discount=discount,
            entropy_coef=case.entropy_coef,
            problems=case.problems,
            **how,
        )

    once = dataclasses.replace(config, iterations=1)
    checks.plan(build(once), once, weights, obs, discount, elites=0.95)
    plan = build(config)
    checks.plan(plan, config, weights, obs, discount)
    return functools.partial(plan, obs)


def publish(case: PublishCase, **settings: Any) -> Callable[[], object]:
    """Publish one set of weights again and again, as a learner does that changes them in place."""
    weights, config = case.plan.world_model().weights(), case.plan.config
    planner = Planner(
        weights, dataclasses.replace(config.planner, **settings), discount=config.discount
    )
    return functools.partial(planner.publish, weights)


def learner(case: UpdateCase, **settings: Any) -> Callable[[], object]:
    """The package's learner with `settings` of its configuration replaced."""
    config = case.config
    config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, **settings))
    made = Learner(case.obs_dim, case.action_dim, config, case.device)
    if case.device == "cpu":
        return functools.partial(made.update, case.slices())
    return functools.partial(made.learn, *case.replays())


def checked_learner(case: UpdateCase, **settings: Any) -> Callable[[], object]:
    """The same on a GPU, after its first updates were those of the eager learner."""
    run = learner(case, **settings)
    if case.device != "cpu":
        checks.update(run, learner(case, mode="eager"))
    return run


PLAN_VARIANTS = {
    "eager-unrolled": Variant(functools.partial(unrolled, compiled=False), flops.plan_unrolled),
    "compiled-unrolled": Variant(
        functools.partial(unrolled, compiled=True), flops.plan_unrolled, compiles=True
    ),
    "reference": Variant(
        functools.partial(package, backend="reference", mode="eager"), flops.plan_advantage
    ),
    "reference-compiled": Variant(
        functools.partial(package, backend="reference", mode="compile"),
        flops.plan_advantage,
        compiles=True,
    ),
    "cpu": Variant(functools.partial(package, backend="cpu"), flops.plan_floor),
    "cpu-bf16": Variant(
        functools.partial(package, backend="cpu", precision="bf16"), flops.plan_floor, "bfloat16"
    ),
}
GPU_PLAN_VARIANTS = {
    f"triton-bf16{suffix}": Variant(
        functools.partial(triton, **settings), flops.plan_floor, "bfloat16"
    )
    for suffix, settings in (
        ("", {}),
        ("-latency", {"schedule": "latency"}),
        ("-throughput", {"schedule": "throughput"}),
        ("-uncaptured", {"capture": False}),
    )
}
PUBLISH_VARIANTS = {  # no matrix product, and so no operations to count
    "cpu": Variant(functools.partial(publish, backend="cpu", threads=1), lambda case: 0),
    "cpu-bf16": Variant(
        functools.partial(publish, backend="cpu", threads=1, precision="bf16"),
        lambda case: 0,
        "bfloat16",
    ),
}
GPU_PUBLISH_VARIANTS = {
    "triton-bf16": Variant(
        functools.partial(publish, backend="triton"), lambda case: 0, "bfloat16"
    ),
    "triton-bf16-uncaptured": Variant(
        functools.partial(publish, backend="triton", capture=False), lambda case: 0, "bfloat16"
    ),
}
UPDATE_VARIANTS = {
    "eager": Variant(functools.partial(learner, mode="eager"), flops.update),
    "compile": Variant(
        functools.partial(checked_learner, mode="compile"), flops.update, compiles=True
    ),
    "fused": Variant(functools.partial(learner, mode="fused"), flops.update_floor),
    "fused-bf16": Variant(
        functools.partial(learner, mode="fused", precision="bf16"), flops.update_floor, "bfloat16"
    ),
}
GPU_UPDATE_VARIANTS = {
    "graph": Variant(functools.partial(checked_learner, mode="graph"), flops.update)
}


OF_A_CPU = ("cpu", "fused")  # names of variants begin so


def on(
    device: str, variants: dict[str, Variant], gpu_variants: dict[str, Variant]
) -> dict[str, Variant]:
    """What can be measured on a device: the C++ library's variants are a CPU's alone."""
    if device == "cpu":
        return variants
    return {k: v for k, v in variants.items() if k.split("-")[0] not in OF_A_CPU} | gpu_variants
