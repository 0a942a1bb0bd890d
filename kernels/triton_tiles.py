"""Which tile sizes the Triton kernels are tried with. Plain Python: does not import Triton."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows and columns of a program's block, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Target(NamedTuple):
    """What a GPU has: bytes of shared memory for one program, and Hopper's products or later."""

    shared: int
    hopper: bool


# Of the throughput schedule. Wide blocks hold a whole row, so that it is normalised in registers;
# the others go over the scratch memory once more, but are taller and read the weights less often.
# (64, 64, 4, 3) is for models of width 64; the last is for little shared memory.
CHAIN = [Tile(*sizes) for sizes in (
    (64, 512, 8, 3), (64, 512, 8, 2), (64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3),
    (64, 256, 8, 3), (128, 128, 8, 3), (128, 256, 8, 2), (128, 256, 8, 3), (64, 128, 8, 3),
    (64, 64, 4, 3), (32, 128, 4, 3), (32, 64, 4, 2))]
# Of a layer of the latency schedule.
STAGE = [Tile(*sizes) for sizes in (
    (16, 64, 4, 4), (32, 64, 4, 4), (64, 64, 4, 3), (32, 128, 4, 3), (64, 128, 4, 3),
    (64, 128, 8, 3), (128, 64, 8, 3), (16, 64, 4, 2))]
# Of the score, which has no products.
SCORE = [Tile(*sizes) for sizes in (
    (1, 512, 4, 1), (2, 512, 4, 1), (4, 256, 4, 1), (4, 512, 8, 1), (8, 128, 4, 1))]


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def shared_bytes(tile: Tile, itemsize: int, block_k: int) -> int:
    """Shared memory that a product's operands take. itemsize: of an operand."""
    lines = tile.num_stages * (tile.block_m + tile.block_n)
    if itemsize == 4:
        lines += tile.block_n  # the weights' low digits
    return lines * block_k * itemsize


def fits(tile: Tile, target: Target, itemsize: int, block_k: int, widest: int) -> bool:
    """Whether a choice is worth trying: its operands fit the shared memory, its sums the registers,
    and its columns are not mostly padding."""
    # Sums a thread beyond which the compiler was seen to spill inside the loop: before Hopper the
    # operands pass through registers too, and float32's are two, with the low digits.
    sums = (128 if target.hopper else 64) // (2 if itemsize == 4 else 1)
    return (shared_bytes(tile, itemsize, block_k) <= target.shared
            and tile.block_m * tile.block_n <= sums * 32 * tile.num_warps
            and tile.block_n <= max(64, power_of_two(widest)))


def usable(
    tiles: list[Tile], target: Target, *, itemsize: int, block_k: int, widest: int, rows: int
) -> list[Tile]:
    """Those worth trying for a model `widest` wide on so many rows: at least one.

    Where none fits it is the one that needs the least shared memory.
    """
    found = [t for t in tiles if fits(t, target, itemsize, block_k, widest)]
    if not found:
        return [min(tiles, key=lambda t: shared_bytes(t, itemsize, block_k))]
    lowest = min(t.block_m for t in found)
    tallest = max(lowest, power_of_two(rows))  # taller ones are mostly padding
    return [t for t in found if t.block_m <= tallest]
