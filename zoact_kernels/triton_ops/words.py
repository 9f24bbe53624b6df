"""The noise of rng.py as device functions: Philox words, normals, signs, masks, stochastic rounding.

Contract: the bits of rng.py, so a kernel that calls these compiles with enable_fp_fusion=False (law 2.1). `first` is an
int64 [rows] of element addresses e = row * cols + col in the whole parameter; a tile covers e = first[i] + j, j < COLS,
a power of two from 4 to 128. ALIGN divides every `first`: with ALIGN % 4 == 0 one evaluation of Philox makes four
normals, with ALIGN % COLS == 0 one makes all signs of a row of the tile. Nothing outside the tile is addressed, so
columns past the end of a row cost nothing but their words; the caller masks them.

The functions run compiled and in Triton's interpreter without a difference between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import rng

NORMAL = tl.constexpr(rng.STREAM_NORMAL)
RADEMACHER = tl.constexpr(rng.STREAM_RADEMACHER)
ROUNDING = tl.constexpr(rng.STREAM_ROUNDING)
MASK = tl.constexpr(rng.STREAM_MASK)

_LOG_0, _LOG_1, _LOG_2, _LOG_3, _LOG_4, _LOG_5, _LOG_6, _LOG_7 = map(tl.constexpr, rng._LOG[::-1])
_LOG_E = tl.constexpr(rng._LOG_E)
_SIN_0, _SIN_1, _SIN_2, _SIN_3 = map(tl.constexpr, rng._SIN[::-1])
_COS_0, _COS_1, _COS_2, _COS_3 = map(tl.constexpr, rng._COS[::-1])
_UNIT = tl.constexpr(2.0**-24)
_TURN = tl.constexpr(2.0**-22)


@triton.jit
def words(seed, param_id, STREAM: tl.constexpr, block):
    """The four uint32 words of each block: int64 [...] -> 4 x uint32 [...]. seed and param_id are int64 scalars."""
    block = block.to(tl.uint64)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    name = tl.zeros_like(low) + (param_id & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, name, tl.zeros_like(low) + STREAM)


@triton.jit
def box_muller(a, b):
    """Two words -> two normals, operation for operation what csrc/philox.h writes."""
    u = ((a >> 8) | 1).to(tl.int32).to(tl.float32) * _UNIT
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    q = f * _LOG_7 + _LOG_6
    q = q * f + _LOG_5
    q = q * f + _LOG_4
    q = q * f + _LOG_3
    q = q * f + _LOG_2
    q = q * f + _LOG_1
    q = q * f + _LOG_0
    r = tl.sqrt_rn(q * f + e * _LOG_E)

    t = (((b << 2).to(tl.int32, bitcast=True) >> 10) | 1).to(tl.float32) * _TURN
    t2 = t * t
    s = t2 * _SIN_3 + _SIN_2
    s = s * t2 + _SIN_1
    s = s * t2 + _SIN_0
    s = s * t
    c = t2 * _COS_3 + _COS_2
    c = c * t2 + _COS_1
    c = c * t2 + _COS_0
    quarter = b + (1 << 29)
    swap = (quarter & 0x40000000) != 0
    x, y = tl.where(swap, s, c), tl.where(swap, c, s)
    x_sign, y_sign = (quarter + 0x40000000) & 0x80000000, quarter & 0x80000000
    even = r * (x.to(tl.uint32, bitcast=True) ^ x_sign).to(tl.float32, bitcast=True)
    odd = r * (y.to(tl.uint32, bitcast=True) ^ y_sign).to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def interleave4(a, b, c, d):
    """Four [rows, cols] -> [rows, 4 * cols]: a0 b0 c0 d0 a1 ..."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4 * a.shape[1]))


