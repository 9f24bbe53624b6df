"""Quantising: the errors that each method may make, hostile weights, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import KS, NS, VARIANTS, same, weight

from zoact_kernels.fits import rounded
from zoact_kernels.formats import FLOATS, FORMATS, PackedWeight
from zoact_kernels.quantize import quantize


def group_errors(w: Tensor, packed: PackedWeight) -> Tensor:
    """Squared error of each group, fp64 [N, groups]."""
    error = (w.double() - packed.dequantize(torch.float64)).square()
    short = packed.groups * packed.span - packed.in_features
    return torch.nn.functional.pad(error, (0, short)).view(packed.out_features, packed.groups, packed.span).sum(-1)


def hostile(name: str, N: int = 12, K: int = 104) -> Tensor:
    w = torch.randn(N, K)
    return {
        "normal": w,
        "mean": w + 3,
        "narrow": 100 + 1e-2 * w,
        "outlier": torch.where(torch.rand(N, K) < 0.01, 50 * w, w),
        "positive": w.abs(),
        "negative": -w.abs() - 1,
        "two values": w.sign(),
        "constant": torch.full((N, K), 0.1),
        "zero": torch.zeros(N, K),
        "tiny": 1e-6 * w,
        "vanishing": 1e-12 * w,
        "large": 1e3 * w,
        "one": torch.zeros(N, K).index_fill_(1, torch.tensor([70]), 1.0),
    }[name]


KINDS = ("normal", "mean", "narrow", "outlier", "positive", "negative", "two values", "constant", "zero", "tiny",
         "vanishing", "large", "one")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_int4(kind: str, symmetric: bool, scale_dtype: torch.dtype) -> None:
    """minmax errs by half a step at most, mse by no more than minmax in any group, whatever the weights."""
    w = hostile(kind)
    for group_size in (32, -1):
        fits = {m: quantize(w, "int4", group_size, m, scale_dtype, symmetric=symmetric) for m in ("minmax", "mse")}
        step = fits["minmax"].scales().double().abs().repeat_interleave(fits["minmax"].span, 1)[:, : w.shape[1]]
        error = (w.double() - fits["minmax"].dequantize(torch.float64)).abs()
        assert (error <= 0.5 * step * (1 + 1e-5) + 1e-7 * w.abs()).all()
        assert (group_errors(w, fits["mse"]) <= group_errors(w, fits["minmax"])).all()


@pytest.mark.parametrize("group_size", (32, 64, 128, -1))
@pytest.mark.parametrize("symmetric", (False, True))
def test_mse_is_worth_it(group_size: int, symmetric: bool) -> None:
    """It takes a tenth off the squared error of normal weights (measured: 10 to 45 %)."""
    w = weight(16, 1024)
    errors = [group_errors(w, quantize(w, "int4", group_size, m, symmetric=symmetric)).sum() for m in ("mse", "minmax")]
    assert errors[0] < 0.91 * errors[1]


def test_codes_fit_the_stored_scale() -> None:
    """Every code is the nearest for scale and offset as rounded to fp16, not as computed."""
    w = hostile("mean")
    for method in ("minmax", "mse"):
        packed = quantize(w, "int4", 32, method)
        scale, offset = packed.scales().double(), packed.offsets()
        assert offset is not None
        values = scale[..., None] * torch.arange(16) + offset.double()[..., None]  # [N, groups, 16]
        values = values.repeat_interleave(32, 1)[:, :104]
        best = (values - w.double()[..., None]).abs().amin(-1)
        assert ((w.double() - packed.dequantize(torch.float64)).abs() <= best * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_int8(kind: str, scale_dtype: torch.dtype) -> None:
    w = hostile(kind)
    packed = quantize(w, "int8", 64, scale_dtype=scale_dtype)
    step = packed.scales().double().repeat_interleave(64, 1)[:, :104]
    error = (w.double() - packed.dequantize(torch.float64)).abs()
    assert (error <= 0.5 * step * (1 + 1e-5)).all()
    assert int(packed.codes().int().abs().max()) <= 127


@pytest.mark.parametrize("format", ("nf4", "fp4"))
@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_codebooks(format: str, scale_dtype: torch.dtype) -> None:
    """The nearest entry for the stored absmax; absmax itself is met exactly by an fp32 scale."""
    for kind in KINDS:
        w = hostile(kind)
        packed = quantize(w, format, 64, scale_dtype=scale_dtype)
        scale = packed.scales().double().repeat_interleave(64, 1)[:, :104]
        values = torch.tensor(FORMATS[format].table, dtype=torch.float64) * scale[..., None]
        best = (values - w.double()[..., None]).abs().amin(-1)
        error = (w.double() - packed.dequantize(torch.float64)).abs()
        assert (error <= best + 1e-6 * w.abs()).all(), kind
        if scale_dtype == torch.float32 and kind != "zero":
            assert torch.equal(packed.dequantize().abs().amax(1), w.abs().amax(1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=8), st.booleans())
def test_rounded(values: list[float], up: bool) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        r = rounded(x, dtype, up)
        error = (r.double() - x.double()) if up else (x.double() - r.double())
        assert (error >= 0).all()
        assert (error <= x.double().abs() * 2 * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal).all()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(NS), st.sampled_from(KS), st.sampled_from([v for v in VARIANTS if "nested" not in v]),
    st.sampled_from(FLOATS), st.integers(0, 99),
)  # fmt: skip
def test_quantize_any_shape(N: int, K: int, variant: str, dtype: torch.dtype, seed: int) -> None:
    """A row's codes depend on the row alone (but for blocks that run across rows), and w may be any view."""
    w = torch.randn(N, 2 * K, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, ::2]
    before = w.clone()
    pack = VARIANTS.get(variant, lambda w: quantize(w, "int4", 64, "mse"))
    packed = pack(w)
    assert torch.equal(w, before) and (packed.out_features, packed.in_features) == (N, K)
    contiguous, transposed = pack(w.contiguous()), pack(w.T.contiguous().T)
    assert same(packed.weight, contiguous.weight) and same(packed.scale, transposed.scale)
    if not packed.flat:
        alone = pack(w[N - 1 :])
        assert torch.equal(alone.dequantize(), packed.dequantize(row_start=N - 1))
    bound = 0.2 if packed.format == "fp4" else 0.16  # of the absmax: half the widest gap of a codebook
    error = (w.double() - packed.dequantize(torch.float64)).abs().max()
    assert variant == "int4-mse" or error <= bound * w.double().abs().max()  # mse may clip an outlier


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf")))
def test_quantize_refuses_what_is_not_finite(format: str, bad: float) -> None:
    w = weight(4, 32)
    w[2, 7] = bad
    with pytest.raises(ValueError, match=r"`w` holds (nan|inf|-inf) at row 2, column 7"):
        quantize(w, format)


