"""Weight formats: what a frozen weight W [N, K] looks like in memory, one row of `FORMATS` each.

    format   codes                                scale, offset [N, groups]           D(W)
    dense    fp32, bf16, fp16                     -                                   c
    int8     int8                                 fp16, bf16, fp32                    q * scale
    int4     uint8, two a byte, low nibble first  fp16, bf16, fp32; maybe no offset   q * scale + offset; (q-8) * scale
    nf4 fp4  uint8, two a byte, low nibble first  fp32, fp16, bf16, or nested uint8   table[q] * scale

groups = ceil(K / group_size): a scale covers `group_size` consecutive weights of a row, -1 all of them; the last group
of a row may be short. D(W) is a real number, computed exactly or in fp64, rounded to fp32, and from there to bf16 or
fp16: for nf4 and fp4 the bits of bitsandbytes. The float64 result is not rounded to fp32 on its way.

Layouts hold the same codes. `row` is canonical and what checkpoints store. `cpu` is what the CPU kernels read, output
columns side by side in blocks of 64: see layouts.py, and csrc/formats.h, which says it for C++. `cuda` is what the CUDA
C++ kernels read of all but dense: codes in tiles of 16 x 64 (layouts.py, csrc/cuda/weight.cuh), scales as in `row`.

`nested` keeps the 8-bit absmax of bitsandbytes, fp32 [257 + ceil(scales / 256)]: 256 code values, an offset, one absmax
for 256 scales each. Scale i is code[scale_i] * absmax[i / 256] + offset, a product and a sum, each rounded to fp32. The
other heritage of bitsandbytes is `flat`: where K is no multiple of its block, blocks run across rows. Such a weight has
a 1-D `weight` [ceil(N * K / 2)] and a 1-D `scale` [ceil(N * K / group_size)], in layout `row` only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import fits
from .layouts import (
    BLOCK,
    FRAGMENT_K,
    FRAGMENT_ROWS,
    ceil_div,
    dwords,
    from_blocks,
    from_byte_fragments,
    from_fragments,
    padded_columns,
    to_blocks,
    to_byte_fragments,
    to_fragments,
    unpack_nibbles,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("row", "cpu", "cuda")
BLOCKWISE = ("nf4", "fp4")  # formats of bitsandbytes: may be flat, may have nested scales
CHUNK = 1 << 20  # weights converted at a time: 4 MB of fp32, so that the transient memory of a layer is its result


@dataclass(frozen=True)
class Format:
    """One row of the table. `table` holds the values of the 16 codes of a 4-bit format, centred for int4."""

    name: str
    bits: int  # of a code; 0: those of the stored dtype
    code_dtypes: tuple[torch.dtype, ...]
    scale_dtypes: tuple[torch.dtype, ...] = ()  # the first is what `quantize` stores unless told
    group_size: int = -1  # what `quantize` uses unless told
    table: tuple[float, ...] = ()
    padding: int = 0  # the code that decodes to zero and fills the unused ones
    offset: bool = False  # may have one
    fit: Callable[[Tensor, torch.dtype, fits.Options], fits.Fit] | None = None


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A stored weight W [out_features, in_features]; shapes and dtypes are checked on construction (ValueError)."""

    format: str
    layout: str
    group_size: int  # as given: weights per scale, or -1 for the row
    out_features: int  # N
    in_features: int  # K
    weight: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    nested: Tensor | None = None

    def __post_init__(self) -> None:
        validate(self)

    @property
    def flat(self) -> bool:
        """Whether blocks run across rows (bitsandbytes with K % group_size != 0)."""
        return self.layout == "row" and self.scale is not None and self.scale.dim() == 1 and self.weight.dim() == 1

    @property
    def span(self) -> int:
        """Weights per scale: `group_size`, or K for -1."""
        return self.in_features if self.group_size == -1 else self.group_size

    @property
    def groups(self) -> int:
        """Scales per row, ceil(K / group_size)."""
        return ceil_div(self.in_features, self.span)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {"weight": self.weight, "scale": self.scale, "offset": self.offset, "nested": self.nested}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, the padding of layouts `cpu` and `cuda` included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **moved)  # type: ignore[arg-type]  # mypy sees the other fields' types as well

    def has_layout(self, layout: str) -> bool:
        """Whether this weight can be stored so: flat blocks have "row" only, "cuda" is for codes."""
        return layout == "row" or not (self.flat or (layout == "cuda" and self.format == "dense"))

    def to_layout(self, layout: str, *, reuse: bool = False) -> PackedWeight:
        """The same codes and scales in another layout; itself if it already is. Exact both ways.

        reuse: between "row" and "cuda" the codes are put in order where they are, some rows at a time, and `self` is of
        no use any more; only where N or K is no multiple of 16 or 64, so that one of the two holds more bytes, do they
        move to new storage.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"`layout` is {layout!r}; layouts are {', '.join(LAYOUTS)}")
        if layout == self.layout:
            return self
        if not self.has_layout(layout):
            has = "blocks run across rows, so it has only 'row'" if self.flat else "there is 'row' and 'cpu'"
            raise ValueError(f"`layout` is {layout!r}; for this {self.format} weight {has}")
        if layout == "cuda":
            row = self.to_layout("row")
            return replace(row, layout=layout, weight=row._into_fragments(reuse or row is not self))
        if self.layout == "cuda":
            row = replace(self, layout="row", weight=self._out_of_fragments(reuse))
            return row.to_layout(layout)
        fmt, N, K = FORMATS[self.format], self.out_features, self.in_features
        if layout == "cpu":
            weight = dwords(self.weight, K, fmt.padding) if fmt.bits == 4 else self.weight
            weight = to_blocks(weight, _code_rows(fmt, K), _padding(fmt))
            scale, offset = (None if t is None else to_blocks(t, self.groups) for t in (self.scale, self.offset))
        else:
            weight = from_blocks(self.weight, N, _code_rows(fmt, K), 0, N)
            weight = weight.view(torch.uint8)[:, : ceil_div(K, 2)] if fmt.bits == 4 else weight[:, :K]
            weight = weight.contiguous()
            scale, offset = (None if t is None else self._grouped(t, 0, N) for t in (self.scale, self.offset))
        return replace(self, layout=layout, weight=weight, scale=scale, offset=offset)

    def codes(self, row_start: int = 0, rows: int | None = None) -> Tensor:
        """Codes as stored, [rows, K]: uint8 0..15 of a 4-bit format, int8 of int8, the values of dense."""
        first, stop = self._range(row_start, rows)
        fmt = FORMATS[self.format]
        if fmt.bits == 4:
            return self._unpacked(first, stop, unpack_nibbles)
        if self.layout == "cuda":
            return self._tile_rows(first, stop)
        return self._rows_of(self.weight, _code_rows(fmt, self.in_features), first, stop)[:, : self.in_features]

    def scales(self, row_start: int = 0, rows: int | None = None) -> Tensor:
        """Scales in fp32, nested ones decoded: [rows, groups], for a flat weight one an element [rows, K]."""
        if self.scale is None:
            raise ValueError(f"`format` is {self.format!r}, which has no scale")
        first, stop = self._range(row_start, rows)
        count = self.in_features if self.flat else self.groups  # a row's share of the result
        index = torch.arange(first * count, stop * count, device=self.weight.device).view(-1, count)
        if self.flat:
            index = index // self.span
        stored = self.scale[index] if self.flat else self._grouped(self.scale, first, stop)
        if self.nested is None:
            return stored.float()
        return self.nested[:256][stored.int()] * self.nested[257:][index >> 8] + self.nested[256]

    def offsets(self, row_start: int = 0, rows: int | None = None) -> Tensor | None:
        """Offsets [rows, groups] in fp32, None for a weight without."""
        return None if self.offset is None else self._grouped(self.offset, *self._range(row_start, rows)).float()

    def dequantize(self, dtype: torch.dtype = torch.float32, row_start: int = 0, rows: int | None = None) -> Tensor:
        """D(W)[row_start : row_start + rows] as [rows, K] of float64, float32, bfloat16 or float16.

        rows = None: all that follow. Only the bytes of these rows (of their blocks or tiles) are read.
        """
        if dtype not in (torch.float64, *FLOATS):
            raise ValueError(f"`dtype` is {dtype}; allowed are float64, float32, bfloat16 and float16")
        first, stop = self._range(row_start, rows)
        out = self.weight.new_empty((stop - first, self.in_features), dtype=dtype)
        for a, b in _chunks(first, stop, self.in_features):
            out[a - first : b - first] = self._dequantize(dtype, a, b)
        return out

    def codes_over_scale(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """dW / dscale with the zero point -offset / scale fixed, [N, K]: q - zero (QZO, arXiv 2505.13430).

        It is table[q], the int8 code, q - 8 or q + offset / scale; a group of scale 0 has no zero point and gives q.
        """
        factor = self._factors(0, self.out_features).to(dtype)
        offsets = self.offsets()
        if offsets is None:
            return factor
        scales = self.scales().to(dtype)
        zero = torch.where(scales == 0, 0, offsets.to(dtype) / scales)
        return factor + 8 + self._spread(zero)

    # The helpers below take rows first..stop - 1, already checked.

    def _range(self, row_start: int, rows: int | None) -> tuple[int, int]:
        N = self.out_features
        if not 0 <= row_start <= N:
            raise ValueError(f"`row_start` is {row_start}; out_features={N} allows 0..{N}")
        if rows is not None and not 0 <= rows <= N - row_start:
            raise ValueError(f"`rows` is {rows}; out_features={N} and row_start={row_start} allow 0..{N - row_start}")
        return row_start, N if rows is None else row_start + rows

    def _rows_of(self, stored: Tensor, C: int, first: int, stop: int) -> Tensor:
        """[stop - first, C] of a tensor [N, C] in layout `row` or `cpu`."""
        return from_blocks(stored, self.out_features, C, first, stop) if self.layout == "cpu" else stored[first:stop]

    def _into_fragments(self, reuse: bool) -> Tensor:
        """Codes of layout `row` in layout `cuda`: a chunk of rows has one place where nothing is padded."""
        shape, _ = expected_shapes(self.format, "cuda", self.group_size, self.out_features, self.in_features)
        out = self._storage(shape, reuse)
        for a, b in _chunks(0, self.out_features, self.in_features):
            rows, fmt = self.weight[a:b], FORMATS[self.format]
            tiles = to_fragments(rows, self.in_features, fmt.padding) if fmt.bits == 4 else to_byte_fragments(rows)
            out[a // FRAGMENT_ROWS : ceil_div(b, FRAGMENT_ROWS)] = tiles
        return out

    def _out_of_fragments(self, reuse: bool) -> Tensor:
        shape, _ = expected_shapes(self.format, "row", self.group_size, self.out_features, self.in_features)
        out = self._storage(shape, reuse)
        for a, b in _chunks(0, self.out_features, self.in_features):
            out[a:b] = self._tile_rows(a, b)
        return out

    def _storage(self, shape: tuple[int, ...], reuse: bool) -> Tensor:
        """Room for codes: that of these where `reuse` says so and the size is the same."""
        fits = reuse and self.weight.is_contiguous() and self.weight.numel() == math.prod(shape)
        return self.weight.view(shape) if fits else self.weight.new_empty(shape)

    def _tile_rows(self, first: int, stop: int) -> Tensor:
        """Rows of layout `cuda` as bytes of layout `row`."""
        start = first // FRAGMENT_ROWS
        tiles = self.weight[start : ceil_div(stop, FRAGMENT_ROWS)]
        N, K, fmt = stop - start * FRAGMENT_ROWS, self.in_features, FORMATS[self.format]
        rows = from_fragments(tiles, N, K, fmt.padding) if fmt.bits == 4 else from_byte_fragments(tiles, N, K)
        return rows[first - start * FRAGMENT_ROWS :]

    def _grouped(self, stored: Tensor, first: int, stop: int) -> Tensor:
        return self._rows_of(stored, self.groups, first, stop)

    def _unpacked(self, first: int, stop: int, unpack: Callable[[Tensor], Tensor]) -> Tensor:
        """4-bit codes [rows, K] as `unpack` makes them of bytes: [rows, bytes] -> [rows, 2 * bytes]."""
        K = self.in_features
        if self.flat:
            start, end = first * K, stop * K
            nibbles = unpack(self.weight[start // 2 : ceil_div(end, 2)].view(1, -1))
            return nibbles[:, start % 2 :][:, : end - start].reshape(-1, K)
        if self.layout == "cuda":
            return unpack(self._tile_rows(first, stop))[:, :K]
        return unpack(self._rows_of(self.weight, ceil_div(K, 8), first, stop).view(torch.uint8))[:, :K]

    def _factors(self, first: int, stop: int) -> Tensor:
        """What the scale multiplies, fp32 [rows, K]: q - 8, table[q], the int8 code, the dense value."""
        fmt = FORMATS[self.format]
        if fmt.bits != 4:
            return self.codes(first, stop - first).float()
        table = torch.tensor(fmt.table, dtype=torch.float32, device=self.weight.device)
        pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1)  # [256, 2]: both values of a byte
        return self._unpacked(first, stop, lambda packed: torch.nn.functional.embedding(packed.int(), pairs).flatten(1))

    def _spread(self, per_group: Tensor) -> Tensor:
        """[rows, groups] -> [rows, K]; [rows, K] of a flat weight stays."""
        if self.flat or per_group.shape[1] == 1:
            return per_group
        return per_group.repeat_interleave(self.span, dim=1)[:, : self.in_features]

    def _dequantize(self, dtype: torch.dtype, first: int, stop: int) -> Tensor:
        if self.format == "dense":
            return self.codes(first, stop - first)
        factors, scales = self._factors(first, stop), self.scales(first, stop - first)
        offsets = self.offsets(first, stop - first)
        if offsets is None:
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            return factors.to(compute) * self._spread(scales.to(compute))
        exact = (factors.double() + 8) * self._spread(scales.double()) + self._spread(offsets.double())
        return exact if dtype == torch.float64 else exact.float()


def _chunks(first: int, stop: int, cols: int) -> list[tuple[int, int]]:
    """Row ranges of about CHUNK weights that start and end at whole blocks of layout `cpu`."""
    step = max(1, CHUNK // (max(cols, 1) * BLOCK)) * BLOCK
    cuts = [first, *range((first // step + 1) * step, stop, step), stop]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, sizes and checks


def expected_shapes(
    format: str, layout: str, group_size: int, out_features: int, in_features: int, flat: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `weight` and of `scale` (and `offset`); the second is () for dense, which has none."""
    fmt, N, K = FORMATS[format], out_features, in_features
    span = K if group_size == -1 else group_size
    if flat:
        return (ceil_div(N * K, 2),), (ceil_div(N * K, span),)
    groups = ceil_div(K, span)
    if layout == "cuda":
        if not fmt.bits:
            raise ValueError(f"`layout` is 'cuda'; {format} has 'row' and 'cpu'")
        tile = FRAGMENT_ROWS * FRAGMENT_K * fmt.bits // 8  # bytes
        return (ceil_div(N, FRAGMENT_ROWS), ceil_div(K, FRAGMENT_K), tile), (N, groups)
    if layout == "row":
        return (N, ceil_div(K, 2) if fmt.bits == 4 else K), (N, groups) if fmt.scale_dtypes else ()
    return (padded_columns(N) * _code_rows(fmt, K),), (padded_columns(N) * groups,) if fmt.scale_dtypes else ()


