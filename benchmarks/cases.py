"""What is measured: sizes, settings and inputs. How it is computed is `benchmarks.variants`."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from iqmpc.composition import compose
from iqmpc.config import Config
from iqmpc.episode import Episode
from iqmpc.losses import Batch
from iqmpc.model import WorldModel
from iqmpc.replay import SliceReplay


@dataclass(frozen=True)
class PlanCase:
    """One plan for E problems at once; `model` and `planner` name groups of the configuration.

    The weights lie on `device`, observations on the host, as a run has them.
    """

    model: str
    planner: str
    obs_dim: int
    action_dim: int
    problems: int
    device: str = "cpu"

    def on(self, device: str) -> PlanCase:
        return dataclasses.replace(self, device=device)

    @property
    def name(self) -> str:
        return f"plan/{self.model}/{self.obs_dim}x{self.action_dim}/E{self.problems}"

    @property
    def config(self) -> Config:
        return _compose(f"model={self.model}", f"planner={self.planner}")

    @property
    def iterations(self) -> int:
        return self.config.planner.iterations_for(self.action_dim)

    @property
    def entropy_coef(self) -> float:
        """The entropy coefficient in force, β·A."""
        return self.config.entropy_coefficient(self.action_dim)

    def world_model(self) -> WorldModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = WorldModel(self.obs_dim, self.action_dim, self.config.model)
            # A new model's critics are constant zero, and every trajectory would be an elite.
            torch.nn.init.normal_(model.critics[-1].weight, std=0.1)
        return model.to(self.device)

    def observations(self) -> Tensor:
        """[E, O]"""
        return torch.randn(self.problems, self.obs_dim, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class UpdateCase:
    """One update on `batch` slices of demonstrations and as many of behaviour.

    `penalty`: with the gradient penalty. On a GPU the slices are drawn there, from `replays`, which
    is part of the update; on a CPU they are given.
    """

    model: str
    obs_dim: int
    action_dim: int
    batch: int
    penalty: bool = False
    device: str = "cpu"

    def on(self, device: str) -> UpdateCase:
        return dataclasses.replace(self, device=device)

    @property
    def name(self) -> str:
        return f"update/{self.model}/{self.obs_dim}x{self.action_dim}/{self.batch}+{self.batch}" + (
            "/penalty" if self.penalty else ""
        )

    @property
    def config(self) -> Config:
        return _compose(
            f"model={self.model}",
            f"learner.batch={self.batch}",
            f"learner.gradient_penalty={str(self.penalty).lower()}",
        )

    def slices(self) -> Batch:
        horizon, rows = self.config.learner.horizon, 2 * self.batch
        draw = torch.Generator().manual_seed(1)
        return Batch(
            obs=torch.randn(horizon + 1, rows, self.obs_dim, generator=draw),
            action=torch.rand(horizon, rows, self.action_dim, generator=draw) * 2 - 1,
            reward=torch.zeros(horizon, rows),
            terminated=torch.zeros(horizon, rows),
            experts=self.batch,
        )

    def replays(self) -> list[SliceReplay]:
        """Demonstrations and behaviour, a hundred episodes of a hundred steps each."""
        draw, replays = torch.Generator().manual_seed(1), []
        for _ in range(2):
            replay = SliceReplay(
                self.obs_dim,
                self.action_dim,
                horizon=self.config.learner.horizon,
                capacity=100_000,
                device=self.device,
            )
            for _ in range(100):
                obs = torch.randn(101, self.obs_dim, generator=draw)
                action = torch.rand(100, self.action_dim, generator=draw) * 2 - 1
                replay.add(Episode(obs.numpy(), action.numpy()))
            replays.append(replay)
        return replays


@dataclass(frozen=True)
class PublishCase:
    """New weights for a planner: the model of a plan's case, where a learner would have it."""

    plan: PlanCase

    def on(self, device: str) -> PublishCase:
        return PublishCase(self.plan.on(device))

    @property
    def name(self) -> str:
        return f"publish/{self.plan.model}/{self.plan.obs_dim}x{self.plan.action_dim}"


# `compose` costs tens of milliseconds and the properties above ask often.
@functools.cache
def _compose(*overrides: str) -> Config:
    return compose(overrides)


PLAN_CASES = [
    PlanCase("tiny", "cpu", 24, 6, 1),
    PlanCase("tiny", "cpu", 24, 6, 8),
    PlanCase("small", "paper", 17, 6, 1),
    PlanCase("small", "paper", 17, 6, 8),
    PlanCase("paper", "paper", 17, 6, 1),
    PlanCase("paper", "paper", 17, 6, 8),
    PlanCase("paper", "paper", 91, 39, 1),
    PlanCase("paper", "paper", 91, 39, 8),
]
PUBLISH_CASES = [PublishCase(PLAN_CASES[i]) for i in (0, 2, 6)]
UPDATE_CASES = [
    UpdateCase("tiny", 24, 6, 64),
    UpdateCase("tiny", 24, 6, 64, penalty=True),
    UpdateCase("small", 17, 6, 256),
    UpdateCase("paper", 91, 39, 256),
]