def test_quantize_refuses_scales_that_overflow() -> None:
    w = 1e30 * weight(4, 32)
    for format in ("int8", "int4"):
        with pytest.raises(ValueError, match=r"`scale_dtype` is torch\.float16; it can't hold a (scale|offset)"):
            quantize(w, format)
        kept = quantize(w, format, scale_dtype=torch.float32).dequantize(torch.float64)
        assert ((kept - w.double()).abs() < 0.1 * w.abs().max()).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: quantize(w, "int5"), "`format` is 'int5'; formats are dense, int8, int4, nf4, fp4"),
        (lambda w: quantize(w[0], "int4"), r"`w` has shape \(32,\)"),
        (lambda w: quantize(w[:, :0], "int4"), r"`w` has shape \(4, 0\)"),
        (lambda w: quantize(w.double(), "int4"), "`w` is torch.float64"),
        (lambda w: quantize(w, "int4", 12), "`group_size` is 12; allowed are -1"),
        (lambda w: quantize(w, "int4", 0), "`group_size` is 0"),
        (lambda w: quantize(w, "int4", method="gptq"), "`method` is 'gptq'; methods are mse, minmax"),
        (lambda w: quantize(w, "int4", scale_dtype=torch.float64), "`scale_dtype` is torch.float64; int4 takes"),
        (lambda w: quantize(w, "nf4", symmetric=True), "`symmetric` is about .* int4"),
        (lambda w: quantize(w, "int4", flat=True), "`flat` is about .* nf4 and fp4"),
        (lambda w: quantize(w, "int4").to_layout("gpu"), "`layout` is 'gpu'; layouts are row, cpu, cuda"),
    ],
)
def test_quantize_says_what_is_allowed(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(weight(4, 32))
