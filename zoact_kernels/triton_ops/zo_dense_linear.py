"""zo_dense_linear: y_g = x_g (D(W) + f * sum_s sigmas[g, s] Z_s)^T + b, f = mask * noise_scale.

    x [M, K] fp32, bf16, fp16; D(W) [N, K] of any format; Z_s [N, K] made tile by tile in registers; y [M, N] as x.

With noise_on = "scale" Z_s is [N, K/group_size], one value a scale, and moves the zero point with it (QZO):
D(W) + (q - zero) sum_s sigmas[g, s] Z_s, zero = -offset / scale. A group's product with q - zero is made once for all
seeds, its noise multiplies the sums.

One launch. After the pass over W there is one pass over x for each seed: f Z_s is made once for all row groups of the
tile, its product with x summed apart, and sigma, a number a row, multiplies that sum in fp32. Z is not rounded to the
dtype of x (dequant.dot32_by), but where its values, 1 and -1, are exact in it. y is rounded once. K is not split: Z,
not the weight's bytes, is the bound. The weight is the left operand, as in zo_linear.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import host, tiles
from .dequant import dot32_by, factor_tile, load_k, operand, scalars, weight_tile
from .words import kept, noise
from .zo_linear import multiply, store_rows, x_tile


@triton.jit
def scale_noise(
    acc, x, codes, scale, offset, n, m, seeds, sigmas, param_id, row, group, K, x_stride, code_stride, groups, S, cols,
    FORMAT: tl.constexpr, SPAN: tl.constexpr, NOISE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] plus x . (noise of a scale times what it is multiplied by)^T, one group of K after the other. n and
    m are rows that there are, `row` those of the whole parameter, `group` [BM] the row groups."""
    span = K if SPAN == 0 else SPAN
    CENTRE: tl.constexpr = 8.0 if offset is None else 0.0
    for i in range(groups):
        last = tl.minimum((i + 1) * span, K)
        zero = tl.zeros((BN, 1), tl.float32)
        if offset is not None:
            s = scalars(scale, None, n.to(tl.int64)[:, None] * groups, i, 0, K, True)
            o = scalars(offset, None, n.to(tl.int64)[:, None] * groups, i, 0, K, True)
            zero = tl.where(s == 0, zero, tl.div_rn(o, s))
        part = tl.zeros((BN, BM), tl.float32)
        for k0 in tl.range(i * span, last, BK, num_stages=1):
            w = factor_tile(codes, n, k0, K, code_stride, FORMAT, False, False, CENTRE, BK) + zero
            part = dot32_by(w, x_tile(x, m, k0, last, x_stride, False, BK), part, x.dtype.element_ty)
        moved = tl.zeros((BN, BM), tl.float32)
        for s in range(S):
            z = noise(NOISE, tl.load(seeds + s), tl.load(param_id), row * cols + i, 4, 1)
            z = tl.sum(tl.where(tl.arange(0, 4)[None, :] == 0, z, 0.0), axis=1)
            moved += z[:, None] * tl.load(sigmas + group * S + s)[None, :]
        acc += part * moved
    return acc


