"""iqmpc.kernels.triton_tiles: some tile for every model, on every GPU. Needs no Triton."""

from __future__ import annotations

import pytest

from iqmpc.kernels.triton_tiles import CHAIN, STAGE, Target, fits, shared_bytes, usable
from iqmpc.kernels.triton_weights import PRECISIONS

KIB = 1024
TARGETS = [Target(99 * KIB, False), Target(163 * KIB, False), Target(227 * KIB, True)]
WIDTHS = range(64, 2049, 64)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tiles", [CHAIN, STAGE], ids=["throughput", "latency"])
def test_every_model_has_a_tile_that_fits(tiles, precision, target):
    """Of every width, number of rows and step through a product: SimNorm's groups go up to 64."""
    itemsize = PRECISIONS[precision].itemsize
    for width in WIDTHS:
        for block_k in {64, 128 // itemsize}:
            for rows in (1, 17, 64, 488, 1 << 20):
                sizes = dict(itemsize=itemsize, block_k=block_k, widest=width)
                found = usable(tiles, target, **sizes, rows=rows)
                assert found and all(fits(t, target, **sizes) for t in found)
                lowest = min(t.block_m for t in found)
                assert all(t.block_m <= max(lowest, 2 * rows) for t in found)


def test_where_nothing_fits_the_smallest_is_tried():
    none = Target(1, False)
    for tiles in (CHAIN, STAGE):
        found = usable(tiles, none, itemsize=4, block_k=64, widest=512, rows=1000)
        assert [shared_bytes(t, 4, 64) for t in found] == [
            min(shared_bytes(t, 4, 64) for t in tiles)
        ]
