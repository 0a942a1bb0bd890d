"""iqmpc.kernels.weights: what is done to a whole model is done to every part of it."""

from __future__ import annotations

import torch

from iqmpc.kernels.weights import PARTS, refresh, snapshot


def test_map_reaches_every_tensor_and_keeps_the_rest(make_weights) -> None:
    weights = make_weights(5, 3, termination=True)
    doubled = weights.map(lambda t: 2 * t)
    assert all(len(getattr(doubled, part)) == len(getattr(weights, part)) for part in PARTS)
    assert len(doubled.tensors()) == len(weights.tensors()) == 50
    for old, new in zip(weights.tensors(), doubled.tensors(), strict=True):
        assert torch.equal(new, 2 * old)
    assert doubled.simnorm_dim == weights.simnorm_dim and doubled.log_std_min == weights.log_std_min


def test_a_snapshot_is_a_copy_that_is_refreshed_in_place(make_weights) -> None:
    weights, other = (make_weights(5, 3, termination=True, seed=seed) for seed in (0, 1))
    copy = snapshot(weights, torch.float64)
    where = [t.data_ptr() for t in copy.tensors()]
    for t in weights.tensors():
        t.zero_()
    assert all(t.dtype == torch.float64 and t.any() for t in copy.tensors())
    refresh(copy, other)
    for got, expected in zip(copy.tensors(), other.tensors(), strict=True):
        assert torch.equal(got, expected.double())
    assert [t.data_ptr() for t in copy.tensors()] == where