@triton.jit
def dense_kernel(
    y, x, codes, scale, offset, nested, bias, seeds, sigmas, param_id, noise_scale, mask_value, mask_seed,
    M, N, K, x_stride, code_stride, groups, S, group_rows, row_offset, cols,
    FORMAT: tl.constexpr, SPAN: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, FP32: tl.constexpr,
    NOISE: tl.constexpr, ON_SCALE: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    n = pid // tiles_m * BN + tl.arange(0, BN)
    m = pid % tiles_m * BM + tl.arange(0, BM)
    acc = tl.zeros((BN, BM), tl.float32)
    if FORMAT != "none":
        acc = multiply(x, codes, scale, offset, nested, n, m, 0, K, M, N, K, x_stride, code_stride, groups,
                       FORMAT, SPAN, FLAT, EVEN, FP32, BN, BM, BK)  # fmt: skip
    if NOISE != "none":
        n_there, m_there = tl.minimum(n, N - 1), tl.minimum(m, M - 1)
        group = m_there // group_rows
        row = row_offset + n.to(tl.int64)
        if ON_SCALE:
            acc = scale_noise(acc, x, codes, scale, offset, n_there, m_there, seeds, sigmas, param_id, row, group, K,
                              x_stride, code_stride, groups, S, cols, FORMAT, SPAN, NOISE, BN, BM, BK)  # fmt: skip
        else:
            for s in range(S):
                seed = tl.load(seeds + s)
                sums = tl.zeros((BN, BM), tl.float32)
                for k0 in tl.range(0, K, BK, num_stages=1):  # Z, not a load, is what takes the time and the registers
                    z = noise(NOISE, seed, tl.load(param_id), row * cols + k0, BK, ALIGN)
                    if MASK == "magnitude" and FORMAT != "none":
                        w = weight_tile(codes, scale, offset, nested, n_there, k0, K, code_stride, groups, FORMAT, SPAN,
                                        FLAT, EVEN, BN, BK)  # fmt: skip
                        z = tl.where(tl.abs(w) <= tl.load(mask_value), z, 0.0)
                    elif MASK == "random":
                        part = kept(
                            tl.load(mask_seed), tl.load(param_id), tl.load(mask_value), row * cols + k0, BK, ALIGN
                        )
                        z = tl.where(part, z, 0.0)
                    right = x_tile(x, m_there, k0, K, x_stride, EVEN, BK)
                    if noise_scale is not None:
                        k = k0 + tl.arange(0, BK)[None, :]
                        z = z * load_k(noise_scale + n_there.to(tl.int64)[:, None] * K + k, k, K, EVEN)
                    if NOISE == "rademacher" and noise_scale is None:
                        sums = tl.dot(operand(z, DTYPE), operand(right, DTYPE), sums, input_precision="ieee")
                    else:
                        sums = dot32_by(z, right, sums, DTYPE)
                acc += sums * tl.load(sigmas + group * S + s)[None, :]
    store_rows(y, acc, bias, n, m, M, N, N)


def zo_dense_linear(x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, noise_scale, mask_value,
                    mask_seed, format, layout, group_size, out_features, noise="normal", noise_on="weight",
                    mask="none", groups=1, row_offset=0, cols=0):  # fmt: skip
    """The op, arguments checked: see ops.zo_dense_linear. Noise on the scales goes without masks and noise_scale."""
    N, K = out_features, x.shape[-1]
    rows = host.matrix(x)
    M = rows.shape[0]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    bias, seeds, sigmas, noise_scale = host.dense(bias, seeds, sigmas, noise_scale)
    S = 0 if seeds is None else seeds.numel()
    if not S:
        seeds = sigmas = param_id = noise_scale = mask_value = mask_seed = None
        mask = "none"
    stored = host.Stored.of(weight, scale, offset, nested, format, group_size, K)
    on_scale = noise_on == "scale"
    cols = cols or (max(stored.sizes[1], 1) if on_scale else K)
    shape = host.shape(x, M, N, K, stored)
    tile = tiles.dense_tile(shape)
    with torch.cuda.device_of(x):
        dense_kernel[(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)](
            y, rows, *stored.tensors, bias, seeds, sigmas, param_id, noise_scale, mask_value, mask_seed,
            M, N, K, rows.stride(0), *stored.sizes, S, M // groups, row_offset, cols, *stored.constants,
            K % tile.BK == 0, "tf32" if shape.product == "tf32" else "ieee", noise if S else "none", on_scale, mask,
            tiles.pow2_divisor(cols, tile.BK), tile.BN, tile.BM, tile.BK,
            **host.options(x.device, tile.warps, tile.stages),
        )  # fmt: skip
    return y