def packed_nbytes(
    format: str,
    out_features: int,
    in_features: int,
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
    layout: str = "row",
    symmetric: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes that `quantize` of a [out_features, in_features] weight would store; `dtype` is that of a dense weight."""
    fmt = format_row(format)
    weight, scale = expected_shapes(format, layout, checked_group_size(fmt, group_size), out_features, in_features)
    if not fmt.scale_dtypes:
        return math.prod(weight) * dtype.itemsize
    code_bytes = 4 if fmt.bits == 4 and layout == "cpu" else 1
    scales = math.prod(scale) * (scale_dtype or fmt.scale_dtypes[0]).itemsize
    return math.prod(weight) * code_bytes + scales * (2 if fmt.offset and not symmetric else 1)


def validate(packed: PackedWeight) -> None:
    """Raise ValueError naming the first field that does not fit the others; the values of tensors are not looked at."""
    p, fmt = packed, format_row(packed.format)
    checked_group_size(fmt, p.group_size)
    if p.layout not in LAYOUTS:
        raise ValueError(f"`layout` is {p.layout!r}; layouts are {', '.join(LAYOUTS)}")
    if p.out_features < 0 or p.in_features < 1:
        raise ValueError(f"weight is [{p.out_features}, {p.in_features}]; `out_features` >= 0 and `in_features` >= 1")
    if fmt.scale_dtypes and p.scale is None:
        raise ValueError(f"`scale` is None; {p.format} needs one")
    if p.flat and p.format not in BLOCKWISE:
        raise ValueError(
            f"`weight` and `scale` are 1-D in layout 'row'; flat blocks are for nf4 and fp4, not {p.format}"
        )
    code_dtypes = (torch.int32,) if fmt.bits == 4 and p.layout == "cpu" else fmt.code_dtypes
    weight, scale = expected_shapes(p.format, p.layout, p.group_size, p.out_features, p.in_features, p.flat)
    where = f"{p.format} with group_size {p.group_size}, N={p.out_features}, K={p.in_features}, layout {p.layout!r}"
    scale_dtypes = fmt.scale_dtypes if p.nested is None else (torch.uint8,)
    _is("weight", p.weight, weight, code_dtypes, where)
    if p.scale is not None:
        if not fmt.scale_dtypes:
            raise ValueError(f"`scale` is given; {p.format} has none")
        if p.nested is None and p.scale.dtype == torch.uint8:
            raise ValueError("`scale` is uint8 without `nested`, which decodes it")
        _is("scale", p.scale, scale, scale_dtypes, where)
    if p.offset is not None:
        if not fmt.offset or p.scale is None:
            raise ValueError(f"`offset` is given; {p.format} has none, only int4")
        _is("offset", p.offset, scale, (p.scale.dtype,), where)
    if p.nested is not None:
        if p.format not in BLOCKWISE:
            raise ValueError(f"`nested` is given; {p.format} has none, only nf4 and fp4")
        scales = scale[0] if p.flat else p.out_features * p.groups
        _is("nested", p.nested, (257 + ceil_div(scales, 256),), (torch.float32,), where)


def _code_rows(fmt: Format, K: int) -> int:
    """Rows of a block of codes: dwords of eight 4-bit codes, int8 codes padded to eight, dense values."""
    return ceil_div(K, 8) if fmt.bits == 4 else ceil_div(K, 8) * 8 if fmt.bits == 8 else K


def _padding(fmt: Format) -> int:
    """What fills a block of codes: the int32 of eight padding codes, or 0."""
    filled = fmt.padding * 0x11111111
    return filled - (1 << 32) if filled >= 1 << 31 else filled


def _is(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], where: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; {where} needs {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"`{name}` is {tensor.dtype}; {where} takes {names_of(dtypes)}")


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def format_row(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"`format` is {name!r}; formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def checked_group_size(fmt: Format, group_size: int | None) -> int:
    if group_size is None:
        return fmt.group_size
    if group_size != -1 and (group_size < 8 or group_size % 8):
        raise ValueError(f"`group_size` is {group_size}; allowed are -1 (one group a row) and multiples of 8 from 8 on")
    return group_size


# ---------------------------------------------------------------------------------------------------------------------
# The table

# Quantiles of the normal distribution with an exact zero, QLoRA (arXiv 2305.14314); the floats bitsandbytes stores.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two exponent bits, one mantissa bit, as bitsandbytes orders them; over 12, so that the largest is 1. No -0.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(torch.tensor([*_FP4, 0.0, *(-value for value in _FP4[1:])]).div_(12).tolist())
INT4 = tuple(float(code - 8) for code in range(16))

_HALF_FIRST = (torch.float16, torch.bfloat16, torch.float32)
_U8 = (torch.uint8,)
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("dense", 0, FLOATS),
        Format("int8", 8, (torch.int8,), _HALF_FIRST, 64, fit=fits.fit_int8),
        Format("int4", 4, _U8, _HALF_FIRST, 64, INT4, padding=8, offset=True, fit=fits.fit_int4),
        Format("nf4", 4, _U8, FLOATS, 64, NF4, padding=7, fit=fits.fit_codebook),
        Format("fp4", 4, _U8, FLOATS, 64, FP4, padding=0, fit=fits.fit_codebook),
    )
}
