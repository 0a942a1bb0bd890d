"""The networks of a baseline: a policy and twin critics on what is observed, and more by method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from iqmpc.config import Config
from iqmpc.kernels import layers
from iqmpc.kernels.weights import Layer, layer_tensors, map_layers
from iqmpc.model import Linear, layer_views
from iqmpc.observation import ObservationSpec
from iqmpc.scaling import ObservationScaling

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # as usual for SAC


class PolicyWeights(NamedTuple):
    """A policy, squashed Gaussian (2A outputs) or deterministic (A), and its critics, if any.

    As `iqmpc.kernels.weights.Weights`, with what is observed, scaled, in the place of latents.
    """

    policy: tuple[Layer, ...]
    critics: tuple[Layer, ...]
    action_dim: int
    scaling: ObservationScaling
    log_std_min: float = LOG_STD_MIN
    log_std_max: float = LOG_STD_MAX

    @property
    def deterministic(self) -> bool:
        return self.policy[-1].bias.shape[-1] == self.action_dim

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        return layer_tensors(self.policy) + layer_tensors(self.critics)

    def snapshot(self) -> PolicyWeights:
        """A detached copy of the policy alone."""
        return self._replace(
            policy=map_layers(lambda t: t.detach().clone(), self.policy), critics=()
        )

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled obs [N, O] -> action [N, A]: the mode, or with noise [N, A] a draw."""
        if self.deterministic:
            return torch.tanh(layers.mlp(self.policy, obs))
        if noise is None:
            return torch.tanh(layers.policy(self, obs)[0])
        return layers.policy_action(self, obs, noise)


class PolicyModel(nn.Module):
    """π of flat observations, and what more a method has.

    Each network has two hidden layers of `agent.hidden_dim`, the world model's: Linear, LayerNorm,
    Mish. A `deterministic` policy is tanh of A outputs. All take observations that are scaled
    already, as the replays hold them; who has them as they are applies `scaling` first.
    """

    decodes_rewards = False
    deterministic = False
    obs_mean: Tensor
    obs_std: Tensor

    def __init__(self, spec: ObservationSpec, action_dim: int, config: Config):
        super().__init__()
        self.observation_spec, self.action_dim = spec, action_dim
        self.hidden = config.agent.hidden_dim
        self.register_buffer("obs_mean", torch.zeros(self.obs_dim))
        self.register_buffer("obs_std", torch.ones(self.obs_dim))
        outputs = action_dim if self.deterministic else 2 * action_dim
        self.policy = self.network(self.obs_dim, outputs)
        self.critics = nn.ModuleList()

    @property
    def obs_dim(self) -> int:
        """O."""
        (obs_dim,) = self.observation_spec.shape
        return obs_dim

    def network(
        self, inputs: int, outputs: int, *, members: int | None = None, zero: bool = False
    ) -> nn.ModuleList:
        """Two hidden layers and a last one, with `zero` 0 at first; `members` stacks K of them."""
        last = Linear(self.hidden, outputs, normed=False, members=members)
        if zero:
            nn.init.zeros_(last.weight)
        return nn.ModuleList(
            [
                Linear(inputs, self.hidden, normed=True, members=members),
                Linear(self.hidden, self.hidden, normed=True, members=members),
                last,
            ]
        )

    @property
    def scaling(self) -> ObservationScaling:
        """Of observations as they are, into what the networks take (`model.normalise_obs`)."""
        return ObservationScaling(self.obs_mean, self.obs_std)

    def weights(self) -> PolicyWeights:
        """A live view of the policy's and the critics' parameters."""
        return PolicyWeights(
            layer_views(self.policy), layer_views(self.critics), self.action_dim, self.scaling
        )

    def reward(
        self, obs: Tensor, action: Tensor, next_obs: Tensor, terminated: Tensor, noise: Tensor
    ) -> Tensor:
        """The reward that the method has learnt, [N], where `decodes_rewards`.

        Scaled obs and next_obs [N, O], action [N, A], terminated [N]; noise [S, N, A] is standard
        normal, for methods that average over the policy's actions.
        """
        raise NotImplementedError
