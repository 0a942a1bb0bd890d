"""iqmpc.kernels.triton_weights: what cannot be packed, and refreshing in place."""

from __future__ import annotations

import pytest
import torch

from iqmpc.kernels.triton_weights import TritonWeights
from iqmpc.kernels.weights import refresh
from tests.kernels.contract import TOLERANCE
from tests.recorder import Recorder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dynamics=()), "dynamics: the triton backend takes three layers, LayerNorm on all"),
        (dict(simnorm_dim=128), "simnorm_dim: the triton backend takes at most 64, got 128"),
        (dict(simnorm_dim=5), "simnorm_dim: must divide the latent size 128, got 5"),
    ],
)
def test_weights_that_do_not_fit_are_named(make_weights, change, message):
    with pytest.raises(ValueError, match=message):
        TritonWeights(make_weights(5, 3, latent=128)._replace(**change))
    with pytest.raises(ValueError, match="precision must be float32, tf32, bf16, got 'int8'"):
        TritonWeights(make_weights(5, 3), precision="int8")


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("simnorm", [8, 3])
def test_refreshed_weights_are_packed_weights_in_the_same_memory(make_weights, precision, simnorm):
    old, new = (make_weights(5, 3, latent=24, simnorm=simnorm, seed=s) for s in (0, 1))
    packed, expected = (TritonWeights(w, precision=precision) for w in (old, new))
    memory = [
        packed.matrices,
        packed.vectors,
        *(t for x in packed.policy_layers for t in x if t is not None),
    ]
    where = [t.data_ptr() for t in memory]
    assert not torch.equal(packed.matrices, expected.matrices)
    packed.refresh(new)
    assert torch.equal(packed.matrices, expected.matrices)
    assert torch.equal(packed.vectors, expected.vectors)
    assert [t.data_ptr() for t in memory] == where
    for x, y in zip(packed.policy_layers, expected.policy_layers, strict=True):
        assert torch.equal(x.weight, y.weight)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("simnorm", [8, 3])
def test_a_refresh_can_be_captured(make_weights, precision, simnorm):
    """No host synchronisation and no number of the host's: done again, it packs what is there."""
    live, other, new = (make_weights(5, 3, latent=24, simnorm=simnorm, seed=s) for s in range(3))
    packed, expected = (TritonWeights(w, precision=precision) for w in (other, new))
    recorder = Recorder()
    with recorder:
        packed.refresh(live)
    refresh(live, new)
    recorder.replay()
    assert torch.equal(packed.matrices, expected.matrices)
    assert torch.equal(packed.vectors, expected.vectors)
