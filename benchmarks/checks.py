"""What is timed on a GPU is right: held against the float64 reference, or the eager update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iqmpc.capture import WARM_UPS
from iqmpc.config import PlannerConfig
from iqmpc.kernels.mppi_plan import PlanNoise, ReferencePlan
from iqmpc.kernels.mppi_refit import mppi_refit
from iqmpc.kernels.weights import Weights, snapshot

TOLERANCE = {"float32": 1e-4, "bf16": 2e-2}  # of returns, relative: the contract's


class Wrong(Exception):
    """A fast variant's answer is not the reference's."""


def plan(
    plan: Any,
    config: PlannerConfig,
    weights: Weights,
    obs: Tensor,
    discount: float,
    *,
    elites: float = 0.0,
) -> None:
    """Raise `Wrong` unless the last iteration of a Triton plan is the float64 reference's.

    Its returns are the reference's of the same actions and draws, within the contract's tolerance,
    and so are the policy's trajectories; the mean is the refit to those returns. elites: the share
    of them that must be the reference's, for a plan of one iteration: later ones sample where
    returns hardly differ.
    """
    done = plan(obs)
    *drawn, pair = plan.draws()
    noise = PlanNoise(*(t.double() for t in drawn), pair)
    exact = snapshot(weights, torch.float64)
    wide = dataclasses.replace(config, precision="float64", score="advantage", capture=None)
    reference = ReferencePlan(exact, wide, discount=discount, problems=len(obs))
    mean = torch.zeros_like(plan.mean, dtype=torch.float64)
    z0, trajectories, *_ = reference.begin(exact, obs.to(mean), mean, noise)
    tolerance, count = TOLERANCE[plan.precision], config.policy_trajectories
    actions = plan.actions.double()
    scores = torch.cat(
        [
            reference.returns(exact, z0, part, score_noise, noise.root, pair)
            for part, score_noise in (
                (actions[:, :, :count], noise.policy_score_noise),
                (actions[:, :, count:], noise.score_noise[-1]),
            )
        ],
        dim=1,
    )

    def compare(what: str, got: Tensor, expected: Tensor, allowed: float) -> None:
        error = ((got - expected).norm() / expected.norm()).item()
        if not error <= allowed:
            raise Wrong(f"{what}: {error:.1e} from the float64 reference, allowed {allowed:.0e}")

    compare("policy trajectories", actions[:, :, :count], trajectories, tolerance)
    compare("returns", plan.returns.double(), scores, tolerance)
    refit = mppi_refit(
        actions,
        plan.returns.double(),
        elites=config.elites,
        temperature=config.temperature,
        std_min=config.std_min,
        std_max=config.std_max,
        backend="reference",
    )
    compare("mean", plan.mean.double(), refit[0], 1e-4)
    best = scores.topk(config.elites, dim=1).indices
    same = (best.unsqueeze(2) == refit[2].unsqueeze(1)).any(2).double().mean().item()
    if same < elites:
        raise Wrong(f"elites: {same:.1%} are the float64 reference's, expected {elites:.0%}")
    if done.nonfinite or not done.action.abs().max() <= 1:
        raise Wrong("action: not finite or out of range")


def update(run: Callable[[], Any], eager: Callable[[], Any]) -> None:
    """Raise `Wrong` unless the updates of `run` are those of `eager`, from the same start.

    More than `WARM_UPS` of them, so that replays of a graph are among them.
    """
    for number in range(2 * WARM_UPS):
        expected = {k: float(v) for k, v in eager().items()}
        for key, value in run().items():
            # Adam's first steps turn rounding into steps of full length.
            if not abs(float(value) - expected[key]) <= 1e-2 * max(1.0, abs(expected[key])):
                raise Wrong(
                    f"update {number}: {key} is {float(value):.6g}, the eager update's "
                    f"{expected[key]:.6g}"
                )
