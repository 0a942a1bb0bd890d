"""CFIL (Freund et al., 2023) with SAC: the reward is a ratio of two flows' densities.

x(s, a) = log p_π(s, a) - log p_E(s, a) is the difference of two normalising flows, coupled in one
objective, the Donsker-Varadhan form of the divergence of behaviour from demonstrations:

    maximise  mean_π x - log mean_E exp x

and the reward is -x. x is squashed smoothly to ±6, and what the flows see is blurred by a little
noise, both as in the paper: densities of data on a lower-dimensional set have no bound otherwise.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor, nn

from iqmpc.baselines.adversarial import RewardLearner, RewardModel
from iqmpc.baselines.learner import Transitions
from iqmpc.config import Config
from iqmpc.errors import ConfigError
from iqmpc.observation import ObservationSpec

BOUND, SLOPE = 6.0, 15.0  # x is BOUND tanh(x / SLOPE)
BLUR = 0.05  # standard deviation of the noise on scaled observations and actions
EVERY = 10  # updates to a step of the flows


def squashed(x: Tensor) -> Tensor:
    """6 tanh(x / 15)."""
    return BOUND * torch.tanh(x / SLOPE)


def coupled_loss(experts: Tensor, behaviour: Tensor) -> Tensor:
    """log mean_E exp x - mean_π x, of squashed log ratios [N_E] and [N_π]."""
    return torch.logsumexp(experts, 0) - math.log(len(experts)) - behaviour.mean()


class FlowModel(RewardModel):
    """f is -x, of two masked autoregressive flows of (s, a)."""

    learnt = "flows"

    def __init__(self, spec: ObservationSpec, action_dim: int, config: Config):
        super().__init__(spec, action_dim, config)
        if importlib.util.find_spec("zuko") is None:
            raise ConfigError("agent=cfil_sac needs the extra 'flows': pip install 'iqmpc[flows]'")
        import zuko

        hidden = [config.agent.hidden_dim] * 2
        with torch.device("cpu"):  # its masks are of numbers, which the meta device has none of
            self.flows = nn.ModuleList(
                zuko.flows.MAF(self.obs_dim + action_dim, transforms=1, hidden_features=hidden)
                for _ in range(2)
            )

    def log_ratio(self, obs: Tensor, action: Tensor) -> Tensor:
        """The squashed x [N] of obs [N, O] and action [N, A]."""
        rows = torch.cat([obs, action], -1)
        of_behaviour, of_experts = (flow().log_prob(rows) for flow in self.flows)
        return squashed(of_behaviour - of_experts)

    def f(self, obs: Tensor, action: Tensor) -> Tensor:
        return -self.log_ratio(obs, action)


class CfilSac(RewardLearner):
    """Every tenth update begins with a step of both flows; SAC learns from behaviour alone."""

    every = EVERY
    model_class = FlowModel
    model: FlowModel

    def rl_rows(self, batch: Transitions) -> Transitions:
        return batch.behaviour()

    def reward_loss(self, batch: Transitions) -> tuple[Tensor, Tensor | float]:
        x = self.model.log_ratio(
            batch.obs + BLUR * self.normal(*batch.obs.shape),
            batch.action + BLUR * self.normal(*batch.action.shape),
        )
        return coupled_loss(x[: batch.experts], x[batch.experts :]), 0.0
