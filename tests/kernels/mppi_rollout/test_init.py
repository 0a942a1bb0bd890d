"""The operation: what it takes, and what it says of a backend that cannot serve."""

import pytest
import torch

from iqmpc.errors import BackendError
from iqmpc.kernels.cuda import CudaWeights
from iqmpc.kernels.mppi_rollout import mppi_rollout
from tests.kernels.contract import GAMMA, drawn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(z0=torch.zeros(2, 9)), r"z0 must be \[1, 16\], got \[2, 9\]"),
        (
            dict(actions=torch.zeros(1, 3, 4, 5)),
            r"actions must be \[E, H, S, 2\], got \[1, 3, 4, 5\]",
        ),
        (
            dict(score_noise=torch.zeros(1, 3, 4, 2)),
            r"score_noise must be \[1, 2, 4, 2\], got \[1, 3, 4, 2\]",
        ),
        (dict(critic_pair=torch.zeros(3)), r"critic_pair must be \[2\], got \[3\]"),
        (dict(score="both"), "score must be one of advantage, unrolled, got 'both'"),
    ],
)
def test_what_does_not_fit_is_named(make_weights, change, message):
    weights = make_weights(5, 2)
    z0, actions, noise, pair = drawn(weights, 1, 3, 4)
    given_ = (
        dict(
            z0=z0,
            actions=actions,
            score_noise=noise,
            critic_pair=pair,
            discount=GAMMA,
            score="advantage",
            backend="reference",
        )
        | change
    )
    with pytest.raises(ValueError, match=message):
        mppi_rollout(weights, **given_)


def test_a_backend_that_cannot_run_is_an_error(make_weights):
    weights = make_weights(5, 2)
    draws = (weights, *drawn(weights, 1, 3, 4))
    with pytest.raises(BackendError, match="backend=cuda cannot run"):
        mppi_rollout(*draws, GAMMA, backend="cuda")


def test_the_cuda_backend_says_that_it_takes_no_termination_head(make_weights, monkeypatch):
    weights = make_weights(5, 3, termination=True)
    monkeypatch.setattr("iqmpc.kernels.cuda.available_backends", lambda: {"cuda": None})
    with pytest.raises(ValueError, match="the cuda backend takes no model with a termination"):
        CudaWeights(weights)
