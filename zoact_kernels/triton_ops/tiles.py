"""Which tile runs: committed rules over (target, dtype, N, K, M), no measurement at run time, no Triton import.

What a row's bits depend on - the steps of K, the number of splits, the operand that holds the weight - is a function of
the dtype, N and K alone; only the number of rows of x in a tile, warps and pipeline stages follow M and the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

K_STEP = 128  # splits and chunks of K start at multiples of this
CHUNK = 512  # k in one partial sum of h = x A


class Tile(NamedTuple):
    """BN weights' rows x BM rows of x, BK a step; `warps` and `stages` as Triton understands them."""

    BN: int
    BM: int
    BK: int
    warps: int
    stages: int


def pow2_divisor(value: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `value`."""
    align = 1
    while align < limit and value % (2 * align) == 0:
        align *= 2
    return align


def rank_tile(R: int) -> int:
    """Columns of C or Z at a time: tl.dot takes 16 or more."""
    return 16 if R <= 16 else 32


def splits(N: int, K: int) -> tuple[int, int]:
    """(number of splits, k in each): enough programs for one tile of x to fill a device, none shorter than CHUNK."""
    count = max(1, min(128 * 64 // max(N, 1), K // CHUNK, 16))
    size = -(-K // (count * K_STEP)) * K_STEP
    return -(-K // size) if K else 1, max(size, K_STEP)


def linear_tile(dtype: torch.dtype, M: int, flat: bool = False, hip: bool = False) -> Tile:
    """The tile of zo_linear.

    Half precision: 64 rows of the weight are what one warp group multiplies from registers (wgmma), and the weight is
    the left operand on every target, so that M changes the width of an instruction, never its depth. fp32 has no tensor
    core: its tiles are small because both operands and the sums live in registers. Flat blocks address every element.
    """
    if dtype == torch.float32:
        return Tile(32, 16, 32, 4, 2) if M <= 16 else Tile(64, 32, 32, 4, 2)
    stages = 2 if hip else 3
    return Tile(64, 16 if M <= 16 else 32 if M <= 32 else 64, 32 if flat else 64, 4, stages)


def dense_tile(dtype: torch.dtype, M: int, hip: bool = False) -> Tile:
    """The tile of zo_dense_linear: narrower, since Z and its parts live in registers beside the sums, and those of an
    fp16 x too."""
    if dtype == torch.float32:
        return Tile(32, 16 if M <= 16 else 32, 32, 4, 2)
    return Tile(64, 16 if M <= 16 or dtype == torch.float16 else 32, 32, 4, 2 if hip else 3)
