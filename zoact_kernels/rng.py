"""The noise: a pure function of (seed, parameter, row, column), in NumPy and torch.

Nothing here has state. `csrc/philox.h` says the same in C++ and CUDA, `csrc/cpu/noise.h` many values at a time; they
agree bit for bit. Counters are those of Philox4x32-10 (Salmon et al. 2011):

    key     = (seed & 0xffffffff, seed >> 32)                            seed: any int64
    counter = (block & 0xffffffff, block >> 32, param_id, stream)        -> four 32-bit words
    e       = (row_offset + row) * total_cols + col                      address of an element in its whole parameter

    stream  block   element e
    0       e >> 2  normal (Box-Muller): (w0, w1) -> e & 3 = 0, 1;  (w2, w3) -> 2, 3
    1       e >> 7  rademacher: bit e & 31 of word (e >> 5) & 3;  1 -> +1, 0 -> -1
    2       e >> 2  stochastic rounding: word e & 3
    3       e >> 2  masks: takes part where word e & 3 < floor(share * 2^32)
    5       e >> 2  uniform, for starting values: ((word e & 3 >> 9) + 1/2) / 2^23   (4 is the order of data)

Every float operation is one IEEE fp32 operation, rounded to nearest, in the order written; an implementation that fuses
a multiply and an add changes 5 % of the normals. They are within 1.2e-6 of float64.

Several seeds are summed in fp32, product rounded, then sum rounded, in the order of the seeds, from zero:

    g = 0;  for s: g = g + weights[s] * Z_s

and whatever is done with g is written, one rounding at a time, in `reference.zo_update_` and `reference.zo_perturb_`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

STREAM_NORMAL, STREAM_RADEMACHER, STREAM_ROUNDING, STREAM_MASK = range(4)
STREAM_UNIFORM = 5
KINDS = ("normal", "rademacher")
PREFIXES = ("module.", "_orig_mod.", "base_model.model.")

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# csrc/philox.h explains these; here highest power first. tests/test_rng.py compares the bits of both.
_LOG = tuple(
    float.fromhex(c)
    for c in (
        "0x1.a3644cp-3",
        "-0x1.4ec72ap-2",
        "0x1.615b4cp-2",
        "-0x1.97379ep-2",
        "0x1.ff5b7cp-2",
        "-0x1.555b1ep-1",
        "0x1.00007ep+0",
        "-0x1.000000p+1",
    )
)
_LOG_E = float.fromhex("-0x1.62e430p+0")
_SIN = tuple(float.fromhex(c) for c in ("-0x1.2a7638p-8", "0x1.46496cp-4", "-0x1.4abb68p-1", "0x1.921fb4p+0"))
_COS = tuple(float.fromhex(c) for c in ("-0x1.4eb112p-6", "0x1.03b18ep-2", "-0x1.3bd3a2p+0", "0x1.000000p+0"))

# The functions below serve Python ints, int64 ndarrays and int64 tensors: a product of two words wraps around 2^64 in
# the last two, and `& _WORD` makes the high half right again. `xp` is the module, numpy or torch.
Integers = Any
Floats = Any


def _philox(c0: Integers, c1: Integers, c2: Integers, c3: Integers, k0: Integers, k1: Integers) -> tuple[Integers, ...]:
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _words(seed: Integers, param_id: Integers, stream: int, block: Integers) -> tuple[Integers, ...]:
    return _philox(block & _WORD, (block >> 32) & _WORD, param_id, stream, seed & _WORD, (seed >> 32) & _WORD)


def exact_sqrt(x: Tensor) -> Tensor:
    """The fp32 square root rounded to nearest. torch.sqrt is one ulp off for 15 % of inputs where MKL computes it.

    A float64 root, even if one ulp off itself, rounds to the right fp32: no root of an fp32 is closer than 2^-50 to the
    middle of two neighbours.
    """
    return x.double().sqrt().float()


def _polynomial(x: Floats, coefficients: tuple[float, ...]) -> Floats:
    """Horner's rule, each product and each sum rounded."""
    y = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        y = y * x + c
    return y


