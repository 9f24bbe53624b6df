"""triton_ops/words.py against rng.py, with ==: words, normals, signs, masks, stochastic rounding, at any alignment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from zoact_kernels import rng
from zoact_kernels.triton_ops import words as device
from zoact_kernels.triton_ops.tiles import pow2_divisor

SEED, PARAM_ID = torch.tensor([-(2**62) + 12345]), torch.tensor([0xDEADBEEF])
ROWS = 8
# (columns of a tile, columns of the parameter, first row): both sides of 2^32 blocks, rows that cross a block of 128
TILES = (
    (4, 4, 0), (4, 3, 5), (16, 16, 0), (16, 5, 7), (32, 20, 2**34), (32, 30, 3), (64, 64, 2**40), (128, 128, 1),
    (128, 130, 2**33), (128, 131, 2**33),
)  # fmt: skip


@triton.jit
def words_kernel(out, seed, param_id, blocks, STREAM: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    w0, w1, w2, w3 = device.words(tl.load(seed), tl.load(param_id), STREAM, tl.load(blocks + i))
    tl.store(out + i * 4, w0.to(tl.int64))
    tl.store(out + i * 4 + 1, w1.to(tl.int64))
    tl.store(out + i * 4 + 2, w2.to(tl.int64))
    tl.store(out + i * 4 + 3, w3.to(tl.int64))


@triton.jit
def box_muller_kernel(out, a, b, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    even, odd = device.box_muller(tl.load(a + i).to(tl.uint32), tl.load(b + i).to(tl.uint32))
    tl.store(out + i * 2, even)
    tl.store(out + i * 2 + 1, odd)


@triton.jit
def noise_kernel(out, seed, param_id, row, cols, NOISE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                 ALIGN: tl.constexpr):  # fmt: skip
    i = tl.arange(0, ROWS)
    z = device.noise(NOISE, tl.load(seed), tl.load(param_id), (i.to(tl.int64) + row) * cols, COLS, ALIGN)
    tl.store(out + i[:, None] * COLS + tl.arange(0, COLS)[None, :], z)


@triton.jit
def kept_kernel(out, seed, param_id, share, row, cols, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr):
    i = tl.arange(0, ROWS)
    first = (i.to(tl.int64) + row) * cols
    part = device.kept(tl.load(seed), tl.load(param_id), tl.load(share), first, COLS, ALIGN)
    tl.store(out + i[:, None] * COLS + tl.arange(0, COLS)[None, :], part)


@triton.jit
def stochastic_kernel(out, value, seed, param_id, COLS: tl.constexpr):
    j = tl.arange(0, COLS)[None, :]
    first = tl.program_id(0).to(tl.int64) * COLS + tl.zeros((1,), tl.int64)
    word = device.element_words(tl.load(seed), tl.load(param_id), device.ROUNDING, first, COLS, COLS)
    at = tl.program_id(0) * COLS + j
    tl.store(out + at, device.stochastic(tl.load(value + at), word, out.dtype.element_ty))


@pytest.mark.parametrize("stream", range(4))
def test_words(stream: int) -> None:
    blocks = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**45 + 3, 77, 2**61, 5])
    out = torch.empty(8, 4, dtype=torch.int64)
    words_kernel[(1,)](out, SEED, PARAM_ID, blocks, stream, 8)
    want = rng.words(int(SEED), int(PARAM_ID), stream, blocks.numpy())
    assert (out.numpy() == want.astype(np.int64)).all()


def test_words_random123() -> None:
    """The known answer of Random123 for zero key and counter."""
    out = torch.empty(1, 4, dtype=torch.int64)
    zero = torch.zeros(1, dtype=torch.int64)
    words_kernel[(1,)](out, zero, zero, zero, 0, 1)
    assert out[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_box_muller() -> None:
    """Words at every edge of the range reductions, and many between."""
    edges = np.array([0, 1, 255, 256, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 1, 0xB504F333], int)
    between = np.random.default_rng(0).integers(0, 2**32, (2, 4096 - 144))
    a = torch.from_numpy(np.concatenate([np.repeat(edges, 12), between[0]]))
    b = torch.from_numpy(np.concatenate([np.tile(edges, 12), between[1]]))
    out = torch.empty(4096, 2)
    box_muller_kernel[(4,)](out, a, b, 1024)
    even, odd = rng._box_muller(torch, a, b)
    assert torch.equal(out.view(torch.int32), torch.stack([even, odd], 1).view(torch.int32))


@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_noise(kind: str, tile: tuple[int, int, int]) -> None:
    cols, total, row = tile
    out = torch.empty(ROWS, cols)
    noise_kernel[(1,)](out, SEED, PARAM_ID, row, total, kind, ROWS, cols, pow2_divisor(total, cols))
    width = min(cols, total)
    want = rng.noise(kind, SEED, PARAM_ID, ROWS, width, row_offset=row, total_cols=total)
    assert torch.equal(out[:, :width], want)


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.3, 0.5, 1.0, 1.5, -1.0, float("nan")])
@pytest.mark.parametrize("tile", [(16, 16, 0), (64, 70, 2**33)], ids=str)
def test_kept(share: float, tile: tuple[int, int, int]) -> None:
    cols, total, row = tile
    out = torch.empty(ROWS, cols, dtype=torch.bool)
    value = torch.tensor([share])
    kept_kernel[(1,)](out, SEED, PARAM_ID, value, row, total, ROWS, cols, pow2_divisor(total, cols))
    assert torch.equal(out, rng.mask(SEED, PARAM_ID, value, ROWS, cols, row_offset=row, total_cols=total))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic(dtype: torch.dtype) -> None:
    """Every exponent, both signs, infinities and NaN."""
    exponents = torch.arange(256, dtype=torch.int32).repeat_interleave(32) << 23
    value = (exponents | torch.randint(0, 2**23, (8192,), dtype=torch.int32)).view(torch.float32)
    value = torch.where(torch.arange(8192) % 2 == 1, -value, value)
    value[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65520.0])
    out = torch.empty(8192, dtype=dtype)
    stochastic_kernel[(64,)](out, value, SEED, PARAM_ID, 128)
    want = rng.round_stochastic(value.view(64, 128), dtype, SEED, PARAM_ID).flatten()
    assert torch.equal(out.view(torch.int16), want.view(torch.int16))
