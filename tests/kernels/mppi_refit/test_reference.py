import numpy as np
import pytest
import torch

from iqmpc.kernels.mppi_refit import mppi_refit

SETTINGS = dict(elites=4, temperature=0.5, std_min=0.05, std_max=2.0, backend="reference")


def by_hand(actions, returns, elites, temperature, std_min, std_max, backend):
    means, stds, chosen = [], [], []
    for a, g in zip(actions, returns, strict=True):
        best = sorted(range(len(g)), key=lambda s: -g[s])[:elites]
        w = np.exp([temperature * (g[s] - g[best[0]]) for s in best])
        w /= w.sum()
        mean = sum(wi * a[:, s] for wi, s in zip(w, best, strict=True))
        var = sum(wi * (a[:, s] - mean) ** 2 for wi, s in zip(w, best, strict=True))
        means.append(mean)
        stds.append(np.clip(np.sqrt(var), std_min, std_max))
        chosen.append((best, w))
    return np.array(means), np.array(stds), chosen


@pytest.mark.parametrize(
    ("envs", "horizon", "samples", "action_dim"), [(1, 3, 4, 1), (3, 2, 9, 2), (2, 1, 33, 5)]
)
def test_refit_by_hand(envs, horizon, samples, action_dim):
    actions = torch.rand(envs, horizon, samples, action_dim).double() * 2 - 1
    returns = torch.randn(envs, samples).double() * 3
    mean, std, index, weight = mppi_refit(actions, returns, **SETTINGS)
    e_mean, e_std, chosen = by_hand(actions.numpy(), returns.numpy(), **SETTINGS)
    np.testing.assert_allclose(mean, e_mean, rtol=1e-12)
    np.testing.assert_allclose(std, e_std, rtol=1e-9)
    for e, (best, w) in enumerate(chosen):
        assert index[e].tolist() == best
        np.testing.assert_allclose(weight[e], w, rtol=1e-12)


def test_std_is_clamped_at_both_ends():
    actions = torch.zeros(1, 1, 4, 2)
    actions[0, 0, :, 1] = torch.tensor([-9.0, 9.0, -9.0, 9.0])
    _, std, _, _ = mppi_refit(actions, torch.zeros(1, 4), **SETTINGS)
    assert std[0, 0, 0] == pytest.approx(0.05) and std[0, 0, 1] == pytest.approx(2.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_ranks_last_and_weighs_nothing(bad):
    actions = torch.rand(1, 2, 6, 2)
    actions[0, :, [1, 2, 4]] = torch.nan
    returns = torch.tensor([[0.0, bad, bad, -5.0, bad, 1.0]])
    mean, std, index, weight = mppi_refit(actions, returns, **SETTINGS)
    assert index[0, :3].tolist() == [5, 0, 3] and weight[0, 3] == 0
    assert weight.sum().item() == pytest.approx(1)
    assert mean.isfinite().all() and std.isfinite().all()


def test_without_a_finite_score_all_weights_are_zero():
    *_, weight = mppi_refit(torch.rand(2, 2, 6, 2), torch.full((2, 6), torch.nan), **SETTINGS)
    assert torch.equal(weight, torch.zeros(2, 4))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"got \[1, 2, 6, 2\] and \[1, 5\]"):
        mppi_refit(torch.rand(1, 2, 6, 2), torch.rand(1, 5), **SETTINGS)
    with pytest.raises(ValueError, match=r"elites must lie in \[1, 3\], got 4"):
        mppi_refit(torch.rand(1, 2, 3, 2), torch.rand(1, 3), **SETTINGS)
