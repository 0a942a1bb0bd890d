"""World models of any size, with activations around 1 in every layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from iqmpc.kernels.weights import Layer, Weights


def random_weights(
    obs_dim: int,
    action_dim: int,
    *,
    latent: int = 16,
    hidden: int = 13,
    encoder: int = 9,
    critics: int = 3,
    simnorm: int = 8,
    seed: int = 0,
    termination: bool = False,
) -> Weights:
    random = torch.Generator().manual_seed(seed)

    def layer(inputs: int, outputs: int, normed: bool, *lead: int) -> Layer:
        def normal(*shape: int, mean: float = 0, std: float = 0.3) -> torch.Tensor:
            return mean + std * torch.randn(*lead, *shape, generator=random)

        weight, bias = normal(outputs, inputs, std=inputs**-0.5), normal(outputs)
        if not normed:
            return Layer(weight, bias)
        return Layer(weight, bias, normal(outputs, mean=1), normal(outputs))

    joint = latent + action_dim
    world = Weights(
        encoder=(layer(obs_dim, encoder, True), layer(encoder, latent, True)),
        dynamics=(
            layer(joint, hidden, True),
            layer(hidden, hidden, True),
            layer(hidden, latent, True),
        ),
        policy=(
            layer(latent, hidden, True),
            layer(hidden, hidden, True),
            layer(hidden, 2 * action_dim, False),
        ),
        critics=(
            layer(joint, hidden, True, critics),
            layer(hidden, hidden, True, critics),
            layer(hidden, 1, False, critics),
        ),
        simnorm_dim=simnorm,
        log_std_min=-10.0,
        log_std_max=2.0,
    )
    return (
        world._replace(
            termination=(
                layer(latent, hidden, True),
                layer(hidden, hidden, True),
                layer(hidden, 1, False),
            )
        )
        if termination
        else world
    )


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., Weights]:
    return random_weights
