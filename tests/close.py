"""The only place where a tolerance is written: design law 2.3.

A result may be wrong by at most twice what the same mathematics in plain torch is wrong by, at the same dtypes, both
measured against float64; or by four units in the last place at the scale of the result, so that a lucky torch (one row,
a handful of products) does not fail us. Both hold for the largest error and for the root mean square.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR = 4.0  # units in the last place


def ulp(scale: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of `dtype` at `scale`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(scale, info.smallest_normal)))


def allowed(plain: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest error and the root mean square that a result of the dtype of `plain` may have."""
    error, dtype = plain.double() - truth, plain.dtype
    largest = max(FACTOR * _largest(error), FLOOR * ulp(_largest(truth), dtype))
    return largest, max(FACTOR * _rms(error), FLOOR * ulp(_rms(truth), dtype))


def assert_no_worse(actual: Tensor, plain: Tensor, truth: Tensor, what: str = "") -> None:
    """`actual` is as close to `truth` (float64) as law 2.3 asks, `plain` being torch's own result of the same dtype."""
    assert actual.shape == plain.shape == truth.shape, f"{what}: {actual.shape}, {plain.shape}, {truth.shape}"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype} where torch gives {plain.dtype}"
    assert truth.dtype == torch.float64, f"the truth is {truth.dtype}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    error = actual.double() - truth
    largest, rms = allowed(plain, truth)
    where = tuple(int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape))
    assert _largest(error) <= largest, f"{what}: off by {_largest(error):.3g} at {where}; allowed {largest:.3g}"
    assert _rms(error) <= rms, f"{what}: off by {_rms(error):.3g} in the mean; allowed {rms:.3g}"


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()
