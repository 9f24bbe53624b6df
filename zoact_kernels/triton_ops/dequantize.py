"""dequantize: out[r, k] = D(W)[row_start + r, k], [rows, K] of fp32, bf16 or fp16.

Bound by memory. One program a tile of [BN, BK]; bit for bit formats.PackedWeight.dequantize.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import host
from .dequant import rounded, weight_tile

BN, BK = 32, 128


@triton.jit
def dequantize_kernel(
    out, codes, scale, offset, nested, row_start, N, K, code_stride, groups,
    FORMAT: tl.constexpr, SPAN: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """N is one past the last row."""
    tiles = tl.cdiv(K, BK)
    pid = tl.program_id(0)
    k0 = pid % tiles * BK
    n = row_start + pid // tiles * BN + tl.arange(0, BN)
    w = weight_tile(codes, scale, offset, nested, tl.minimum(n, N - 1), k0, K, code_stride, groups, FORMAT, SPAN, FLAT,
                    EVEN, BN, BK)  # fmt: skip
    k = k0 + tl.arange(0, BK)[None, :]
    where = out + (n - row_start).to(tl.int64)[:, None] * K + k
    tl.store(where, rounded(w, out.dtype.element_ty), mask=(n[:, None] < N) & (k < K))


def dequantize(weight, scale, offset, nested, format, layout, group_size, out_features, in_features, dtype,
               row_start=0, rows=-1, out=None):  # fmt: skip
    """The op, arguments checked: see ops.dequantize. `out` [rows, K] of dtype, contiguous, is filled where given."""
    K = in_features
    count = out_features - row_start if rows < 0 else rows
    if out is None:
        out = torch.empty((count, K), dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    stored = host.Stored.of(weight, scale, offset, nested, format, group_size, K)
    with torch.cuda.device_of(weight):
        dequantize_kernel[(triton.cdiv(count, BN) * triton.cdiv(K, BK),)](
            out, *stored.tensors, row_start, row_start + count, K, *stored.sizes, *stored.constants,
            K % BK == 0, BN, BK, **host.options(weight.device, 4),
        )  # fmt: skip
    return out
