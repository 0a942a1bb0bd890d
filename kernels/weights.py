"""What the kernels compute with: the world model's tensors, as plain tuples.

`Weights` is either a live view of a model's parameters (`WorldModel.weights()`) or a packed,
read-only copy of them (`snapshot`), made once per published update and never per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from iqmpc.observation import SIZE

PARTS = ("encoder", "dynamics", "policy", "critics", "termination")  # of `Weights`: the networks


class Layer(NamedTuple):
    """One linear layer, followed by a LayerNorm where `gamma` and `beta` are present.

    weight [O, I], bias [O], gamma [O], beta [O]; critics carry a leading K on each. A convolution
    has weight [O, I, k, k] and no LayerNorm.
    """

    weight: Tensor
    bias: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Layer:
        """The same layer with `f` applied to every tensor."""
        gamma, beta = (None if t is None else f(t) for t in (self.gamma, self.beta))
        return Layer(f(self.weight), f(self.bias), gamma, beta)


class PolicyLayers(Protocol):
    """A squashed Gaussian policy: its layers, of 2A outputs, and the range of log σ."""

    @property
    def policy(self) -> tuple[Layer, ...]: ...

    @property
    def log_std_min(self) -> float: ...

    @property
    def log_std_max(self) -> float: ...


class Weights(NamedTuple):
    """A world model: its stacks of layers and the constants of its activations.

    The encoder of images is four convolutions, and a linear layer where Z is not their size.
    `termination` is empty for a model of tasks that never end in a terminal state.
    """

    encoder: tuple[Layer, ...]
    dynamics: tuple[Layer, ...]
    policy: tuple[Layer, ...]
    critics: tuple[Layer, ...]
    simnorm_dim: int
    log_std_min: float
    log_std_max: float
    termination: tuple[Layer, ...] = ()

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """(O,), or (3C, 64, 64) of images."""
        inputs = self.encoder[0].weight.shape[1]
        return (inputs, SIZE, SIZE) if self.encodes_images else (inputs,)

    @property
    def encodes_images(self) -> bool:
        return self.encoder[0].weight.dim() == 4

    @property
    def latent_dim(self) -> int:
        return self.dynamics[-1].weight.shape[-2]

    @property
    def action_dim(self) -> int:
        return self.policy[-1].weight.shape[-2] // 2

    @property
    def num_critics(self) -> int:
        return self.critics[0].weight.shape[0]

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        return [t for part in PARTS for t in layer_tensors(getattr(self, part))]

    def map(self, f: Callable[[Tensor], Tensor]) -> Weights:
        """The same model with `f` applied to every tensor of every part."""
        return self._replace(**{part: map_layers(f, getattr(self, part)) for part in PARTS})


def layer_tensors(layers: tuple[Layer, ...]) -> list[Tensor]:
    """All tensors of a stack of layers, in a fixed order."""
    return [t for layer in layers for t in layer if t is not None]


def map_layers(f: Callable[[Tensor], Tensor], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Apply `f` to every tensor of a stack of layers."""
    return tuple(layer.map(f) for layer in layers)


def frozen(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The same layers, cut off from gradients."""
    return map_layers(Tensor.detach, layers)


def snapshot(weights: Weights, dtype: torch.dtype = torch.float32) -> Weights:
    """A detached copy in `dtype`, for the planner. Refresh it in place with `refresh`."""

    return weights.map(lambda t: t.detach().to(dtype, copy=True))


@torch.no_grad()
def refresh(target: Weights, source: Weights) -> None:
    """Copy `source` into the snapshot `target`, keeping its storage and what was compiled on it."""
    # The public copies go tensor by tensor.
    torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
        target.tensors(), [t.detach() for t in source.tensors()]
    )
