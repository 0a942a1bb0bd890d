"""A baseline's agent: a policy that acts, with the interface of `iqmpc.Agent`."""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.agent import Agent
from iqmpc.baselines.model import PolicyModel, PolicyWeights
from iqmpc.config import Config
from iqmpc.controller import Controller
from iqmpc.errors import ConfigError
from iqmpc.seeding import stream_seed


class PolicyController(Controller):
    """Acts with the policy's mode; exploring, with draws of it (a deterministic one has none)."""

    backend = "policy"

    def __init__(self, weights: PolicyWeights, *, problems: int = 1, seed: int = 0):
        super().__init__(problems)
        self.step, self._seed = 0, seed
        self._weights = weights.snapshot()
        self._device = weights.policy[0].weight.device

    @torch.no_grad()
    def publish(self, weights: PolicyWeights) -> None:
        self._weights = weights.snapshot()

    def reset(self, problem: int | None = None) -> None:
        """Nothing: a policy remembers no step."""

    @torch.no_grad()
    def plan(self, obs: Tensor, *, explore: bool = False) -> Tensor:
        """obs [E, O] -> action [E, A]; zeros, counted, where it is not finite."""
        noise = None
        if explore:
            generator = torch.Generator().manual_seed(stream_seed(self._seed, "policy", self.step))
            shape = self.problems, self._weights.action_dim
            noise = torch.randn(shape, generator=generator).to(self._device)
        self.step += 1
        scaled = self._weights.scaling(obs.to(self._device))
        action = self._weights.act(scaled, noise).cpu()
        finite = action.isfinite().all(-1, keepdim=True)
        self.count_nonfinite(
            int((~finite).sum()), "the policy's action is not finite: acting with zeros"
        )
        return torch.where(finite, action, 0.0)


class PolicyAgent(Agent):
    """`Agent` of a baseline: `planner` is the policy alone, and rewards are the method's."""

    model: PolicyModel

    def __init__(
        self,
        model: PolicyModel,
        config: Config,
        *,
        seed: int = 0,
        num_envs: int = 1,
        weights: PolicyWeights | None = None,
    ):
        weights = model.weights() if weights is None else weights
        planner = PolicyController(weights, problems=num_envs, seed=stream_seed(seed, "planner"))
        self._set_up(model, config, planner, weights)

    @property
    def decodes_rewards(self) -> bool:
        return self.model.decodes_rewards

    def _decoded(
        self, obs: Tensor, action: Tensor, next_obs: Tensor, terminated: Tensor, noise: Tensor
    ) -> Tensor:
        if not self.decodes_rewards:
            raise ConfigError(f"agent.name={self.config.agent.name} learns no reward to decode")
        scaling = self.model.scaling
        return self.model.reward(scaling(obs), action, scaling(next_obs), terminated, noise)
