"""The weight formats of formats.py as device functions: a tile of D(W), whatever the format.

Contract: `weight_tile` gives fp32 [BN, BK], bit for bit formats.PackedWeight.dequantize(torch.float32) of layout `row`,
in kernels compiled with enable_fp_fusion=False; columns from K on are finite (the caller's x is zero there), and a
caller whose tile reaches past the last row repeats that row.
A code becomes a float by bits, not by conversion: 2^23 + q has q as its low mantissa bits, and one subtraction, exact,
leaves q or q - 8. `operand` rounds it to the dtype of the product, once: the bits of dequantize(dtype).

Arguments that say what a weight is, in every kernel:

    codes, scale, offset, nested   pointers, None where the weight has none
    code_stride                    codes: bytes (4 bit) or elements of a row
    groups                         scales a row
    FORMAT                         "dense", "int8", "int4", "nf4", "fp4"
    SPAN                           weights a scale, 0 for the whole row
    FLAT                           blocks run across rows (bitsandbytes with K % block != 0)
    EVEN                           K is a multiple of BK: nothing is masked
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..formats import FP4, NF4

# bf16 arithmetic of the interpreter is silently wrong: there, bf16 values go on as the fp32 that they equal.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

_NF4 = tl.constexpr(NF4)
_FP4 = tl.constexpr(FP4)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """fp32 -> DTYPE, to nearest, ties to even. The interpreter's own cast to bf16 cuts off."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def operand(value, DTYPE: tl.constexpr):
    """`value` rounded to DTYPE, as an operand of tl.dot. In the interpreter a bf16 goes on as the fp32 it equals."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        return rounded(value.to(tl.float32), DTYPE).to(tl.float32)
    else:
        return value.to(DTYPE)


@triton.jit
def dot32(left, right, acc, DTYPE: tl.constexpr):
    """acc + left . right of fp32 operands, for the low-rank term beside x of DTYPE (law 2.5).

    fp32 x: fp32 FMA. Half precision: three bf16 parts of each operand and the six products that matter, on tensor
    cores; their error, about 2^-22, is far below the rounding of y. The interpreter has fp32 products alone.
    """
    if INTERPRETED or DTYPE == tl.float32:
        return tl.dot(left, right, acc, input_precision="ieee")
    else:
        return tl.dot(left, right, acc, input_precision="bf16x6")


@triton.jit
def dot32_by(left, right, acc, DTYPE: tl.constexpr):
    """acc + left . right of an fp32 `left`, finite, and a `right` of DTYPE: law 2.5 as in dot32, nothing rounded.

    A bf16 `right` is one part already, so the three parts of `left`, 24 bits, take three products.
    """
    if tl.bfloat16 == DTYPE and not INTERPRETED:
        high = left.to(tl.bfloat16)
        rest = left - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(high, right, tl.dot(middle, right, tl.dot(low, right, acc)))
    else:
        return dot32(left, right.to(tl.float32), acc, DTYPE)


@triton.jit
def _table(FORMAT: tl.constexpr):
    """The 16 values of a codebook, fp32 [16]."""
    values: tl.constexpr = _NF4 if FORMAT == "nf4" else _FP4
    i = tl.arange(0, 16)
    table = tl.full((16,), 0.0, tl.float32)
    for j in tl.static_range(16):
        table = tl.where(i == j, values[j], table)
    return table


@triton.jit
def _unsigned(word, zero, AT: tl.constexpr, MASK: tl.constexpr, CENTRE: tl.constexpr):
    """(word >> AT & MASK) - CENTRE in fp32, exact and without a shift: the field, which ends below bit 23, is put into
    the mantissa of 2^(23 - AT), where it counts as units. `zero` is 0, which the compiler must not know: NVIDIA's
    logic instruction takes one constant, and a second one would be moved to a register again for every code."""
    bits = (word & (MASK << AT)) | (zero + ((150 - AT) << 23)).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True) - ((8388608 >> AT) + CENTRE)


@triton.jit
def _decoded(word, zero, AT: tl.constexpr, FORMAT: tl.constexpr, CENTRE: tl.constexpr):
    """What the scale multiplies, of the code in bits AT to AT + 3: q - CENTRE of int4, the value of the codebook."""
    if FORMAT == "int4":
        return _unsigned(word, zero, AT, 15, CENTRE)
    else:
        code = ((word >> AT) & 15).to(tl.int32)
        return tl.reshape(tl.gather(_table(FORMAT), tl.reshape(code, (code.shape[0] * code.shape[1],)), 0), code.shape)


@triton.jit
def load_k(where, k, K, EVEN: tl.constexpr):
    """Elements of columns k, zero from K on. EVEN: there are none, and a mask would cost a step of K its budget."""
    if EVEN:
        return tl.load(where)
    else:
        return tl.load(where, mask=k < K, other=0)


@triton.jit
def factor_tile(
    codes, n, k0, K, code_stride, FORMAT: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, CENTRE: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    row = n.to(tl.int64)[:, None]
    k = k0 + tl.arange(0, BK)[None, :]
    zero = tl.cast(code_stride, tl.int32) >> 31
    if FORMAT == "dense":
        return load_k(codes + row * code_stride + k, k, K, EVEN).to(tl.float32)
    elif FORMAT == "int8":
        q = load_k(codes + row * code_stride + k, k, K, EVEN)
        return _unsigned((q.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint32), zero, 0, 255, 128.0)
    elif FLAT:
        e = row * K + k
        byte = load_k(codes + (e >> 1), k, K, EVEN).to(tl.uint32)
        return _decoded(byte >> ((e & 1) * 4).to(tl.uint32), zero, 0, FORMAT, CENTRE)
    else:
        j = k0 // 2 + tl.arange(0, BK // 2)[None, :]
        byte = load_k(codes + row * code_stride + j, j, code_stride, EVEN).to(tl.uint32)
        pair = tl.join(_decoded(byte, zero, 0, FORMAT, CENTRE), _decoded(byte, zero, 4, FORMAT, CENTRE))
        return tl.reshape(pair, (n.shape[0], BK))


@triton.jit
def scalars(stored, nested, row, step, k, K, EVEN: tl.constexpr):
    """Scales (or offsets) number row + step, of column k, in fp32; nested ones decoded: two operations, each rounded.
    `row` is what a loop over K leaves alone, so that a step adds no more than `step`."""
    value = load_k(stored + row + step, k, K, EVEN)
    if nested is None:
        return value.to(tl.float32)
    else:
        code = tl.load(nested + value.to(tl.int32))
        absmax = load_k(nested + 257 + (row + step >> 8), k, K, EVEN)
        return code * absmax + tl.load(nested + 256)


@triton.jit
def _scale_tile(
    stored, nested, n, k0, K, groups, SPAN: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Scales of the tile, fp32 [BN, BK], or [BN, 1] where the whole tile lies in one group of each row."""
    row = n.to(tl.int64)[:, None]
    k = k0 + tl.arange(0, BK)[None, :]
    if FLAT:
        return scalars(stored, nested, 0, (row * K + k) // SPAN, k, K, EVEN)
    elif SPAN == 0:
        return scalars(stored, nested, row, 0, 0, K, True)
    elif SPAN % BK == 0:
        return scalars(stored, nested, row * groups, k0 // SPAN, 0, K, True)
    elif BK % SPAN == 0:
        group = k0 // SPAN + tl.arange(0, BK // SPAN)[None, :]
        each = scalars(stored, nested, row * groups, group, group, groups, EVEN)
        return tl.reshape(tl.broadcast_to(each[:, :, None], (BN, BK // SPAN, SPAN)), (BN, BK))
    else:
        return scalars(stored, nested, row * groups, k // SPAN, k, K, EVEN)


@triton.jit
def weight_tile(
    codes, scale, offset, nested, n, k0, K, code_stride, groups, FORMAT: tl.constexpr, SPAN: tl.constexpr,
    FLAT: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """D(W)[n, k0 : k0 + BK] in fp32. n is int32 [BN], rows of the weight; k0 < K is a multiple of BK, and if EVEN so
    is K."""
    if FORMAT == "dense":
        return factor_tile(codes, n, k0, K, code_stride, FORMAT, FLAT, EVEN, 0.0, BK)
    elif offset is None:
        factor = factor_tile(codes, n, k0, K, code_stride, FORMAT, FLAT, EVEN, 8.0, BK)
        return factor * _scale_tile(scale, nested, n, k0, K, groups, SPAN, FLAT, EVEN, BN, BK)
    else:
        q = factor_tile(codes, n, k0, K, code_stride, FORMAT, FLAT, EVEN, 0.0, BK)
        s = _scale_tile(scale, None, n, k0, K, groups, SPAN, FLAT, EVEN, BN, BK)
        o = _scale_tile(offset, None, n, k0, K, groups, SPAN, FLAT, EVEN, BN, BK)
        return tl.fma(q, tl.broadcast_to(s, (BN, BK)), tl.broadcast_to(o, (BN, BK)))
