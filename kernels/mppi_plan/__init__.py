"""A whole MPPI plan (IQ-MPC, Algorithm 1): encode, sample, score, refit, draw an elite.

A backend is a class that is built once and keeps what passes from one control step to the next:

    plan = BACKENDS["cpu"](weights, config, discount=0.99, beta=1e-4, num_envs=1, seed=0)
    plan.publish(weights)            # the weights changed
    action = plan(obs).action        # obs [E, O], or uint8 images [E, 3C, 64, 64] -> [E, A]
    plan.reset(0)                    # an episode of problem 0 starts

`config` is an `iqmpc.PlannerConfig`, `beta` the entropy coefficient in force (of the unrolled
score), `seed` a 64-bit integer. All state there is: `mean` [E, H, A], the last plan's mean, and
`step`, the number of plans so far. The draws of a plan follow from seed and step alone.

The policy's trajectories and their scores are computed once a plan: their actions do not change
between iterations, so each keeps the one draw of ã_t that it was scored with.
"""

from __future__ import annotations

from typing import Any

from iqmpc.kernels.mppi_plan.cpu import CpuPlan
from iqmpc.kernels.mppi_plan.reference import PlanNoise, ReferencePlan
from iqmpc.kernels.mppi_plan.types import Plan

__all__ = ["BACKENDS", "CpuPlan", "Plan", "PlanNoise", "ReferencePlan"]


def _triton(*arguments: Any, **settings: Any) -> Any:
    # Importing Triton's library after Mesa's has ended processes: not before it is needed.
    from iqmpc.kernels.mppi_plan.triton import TritonPlan

    return TritonPlan(*arguments, **settings)


BACKENDS = {"reference": ReferencePlan, "cpu": CpuPlan, "triton": _triton}
