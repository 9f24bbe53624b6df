"""Weight formats: what codes mean, the layouts, what a stored weight checks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from weights import SHAPES, VARIANTS, nested_of, same, weight

from zoact_kernels import formats, layouts
from zoact_kernels.formats import FORMATS, PackedWeight, packed_nbytes
from zoact_kernels.layouts import dwords, pack_nibbles, unpack_nibbles
from zoact_kernels.quantize import quantize

# ---------------------------------------------------------------------------------------------------------------------
# What a stored weight means


def exact(packed: PackedWeight, n: int, k: int) -> Fraction:
    """D(W)[n, k] as the module's docstring has it, in rational numbers, straight from the bytes of layout `row`."""
    p, fmt = packed, FORMATS[packed.format]
    if p.format == "dense":
        return Fraction(p.weight[n, k].item())
    assert p.scale is not None
    i = (n * p.in_features + k) // p.span if p.flat else n * p.groups + k // p.span
    scale = p.scale.reshape(-1)[i]
    if p.nested is not None:
        scale = p.nested[int(scale)] * p.nested[257 + i // 256] + p.nested[256]
    if p.format == "int8":
        return Fraction(p.weight[n, k].item()) * Fraction(scale.item())
    nibble = n * p.in_features + k if p.flat else n * (p.in_features + p.in_features % 2) + k
    q = int(p.weight.reshape(-1)[nibble // 2]) >> 4 * (nibble % 2) & 15
    if p.offset is not None:
        return q * Fraction(scale.item()) + Fraction(p.offset.reshape(-1)[i].item())
    return Fraction(fmt.table[q]) * Fraction(scale.item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_dequantize_is_the_formula(variant: str) -> None:
    packed = VARIANTS[variant](weight(9, 101, mean=0.5))
    truth = torch.tensor(
        [[float(exact(packed, n, k)) for k in range(101)] for n in range(9)], dtype=torch.float64
    )  # float() of a Fraction rounds once
    assert torch.equal(packed.dequantize(torch.float64), truth)
    assert torch.equal(packed.dequantize(), truth.float())
    for dtype in (torch.bfloat16, torch.float16):
        assert same(packed.dequantize(dtype), truth.float().to(dtype))


def test_16_bits_are_rounded_from_fp32() -> None:
    """A value just above the middle of two bf16: fp32 makes it the middle, and that rounds to even."""
    scale, offset = torch.tensor([[2.0**-30]]), torch.tensor([[1 + 2.0**-8]])
    packed = PackedWeight("int4", "row", -1, 1, 1, torch.tensor([[0x81]], dtype=torch.uint8), scale, offset)
    assert packed.dequantize(torch.float64).item() == 1 + 2.0**-8 + 2.0**-30
    assert packed.dequantize().item() == 1 + 2.0**-8 and packed.dequantize(torch.bfloat16).item() == 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", formats.LAYOUTS)
def test_row_ranges(variant: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = VARIANTS[variant](weight(150, 37))
    if not packed.has_layout(layout):
        with pytest.raises(ValueError, match="only 'row'" if packed.flat else "there is 'row' and 'cpu'"):
            packed.to_layout(layout)
        return
    packed = packed.to_layout(layout)
    whole = packed.dequantize()
    codes = packed.codes()
    monkeypatch.setattr(formats, "CHUNK", 64 * 37)  # several chunks
    for first, rows in ((0, 0), (0, 1), (0, 150), (149, 1), (150, 0), (63, 2), (64, 64), (1, 148), (127, 23)):
        assert torch.equal(packed.dequantize(torch.float32, first, rows), whole[first : first + rows])
        assert torch.equal(packed.codes(first, rows), codes[first : first + rows])
    assert torch.equal(packed.dequantize(row_start=70), whole[70:])
    for first, rows, name in ((-1, 1, "row_start"), (151, 0, "row_start"), (149, 2, "rows"), (0, -2, "rows")):
        with pytest.raises(ValueError, match=f"`{name}` is .* 0..150|`{name}` is .*allow 0.."):
            packed.dequantize(torch.float32, first, rows)


EVERY = [(f, layout) for f in FORMATS for layout in formats.LAYOUTS if layout != "cuda" or f != "dense"]


@pytest.mark.parametrize("format, layout", EVERY)
def test_rows_do_not_read_other_rows(format: str, layout: str) -> None:
    """Blocks are the unit of layout `cpu`, tiles that of `cuda`: rows 64.. may be poison for rows 0..63."""
    packed = quantize(weight(100, 72), format).to_layout(layout)
    clean = packed.dequantize(torch.float32, 0, 64)
    for tensor in packed.tensors.values():
        rest = tensor[tensor.numel() // 112 * 64 :] if layout == "cpu" else tensor[4 if tensor.dim() == 3 else 64 :]
        rest.fill_(127 if not rest.is_floating_point() else float("nan"))
    assert torch.equal(packed.dequantize(torch.float32, 0, 64), clean)


def test_dequantize_says_which_dtypes() -> None:
    with pytest.raises(ValueError, match=r"`dtype` is torch\.int8; allowed are float64"):
        quantize(weight(2, 8), "int4").dequantize(torch.int8)


@pytest.mark.parametrize("variant", ("int8-g64", "int4-g64", "int4-row-symmetric", "nf4-g64-flat", "fp4-row"))
def test_codes_over_scale(variant: str) -> None:
    """D(W) = factor * scale, for QZO: the zero point moves with the scale."""
    packed = VARIANTS[variant](weight(20, 100, mean=1.0))
    scales = packed.scales().double()
    spread = scales if packed.flat else scales.repeat_interleave(packed.span, 1)[:, :100]
    torch.testing.assert_close(packed.codes_over_scale(torch.float64) * spread, packed.dequantize(torch.float64))


def test_codes_over_scale_without_a_zero_point() -> None:
    packed = quantize(torch.full((1, 16), 0.5), "int4", 8)
    assert packed.scale is not None and not packed.scale.any()
    assert torch.equal(packed.codes_over_scale(), packed.codes().float())


def test_nibbles() -> None:
    codes = torch.arange(5, dtype=torch.uint8)[None]
    assert pack_nibbles(codes, 8).tolist() == [[0x10, 0x32, 0x84]]
    assert unpack_nibbles(pack_nibbles(codes, 8)).tolist() == [[0, 1, 2, 3, 4, 8]]
    assert dwords(pack_nibbles(codes, 0), 5, 8).tolist() == [[0x88843210 - (1 << 32)]]  # whatever the odd nibble held


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "flat" not in v])
def test_layouts_round_trip(variant: str) -> None:
    for N, K in SHAPES:
        row = VARIANTS[variant](weight(N, K))
        cpu = row.to_layout("cpu")
        back = cpu.to_layout("row")
        assert all(same(getattr(row, f), getattr(back, f)) for f in ("weight", "scale", "offset", "nested")), (N, K)
        assert all(same(row.dequantize(d), cpu.dequantize(d)) for d in (torch.float64, torch.bfloat16)), (N, K)
        assert same(row.codes(), cpu.codes())
        assert row.to_layout("row") is row and cpu.to_layout("cpu") is cpu


@pytest.mark.parametrize("format", FORMATS)
def test_cpu_layout_addresses(format: str) -> None:
    """The address rule in words: block start + row of the block * width + column; padding decodes to zero."""
    N, K, group_size = 100, 43, 8
    row = quantize(weight(N, K), format, group_size)
    cpu = row.to_layout("cpu")
    codes = row.codes().double()
    words = cpu.weight
    nibbles = (
        unpack_nibbles(words.view(torch.uint8).view(1, -1)).view(-1, 8).double() if words.dtype == torch.int32 else None
    )
    padding = FORMATS[format].padding
    depth = K if format == "dense" else 48
    for n in range(112):
        block, width = n // 64, 64 if n < 64 else 48
        for k in range(depth):
            expected = codes[n, k].item() if n < N and k < K else padding
            if nibbles is not None:
                found = nibbles[block * 64 * 6 + k // 8 * width + n % 64, k % 8].item()
            else:
                found = words[block * 64 * depth + k * width + n % 64].item()
            assert found == expected, (n, k)
        if row.scale is not None and cpu.scale is not None:
            for g in range(row.groups):
                found = cpu.scale[block * 64 * row.groups + g * width + n % 64].item()
                assert found == (row.scale[n, g].item() if n < N else 0)


@pytest.mark.parametrize("offset", (1, 4))
def test_layouts_of_views(offset: int) -> None:
    """A weight that begins inside a storage, at no dword, or is not contiguous."""
    row = quantize(weight(17, 64), "int4")
    assert row.scale is not None
    storage = torch.zeros(row.weight.numel() + offset, dtype=torch.uint8)
    inside = storage[offset:].view(17, 32).copy_(row.weight)
    strided = row.weight.repeat_interleave(2, 1)[:, ::2]
    for view in (inside, strided):
        moved = PackedWeight("int4", "row", 64, 17, 64, view, row.scale, row.offset)
        assert same(moved.to_layout("cpu").weight, row.to_layout("cpu").weight)
        assert torch.equal(moved.dequantize(), row.dequantize())


@pytest.mark.parametrize("format, layout", EVERY)
def test_nbytes(format: str, layout: str) -> None:
    for N, K, group_size in ((100, 193, 64), (64, 64, -1), (0, 8, None), (1, 1, 8)):
        packed = quantize(weight(N, K, torch.bfloat16), format, group_size).to_layout(layout)
        assert packed.nbytes == packed_nbytes(format, N, K, group_size, layout=layout), (N, K)
    assert packed_nbytes("int4", 4096, 4096) == 4096 * 4096 // 2 + 2 * 2 * 4096 * 64
    assert packed_nbytes("int4", 4096, 4096, symmetric=True) == 4096 * 4096 // 2 + 2 * 4096 * 64


# ---------------------------------------------------------------------------------------------------------------------
# Layout `cuda`


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v](torch.ones(2, 63)).has_layout("cuda")])
@pytest.mark.parametrize("N, K", [(32, 128), (33, 100), (1, 1), (0, 64), (150, 37)])
def test_layout_cuda_and_back(variant: str, N: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact, through any other layout, in chunks; in place where both hold the same number of bytes."""
    monkeypatch.setattr(formats, "CHUNK", 64 * K)
    row = VARIANTS[variant](weight(N, K))
    cuda = row.to_layout("cuda")
    assert cuda.layout == "cuda" and cuda.nbytes >= row.nbytes
    fmt = FORMATS[row.format]
    if fmt.bits == 4:
        assert same(cuda.weight, layouts.to_fragments(row.weight, K, fmt.padding))
    else:
        assert same(cuda.weight, layouts.to_byte_fragments(row.weight))
    assert same(cuda.to_layout("row").weight, row.weight)
    assert same(cuda.to_layout("cpu").weight, row.to_layout("cpu").weight)
    assert same(row.to_layout("cpu").to_layout("cuda").weight, cuda.weight)
    assert all(same(cuda.tensors[name], tensor) for name, tensor in row.tensors.items() if name != "weight")
    again = replace(row, weight=row.weight.clone())
    where = again.weight.data_ptr()
    moved = again.to_layout("cuda", reuse=True)
    assert same(moved.weight, cuda.weight)
    assert (moved.weight.data_ptr() == where) == (N % 16 == K % 64 == 0)
    assert same(moved.to_layout("row", reuse=True).weight, row.weight)


def test_layout_cuda_of_a_view() -> None:
    """What cannot be put in order in place, being scattered, moves."""
    row = quantize(weight(16, 64), "int4")
    strided = row.weight.repeat_interleave(2, 1)[:, ::2]
    moved = PackedWeight("int4", "row", 64, 16, 64, strided, row.scale, row.offset).to_layout("cuda", reuse=True)
    assert same(moved.weight, row.to_layout("cuda").weight) and same(strided, row.weight)


def test_layout_cuda_in_place_takes_a_few_megabytes() -> None:
    """At the move of a layer: the memory of a chunk, not that of the weight, 16 MB here."""
    N, K = 8192, 4096
    packed = PackedWeight("int4", "row", -1, N, K, torch.zeros(N, K // 2, dtype=torch.uint8), torch.ones(N, 1))
    for layout in ("cuda", "row"):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            packed = packed.to_layout(layout, reuse=True)
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        assert 1 << 20 < max(itertools.accumulate(e.nbytes() for e in events)) < 6 << 20, layout


@pytest.mark.parametrize("N, K", [(32, 128), (33, 100), (1, 1), (130, 257)])
def test_fragments_of_some_rows(N: int, K: int) -> None:
    packed = layouts.pack_nibbles(torch.randint(0, 16, (N, K), dtype=torch.uint8), 8)
    rows = torch.randint(0, N, (3 * N,))
    taken = layouts.take_fragments(layouts.to_fragments(packed, K, 8), rows, K)
    assert torch.equal(taken, layouts.unpack_nibbles(packed)[rows, :K])
    codes = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    assert torch.equal(layouts.take_byte_fragments(layouts.to_byte_fragments(codes), rows, K), codes[rows])


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows(variant: str) -> None:
    packed = VARIANTS[variant](torch.empty(0, 33))
    assert packed.dequantize().shape == (0, 33) and packed.codes().shape == (0, 33)
    if not packed.flat:
        assert packed.to_layout("cpu").to_layout("row").dequantize(torch.bfloat16).shape == (0, 33)


def test_packed_weight_is_checked() -> None:
    good = quantize(weight(64, 128), "int4", 32, "minmax")
    assert good.scale is not None and good.offset is not None
    fields = {
        "format": "int4",
        "layout": "row",
        "group_size": 32,
        "out_features": 64,
        "in_features": 128,
        **good.tensors,
    }
    PackedWeight(**fields)  # type: ignore[arg-type]
    short = torch.zeros(64, 3, dtype=torch.float16)
    flat = {"weight": good.weight.view(-1), "scale": good.scale.view(-1), "offset": None}
    cases: tuple[tuple[dict[str, object], str], ...] = (
        ({"scale": short}, r"`scale` has shape \(64, 3\); int4 with group_size 32, N=64, K=128, .* needs \(64, 4\)"),
        ({"offset": short}, r"`offset` has shape \(64, 3\)"),
        ({"offset": good.offset.float()}, "`offset` is torch.float32; .* takes torch.float16"),
        ({"scale": None}, "`scale` is None; int4 needs one"),
        ({"scale": good.scale.to(torch.uint8), "offset": None}, "`scale` is uint8 without `nested`"),
        ({"weight": good.weight[:, :32].T}, r"`weight` has shape \(32, 64\)"),
        ({"weight": good.weight[:63]}, r"`weight` has shape \(63, 64\)"),
        ({"weight": good.weight.to(torch.int8)}, "`weight` is torch.int8; .* takes torch.uint8"),
        ({"in_features": 130}, "`weight` has shape"),
        ({"in_features": 0}, "`in_features` >= 1"),
        ({"layout": "col"}, "`layout` is 'col'"),
        ({"layout": "cpu"}, r"`weight` has shape \(64, 64\); .*layout 'cpu' needs \(1024,\)"),
        ({"format": "int3"}, "`format` is 'int3'"),
        ({"format": "nf4"}, "`offset` is given; nf4 has none"),
        ({"format": "dense", "weight": torch.zeros(64, 128)}, "`scale` is given; dense has none"),
        ({"group_size": 31}, "`group_size` is 31"),
        ({"nested": torch.zeros(258)}, "`scale` is torch.float16; .* takes torch.uint8"),
        ({"nested": torch.zeros(258), "scale": good.scale.to(torch.uint8), "offset": None}, "`nested` is given; int4"),
        (flat, "flat blocks are for nf4 and fp4, not int4"),
    )
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            PackedWeight(**{**fields, **change})  # type: ignore[arg-type]
    nf4 = nested_of(quantize(weight(64, 128), "nf4", 32))
    with pytest.raises(ValueError, match=r"`nested` has shape \(257,\); .* needs \(258,\)"):
        PackedWeight("nf4", "row", 32, 64, 128, nf4.weight, nf4.scale, None, nf4.nested[:257])  # type: ignore[index]


def test_moves() -> None:
    packed = quantize(weight(4, 32), "int4")
    assert packed.to("cpu").tensors.keys() == {"weight", "scale", "offset"}
    assert packed.to("meta").weight.is_meta and packed.to("meta").nbytes == packed.nbytes
