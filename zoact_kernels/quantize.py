"""Quantising: a dense weight into any format; what is fitted in a group of weights stands in `fits`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fits
from .formats import BLOCKWISE, FLOATS, PackedWeight, checked_group_size, format_row, names_of
from .layouts import pack_nibbles


def quantize(
    w: Tensor,
    format: str,
    group_size: int | None = None,
    method: str = "mse",
    scale_dtype: torch.dtype | None = None,
    *,
    symmetric: bool = False,
    flat: bool = False,
) -> PackedWeight:
    """Quantise w [N, K] (fp32, bf16, fp16; any N >= 0, K >= 1) into layout `row`. Deterministic; w is not changed.

    group_size   -1 (one a row) or a multiple of 8; None: 64. Ignored by dense, which keeps w as it is.
    method       of int4: "minmax" covers each group's range, so no error exceeds scale / 2; "mse" tries shrunk ranges,
                 refits scale and offset by least squares and keeps the least squared error of each group, never
                 above minmax's. Both choose codes for scale and offset as stored, after rounding. int8 (absmax / 127),
                 nf4 and fp4 (absmax) have one method, which both names mean.
    scale_dtype  float16, bfloat16 or float32; None: float16 for int8 and int4, float32 for nf4 and fp4 (bitsandbytes).
    symmetric    int4 without offset: w = (q - 8) * scale, where scale takes the sign that uses code 0 best.
    flat         nf4 and fp4: blocks run across rows where K % group_size != 0, the codes of bitsandbytes.quantize_4bit
                 bit for bit. Otherwise each row's last group is short, which every kernel and layout serves.

    Raises ValueError for inf and NaN in w, and for weights whose scale or offset `scale_dtype` can't hold (fp16 ends at
    65504; tiny weights instead lose precision where fp16 has none: 6e-8 is its smallest scale).
    """
    fmt = format_row(format)
    span = checked_group_size(fmt, group_size)
    if w.dim() != 2 or w.shape[1] < 1:
        raise ValueError(f"`w` has shape {tuple(w.shape)}; quantize takes [N, K] with K >= 1")
    if w.dtype not in FLOATS:
        raise ValueError(f"`w` is {w.dtype}; quantize takes float32, bfloat16 and float16")
    if method not in ("mse", "minmax"):
        raise ValueError(f"`method` is {method!r}; methods are mse, minmax")
    if symmetric and not fmt.offset:
        raise ValueError(f"`symmetric` is about the offset of int4; {format} has none")
    if flat and format not in BLOCKWISE:
        raise ValueError(f"`flat` is about the blocks of nf4 and fp4; {format} has none")
    if scale_dtype is not None and scale_dtype not in fmt.scale_dtypes:
        raise ValueError(f"`scale_dtype` is {scale_dtype}; {format} takes {names_of(fmt.scale_dtypes)}")
    w, (N, K) = w.detach(), w.shape
    _check_finite(w)
    if fmt.fit is None:
        return PackedWeight(format, "row", -1, N, K, w.contiguous())
    dtype = scale_dtype or fmt.scale_dtypes[0]
    width = K if span == -1 else span
    flat = flat and N > 0 and K % width != 0
    rows = w.reshape(1, -1) if flat else w
    whole = rows.shape[1] // width * width
    parts = []
    for first, stop, size in ((0, whole, width), (whole, rows.shape[1], rows.shape[1] - whole)):
        if first < stop:  # the whole groups, then each row's short one
            options = fits.Options(method, symmetric, size < width, fmt.table)
            groups = (stop - first) // size
            x = rows[:, first:stop].reshape(rows.shape[0] * groups, size)
            parts.append(fits.fit_groups(fmt.fit, x, dtype, options, groups))
    codes, scale = torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=1)
    offsets = [part[2] for part in parts if part[2] is not None]
    offset = torch.cat(offsets, dim=1) if offsets else None
    for name, stored in (("scale", scale), ("offset", offset)):
        if stored is not None and not torch.isfinite(stored).all():
            raise ValueError(f"`scale_dtype` is {dtype}; it can't hold a {name} of these weights, torch.float32 may")
    weight = pack_nibbles(codes, fmt.padding) if fmt.bits == 4 else codes
    if flat:
        weight, scale = weight[0], scale[0]
    return PackedWeight(format, "row", span, N, K, weight, scale, offset)


def _check_finite(w: Tensor) -> None:
    finite = torch.isfinite(w)
    if not finite.all():
        row, col = (~finite).nonzero()[0].tolist()
        raise ValueError(f"`w` holds {w[row, col].item()} at row {row}, column {col}; quantize takes finite values")
