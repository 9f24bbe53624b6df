"""Masks and stochastic rounding: streams 3 and 2 of the noise law, in NumPy, torch and csrc/philox.h.

The vectors of csrc/cpu meet the same rules in test_zo_perturb.py.
"""

from __future__ import annotations

import math

import law
import numpy as np
import pytest
import torch

from zoact_kernels import rng

# ---------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.1, 0.25, 1 / 3, 0.5, 0.999999999, 1.0])
def test_mask(share: float) -> None:
    rows, cols = 33, 21
    got = rng.mask(-4, 9, share, rows, cols, row_offset=5)
    e = np.arange(5 * cols, (5 + rows) * cols, dtype=np.uint64)
    words = rng.words(-4, 9, rng.STREAM_MASK, e // np.uint64(4))[np.arange(e.size), e % np.uint64(4)]
    threshold = int(np.float64(np.float32(share)) * 2**32)
    assert threshold == law.mask_threshold(share)
    assert (got.numpy().ravel() == (words < threshold)).all()
    assert (got == rng.mask(-4, 9, torch.tensor([share]), rows, cols, row_offset=5)).all()
    assert (got[:, :8] == rng.mask(-4, 9, share, rows, 8, row_offset=5, total_cols=cols)).all()
    if share in (0.0, 1.0):
        assert got.all() == got.any() == bool(share)


def test_mask_share() -> None:
    small, large = (rng.mask(1, 2, share, 256, 256) for share in (0.2, 0.7))
    assert (small <= large).all()  # one draw: a smaller share is a part of a larger one
    assert abs(small.float().mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 65536)
    assert abs((rng.mask(3, 2, 0.2, 256, 256) & small).float().mean() - 0.04) < 4 * math.sqrt(0.04 / 65536)


def test_mask_clamps_what_it_cannot_check() -> None:
    for share in (-1.0, math.nan, 2.0, math.inf):
        want = share > 1
        assert rng.mask(1, 2, torch.tensor([share]), 4, 4).all() == want
        assert law.mask_threshold(share) == (2**32 if want else 0)
    for share in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"`share` is .*; it has to be in \[0, 1\]"):
            rng.mask(1, 2, share, 4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Stochastic rounding

NARROW = (torch.bfloat16, torch.float16)


def awkward(dtype: torch.dtype) -> np.ndarray:
    """fp32 patterns: uniform ones, and all that lie around the ends of `dtype`'s normal and subnormal numbers."""
    generator = np.random.default_rng(5)
    near = [0.0, 2.0**-149, 2.0**-133, 2.0**-126, 2.0**-33, 2.0**-32, 2.0**-31, 2.0**-25, 2.0**-24, 2.0**-15, 2.0**-14]
    near += [1.0, 65504.0, 65519.996, 65520.0, 65536.0, float(torch.finfo(dtype).max), 3.4e38, math.inf]
    bits = np.array(near, np.float32).view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)
    bits = np.concatenate([bits.ravel(), generator.integers(-(2**31), 2**31, 20000).astype(np.int32)])
    bits = np.concatenate([bits, np.int32([0x7FC00000, 0x7F800001, -0x3FFFFF])])
    return np.concatenate([bits, bits ^ np.int32(-(2**31))])


def neighbours(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of `dtype` next to |x|, below or equal and above, in float64; above the largest comes infinity."""
    down = x.abs().to(dtype).double()
    bits = x.abs().to(dtype).view(torch.int16)
    below = torch.where(down > x.abs().double(), (bits - 1).view(dtype).double(), down)
    above = (torch.where(down > x.abs().double(), bits, bits + 1)).view(dtype).double()
    return below, above


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_round_stochastic(dtype: torch.dtype) -> None:
    bits = awkward(dtype)
    x = torch.from_numpy(bits).view(torch.float32)
    got = rng.round_stochastic(x[:, None], dtype, -8, 3, row_offset=2**33)[:, 0]
    assert got.dtype is dtype

    e = 2**33 + np.arange(bits.size, dtype=np.uint64)
    word = rng.words(-8, 3, rng.STREAM_ROUNDING, e // np.uint64(4))[np.arange(e.size), e % np.uint64(4)]
    want = law.stochastic(dtype, bits, word)
    assert (got.view(torch.int16).numpy().view(np.uint16) == want).all()

    assert (got.isnan() == x.isnan()).all()
    fine = ~x.isnan()
    assert (got[fine].signbit() == x[fine].signbit()).all()
    assert (got[x.isinf()] == x[x.isinf()].to(dtype)).all()
    assert (got[fine].isinf() == x[fine].to(dtype).isinf()).all()  # overflow exactly where nearest overflows
    below, above = neighbours(x[fine], dtype)
    magnitude = got[fine].abs().double()
    within = (magnitude == below) | (magnitude == above)
    assert within.all()
    exact = x[fine].to(dtype).double() == x[fine].double()
    assert (magnitude[exact] == x[fine][exact].abs().double()).all()
    assert ((magnitude == above) & ~exact).sum() > 1000  # both ways happen
    assert ((magnitude == below) & ~exact).sum() > 1000


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("value", [1.2345, -3.1e-5, 7.7e-7, 3e-8, -1000.3])
def test_round_stochastic_keeps_the_mean(dtype: torch.dtype, value: float) -> None:
    """The share that goes up is the distance from the value below, within four standard deviations."""
    count = 1 << 16
    x = torch.full((count, 1), value)
    below, above = (float(v[0]) for v in neighbours(x[:1, 0], dtype))
    up = (rng.round_stochastic(x, dtype, 5, 6).abs().double() == above).double().mean().item()
    share = (abs(float(x[0, 0])) - below) / (above - below)
    assert abs(up - share) < 4 * math.sqrt(max(share * (1 - share), 1 / count) / count)


def test_round_stochastic_of_a_part() -> None:
    w = torch.linspace(-1, 1, 35).view(5, 7)
    whole = rng.round_stochastic(w, torch.bfloat16, 1, 2)
    part = rng.round_stochastic(w[2:4, :3], torch.bfloat16, 1, 2, row_offset=2, total_cols=7)
    assert (part == whole[2:4, :3]).all()


def test_round_stochastic_refuses() -> None:
    with pytest.raises(ValueError, match=r"`w` is torch.float64 with 2 dimensions; it has to be float32"):
        rng.round_stochastic(torch.ones(1, 1, dtype=torch.float64), torch.bfloat16, 1, 2)
    with pytest.raises(ValueError, match=r"`dtype` is torch.int8; it has to be torch.bfloat16 or torch.float16"):
        rng.round_stochastic(torch.ones(1, 1), torch.int8, 1, 2)


def test_exact_sqrt() -> None:
    bits = np.random.default_rng(9).integers(0, 0x7F800000, 200_000).astype(np.int32)
    x = np.concatenate([bits.view(np.float32), np.float32([0.0, 1.0, 4.0, np.inf])])
    assert (rng.exact_sqrt(torch.from_numpy(x)).numpy() == np.sqrt(x)).all()
