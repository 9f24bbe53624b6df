"""zo_linear: y_g = x_g D(W)^T + (x_g A0) C0^T + (x_g A) (C + C_g + sum_s sigmas[g, s] Z_s)^T + b.

    x [M, K] fp32, bf16, fp16; D(W) [N, K] of any format; h = x A [M, R], C [N, R], C_g [G, N, R], all fp32; y as x.

Three kernels, the first only where h is not given, the last only where K is split:

    project   h in chunks of K, fp32 products; the chunks are summed by whoever reads h, in their order
    product   x D(W)^T, each dequantised tile shared by all rows, hence by all signs and queries; then `low_rank`
    finish    the splits of K in their order, then `low_rank`

`low_rank` adds to the fp32 sums, per N-tile one Z_s for all row groups; sigma multiplies h, C + sigma Z is never formed
(law 2.5), and y is rounded once. The weight is the left operand: [BN, BK] x [BK, BM], so that wgmma takes it from
registers. Splits of K follow from (N, K) (tiles.py); for few rows they run side by side, for many one after the other,
with the same sums. No atomics. Bound: the weight's bytes for few rows, the products for many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..workspace import Scratch
from . import host, tiles
from .dequant import dot32, dot32_by, load_k, operand, rounded, weight_tile
from .words import noise


@triton.jit
def x_tile(x, m, k0, K, x_stride, EVEN: tl.constexpr, BK: tl.constexpr):
    """x[m]^T [BK, BM], zero from K on."""
    k = k0 + tl.arange(0, BK)[:, None]
    return load_k(x + m.to(tl.int64)[None, :] * x_stride + k, k, K, EVEN)


@triton.jit
def multiply(
    x, codes, scale, offset, nested, n, m, first, last, M, N, K, x_stride, code_stride, groups,
    FORMAT: tl.constexpr, SPAN: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, FP32: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """D(W)[n] . x[m]^T over first <= k < last: fp32 [BN, BM]. `first` is a multiple of BK, `last` too or K. Rows past
    the last repeat it: nobody stores them, and no step of K has to mask them. FP32: "ieee", or "tf32" of an fp32 x."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    n, m = tl.minimum(n, N - 1), tl.minimum(m, M - 1)
    acc = tl.zeros((BN, BM), tl.float32)
    for k0 in tl.range(first, last, BK):
        right = operand(x_tile(x, m, k0, K, x_stride, EVEN, BK), DTYPE)
        w = weight_tile(codes, scale, offset, nested, n, k0, K, code_stride, groups, FORMAT, SPAN, FLAT, EVEN, BN, BK)
        acc = tl.dot(operand(w, DTYPE), right, acc, input_precision=FP32)
    return acc


@triton.jit
def h_tile(h, parts, m, r0, M, R, BM: tl.constexpr, BR: tl.constexpr):
    """h^T [BR, BM] from its parts [parts, M, R], zero outside."""
    r = r0 + tl.arange(0, BR)[:, None]
    total = tl.zeros((BR, BM), tl.float32)
    for part in range(parts):
        row = (m.to(tl.int64) + part * M)[None, :]
        total += tl.load(h + row * R + r, mask=(m[None, :] < M) & (r < R), other=0)
    return total


@triton.jit
def c_tile(coeff, n, g, r0, N, R, BR: tl.constexpr):
    """C_g[n, r0 : r0 + BR], zero outside."""
    r = r0 + tl.arange(0, BR)[None, :]
    return tl.load(coeff + (n.to(tl.int64) + g * N)[:, None] * R + r, mask=(n[:, None] < N) & (r < R), other=0)


