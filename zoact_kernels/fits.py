"""Fits: which codes, scale and offset stand for a group of weights. `quantize.quantize` calls `fit_groups`.

Each takes x [groups, width] fp32, one group a row, and the dtype its scales are stored in; each returns codes like x in
the form `formats.PackedWeight.codes` has, scale [groups, 1] and offset [groups, 1] or None. Codes are always chosen for
the scale and offset *as stored*: choosing them before rounding to fp16 costs up to half a step at the far end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Fit = tuple[Tensor, Tensor, "Tensor | None"]  # codes, scale, offset

# Of the range, where "mse" starts: steps of 0.05 gain 1 % more for twice the time.
SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
REFITS = 2  # least-squares fits after each start
GAIN = 0.999  # a candidate replaces the best one below this share of its error, so fp32 sums cannot prefer a worse one
CHUNK = 1 << 18  # weights fitted at a time: 1 MB of fp32 stays in L2 over the 18 candidates of "mse"


@dataclass(frozen=True)
class Options:
    """How to fit: see `quantize.quantize`. `table`: of nf4 and fp4; `short`: the groups are cut off by the end of K."""

    method: str = "mse"
    symmetric: bool = False
    short: bool = False
    table: tuple[float, ...] = ()


def fit_groups(
    fit: Callable[[Tensor, torch.dtype, Options], Fit], x: Tensor, dtype: torch.dtype, options: Options, groups: int
) -> Fit:
    """`fit` over x [rows * groups, width] of any float dtype, in chunks: codes [rows, groups * width] and so on."""
    rows, width = x.shape[0] // groups, x.shape[1]
    # contiguous: the order of a sum follows the strides, and a row's codes must not
    parts = [fit(chunk.float().contiguous(), dtype, options) for chunk in x.split(max(1, CHUNK // width))]
    codes, scales, offsets = zip(*parts, strict=True)
    offset = None if offsets[0] is None else torch.cat(offsets).view(rows, groups)
    return torch.cat(codes).view(rows, groups * width), torch.cat(scales).view(rows, groups), offset


def rounded(values: Tensor, dtype: torch.dtype, up: bool) -> Tensor:
    """fp32 values in `dtype`, rounded towards +inf (`up`) or -inf."""
    nearest = values.to(dtype)
    if dtype == torch.float32:
        return nearest
    wrong = nearest.float() < values if up else nearest.float() > values
    step = torch.where(torch.signbit(nearest) == up, -1, 1).to(torch.int16)  # of the magnitude, in units of last place
    return torch.where(wrong, (nearest.view(torch.int16) + step).view(dtype), nearest)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale in fp32, 0 where that overflows: then every code is the one of zero."""
    scale = scale.float()
    return torch.where(scale.abs() >= torch.finfo(torch.float32).tiny, 1 / scale, 0.0)


def fit_int8(x: Tensor, dtype: torch.dtype, options: Options) -> Fit:
    """w = q * scale, scale = absmax / 127 rounded up: no error exceeds scale / 2."""
    scale = rounded(x.abs().amax(-1, keepdim=True) / 127, dtype, up=True)
    return (x * reciprocal(scale)).round_().clamp_(-127, 127).to(torch.int8), scale, None


