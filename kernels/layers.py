"""The world model's functions on `Weights`, in plain torch and any dtype.

These are the meaning of the model, used by the learner (on live parameters) and by the planner's
reference (on a snapshot). Leading dimensions are free; the last is the feature dimension.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from iqmpc.kernels.weights import Layer, PolicyLayers, Weights, map_layers

_EPS = 1e-5  # LayerNorm's, as in torch
CONVOLUTIONS = ((7, 2), (5, 2), (3, 2), (3, 1))  # kernel and stride of the encoder of images
CHANNELS = 32  # of each


def linear(layer: Layer, x: Tensor) -> Tensor:
    """x W^T + b, then LayerNorm where the layer has one. A stacked layer maps [K, N, I]."""
    if layer.weight.dim() == 2:
        y = F.linear(x, layer.weight, layer.bias)
    else:
        y = torch.baddbmm(layer.bias.unsqueeze(1), x, layer.weight.transpose(1, 2))
    gamma, beta = layer.gamma, layer.beta
    if gamma is None or beta is None:
        return y
    if layer.weight.dim() == 2:
        return F.layer_norm(y, y.shape[-1:], gamma, beta, _EPS)
    return F.layer_norm(y, y.shape[-1:], eps=_EPS) * gamma.unsqueeze(1) + beta.unsqueeze(1)


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)) = x n / (n + 2) with n = e^x (e^x + 2): one exponential, not three.

    Beyond 20 the quotient is 1 in every dtype used here, and the exponential must not overflow.
    """
    e = x.clamp(max=20).exp()
    n = e * (e + 2)
    return x * (n / (n + 2))


def mlp(layers: tuple[Layer, ...], x: Tensor) -> Tensor:
    """Hidden layers with Mish, the last one without."""
    for layer in layers[:-1]:
        x = mish(linear(layer, x))
    return linear(layers[-1], x)


def simnorm(x: Tensor, group: int) -> Tensor:
    """Softmax inside each group of `group` features."""
    return F.softmax(x.unflatten(-1, (-1, group)), dim=-1).flatten(-2)


def encode(w: Weights, obs: Tensor) -> Tensor:
    """h: obs [..., O], or images [..., 3C, 64, 64] with values from 0 to 255 -> z [..., Z]."""
    x = convolve(w.encoder, obs) if w.encodes_images else mlp(w.encoder, obs)
    return simnorm(x, w.simnorm_dim)


def convolve(layers: tuple[Layer, ...], images: Tensor) -> Tensor:
    """Convolutions with ReLU between them, flattened, and the linear layer where there is one."""
    x = images.reshape(-1, *images.shape[-3:]).to(layers[0].weight.dtype) / 255 - 0.5
    for index, (layer, (_, stride)) in enumerate(zip(layers, CONVOLUTIONS, strict=False)):
        x = F.conv2d(F.relu(x) if index else x, layer.weight, layer.bias, stride)
    x = x.flatten(1)
    for layer in layers[len(CONVOLUTIONS) :]:
        x = linear(layer, x)
    return x.reshape(*images.shape[:-3], -1)


def shifted(images: Tensor, shift: Tensor) -> Tensor:
    """Images [..., C, H, W] moved by whole pixels, shift [..., 2] (rows, columns) int64 each.

    Output (y, x) is input (y + rows, x + columns); beyond an edge the edge is repeated.
    """
    rows, columns = (
        (torch.arange(size, device=images.device) + shift[..., axis, None]).clamp(0, size - 1)
        for axis, size in enumerate(images.shape[-2:])
    )
    moved = images.gather(-2, rows[..., None, :, None].expand_as(images))
    return moved.gather(-1, columns[..., None, None, :].expand_as(images))


def dynamics(w: Weights, z: Tensor, action: Tensor) -> Tensor:
    """d: z [..., Z], action [..., A] -> next z [..., Z]."""
    return simnorm(mlp(w.dynamics, torch.cat([z, action], dim=-1)), w.simnorm_dim)


