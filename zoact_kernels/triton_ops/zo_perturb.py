"""zo_perturb_: w [N, C] <- w + sum_s weights[s] Z_s (* noise_scale | . basis^T) where the mask lets an element move.

w fp32, bf16 or fp16 with any row stride, in place; bit for bit reference.zo_perturb_: all in fp32, each operation
rounded on its own, one rounding to the dtype of w, to nearest or stochastically. Bound by memory.

Dense: a program takes 8 runs of 128 elements whose addresses e start at multiples of 128, so no word of Philox is made
twice; where the rows of w follow one another it is one long row. With a basis, a tile of rows and columns adds one rank
after the other, in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import host, tiles
from .dequant import rounded
from .words import ROUNDING, element_words, kept, noise, stochastic

ROWS, COLS = 8, 128


@triton.jit
def store_rounded(
    where, moved, inside, rounding_seed, param_id, first, DTYPE: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr
):
    """fp32 [rows, COLS] -> DTYPE, to nearest, or with random bits where there is a seed for them."""
    if rounding_seed is None or DTYPE == tl.float32:
        tl.store(where, rounded(moved, DTYPE), mask=inside)
    else:
        word = element_words(tl.load(rounding_seed), tl.load(param_id), ROUNDING, first, COLS, ALIGN)
        tl.store(where, stochastic(moved, word, DTYPE), mask=inside)


@triton.jit
def perturb_kernel(
    w, seeds, weights, param_id, noise_scale, mask_value, mask_seed, rounding_seed,
    rows, width, stride, S, row_offset, total, chunks,
    NOISE: tl.constexpr, MASK: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`chunks` runs cover a row of `width` elements wherever in a run of 128 it begins. VECTORS: every row of w and of
    noise_scale starts on 16 bytes, and its address e is a multiple of 8."""
    DTYPE: tl.constexpr = w.dtype.element_ty
    run = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = run // chunks
    e_row = (row_offset + row) * total
    first = ((e_row >> 7) + run % chunks) << 7
    start, at_w, at_scale = first - e_row, row * stride, row * width
    if VECTORS:
        start, at_w, at_scale = tl.multiple_of(start, 8), tl.multiple_of(at_w, 8), tl.multiple_of(at_scale, 8)
    j = start[:, None] + tl.arange(0, COLS)[None, :]
    inside = (j >= 0) & (j < width) & (row < rows)[:, None]

    g = tl.zeros((ROWS, COLS), tl.float32)
    for s in range(S):
        g = g + tl.load(weights + s) * noise(NOISE, tl.load(seeds + s), tl.load(param_id), first, COLS, COLS)
    if noise_scale is not None:
        g = g * tl.load(noise_scale + at_scale[:, None] + j, mask=inside, other=0)
    where = w + at_w[:, None] + j
    clean = tl.load(where, mask=inside, other=0).to(tl.float32)
    moved = clean + g
    if MASK == "magnitude":
        moved = tl.where(tl.abs(clean) <= tl.load(mask_value), moved, clean)
    elif MASK == "random":
        part = kept(tl.load(mask_seed), tl.load(param_id), tl.load(mask_value), first, COLS, COLS)
        moved = tl.where(part, moved, clean)
    store_rounded(where, moved, inside, rounding_seed, param_id, first, DTYPE, COLS, COLS)


@triton.jit
def columns4(tile, ROWS: tl.constexpr):
    """[ROWS, 4] -> its four columns [ROWS]."""
    even, odd = tl.split(tl.reshape(tile, (ROWS, 2, 2)))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return c0, c1, c2, c3


@triton.jit
def perturb_basis_kernel(
    w, seeds, weights, param_id, basis, rounding_seed, rows, width, stride, S, R, row_offset, total,
    NOISE: tl.constexpr, ALIGN: tl.constexpr, ROUND_ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """basis [width, R]; `total` columns of the whole Z."""
    DTYPE: tl.constexpr = w.dtype.element_ty
    tiles_j = tl.cdiv(width, COLS)
    j0 = tl.program_id(0) % tiles_j * COLS
    row = (tl.program_id(0) // tiles_j * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = j0 + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (j < width)[None, :]
    delta = tl.zeros((ROWS, COLS), tl.float32)
    for r in range(0, R, 4):
        g = tl.zeros((ROWS, 4), tl.float32)
        first = (row_offset + row) * total + r
        for s in range(S):
            g = g + tl.load(weights + s) * noise(NOISE, tl.load(seeds + s), tl.load(param_id), first, 4, ALIGN)
        g0, g1, g2, g3 = columns4(g, ROWS)
        at = basis + j.to(tl.int64) * R + r
        in_basis, rank = j < width, tl.zeros_like(j) + r
        delta = delta + g0[:, None] * tl.load(at, mask=in_basis, other=0)[None, :]
        delta = delta + g1[:, None] * tl.load(at + 1, mask=in_basis & (rank + 1 < R), other=0)[None, :]
        delta = delta + g2[:, None] * tl.load(at + 2, mask=in_basis & (rank + 2 < R), other=0)[None, :]
        delta = delta + g3[:, None] * tl.load(at + 3, mask=in_basis & (rank + 3 < R), other=0)[None, :]
    where = w + row[:, None] * stride + j[None, :]
    moved = tl.load(where, mask=inside, other=0).to(tl.float32) + delta
    first = (row_offset + row) * width + j0
    store_rounded(where, moved, inside, rounding_seed, param_id, first, DTYPE, COLS, ROUND_ALIGN)


def zo_perturb_(w, seeds, weights, param_id, basis=None, noise_scale=None, mask_value=None, mask_seed=None,
                rounding_seed=None, noise="normal", mask="none", row_offset=0, cols=0):  # fmt: skip
    """The op, arguments checked: see ops.zo_perturb_."""
    if w.numel() == 0:
        return
    target = w if w.stride(1) == 1 or w.shape[1] == 1 else w.contiguous()
    seeds, weights, basis, noise_scale = host.dense(seeds, weights, basis, noise_scale)
    (rows, width), stride, S = w.shape, target.stride(0), seeds.numel()
    with torch.cuda.device_of(w):
        if basis is None:
            total = cols or width
            if (stride == width or rows == 1) and total == width:  # one row of everything, whose first e is the same
                rows, width, stride, row_offset, total = 1, rows * width, rows * width, row_offset * width, 1
            vectors = stride % 8 == width % 8 == (row_offset * total if rows == 1 else total) % 8 == 0
            chunks = triton.cdiv(width + 127, COLS)
            perturb_kernel[(triton.cdiv(rows * chunks, ROWS),)](
                target, seeds, weights, param_id, noise_scale, mask_value, mask_seed, rounding_seed,
                rows, width, stride, S, row_offset, total, chunks, noise, mask, vectors, ROWS, COLS,
                **host.options(w.device, 4),
            )  # fmt: skip
        else:
            R = basis.shape[1]
            total = cols or R
            perturb_basis_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(width, COLS),)](
                target, seeds, weights, param_id, basis, rounding_seed, rows, width, stride, S, R, row_offset, total,
                noise, tiles.pow2_divisor(total, 4), tiles.pow2_divisor(width, COLS), ROWS, COLS,
                **host.options(w.device, 4),
            )  # fmt: skip
    if target is not w:
        w.copy_(target)