def _box_muller(xp: Any, a: Integers, b: Integers) -> tuple[Floats, Floats]:
    """Words in int64 -> (r cos, r sin) with r = sqrt(-2 ln u(a)), 2 pi u(b); u(w) = ((w >> 9) + 1/2) / 2^23."""

    def to_float(i: Integers) -> Floats:
        return i.astype(np.float32) if xp is np else i.to(torch.float32)

    u = to_float((a >> 8) | 1) * 2.0**-24
    shifted = u.view(xp.int32) - 0x3F3504F3  # u = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2))
    e = to_float(shifted >> 23)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).view(xp.float32) - 1.0
    square = _polynomial(f, _LOG) * f + e * _LOG_E
    r = np.sqrt(square) if xp is np else exact_sqrt(square)

    quarter = ((b + (1 << 29)) >> 30) & 3  # 4 u = quarter + t, t in (-1/2, 1/2)
    t = to_float(((((b & 0x3FFFFFFF) ^ 0x20000000) - 0x20000000) >> 8) | 1) * 2.0**-22
    square = t * t
    s = _polynomial(square, _SIN) * t
    c = _polynomial(square, _COS)
    swap = (quarter & 1) == 1
    x, y = xp.where(swap, s, c), xp.where(swap, c, s)
    x, y = xp.where((quarter == 1) | (quarter == 2), -x, x), xp.where(quarter >= 2, -y, y)
    return r * x, r * y


def _normals(xp: Any, words: tuple[Integers, ...]) -> Floats:
    """The four normals of each block: [..., 4]."""
    w0, w1, w2, w3 = words
    first, second = _box_muller(xp, w0, w1), _box_muller(xp, w2, w3)
    return xp.stack((*first, *second), -1)


def _signs(xp: Any, words: tuple[Integers, ...]) -> Floats:
    """The 128 signs of each block: [..., 128]."""
    bit = np.arange(32) if xp is np else torch.arange(32, device=words[0].device)
    bits = (xp.stack(words, -1)[..., None] >> bit) & 1
    signs = bits * 2 - 1
    return (signs.astype(np.float32) if xp is np else signs.to(torch.float32)).reshape(*words[0].shape, 128)


def _elements(
    xp: Any,
    make: Callable[[Integers], Any],
    size: int,
    rows: int,
    cols: int,
    row_offset: int,
    total_cols: int | None,
    device: Any = None,
) -> Any:
    """[rows, cols] of what `make` gives for blocks of `size` elements: block ids [...] -> values [..., size].

    Raises:
        ValueError: a negative size or offset, or fewer columns in the whole parameter than in the part.
    """
    total = cols if total_cols is None else total_cols
    for name, value in (("rows", rows), ("cols", cols), ("row_offset", row_offset)):
        if value < 0:
            raise ValueError(f"`{name}` is {value}; it can't be negative")
    if total < cols:
        raise ValueError(f"`total_cols` is {total}; a part with {cols} columns needs at least that many")
    # One run of consecutive elements for each row, or for all rows where these are consecutive too.
    runs, length = (1, rows * cols) if total == cols else (rows, cols)
    where = {} if xp is np else {"device": device}
    first = (row_offset + xp.arange(runs, dtype=xp.int64, **where)) * total
    return _runs(xp, make, size, first, length, where).reshape(rows, cols)


