"""What holds every backend of the rollout to one meaning: its draws, reference and tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.config import ModelConfig
from iqmpc.kernels import layers
from iqmpc.kernels.mppi_rollout import mppi_rollout, noise_steps
from iqmpc.kernels.weights import Weights, snapshot
from iqmpc.model import WorldModel

GAMMA, BETA = 0.96, 0.03
# Relative to the float64 reference; the same elites in at least 95 % of places.
TOLERANCE = {"float32": 1e-4, "bf16": 2e-2}


def drawn(
    weights: Weights, envs: int, horizon: int, samples: int, score: str = "advantage", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z0, actions, policy noise and critic pair, in float32 on the CPU."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    groups = weights.latent_dim // weights.simnorm_dim
    z0 = normal(envs, groups, weights.simnorm_dim).softmax(-1).flatten(1)
    actions = normal(envs, horizon, samples, weights.action_dim).clamp(-1, 1)
    noise = normal(envs, noise_steps(horizon, score), samples, weights.action_dim)
    return z0, actions, noise, torch.tensor([2, 0])


def in_float64(
    weights: Weights,
    draws: tuple[Tensor, ...],
    score: str = "advantage",
    *,
    backend: str = "reference",
) -> Tensor:
    """The returns of the reference, [E, S]."""
    z0, actions, noise, pair = draws
    return mppi_rollout(
        snapshot(weights, torch.float64),
        z0.double(),
        actions.double(),
        noise.double(),
        pair,
        GAMMA,
        score,
        entropy_coef=BETA,
        backend=backend,
    )


def end_logits(weights: Weights, draws: tuple[Tensor, ...]) -> Tensor:
    """The termination head's, of z_1..z_H, in float64: [E, S, H].

    Where one is as near to 0 as a backend's rounding, that backend may decide otherwise.
    """
    weights, actions = snapshot(weights, torch.float64), draws[1].double()
    z, logits = draws[0].double().unsqueeze(1).expand(-1, actions.shape[2], -1), []
    for t in range(actions.shape[1]):
        z = layers.dynamics(weights, z, actions[:, t])
        logits.append(layers.termination(weights, z))
    return torch.stack(logits, -1)


def decided(weights: Weights, draws: tuple[Tensor, ...], precision: str) -> Tensor:
    """The samples [E, S] with no imagined latent on the head's edge."""
    edge = 1e-4 if precision == "float32" else 0.02
    return (end_logits(weights, draws)[..., :-1].abs() > edge).all(-1)


def image_model(seed: int = 0) -> Weights:
    """A model of images, with activations that are not zero."""
    torch.manual_seed(seed)
    model = WorldModel((9, 64, 64), 3, ModelConfig(hidden_dim=37, latent_dim=24, critics=3))
    for part in (model.dynamics, model.policy, model.critics, model.encoder[-1:]):
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return model.weights()


def images(envs: int) -> Tensor:
    return torch.randint(0, 256, (envs, 9, 64, 64), dtype=torch.uint8)


def ending_half(weights: Weights, draws: tuple[Tensor, ...]) -> Weights:
    """The weights with the head's bias moved so that half of these latents are terminal."""
    last = weights.termination[-1]
    bias = last.bias.detach() - end_logits(weights, draws).median().to(last.bias.dtype)
    return weights._replace(termination=(*weights.termination[:-1], last._replace(bias=bias)))


def first(draws: tuple[Tensor, ...], samples: int) -> tuple[Tensor, ...]:
    """The draws of the first samples of each problem alone."""
    z0, actions, noise, pair = draws
    return z0, actions[:, :, :samples].contiguous(), noise[:, :, :samples].contiguous(), pair


def assert_within(returns: Tensor, expected: Tensor, precision: str) -> None:
    """`returns` [E, S] are the first of `expected` [E, S or more].

    More, for the scale of a return: a single one may be near zero.
    """
    scale = expected.square().mean().sqrt()
    error = returns - expected[:, : returns.shape[1]]
    if precision == "float32":
        assert error.abs().max() <= TOLERANCE[precision] * max(scale, expected.abs().max())
    else:  # rounding to bf16 is noise: bounded as a whole
        assert error.square().mean().sqrt() <= TOLERANCE[precision] * max(1, scale)


def assert_within_with_elites(returns: Tensor, expected: Tensor, precision: str) -> None:
    """Close as a whole, and 32 elites of at least 95 % the same."""
    assert (returns - expected).norm() <= TOLERANCE[precision] * expected.norm()
    for got, true in zip(returns.topk(32).indices, expected.topk(32).indices, strict=True):
        assert len(set(got.tolist()) & set(true.tolist())) >= 0.95 * 32
