"""The compiled dequantize: the bits of formats.py, for every format, layout, dtype and range of rows."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, SHAPES, WEIGHTS, layouts, stored, weight_arguments

from zoact_kernels import native, ops
from zoact_kernels.formats import PackedWeight

pytestmark = pytest.mark.skipif(native.module() is None, reason=native.why_missing() or "compiled")
ISAS = native.isas()


def run(isa: str, packed: PackedWeight, dtype: torch.dtype, row_start: int = 0, rows: int = -1) -> torch.Tensor:
    shape = (packed.out_features, packed.in_features)
    with ops.using("cpu", isa=isa):
        return ops.dequantize(*(weight_arguments(packed)[name] for name in ORDER), *shape, dtype, row_start, rows)


ORDER = ("weight", "scale", "offset", "nested", "format", "layout", "group_size")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [name for name in WEIGHTS if name != "none"])
def test_dequantize(isa: str, weight: str, dtype: str) -> None:
    for N, K in (*SHAPES, (130, 1000)):
        packed = stored(weight, N, K)
        assert packed is not None
        expected = packed.dequantize(DTYPES[dtype])
        for w in layouts(packed):
            assert w is not None
            assert same_bits(run(isa, w, DTYPES[dtype]), expected), f"N={N} K={K} {w.layout}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight", ["int4-g32", "nf4-g64-flat", "int8-row", "dense-bf16"])
def test_dequantize_rows(isa: str, weight: str) -> None:
    packed = stored(weight, 150, 100)
    assert packed is not None
    expected = packed.dequantize(torch.float32)
    for w in layouts(packed):
        assert w is not None
        for start, rows in ((0, 0), (0, 1), (1, 3), (60, 10), (63, 65), (64, 64), (100, -1), (149, 1), (150, 0)):
            stop = 150 if rows < 0 else start + rows
            assert same_bits(run(isa, w, torch.float32, start, rows), expected[start:stop]), (
                f"{w.layout} {start} {rows}"
            )


@pytest.mark.parametrize("isa", ISAS)
def test_dequantize_offset_is_rounded_once(isa: str) -> None:
    """q * scale + offset with fp32 scales: two roundings differ from one in a quarter of these weights."""
    packed = stored("int4-row-f32", 64, 512)
    assert packed is not None
    assert packed.scale is not None
    assert packed.offset is not None
    twice = (packed.codes().float() * packed.scale) + packed.offset
    expected = packed.dequantize(torch.float32)
    assert not same_bits(twice, expected)
    assert all(same_bits(run(isa, w, torch.float32), expected) for w in layouts(packed) if w)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_dequantize_threads(threads: int) -> None:
    packed = stored("int4-g32", 700, 512)
    assert packed is not None
    torch.set_num_threads(threads)
    assert same_bits(run(ISAS[0], packed.to_layout("cpu"), torch.float32), packed.dequantize(torch.float32))
