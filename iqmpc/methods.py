"""Which method a run is, by `agent.name`: what learns and what acts."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from iqmpc.agent import Agent
from iqmpc.config import Config
from iqmpc.observation import ObservationSpec
from iqmpc.replay import SliceReplay
from iqmpc.scaling import ObservationScaling

# Imported when asked for: some need a package that is an extra.
_LEARNERS = {
    "iq_mpc": "iqmpc.learner:Learner",
    "bc": "iqmpc.baselines.bc:BehaviouralCloning",
    "iql_sac": "iqmpc.baselines.iql_sac:IqLearnSac",
    "sqil": "iqmpc.baselines.sqil:Sqil",
    "gail": "iqmpc.baselines.gail:Gail",
    "hype": "iqmpc.baselines.hype:Hype",
    "hyper": "iqmpc.baselines.hyper:Hyper",
    "cfil_sac": "iqmpc.baselines.cfil_sac:CfilSac",
}


class MethodLearner(Protocol):
    """What learns in a run, as `iqmpc.learner.Learner` says.

    `model` holds what acts and what decodes rewards; its tensors are `model.…` of `state_dict`. It
    has an `observation_spec`, an `action_dim` and `weights()`. `learn` makes one update, counts it
    in `updates` and returns metrics of `iqmpc.runlog.COLUMNS`, `skipped_updates` among them.
    """

    model: Any
    mode: str
    matmul: str
    updates: int
    generator: torch.Generator

    def __init__(
        self,
        obs_shape: ObservationSpec,
        action_dim: int,
        config: Config,
        device: torch.device | str = "cpu",
        *,
        sampler: torch.Generator | None = None,
        scaling: ObservationScaling | None = None,
    ): ...

    @staticmethod
    def make_model(
        obs_shape: ObservationSpec,
        action_dim: int,
        config: Config,
        *,
        termination: bool | None = None,
    ) -> nn.Module: ...

    @property
    def skipped_updates(self) -> int: ...

    def learn(self, experts: SliceReplay | None, behaviour: SliceReplay) -> dict[str, Tensor]: ...

    def acting_weights(self) -> Any: ...

    def evaluation_weights(self) -> Any: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def learner_class(config: Config) -> type[MethodLearner]:
    """What learns in a run.

    Raises `ConfigError` where its method needs a package that is not installed.
    """
    module, _, name = _LEARNERS[config.agent.name].partition(":")
    return getattr(importlib.import_module(module), name)


def agent_class(config: Config) -> type[Agent]:
    """What acts in a run, made of a learner's `model`."""
    if not config.is_baseline:
        return Agent
    from iqmpc.baselines.agent import PolicyAgent

    return PolicyAgent