def fit_codebook(x: Tensor, dtype: torch.dtype, options: Options) -> Fit:
    """w = table[q] * absmax, q the nearest entry, ties to the lower one: bitsandbytes' own codes for an fp32 scale.

    It multiplies whole blocks by 1 / absmax and divides the last, `short` one, whose absmax it keeps above 1e-38.
    """
    table = options.table
    scale = rounded(x.abs().amax(-1, keepdim=True).clamp(min=1e-38 if options.short else 0.0), dtype, up=True)
    divisor = scale.float().clamp(min=1e-38)
    ratio = (x / divisor if options.short else x * (1.0 / divisor)).clamp_(-1, 1)
    order = sorted(range(16), key=lambda code: table[code])  # stable: the two zeros of fp4 stay in order, as theirs do
    ascending = torch.tensor([table[code] for code in order], dtype=torch.float32, device=x.device)
    place = torch.bucketize(ratio, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
    return torch.tensor(order, dtype=torch.uint8, device=x.device)[place], scale, None


def fit_int4(x: Tensor, dtype: torch.dtype, options: Options) -> Fit:
    """w = q * scale + offset, or (q - 8) * scale when `symmetric`.

    "minmax" covers the range: offset = min rounded down, scale rounded up, so no error exceeds scale / 2; symmetric
    takes the sign of scale that needs the smaller one. "mse" starts there, tries shrunk ranges, refits each by least
    squares for its codes, and keeps the least squared error. Refits from the full range alone stick: 1 to 4 % worse,
    10 to 40 % for whole rows.
    """
    symmetric = options.symmetric
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    offset = None if symmetric else rounded(low, dtype, up=False)
    if offset is None:
        plus, minus = torch.maximum(high / 7, low / -8), torch.maximum(low / -7, high / 8)
        negative = minus < plus
        magnitude = rounded(torch.minimum(plus, minus), dtype, up=True)
        scale = torch.where(negative, -magnitude, magnitude)
    else:
        scale = rounded((high - offset.float()) / 15, dtype, up=True)
    codes = int4_codes(x, scale, offset)
    if options.method == "minmax":
        return codes.to(torch.uint8), scale, offset
    best = squared_error(x, codes, scale, offset)
    for start in starts(low, high, dtype, symmetric):
        trial = start
        for refit in range(REFITS + 1):
            codes = int4_codes(x, *trial)
            error = squared_error(x, codes, *trial)
            better = error < GAIN * best
            best = torch.where(better, error, best)
            scale = torch.where(better, trial[0], scale)
            if offset is not None and trial[1] is not None:
                offset = torch.where(better, trial[1], offset)
            if refit < REFITS:
                trial = least_squares(x, codes, dtype, None if symmetric else (low + high) / 2)
    return int4_codes(x, scale, offset).to(torch.uint8), scale, offset


def int4_codes(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """The nearest codes 0..15, as floats."""
    if offset is None:
        return (x * reciprocal(scale)).round_().add_(8).clamp_(0, 15)
    return ((x - offset.float()) * reciprocal(scale)).round_().clamp_(0, 15)


def squared_error(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """sum (w - D(w))^2, [groups, 1]; w - offset first, which is exact where the offset is close."""
    residual = x - (codes - 8) * scale.float() if offset is None else x - offset.float() - codes * scale.float()
    return residual.square_().sum(-1, keepdim=True)


def starts(low: Tensor, high: Tensor, dtype: torch.dtype, symmetric: bool) -> list[tuple[Tensor, Tensor | None]]:
    """(scale, offset) of the shrunk ranges; symmetric: of both signs."""
    if symmetric:
        reach = torch.maximum(high, -low)
        return [((reach * (shrink / step)).to(dtype), None) for shrink in SHRINKS for step in (7.5, -7.5)]
    middle, half = (low + high) / 2, (high - low) / 2
    return [((half * (shrink / 7.5)).to(dtype), (middle - half * shrink).to(dtype)) for shrink in SHRINKS]


def least_squares(x: Tensor, codes: Tensor, dtype: torch.dtype, middle: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The best (scale, offset) for these codes, about the `middle` of the range; without one, the best scale alone."""
    width = x.shape[-1]
    if middle is None:
        q = codes - 8
        return (_ratio(_sum(q * x), _sum(q * q))).to(dtype), None
    q, centred = codes - 7.5, x - middle
    sum_q, sum_x = _sum(q), _sum(centred)
    scale = _ratio(width * _sum(q * centred) - sum_q * sum_x, width * _sum(q * q) - sum_q * sum_q).to(dtype)
    offset = (sum_x - scale.float() * sum_q) / width - 7.5 * scale.float() + middle
    return scale, offset.to(dtype)


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)
