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

from iqmpc.baselines.learner import Transitions
from iqmpc.baselines.sac import SacLearner, SacModel
from iqmpc.config import Config
from iqmpc.errors import ConfigError
from iqmpc.observation import ObservationSpec
from iqmpc.scaling import ObservationScaling

BOUND, SLOPE = 6.0, 15.0  # x is BOUND tanh(x / SLOPE)
BLUR = 0.05  # standard deviation of the noise on scaled observations and actions
EVERY = 10  # updates to a step of the flows


def squashed(x: Tensor) -> Tensor:
    """6 tanh(x / 15)."""
    return BOUND * torch.tanh(x / SLOPE)


def coupled_loss(experts: Tensor, behaviour: Tensor) -> Tensor:
    """log mean_E exp x - mean_π x, of squashed log ratios [N_E] and [N_π]."""
    return torch.logsumexp(experts, 0) - math.log(len(experts)) - behaviour.mean()


class FlowModel(SacModel):
    """SAC's networks and two masked autoregressive flows of (s, a)."""

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

    def reward(
        self, obs: Tensor, action: Tensor, next_obs: Tensor, terminated: Tensor, noise: Tensor
    ) -> Tensor:
        return -self.log_ratio(obs, action)


class CfilSac(SacLearner):
    """Every tenth update begins with a step of both flows; SAC learns from behaviour alone."""

    model: FlowModel

    def __init__(
        self,
        obs_shape: ObservationSpec | tuple[int, ...] | int,
        action_dim: int,
        config: Config,
        device: torch.device | str = "cpu",
        *,
        sampler: torch.Generator | None = None,
        scaling: ObservationScaling | None = None,
    ):
        super().__init__(obs_shape, action_dim, config, device, sampler=sampler, scaling=scaling)
        self._flows = self.optimiser("flows", list(self.model.flows.parameters()))
        self._reward_loss = torch.zeros((), device=self.device)  # of its last step
        self.others.register_buffer("reward_loss", self._reward_loss)

    @staticmethod
    def make_model(
        obs_shape: ObservationSpec,
        action_dim: int,
        config: Config,
        *,
        termination: bool | None = None,
    ) -> FlowModel:
        return FlowModel(obs_shape, action_dim, config)

    def reward_of(self, batch: Transitions) -> Tensor:
        with torch.no_grad():
            return -self.model.log_ratio(batch.obs, batch.action)

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        if self.updates % EVERY == 0:
            x = self.model.log_ratio(
                batch.obs + BLUR * self.normal(*batch.obs.shape),
                batch.action + BLUR * self.normal(*batch.action.shape),
            )
            loss = coupled_loss(x[: batch.experts], x[batch.experts :])
            self.step(loss, self._flows)
            self._reward_loss.copy_(loss.detach())
        return super().update(batch.behaviour()) | {"reward_loss": self._reward_loss.clone()}
