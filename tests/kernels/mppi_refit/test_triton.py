"""The Triton refit against the float64 reference (`tests.kernels.on_triton`)."""

from __future__ import annotations

import pytest
import torch

from iqmpc.kernels.mppi_refit import mppi_refit
from tests.kernels.on_triton import (
    device,
    needs_triton,
)


def refits(actions: torch.Tensor, returns: torch.Tensor, elites: int):
    """The Triton kernel's answer and the float64 reference's."""
    settings = dict(elites=elites, temperature=0.5, std_min=0.05, std_max=2.0)
    actions, returns = actions.to(device()), returns.to(device())
    return (
        mppi_refit(actions, returns, **settings, backend="triton"),
        mppi_refit(actions.double(), returns.double(), **settings, backend="reference"),
    )


@needs_triton
@pytest.mark.parametrize(
    ("envs", "horizon", "samples", "action_dim", "elites"),
    [(1, 3, 1, 1, 1), (3, 2, 9, 2, 9), (2, 1, 33, 5, 7), (2, 3, 200, 17, 64), (1, 1, 300, 1, 300)],
)
def test_refit_is_the_reference(envs, horizon, samples, action_dim, elites):
    actions = torch.rand(envs, horizon, samples, action_dim) * 2 - 1
    got, expected = refits(actions, torch.randn(envs, samples) * 3, elites)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(got[2], expected[2]) and got[2].dtype == torch.int64


@needs_triton
def test_refit_breaks_ties_by_place():
    returns = torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0, -0.0, 2.0]])
    (_, _, index, weight), _ = refits(torch.rand(1, 2, 7, 2), returns, 7)
    assert index[0].tolist() == [1, 3, 6, 0, 2, 4, 5]
    assert weight[0, 0] == weight[0, 1] == weight[0, 2]


@needs_triton
def test_refit_ranks_what_is_not_finite_last():
    actions = torch.rand(1, 2, 6, 2)
    actions[0, :, [1, 2, 4]] = torch.nan
    nan, inf = torch.nan, torch.inf
    got, expected = refits(actions, torch.tensor([[0.0, nan, inf, -5.0, -inf, 1.0]]), 4)
    assert got[2].tolist() == [[5, 0, 3, 1]] and got[3][0, 3] == 0
    for i in (0, 1, 3):
        torch.testing.assert_close(got[i].double(), expected[i], rtol=1e-4, atol=1e-5)
    (mean, std, _, weight), _ = refits(actions, torch.full((1, 6), nan), 4)
    assert mean.isfinite().all() and (std == 0.05).all() and (weight == 0).all()
