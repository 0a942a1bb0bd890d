"""HyPER (Ren et al., 2024): hybrid inverse RL in a learnt ensemble of models.

As HyPE, but SAC learns from demonstrations and from what an ensemble of dynamics imagines: short
rollouts of the policy that begin at states of demonstrations and of behaviour alike. They are made
for each update and not kept; imagined steps end no task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.baselines.hype import Hype
from iqmpc.baselines.learner import Transitions
from iqmpc.kernels import layers
from iqmpc.kernels.weights import Layer
from iqmpc.model import layer_views

MEMBERS = 5
HORIZON = 3  # steps of an imagined rollout


def predicted(dynamics: tuple[Layer, ...], obs: Tensor, action: Tensor) -> Tensor:
    """What each member expects of the next observations: [N, O], [N, A] -> [members, N, O]."""
    x = torch.cat([obs, action], -1)
    return obs + layers.mlp(dynamics, x.expand(len(dynamics[0].weight), -1, -1))


def dynamics_loss(dynamics: tuple[Layer, ...], batch: Transitions) -> Tensor:
    """mean over members, rows and numbers of the squared error of the next observation."""
    return (predicted(dynamics, batch.obs, batch.action) - batch.next_obs).square().mean()


class Hyper(Hype):
    """The ensemble makes a step in every update, on both sides of the batch."""

    def set_up(self) -> None:
        super().set_up()
        model = self.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            members = model.network(
                model.obs_dim + model.action_dim, model.obs_dim, members=MEMBERS
            )
        self.others["dynamics"] = members.to(self.device)
        self.dynamics = layer_views(members)
        self._dynamics = self.optimiser("dynamics", list(members.parameters()))

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        loss = dynamics_loss(self.dynamics, batch)
        self.step(loss, self._dynamics)
        return super().update(batch) | {"dynamics_loss": loss.detach()}

    @torch.no_grad()
    def rl_rows(self, batch: Transitions) -> Transitions:
        """Demonstrations, and about as many imagined steps as the batch has rows."""
        n, at = batch.experts, batch.obs[::HORIZON]
        obs, action, after = [batch.obs[:n]], [batch.action[:n]], [batch.next_obs[:n]]
        for _ in range(HORIZON):
            noise = self.normal(len(at), batch.action.shape[-1])
            acted, _ = layers.policy_sample(self.weights, at, noise)
            every = predicted(self.dynamics, at, acted)
            member = torch.randint(
                MEMBERS, (len(at),), device=self.device, generator=self.generator
            )
            obs.append(at)
            action.append(acted)
            at = every[member, torch.arange(len(at), device=self.device)]
            after.append(at)
        rows = torch.cat(obs)
        terminated = torch.zeros_like(rows[:, 0])
        terminated[:n] = batch.terminated[:n]
        return Transitions(rows, torch.cat(action), torch.cat(after), terminated, n)
