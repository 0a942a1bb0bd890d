"""The world model: encoder, latent dynamics, policy prior and critic ensemble (IQ-MPC, eq. 7-10),
and, for tasks that end in terminal states, a head that recognises them.

A `WorldModel` only holds parameters; what it computes is `iqmpc.kernels.layers` on its weights.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from iqmpc.config import ModelConfig
from iqmpc.kernels import layers
from iqmpc.kernels.weights import Layer, Weights
from iqmpc.observation import ObservationSpec


class Linear(nn.Module):
    """Parameters of one linear layer, LayerNorm's included where `normed`; `members` stacks K."""

    def __init__(self, inputs: int, outputs: int, *, normed: bool, members: int | None = None):
        super().__init__()
        lead = () if members is None else (members,)
        self.weight = nn.Parameter(torch.empty(*lead, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(*lead, outputs))
        self.gamma = nn.Parameter(torch.ones(*lead, outputs)) if normed else None
        self.beta = nn.Parameter(torch.zeros(*lead, outputs)) if normed else None
        nn.init.trunc_normal_(self.weight, std=0.02)

    def layer(self) -> Layer:
        return Layer(self.weight, self.bias, self.gamma, self.beta)


class Convolution(nn.Module):
    """Parameters of one convolution with a square kernel."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        # He's: with σ = 0.02 and no LayerNorm behind it, all images would have nearly one latent.
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def layer(self) -> Layer:
        return Layer(self.weight, self.bias)


def _zeroed(linear: Linear) -> Linear:
    """The same, whose outputs are its bias's zeros until it is trained."""
    nn.init.zeros_(linear.weight)
    return linear


def layer_views(part: nn.ModuleList) -> tuple[Layer, ...]:
    """A live view of a part's parameters."""
    return tuple(cast("Linear | Convolution", module).layer() for module in part)


class WorldModel(nn.Module):
    """h, d, π and Q_1..Q_K for observations of shape `obs_shape` and actions of size `action_dim`.

    `obs_shape` is (O,), or O for short, or (3C, 64, 64) for images, or an `ObservationSpec`.
    `termination` adds the head d̂ (null: as `config.termination` says, false where that is null).
    With the default (paper) sizes, 91 observations and 39 actions it has 4,274,259 parameters.
    Raises `ValueError` for another shape.
    """

    def __init__(
        self,
        obs_shape: ObservationSpec | tuple[int, ...] | int,
        action_dim: int,
        config: ModelConfig | None = None,
        *,
        termination: bool | None = None,
    ):
        super().__init__()
        config = config or ModelConfig()
        self.observation_spec = ObservationSpec.of(obs_shape)
        self.action_dim, self.config = action_dim, config
        latent, hidden = config.latent_dim, config.hidden_dim
        self.encoder = nn.ModuleList(_encoder(self.observation_spec, config))
        self.dynamics = nn.ModuleList(
            [
                Linear(latent + action_dim, hidden, normed=True),
                Linear(hidden, hidden, normed=True),
                Linear(hidden, latent, normed=True),
            ]
        )
        self.policy = nn.ModuleList(
            [
                Linear(latent, hidden, normed=True),
                Linear(hidden, hidden, normed=True),
                Linear(hidden, 2 * action_dim, normed=False),
            ]
        )
        members = config.critics
        self.critics = nn.ModuleList(
            [
                Linear(latent + action_dim, hidden, normed=True, members=members),
                Linear(hidden, hidden, normed=True, members=members),
                _zeroed(Linear(hidden, 1, normed=False, members=members)),
            ]
        )
        self.termination = nn.ModuleList()
        if config.termination if termination is None else termination:
            self.termination.extend(
                [
                    Linear(latent, hidden, normed=True),
                    Linear(hidden, hidden, normed=True),
                    _zeroed(Linear(hidden, 1, normed=False)),  # nothing is terminal at first
                ]
            )

    def weights(self) -> Weights:
        """A live view of the parameters, for `iqmpc.kernels`."""
        c = self.config
        return Weights(
            encoder=layer_views(self.encoder),
            dynamics=layer_views(self.dynamics),
            policy=layer_views(self.policy),
            critics=layer_views(self.critics),
            simnorm_dim=c.simnorm_dim,
            log_std_min=c.log_std_min,
            log_std_max=c.log_std_max,
            termination=layer_views(self.termination),
        )

    def encode(self, obs: Tensor) -> Tensor:
        """obs [..., O], or uint8 [..., 3C, 64, 64] -> z [..., Z]."""
        return layers.encode(self.weights(), obs)

    def next(self, z: Tensor, action: Tensor) -> Tensor:
        """z [..., Z], action [..., A] -> the next latent [..., Z]."""
        return layers.dynamics(self.weights(), z, action)

    def pi(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [..., Z] -> μ and log σ [..., A] of the Gaussian before squashing."""
        return layers.policy(self.weights(), z)

    def q(self, z: Tensor, action: Tensor) -> Tensor:
        """z [..., Z], action [..., A] -> Q of every critic [K, ...]."""
        return layers.critics(self.weights().critics, z, action)


def _encoder(spec: ObservationSpec, config: ModelConfig) -> list[nn.Module]:
    """MLP for flat observations; for images convolutions, and a Linear if Z is not their size."""
    latent = config.latent_dim
    encoder: list[nn.Module] = []
    if not spec.images:
        encoder.append(Linear(spec.shape[0], config.encoder_dim, normed=True))
        encoder.append(Linear(config.encoder_dim, latent, normed=True))
        return encoder
    channels, side, _ = spec.shape
    for kernel, stride in layers.CONVOLUTIONS:
        encoder.append(Convolution(channels, layers.CHANNELS, kernel))
        channels, side = layers.CHANNELS, (side - kernel) // stride + 1
    flat = channels * side**2  # 512
    return encoder if flat == latent else [*encoder, Linear(flat, latent, normed=False)]