def termination(w: Weights, z: Tensor) -> Tensor:
    """z [..., Z] -> the logit [...] of z being terminal; planning takes it as such above 0."""
    return mlp(w.termination, z).squeeze(-1)


def policy(w: PolicyLayers, z: Tensor) -> tuple[Tensor, Tensor]:
    """π: z [..., Z] -> mean μ and log σ, each [..., A], both before the squashing tanh."""
    mean, x = mlp(w.policy, z).chunk(2, dim=-1)
    low, high = w.log_std_min, w.log_std_max
    return mean, low + 0.5 * (high - low) * (torch.tanh(x) + 1)


def policy_action(w: PolicyLayers, z: Tensor, noise: Tensor) -> Tensor:
    """a = tanh(μ + σ ε): z [..., Z], standard normal noise [..., A] -> action [..., A]."""
    mean, log_std = policy(w, z)
    return torch.tanh(mean + log_std.exp() * noise)


def policy_sample(
    w: PolicyLayers, z: Tensor, noise: Tensor, form: Literal["exact", "presquash"] = "exact"
) -> tuple[Tensor, Tensor]:
    """a = tanh(u), u = μ + σ ε, and log π [...], summed over the action's dimensions.

    z [..., Z] and standard normal noise [..., A]. `exact` is the density of the squashed Gaussian,
    Σ (-ε²/2 - log σ - ½ log 2π) - Σ log(1 - a²). `presquash` is that of the Gaussian before
    squashing, with 1/A of the second sum, each term log(max(1 - a², 0) + 1e-6): the released
    code's log π divided by A. It is no density of a.
    """
    mean, log_std = policy(w, z)
    u = mean + log_std.exp() * noise
    action = torch.tanh(u)
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    if form == "presquash":
        squash = ((1 - action.square()).clamp_min(0) + 1e-6).log() / action.shape[-1]
    else:  # log(1 - tanh(u)^2), in a form that does not cancel for large |u|
        squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return action, (gaussian - squash).sum(-1)


def ensemble(layers: tuple[Layer, ...], x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Every critic on its own rows: x [K, N, Z+A] -> [K, N].

    keep: dropout multipliers for the first layer's pre-activations, [K, N, hidden], or None.
    """
    first = layers[0]
    if keep is None:
        x = mish(linear(first, x))
    else:  # NormedLinear is Linear -> Dropout -> LayerNorm -> Mish
        assert first.gamma is not None and first.beta is not None
        x = linear(Layer(first.weight, first.bias), x) * keep
        x = F.layer_norm(x, x.shape[-1:], eps=_EPS)
        x = mish(x * first.gamma.unsqueeze(1) + first.beta.unsqueeze(1))
    return mlp(layers[1:], x).squeeze(-1)


def critics(
    layers: tuple[Layer, ...], z: Tensor, action: Tensor, keep: Tensor | None = None
) -> Tensor:
    """Q of every critic in `layers` on the same rows: z [..., Z], action [..., A] -> [K, ...].

    keep: as in `ensemble`, with N the product of the leading dimensions.
    """
    x = torch.cat([z, action], dim=-1).flatten(0, -2)
    x = x.expand(layers[0].weight.shape[0], *x.shape)
    return ensemble(layers, x, keep).unflatten(-1, z.shape[:-1])


def random_pair(critics: int, generator: torch.Generator) -> Tensor:
    """Two different critics out of `critics`, drawn on the generator's device: [2] int64."""
    order = torch.rand(critics, device=generator.device, generator=generator)
    return order.topk(2).indices


def draw_pair(layers: tuple[Layer, ...], pair: Tensor) -> tuple[Layer, ...]:
    """The two critics named by `pair` ([2] int64): only these are evaluated for Q_min."""
    return map_layers(lambda t: t.index_select(0, pair), layers)


def q_min(pair: tuple[Layer, ...], z: Tensor, action: Tensor, keep: Tensor | None = None) -> Tensor:
    """Q_min: the smaller of the drawn pair. z [..., Z], action [..., A] -> [...].

    keep: as in `critics`, [2, N, hidden] in the pair's order.
    """
    return critics(pair, z, action, keep).amin(0)