def _runs(xp: Any, make: Callable[[Integers], Any], size: int, first: Any, length: int, where: dict[str, Any]) -> Any:
    """[runs, length]: `length` consecutive elements from each of the addresses `first` [runs] on."""
    block = (first // size)[:, None] + xp.arange((length + 2 * size - 2) // size, **where)
    at = (first % size)[:, None] + xp.arange(length, **where)
    values = make(block).reshape(first.shape[0], block.shape[1] * size)
    return np.take_along_axis(values, at, 1) if xp is np else values.gather(1, at)


def _noise(xp: Any, kind: str, seed: Any, param_id: Any, part: tuple[Any, ...]) -> Any:
    make, size = _maker(xp, kind, seed, param_id)
    return _elements(xp, make, size, *part)


def _maker(xp: Any, kind: str, seed: Any, param_id: Any) -> tuple[Callable[[Integers], Any], int]:
    """What gives the noise of whole blocks, and the size of a block."""
    if kind == "normal":
        return lambda block: _normals(xp, _words(seed, param_id, STREAM_NORMAL, block)), 4
    if kind == "rademacher":
        return lambda block: _signs(xp, _words(seed, param_id, STREAM_RADEMACHER, block)), 128
    raise ValueError(f"`kind` is {kind!r}; kinds of noise are {', '.join(KINDS)}")


def _number(name: str, value: int | Tensor, bits: int) -> int | Tensor:
    """A seed or a param_id: a Python int that fits, or a tensor of one element, which is not read."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype is not torch.int64:
            raise ValueError(f"`{name}` is {value.dtype} of shape {tuple(value.shape)}; it has to be one int64")
        return value.reshape(()) & (2**bits - 1) if bits < 64 else value.reshape(())
    low, high = (-(2**63), 2**63) if bits == 64 else (0, 2**bits)
    if not low <= value < high:
        raise ValueError(f"`{name}` is {value}; it has to be in [{low}, {high})")
    return int(value)


# ---------------------------------------------------------------------------------------------------------------------
# NumPy


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10: counter uint32 [..., 4], key uint32 [..., 2] -> uint32 [..., 4]."""
    c = np.moveaxis(np.atleast_2d(counter).astype(np.int64), -1, 0)
    k = np.moveaxis(np.atleast_2d(key).astype(np.int64), -1, 0)
    words = np.stack(_philox(*c, *k), -1).astype(np.uint32)
    return words.reshape(*np.broadcast_shapes(np.shape(counter)[:-1], np.shape(key)[:-1]), 4)


def words(seed: int, param_id: int, stream: int, block: np.ndarray) -> np.ndarray:
    """The four words of each block: block uint64 [...] -> uint32 [..., 4]."""
    ids = np.asarray(block, dtype=np.uint64).astype(np.int64)
    of = _words(_number("seed", seed, 64), _number("param_id", param_id, 32), stream, np.atleast_1d(ids))
    return np.stack(of, -1).astype(np.uint32).reshape(*ids.shape, 4)


def noise_numpy(
    kind: str, seed: int, param_id: int, rows: int, cols: int, *, row_offset: int = 0, total_cols: int | None = None
) -> np.ndarray:
    """Z as fp32 [rows, cols]: rows row_offset ... of a parameter with total_cols (default cols) columns."""
    return _noise(
        np, kind, _number("seed", seed, 64), _number("param_id", param_id, 32), (rows, cols, row_offset, total_cols)
    )


# ---------------------------------------------------------------------------------------------------------------------
# torch: any device, any tracer; a seed or param_id that is a tensor stays on its device


def noise(
    kind: str,
    seed: int | Tensor,
    param_id: int | Tensor,
    rows: int,
    cols: int,
    *,
    row_offset: int = 0,
    total_cols: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Z as fp32 [rows, cols] on `device`, the same bits as `noise_numpy`.

    seed and param_id are ints or int64 tensors of one element.

    Raises:
        ValueError: an unknown `kind`, a seed outside int64, a negative size.
    """
    seed, param_id = _number("seed", seed, 64), _number("param_id", param_id, 32)
    return _noise(torch, kind, seed, param_id, (rows, cols, row_offset, total_cols, device))


def noise_of_rows(kind: str, seed: int | Tensor, param_id: int | Tensor, rows: Tensor, cols: int) -> Tensor:
    """Rows `rows` (int64 [n], any order) of the Z with `cols` columns, fp32 [n, cols]: what a table's lookup needs."""
    make, size = _maker(torch, kind, _number("seed", seed, 64), _number("param_id", param_id, 32))
    return _runs(torch, make, size, rows * cols, cols, {"device": rows.device})


def mask_of_rows(seed: int | Tensor, param_id: int | Tensor, share: float | Tensor, rows: Tensor, cols: int) -> Tensor:
    """Rows `rows` (int64 [n]) of the `mask` with `cols` columns, bool [n, cols]."""
    seed, param_id = _number("seed", seed, 64), _number("param_id", param_id, 32)

    def make(block: Tensor) -> Tensor:
        return torch.stack(_words(seed, param_id, STREAM_MASK, block), -1)

    return _runs(torch, make, 4, rows * cols, cols, {"device": rows.device}) < _threshold(share)


def _threshold(share: float | Tensor) -> int | Tensor:
    """floor(share * 2^32), the share being rounded to fp32 first: a word below it takes part."""
    if isinstance(share, Tensor):
        return (share.reshape(()).float().double().nan_to_num(0.0).clamp(0.0, 1.0) * 2.0**32).to(torch.int64)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`share` is {share}; it has to be in [0, 1]")
    return math.floor(float(np.float32(share)) * 2**32)


def _element_words(
    seed: int | Tensor, param_id: int | Tensor, stream: int, rows: int, cols: int, row_offset: int,
    total_cols: int | None, device: torch.device | str,
) -> Tensor:  # fmt: skip
    """Word e & 3 of block e >> 2 for each element: int64 [rows, cols], values below 2^32."""
    seed, param_id = _number("seed", seed, 64), _number("param_id", param_id, 32)

    def make(block: Tensor) -> Tensor:
        return torch.stack(_words(seed, param_id, stream, block), -1)

    return _elements(torch, make, 4, rows, cols, row_offset, total_cols, device)


def mask(
    seed: int | Tensor,
    param_id: int | Tensor,
    share: float | Tensor,
    rows: int,
    cols: int,
    *,
    row_offset: int = 0,
    total_cols: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """bool [rows, cols]: True for a random `share` of the elements, rounded to fp32 first, in [0, 1].

    Raises:
        ValueError: a `share` (a number, not a tensor) outside [0, 1].
    """
    threshold = _threshold(share)
    return _element_words(seed, param_id, STREAM_MASK, rows, cols, row_offset, total_cols, device) < threshold


def uniform(
    seed: int | Tensor, param_id: int | Tensor, rows: int, cols: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """fp32 [rows, cols], each one of the 2^23 middles of equal parts of (0, 1): what a starting value is drawn from."""
    words = _element_words(seed, param_id, STREAM_UNIFORM, rows, cols, 0, None, device)
    return ((words >> 9).float() + 0.5) * 2.0**-23


def round_stochastic(
    w: Tensor,
    dtype: torch.dtype,
    seed: int | Tensor,
    param_id: int | Tensor,
    *,
    row_offset: int = 0,
    total_cols: int | None = None,
) -> Tensor:
    """fp32 [rows, cols] -> bf16 or fp16, up or down with the probability that keeps the mean.

    Random bits (stream 2) are added to the magnitude below the last place of `dtype`, then the rest is cut off: 16 bits
    for bf16, 13 for fp16, more where fp16 is subnormal; magnitudes below 2^-32 become zero in fp16. A finite value
    becomes infinite only where rounding to nearest makes it so; infinities and NaN stay what they are.

    Raises:
        ValueError: `w` is not fp32 of two dimensions, or `dtype` is neither bf16 nor fp16.
    """
    if w.dtype is not torch.float32 or w.dim() != 2:
        raise ValueError(f"`w` is {w.dtype} with {w.dim()} dimensions; it has to be float32 [rows, cols]")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"`dtype` is {dtype}; it has to be torch.bfloat16 or torch.float16")
    rows, cols = w.shape
    word = _element_words(seed, param_id, STREAM_ROUNDING, rows, cols, row_offset, total_cols, w.device)
    bits = w.contiguous().view(torch.int32).to(torch.int64)
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        half = (magnitude + (word & 0xFFFF)) >> 16
        largest, to_infinity, infinity, nan = 0x7F7F, 0x7F7F8000, 0x7F80, 0x7FC0
    else:
        exponent = magnitude >> 23
        drop = (126 - exponent) & 31  # of a subnormal
        small = (((magnitude & 0x7FFFFF) | 0x800000) + (word & ((1 << drop) - 1))) >> drop
        half = (magnitude - 0x38000000 + (word & 0x1FFF)) >> 13
        half = torch.where(exponent >= 113, half, torch.where(exponent >= 95, small, 0))
        largest, to_infinity, infinity, nan = 0x7BFF, 0x477FF000, 0x7C00, 0x7E00
    half = half.clamp(max=largest)
    half = torch.where(magnitude >= to_infinity, infinity, half)
    half = torch.where(magnitude > 0x7F800000, nan, half)
    return torch.where(bits < 0, half - 0x8000, half).to(torch.int16).view(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Names and steps


def seed_for(run_seed: int, step: int, query: int = 0) -> int:
    """The seed (int64) of query `query` of step `step`: words 0 and 1 of counter (step, query, 0xffffffff)."""
    run_seed = int(_number("run_seed", run_seed, 64))
    if not 0 <= step < 2**64:
        raise ValueError(f"`step` is {step}; it has to be in [0, 2^64)")
    if not 0 <= query < 2**32:
        raise ValueError(f"`query` is {query}; it has to be in [0, 2^32)")
    low, high, _, _ = _philox(step & _WORD, step >> 32, query, _WORD, run_seed & _WORD, (run_seed >> 32) & _WORD)
    return (low | high << 32) - (high >> 31 << 64)


def strip_prefixes(name: str) -> str:
    """`name` without what DistributedDataParallel, torch.compile and PEFT put before it, in any order."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name[len(prefix) :]
    return name


def param_id(name: str) -> int:
    """CRC-32 of the qualified name of a weight, wrapper prefixes stripped. A second factor is `name#V`."""
    return zlib.crc32(strip_prefixes(name).encode())


def assign_param_ids(names: Iterable[str]) -> dict[str, int]:
    """An id for each name, all different: of two names with one id, the later in the alphabet takes that of `name~1`.

    Raises:
        ValueError: a name is there twice.
    """
    given = list(names)
    ids: dict[str, int] = {}
    taken: set[int] = set()
    for name in sorted(given, key=lambda n: (strip_prefixes(n), n)):
        if name in ids:
            raise ValueError(f"`names` holds {name!r} twice; names of parameters are unique")
        number, tries = param_id(name), 0
        while number in taken:
            tries += 1
            number = param_id(f"{name}~{tries}")
        taken.add(number)
        ids[name] = number
    return {name: ids[name] for name in given}
