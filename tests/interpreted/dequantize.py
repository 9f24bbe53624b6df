"""The Triton dequantize: the bits of formats.py, for every format, dtype and range of rows."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, SHAPES, WEIGHTS, stored
from test_dequantize import ORDER, same_bits, weight_arguments

from zoact_kernels import ops
from zoact_kernels.formats import PackedWeight

NAMES = [name for name in WEIGHTS if name != "none"]


def run(packed: PackedWeight, dtype: torch.dtype, row_start: int = 0, rows: int = -1) -> torch.Tensor:
    shape = (packed.out_features, packed.in_features)
    with ops.using("triton"):
        return ops.dequantize(*(weight_arguments(packed)[name] for name in ORDER), *shape, dtype, row_start, rows)


@pytest.mark.parametrize("weight", NAMES)
def test_dequantize(weight: str) -> None:
    """Every format, shape and dtype in pairs: the dtypes take turns."""
    for i, (N, K) in enumerate(SHAPES):
        packed = stored(weight, N, K)
        assert packed is not None
        dtype = list(DTYPES.values())[(i + NAMES.index(weight)) % 3]
        assert same_bits(run(packed, dtype), packed.dequantize(dtype)), f"N={N} K={K} {dtype}"


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", NAMES)
def test_dequantize_grid(weight: str, dtype: str) -> None:
    for N, K in (*SHAPES, (130, 1000)):
        packed = stored(weight, N, K)
        assert packed is not None
        assert same_bits(run(packed, DTYPES[dtype]), packed.dequantize(DTYPES[dtype])), f"N={N} K={K}"


@pytest.mark.parametrize("weight", ["int4-g32", "nf4-g64-flat", "int8-row", "dense-bf16"])
def test_dequantize_rows(weight: str) -> None:
    packed = stored(weight, 70, 100)
    assert packed is not None
    expected = packed.dequantize(torch.float32)
    for start, rows in ((0, 0), (0, 1), (1, 3), (30, 33), (40, -1), (69, 1), (70, 0)):
        stop = 70 if rows < 0 else start + rows
        assert same_bits(run(packed, torch.float32, start, rows), expected[start:stop]), f"{start} {rows}"


def test_dequantize_offset_is_rounded_once() -> None:
    packed = stored("int4-row-f32", 64, 512)
    assert packed is not None and packed.scale is not None and packed.offset is not None
    expected = packed.dequantize(torch.float32)
    assert not same_bits(packed.codes().float() * packed.scale + packed.offset, expected)
    assert same_bits(run(packed, torch.float32), expected)
