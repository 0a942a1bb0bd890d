"""A whole MPPI plan (IQ-MPC, Algorithm 1): encode, sample, score, refit, draw an elite.

A backend is a class that is built once and keeps what passes from one control step to the next
(`PlanBackend`):

    plan = BACKENDS["cpu"](weights, config, discount=0.99, entropy_coef=1e-4, problems=1, seed=0)
    plan.publish(weights)            # the weights changed
    action = plan(obs).action        # obs [E, O], or uint8 images [E, 3C, 64, 64] -> [E, A]
    plan.reset(0)                    # an episode of problem 0 starts

`config` is an `iqmpc.PlannerConfig`, `entropy_coef` the entropy coefficient in force (of the
unrolled score), `seed` a 64-bit integer. All state there is: `mean` [E, H, A], the last plan's
mean, and `step`, the number of plans so far. The draws of a plan follow from seed and step alone.

A plan has three phases in every backend: begin (the latent, the policy's trajectories and their
scores), improve (an iteration: sample, score, refit) and choose (one elite's first action). The
policy's trajectories and their scores are computed once a plan: their actions do not change between
iterations, so each keeps the one draw of ã_t that it was scored with.

The CUDA C++ library (`csrc/cuda`) scores rollouts and has no plan: `iqmpc.kernels.mppi_rollout`.
"""

from __future__ import annotations

from typing import Any

from iqmpc.config import PlannerConfig
from iqmpc.kernels import triton_weights
from iqmpc.kernels.backends import AUTO, cannot_run, interpreted, resolve
from iqmpc.kernels.mppi_plan.cpu import CpuPlan
from iqmpc.kernels.mppi_plan.reference import PlanNoise, ReferencePlan
from iqmpc.kernels.mppi_plan.types import (
    Plan,
    PlanBackend,
    PlanBackendType,
    unserved_precision,
    unused,
)
from iqmpc.kernels.weights import Weights

__all__ = [
    "BACKENDS",
    "CpuPlan",
    "Plan",
    "PlanBackend",
    "PlanBackendType",
    "PlanNoise",
    "ReferencePlan",
    "resolve_plan",
]


class _Triton:
    """Builds a `TritonPlan`, which is imported then and not before."""

    def unfit(self, weights: Weights, config: PlannerConfig) -> str | None:
        device = weights.encoder[0].weight.device
        here = device.type == "cuda" or (config.backend == "triton" and interpreted())
        model = triton_weights.unfit(weights)
        return (
            unserved_precision(config, *triton_weights.PRECISIONS)
            or unused(config, "capture")
            or (None if here else f"needs weights on a CUDA device, got {device}")
            or (model and f"cannot take the model: {model}")
            or cannot_run("triton", config.backend)
        )

    def __call__(self, *arguments: Any, **settings: Any) -> PlanBackend:
        # Importing Triton's library after Mesa's has ended processes: not before it is needed.
        from iqmpc.kernels.mppi_plan.triton import TritonPlan

        return TritonPlan(*arguments, **settings)


BACKENDS: dict[str, PlanBackendType] = {
    "reference": ReferencePlan,
    "cpu": CpuPlan,
    "triton": _Triton(),
}


def resolve_plan(weights: Weights, config: PlannerConfig) -> str:
    """The backend that `config.backend` comes to for these weights, by name.

    Raises `BackendError` with what keeps the named one, or all of them, from serving: the machine,
    the weights, or a setting that the backend does not use.
    """
    unfit = {name: backend.unfit(weights, config) for name, backend in BACKENDS.items()}
    return resolve(config.backend, unfit, order=AUTO, setting="planner.backend")