@triton.jit
def low_rank(
    acc, n, m, h0, coeff0, h, coeff, coeff_groups, seeds, sigmas, param_id, M, N, parts0, R0, parts, R, S, group_rows,
    row_offset, cols, NOISE: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] plus the base term h0 . C0^T and the perturbed term h . (C + C_g + sum sigma Z)^T."""
    if coeff0 is not None:
        for r0 in range(0, R0, BR):
            left = c_tile(coeff0, n, 0, r0, N, R0, BR)
            acc = dot32(left, h_tile(h0, parts0, m, r0, M, R0, BM, BR), acc, DTYPE)
    if h is not None:
        group = tl.minimum(m, M - 1) // group_rows
        for r0 in range(0, R, BR):
            right = h_tile(h, parts, m, r0, M, R, BM, BR)
            if coeff is not None:
                acc = dot32(c_tile(coeff, n, 0, r0, N, R, BR), right, acc, DTYPE)
            if coeff_groups is not None:
                for g in range(tl.min(group, 0), tl.max(group, 0) + 1):
                    left = c_tile(coeff_groups, n, g, r0, N, R, BR)
                    own = tl.where(group[None, :] == g, right, 0.0)
                    acc = dot32(left, own, acc, DTYPE)
            if NOISE != "none":
                first = (n.to(tl.int64) + row_offset) * cols + r0
                for s in range(S):
                    z = noise(NOISE, tl.load(seeds + s), tl.load(param_id), first, BR, ALIGN)
                    sigma = tl.load(sigmas + group * S + s)
                    acc = dot32(z, right * sigma[None, :], acc, DTYPE)
    return acc


@triton.jit
def store_rows(y, acc, bias, n, m, M, N, stride):
    """y[m, n] = acc[n, m] + bias[n], rounded once; rows of y are `stride` apart."""
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    where = y + m.to(tl.int64)[None, :] * stride + n[:, None]
    tl.store(where, rounded(acc, y.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit
def product_kernel(
    y, x, codes, scale, offset, nested, bias, h0, coeff0, h, coeff, coeff_groups, seeds, sigmas, param_id,
    M, N, K, x_stride, code_stride, groups, split, split_steps, parts0, R0, parts, R, S, group_rows, row_offset, cols,
    FORMAT: tl.constexpr, SPAN: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, FP32: tl.constexpr,
    NOISE: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """SPLIT "one": K whole. "loop": the splits one after the other. "grid": program_id(1) is the split, y the fp32
    partial sums [split, M, N] that `finish_kernel` reads."""
    tiles_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    n = pid // tiles_m * BN + tl.arange(0, BN)
    m = pid % tiles_m * BM + tl.arange(0, BM)
    acc = tl.zeros((BN, BM), tl.float32)
    if FORMAT != "none":
        if SPLIT == "one":
            acc = multiply(x, codes, scale, offset, nested, n, m, 0, K, M, N, K, x_stride, code_stride, groups,
                           FORMAT, SPAN, FLAT, EVEN, FP32, BN, BM, BK)  # fmt: skip
        elif SPLIT == "loop":
            for i in range(split):
                first = i * split_steps * BK
                acc += multiply(x, codes, scale, offset, nested, n, m, first, tl.minimum(first + split_steps * BK, K),
                                M, N, K, x_stride, code_stride, groups, FORMAT, SPAN, FLAT, EVEN,
                                FP32, BN, BM, BK)  # fmt: skip
        else:
            first = tl.program_id(1) * split_steps * BK
            acc = multiply(x, codes, scale, offset, nested, n, m, first, tl.minimum(first + split_steps * BK, K),
                           M, N, K, x_stride, code_stride, groups, FORMAT, SPAN, FLAT, EVEN, FP32,
                           BN, BM, BK)  # fmt: skip
    if SPLIT == "grid":
        store_rows(y + tl.program_id(1).to(tl.int64) * M * N, acc, None, n, m, M, N, N)
    else:
        acc = low_rank(acc, n, m, h0, coeff0, h, coeff, coeff_groups, seeds, sigmas, param_id, M, N, parts0, R0, parts,
                       R, S, group_rows, row_offset, cols, NOISE, ALIGN, y.dtype.element_ty, BN, BM, BR)  # fmt: skip
        store_rows(y, acc, bias, n, m, M, N, N)


@triton.jit
def finish_kernel(
    y, partial, bias, h0, coeff0, h, coeff, coeff_groups, seeds, sigmas, param_id,
    M, N, first, width, split, parts0, R0, parts, R, S, group_rows, row_offset, cols,
    NOISE: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[:, first : first + width] from the partial sums [split, M, width], in the order of the splits."""
    tiles_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    j = pid // tiles_m * BN + tl.arange(0, BN)
    n = first + j
    m = pid % tiles_m * BM + tl.arange(0, BM)
    acc = tl.zeros((BN, BM), tl.float32)
    for i in range(split):
        where = partial + (m.to(tl.int64) + i * M)[None, :] * width + j[:, None]
        acc += tl.load(where, mask=(m[None, :] < M) & (j[:, None] < width), other=0)
    acc = low_rank(acc, n, m, h0, coeff0, h, coeff, coeff_groups, seeds, sigmas, param_id, M, N, parts0, R0, parts, R,
                   S, group_rows, row_offset, cols, NOISE, ALIGN, y.dtype.element_ty, BN, BM, BR)  # fmt: skip
    store_rows(y, acc, bias, n, m, M, first + width, N)


