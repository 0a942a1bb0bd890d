"""How a case is computed: a new backend or mode is one more entry in a dictionary below."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import flops
from benchmarks.cases import PlanCase, PublishCase, UpdateCase
from benchmarks.eager_unrolled import EagerUnrolled
from iqmpc.kernels.weights import snapshot
from iqmpc.learner import Learner
from iqmpc.planner import Planner


@dataclass(frozen=True)
class Variant:
    """`build(case)` is what is timed, made ready; it may raise `BackendError` to be skipped.

    `flops(case)` counts what it computes, and `dtype` names the matrix product it is held against.
    """

    build: Callable[[Any], Callable[[], object]]
    flops: Callable[[Any], int]
    dtype: str = "float32"


def unrolled(case: PlanCase, *, compiled: bool) -> Callable[[], object]:
    """The planner of `benchmarks.eager_unrolled`."""
    config = case.config
    planner = EagerUnrolled(
        snapshot(case.world_model().weights()),
        config.planner,
        discount=config.discount,
        entropy=case.entropy,
        num_envs=case.envs,
        compiled=compiled,
    )
    return functools.partial(planner.plan, case.observations())


def package(case: PlanCase, **settings: Any) -> Callable[[], object]:
    """The package's planner with `settings` of its configuration replaced."""
    config = case.config
    planner = Planner(
        case.world_model().weights(),
        dataclasses.replace(config.planner, **settings),
        discount=config.discount,
        entropy_coef=case.entropy,
        problems=case.envs,
    )
    return functools.partial(planner.plan, case.observations())


def publish(case: PublishCase, **settings: Any) -> Callable[[], object]:
    """Publish one set of weights again and again, as a learner does that changes them in place."""
    weights, config = case.plan.world_model().weights(), case.plan.config
    planner = Planner(
        weights,
        dataclasses.replace(config.planner, threads=1, **settings),
        discount=config.discount,
    )
    return functools.partial(planner.publish, weights)


def learner(case: UpdateCase, **settings: Any) -> Callable[[], object]:
    """The package's learner with `settings` of its configuration replaced."""
    config = case.config
    config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, **settings))
    return functools.partial(Learner(case.obs_dim, case.action_dim, config).update, case.slices())


PLAN_VARIANTS = {
    "eager-unrolled": Variant(functools.partial(unrolled, compiled=False), flops.plan_unrolled),
    "compiled-unrolled": Variant(functools.partial(unrolled, compiled=True), flops.plan_unrolled),
    "reference": Variant(
        functools.partial(package, backend="reference", mode="eager"), flops.plan_advantage
    ),
    "reference-compiled": Variant(
        functools.partial(package, backend="reference", mode="compile"), flops.plan_advantage
    ),
    "cpu": Variant(functools.partial(package, backend="cpu"), flops.plan_floor),
    "cpu-bf16": Variant(
        functools.partial(package, backend="cpu", precision="bf16"), flops.plan_floor, "bfloat16"
    ),
}
PUBLISH_VARIANTS = {  # no matrix product, and so no operations to count
    "cpu": Variant(functools.partial(publish, backend="cpu"), lambda case: 0),
    "cpu-bf16": Variant(
        functools.partial(publish, backend="cpu", precision="bf16"), lambda case: 0, "bfloat16"
    ),
}
UPDATE_VARIANTS = {
    "eager": Variant(functools.partial(learner, mode="eager"), flops.update),
    "compile": Variant(functools.partial(learner, mode="compile"), flops.update),
    "fused": Variant(functools.partial(learner, mode="fused"), flops.update_floor),
    "fused-bf16": Variant(
        functools.partial(learner, mode="fused", precision="bf16"), flops.update_floor, "bfloat16"
    ),
}