@triton.jit
def element_words(seed, param_id, STREAM: tl.constexpr, first, COLS: tl.constexpr, ALIGN: tl.constexpr):
    """Word e & 3 of block e >> 2: uint32 [rows, COLS]."""
    if ALIGN % 4 == 0:
        w0, w1, w2, w3 = words(seed, param_id, STREAM, (first >> 2)[:, None] + tl.arange(0, COLS // 4)[None, :])
        return interleave4(w0, w1, w2, w3)
    else:
        e = first[:, None] + tl.arange(0, COLS)[None, :]
        w0, w1, w2, w3 = words(seed, param_id, STREAM, e >> 2)
        return tl.where((e & 2) != 0, tl.where((e & 1) != 0, w3, w2), tl.where((e & 1) != 0, w1, w0))


@triton.jit
def normals(seed, param_id, first, COLS: tl.constexpr, ALIGN: tl.constexpr):
    """Standard normals, fp32 [rows, COLS]."""
    if ALIGN % 4 == 0:
        w0, w1, w2, w3 = words(seed, param_id, NORMAL, (first >> 2)[:, None] + tl.arange(0, COLS // 4)[None, :])
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
        return interleave4(z0, z1, z2, z3)
    else:
        e = first[:, None] + tl.arange(0, COLS)[None, :]
        w0, w1, w2, w3 = words(seed, param_id, NORMAL, e >> 2)
        second = (e & 2) != 0
        even, odd = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
        return tl.where((e & 1) != 0, odd, even)


@triton.jit
def _word_of(index, w0, w1, w2, w3):
    """Word index & 3 of a row: index [rows, COLS], words [rows]."""
    low = tl.where((index & 1) != 0, w1[:, None], w0[:, None])
    high = tl.where((index & 1) != 0, w3[:, None], w2[:, None])
    return tl.where((index & 2) != 0, high, low)


@triton.jit
def signs(seed, param_id, first, COLS: tl.constexpr, ALIGN: tl.constexpr):
    """+1 and -1, fp32 [rows, COLS]: the bits of one block of 128 a row, or of two where the row crosses its end."""
    tl.static_assert(COLS <= 128)
    e = (first & 127).to(tl.int32)[:, None] + tl.arange(0, COLS)[None, :]
    w0, w1, w2, w3 = words(seed, param_id, RADEMACHER, first >> 7)
    word = _word_of(e >> 5, w0, w1, w2, w3)
    if ALIGN % COLS != 0:
        w0, w1, w2, w3 = words(seed, param_id, RADEMACHER, (first >> 7) + 1)
        word = tl.where(e >= 128, _word_of(e >> 5, w0, w1, w2, w3), word)
    bit = (word >> (e & 31).to(tl.uint32)) & 1
    return tl.where(bit != 0, 1.0, -1.0)


@triton.jit
def noise(NOISE: tl.constexpr, seed, param_id, first, COLS: tl.constexpr, ALIGN: tl.constexpr):
    """Z(seed) at first[i] + j, fp32 [rows, COLS]. NOISE is "normal" or "rademacher"."""
    if NOISE == "normal":
        return normals(seed, param_id, first, COLS, ALIGN)
    else:
        return signs(seed, param_id, first, COLS, ALIGN)


@triton.jit
def kept(seed, param_id, share, first, COLS: tl.constexpr, ALIGN: tl.constexpr):
    """bool [rows, COLS]: a random `share` (an fp32 scalar, clamped to [0, 1], NaN keeps nothing) of the elements."""
    word = element_words(seed, param_id, MASK, first, COLS, ALIGN)
    part = tl.minimum(tl.where(share > 0.0, share, 0.0), 1.0)
    threshold = (part.to(tl.float64) * 4294967296.0).to(tl.int64)  # exact, then floor
    return word.to(tl.int64) < threshold


@triton.jit
def stochastic(value, word, DTYPE: tl.constexpr):
    """fp32 -> DTYPE (bf16, fp16) with the random bits of `word`: rng.round_stochastic."""
    bits = value.to(tl.uint32, bitcast=True)
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if DTYPE == tl.bfloat16:
        half = (magnitude + (word & 0xFFFF)) >> 16
        half = tl.where(half > 0x7F7F, 0x7F7F, half)
        half = tl.where(magnitude >= 0x7F7F8000, 0x7F80, half)
        half = tl.where(magnitude > 0x7F800000, 0x7FC0, half)
    else:
        exponent = magnitude >> 23
        drop = (126 - exponent.to(tl.int32) & 31).to(tl.uint32)  # of a subnormal
        small = (
            ((magnitude & 0x7FFFFF) | 0x800000) + (word & ((tl.full(drop.shape, 1, tl.uint32) << drop) - 1))
        ) >> drop
        large = (magnitude - 0x38000000 + (word & 0x1FFF)) >> 13
        half = tl.where(exponent >= 113, large, tl.where(exponent >= 95, small, 0))
        half = tl.where(half > 0x7BFF, 0x7BFF, half)
        half = tl.where(magnitude >= 0x477FF000, 0x7C00, half)
        half = tl.where(magnitude > 0x7F800000, 0x7E00, half)
    return (sign | half).to(tl.uint16).to(DTYPE, bitcast=True)
