"""zo_linear for many rows: D(W) once into a panel of some rows of W, then the vendor's GEMM, then `finish_kernel`.

x [M, K], W [N, K], y [M, N] as in zo_linear.py. The panel has the dtype of x, the GEMM gives fp32 sums, to which the
low-rank term and the bias are added before the one rounding. A panel has 64 rows of W, or more as long as it stays
below PANEL bytes and its sums below SUMS. Bound by the products. The vendor picks its kernel by M, so a row's bits
depend on how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..workspace import Scratch
from . import host
from .dequantize import dequantize
from .zo_linear import finish, low_rank_arguments

PANEL = SUMS = 64 << 20  # bytes


def multiply(rows: Tensor, panel: Tensor, sums: Tensor) -> None:
    """sums = rows . panel^T in fp32, unrounded."""
    if rows.dtype == torch.float32:
        torch.mm(rows, panel.T, out=sums)
    elif rows.is_cuda:
        torch.ops.aten.mm.dtype_out(rows, panel.T, torch.float32, out=sums)
    else:  # torch has no such product on the CPU
        torch.mm(rows.float(), panel.float().T, out=sums)


def zo_linear(x, weight, scale, offset, nested, bias, base_basis, base_coeff, basis, coeff, coeff_groups, projected,
              seeds, sigmas, param_id, format, layout, group_size, out_features, noise="normal", groups=1,
              row_offset=0, cols=0):  # fmt: skip
    """The op, arguments checked: see ops.zo_linear. There is a weight."""
    N, K = out_features, x.shape[-1]
    rows = host.matrix(x)
    M = rows.shape[0]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    scratch = Scratch(x.device)
    with torch.cuda.device_of(x):
        low_rank = low_rank_arguments(
            rows, N, base_basis, base_coeff, basis, coeff, coeff_groups, projected, seeds, sigmas, param_id, noise,
            groups, row_offset, cols, scratch,
        )  # fmt: skip
        (bias,) = host.dense(bias)
        width = min(N, max(64, min(PANEL // (max(K, 1) * x.element_size()), SUMS // (4 * M)) // 64 * 64))
        panel, sums = scratch.take(width * K, dtype=x.dtype), scratch.take(M * width)
        for first in range(0, N, width):
            count = min(width, N - first)
            some, its_sums = panel[: count * K].view(count, K), sums[: M * count].view(1, M, count)
            stored = (weight, scale, offset, nested, format, layout, group_size, N, K, x.dtype, first, count)
            if layout == "row":
                dequantize(*stored, out=some)
            else:
                some = torch.ops.zoact.dequantize(*stored)  # Triton reads no other layout
            multiply(rows, some, its_sums[0])
            finish(y, its_sums, bias, *low_rank, first)
    return y