@triton.jit
def project_kernel(
    h, x, basis, M, K, R, x_stride, group_rows, chunks, chunk_size,
    PER_GROUP: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """h[program_id(2)] [M, R] = the sum of `chunks` chunks of x A, each summed from zero; A [K, R], or [G, K, R]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    m_there, r_there = tl.minimum(m, M - 1), tl.minimum(r, R - 1)
    group = m_there // group_rows
    total = tl.zeros((BR, BM), tl.float32)
    low, high = (tl.min(group, 0), tl.max(group, 0)) if PER_GROUP else (0, 0)
    for g in range(low, high + 1):
        own = tl.zeros((BR, BM), tl.float32)
        for c in range(chunks):
            first = (tl.program_id(2) * chunks + c) * chunk_size
            acc = tl.zeros((BR, BM), tl.float32)
            for k0 in tl.range(first, tl.minimum(first + chunk_size, K), BK):
                k = k0 + tl.arange(0, BK)[None, :]
                at = basis + (tl.zeros_like(k).to(tl.int64) + g) * K * R + k * R + r_there[:, None]
                left = load_k(at, k, K, EVEN)
                acc = dot32_by(left, x_tile(x, m_there, k0, K, x_stride, EVEN, BK), acc, x.dtype.element_ty)
            own += acc
        total = tl.where(group[None, :] == g, own, total) if PER_GROUP else own
    where = h + (m.to(tl.int64) + tl.program_id(2) * M)[None, :] * R + r[:, None]
    tl.store(where, total, mask=(m[None, :] < M) & (r[:, None] < R))


def project(rows: Tensor, basis: Tensor, groups: int, scratch: Scratch) -> tuple[Tensor, int]:
    """h = x A as parts [parts, M, R] that still have to be summed, and their number."""
    (M, K), R = rows.shape, basis.shape[-1]
    parts, chunks = tiles.chunk_parts(M, K)
    BM, BK, BR = 16 if M <= 16 else 32, 32, tiles.rank_tile(R)
    h = scratch.take(parts, M, R)
    if R:
        project_kernel[(triton.cdiv(M, BM), triton.cdiv(R, BR), parts)](
            h, rows, basis, M, K, R, rows.stride(0), M // groups, chunks, tiles.CHUNK,
            basis.dim() == 3, K % BK == 0, BM, BK, BR,
            **host.options(rows.device, 4, 2),
        )  # fmt: skip
    return h, parts


def low_rank_arguments(
    rows: Tensor, N: int, base_basis: Tensor | None, base_coeff: Tensor | None, basis: Tensor | None,
    coeff: Tensor | None, coeff_groups: Tensor | None, projected: Tensor | None, seeds: Tensor | None,
    sigmas: Tensor | None, param_id: Tensor | None, noise: str, groups: int, row_offset: int, cols: int,
    scratch: Scratch,
) -> tuple[tuple, tuple, dict]:  # fmt: skip
    """What `low_rank` needs, in the order of the kernels: tensors, sizes, constants. A basis runs `project`."""
    base_coeff, coeff, coeff_groups = host.dense(base_coeff, coeff, coeff_groups)
    seeds, sigmas = host.dense(seeds, sigmas)
    M = rows.shape[0]
    h0, parts0, R0 = None, 0, 0
    if base_basis is not None:
        h0, parts0 = project(rows, base_basis.contiguous(), 1, scratch)
        R0 = base_basis.shape[-1]
    h, parts, R = None, 0, 0
    if projected is not None:
        h, parts, R = projected.reshape(M, -1).contiguous(), 1, projected.shape[-1]
    elif basis is not None:
        h, parts = project(rows, basis.contiguous(), groups, scratch)
        R = basis.shape[-1]
    if R == 0 or (coeff is None and coeff_groups is None and seeds is None):
        h = coeff = coeff_groups = seeds = None
    if R0 == 0:
        h0 = base_coeff = None
    S = 0 if seeds is None else seeds.numel()
    BR = tiles.rank_tile(max(R, R0))
    constants = dict(NOISE=noise if S else "none", ALIGN=tiles.pow2_divisor(cols or max(R, 1), BR), BR=BR)
    tensors = (h0, base_coeff, h, coeff, coeff_groups, *((seeds, sigmas, param_id) if S else (None, None, None)))
    return tensors, (parts0, R0, parts, R, S, max(M // groups, 1), row_offset, cols or max(R, 1)), constants


def finish(y: Tensor, sums: Tensor, bias: Tensor | None, tensors: tuple, sizes: tuple, constants: dict, first: int):
    """y[..., first : first + width] from partial sums [splits, M, width]; the rest is what low_rank_arguments gives."""
    split, M, width = sums.shape
    BM = 16 if M <= 16 else 32
    finish_kernel[(triton.cdiv(M, BM) * triton.cdiv(width, 64),)](
        y, sums, bias, *tensors, M, y.shape[-1], first, width, split, *sizes, BN=64, BM=BM, **constants,
        **host.options(y.device, 4),
    )  # fmt: skip


def zo_linear(x, weight, scale, offset, nested, bias, base_basis, base_coeff, basis, coeff, coeff_groups, projected,
              seeds, sigmas, param_id, format, layout, group_size, out_features, noise="normal", groups=1,
              row_offset=0, cols=0):  # fmt: skip
    """The op, arguments checked: see ops.zo_linear."""
    N, K = out_features, x.shape[-1]
    rows = host.matrix(x)
    M = rows.shape[0]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    scratch = Scratch(x.device)
    with torch.cuda.device_of(x):
        tensors, sizes, constants = low_rank_arguments(
            rows, N, base_basis, base_coeff, basis, coeff, coeff_groups, projected, seeds, sigmas, param_id, noise,
            groups, row_offset, cols, scratch,
        )  # fmt: skip
        (bias,) = host.dense(bias)
        stored = host.Stored.of(weight, scale, offset, nested, format, group_size, K)
        shape = host.shape(x, M, N, K, stored)
        tile = tiles.linear_tile(shape)
        split, size = tiles.splits(N, K) if weight is not None else (1, tiles.K_STEP)
        beside = split > 1 and M <= tile.BM
        grid = triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN)
        sums = scratch.take(split, M, N) if beside else y
        product_kernel[(grid, split if beside else 1)](
            sums, rows, *stored.tensors, bias, *tensors, M, N, K, rows.stride(0), *stored.sizes,
            split, size // tile.BK, *sizes,
            *stored.constants, EVEN=K % tile.BK == 0, FP32="tf32" if shape.product == "tf32" else "ieee",
            SPLIT="grid" if beside else "loop" if split > 1 else "one", BN=tile.BN, BM=tile.BM, BK=tile.BK,
            **constants, **host.options(x.device, tile.warps, tile.stages),
        )  # fmt: skip
        if beside:
            finish(y, sums, bias, tensors, sizes, constants, 0)
    return y
