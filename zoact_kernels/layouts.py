"""Where the codes of a weight lie: nibbles in bytes, bytes in dwords, and the blocks of layout `cpu` (csrc/formats.h).

Layout `cpu` stores any tensor [N, C] as blocks of 64 columns, the last one of what remains rounded up to 16: block
after block [C, width], so that one load takes the same row of 16 neighbouring columns (outputs of the layer). Lanes are
outputs then, a product needs no horizontal sums, and every ISA reads the same bytes.

Layout `cuda` stores codes in tiles of 16 x 64, each as the tensor cores take it: `to_fragments`, `to_byte_fragments`.
"""

from __future__ import annotations

import torch
from torch import Tensor

VECTOR = 16  # columns of a vector: csrc/formats.h VECTOR
BLOCK = 64  # columns of a block


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded_columns(N: int) -> int:
    """Columns that layout `cpu` stores: whole vectors."""
    return ceil_div(N, VECTOR) * VECTOR


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [rows, bytes] -> uint8 codes [rows, 2 * bytes], low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_nibbles(codes: Tensor, padding: int) -> Tensor:
    """uint8 codes [rows, K] -> uint8 [rows, ceil(K / 2)], low nibble first; an odd K ends in the code `padding`."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=padding)
    return codes[..., ::2] | codes[..., 1::2] << 4


def dwords(packed: Tensor, K: int, padding: int) -> Tensor:
    """uint8 [N, ceil(K / 2)] -> int32 [N, ceil(K / 8)]: lowest nibble = lowest k, K filled up to 8 with `padding`.

    The unused nibble of an odd K is set to `padding` whatever it held. Little-endian hosts only.
    """
    if K % 8:
        filled = packed.new_full((packed.shape[0], ceil_div(K, 8) * 4), padding * 0x11)
        filled[:, : packed.shape[1]] = packed
        if K % 2:
            filled[:, K // 2] = packed[:, -1] & 15 | padding << 4
        packed = filled
    if packed.storage_offset() % 4:
        packed = packed.clone()
    return row_major(packed).view(torch.int32)


def row_major(matrix: Tensor) -> Tensor:
    """Strides (C, 1), so that dwords can be viewed as bytes; .contiguous() leaves any to a single row or column."""
    C = matrix.shape[1]
    return matrix if matrix.stride() == (C, 1) else matrix.clone(memory_format=torch.contiguous_format)


def to_blocks(stored: Tensor, C: int, padding: int = 0) -> Tensor:
    """[N, <= C] -> 1-D blocks of [C, width] where missing rows and columns hold `padding`."""
    N, filled = stored.shape
    out = stored.new_full((padded_columns(N) * C,), padding)
    whole = N // BLOCK
    head = out[: whole * BLOCK * C].view(whole, C, BLOCK)
    head[:, :filled] = stored[: whole * BLOCK].view(whole, BLOCK, filled).transpose(1, 2)
    if N % BLOCK:
        out[whole * BLOCK * C :].view(C, -1)[:filled, : N % BLOCK] = stored[whole * BLOCK :].T
    return out


def from_blocks(blocks: Tensor, N: int, C: int, first: int, stop: int) -> Tensor:
    """Rows first..stop - 1 of the [N, C] that `to_blocks` stored, row-major; reads the blocks of these rows only."""
    if first >= stop:
        return blocks.new_empty((0, C))
    whole = padded_columns(N) // BLOCK
    start, end = first // BLOCK, min(ceil_div(stop, BLOCK), whole)
    parts = [blocks[start * BLOCK * C : end * BLOCK * C].view(-1, C, BLOCK).transpose(1, 2).reshape(-1, C)]
    if stop > whole * BLOCK:
        parts.append(blocks[whole * BLOCK * C :].view(C, -1).T)
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return row_major(rows[first - start * BLOCK : stop - start * BLOCK])


FRAGMENT_ROWS, FRAGMENT_K = 16, 64  # a tile of layout `cuda`: 512 bytes


def to_fragments(packed: Tensor, K: int, padding: int) -> Tensor:
    """uint8 [N, ceil(K / 2)] -> uint8 [tiles of N, tiles of K, 512]: layout `cuda` of csrc/cuda/weight.cuh.

    Lane 4 g + t of a warp owns 16 bytes of a tile of 16 rows x 64 k. Word i of them is the left operand of the tensor
    core for k = 16 i ..: nibble j + 4 h is row g + 8 (j & 1), k = 2 t + 8 (j >> 1) + h.
    """
    codes = unpack_nibbles(packed)[:, :K]
    N = codes.shape[0]
    rows, columns = ceil_div(N, FRAGMENT_ROWS), ceil_div(K, FRAGMENT_K)
    fill = (0, columns * FRAGMENT_K - K, 0, rows * FRAGMENT_ROWS - N)
    whole = torch.nn.functional.pad(codes, fill, value=padding)
    tiles = whole.view(rows, 2, 8, columns, 4, 2, 4, 2)  # tile; j & 1, g; tile; i, j >> 1, t, h
    return pack_nibbles(tiles.permute(0, 3, 2, 6, 4, 7, 5, 1).reshape(rows * columns, 1024), padding).view(
        rows, columns, 512
    )


def from_fragments(tiles: Tensor, N: int, K: int, padding: int) -> Tensor:
    """The uint8 [N, ceil(K / 2)] that `to_fragments` was given, an odd K ending in `padding`."""
    rows, columns = tiles.shape[:2]
    nibbles = unpack_nibbles(tiles.reshape(rows * columns, 512)).view(rows, columns, 8, 4, 4, 2, 2, 2)
    codes = nibbles.permute(0, 7, 2, 1, 4, 6, 3, 5).reshape(rows * FRAGMENT_ROWS, columns * FRAGMENT_K)
    return pack_nibbles(codes[:N, :K], padding)


def take_fragments(tiles: Tensor, rows: Tensor, K: int) -> Tensor:
    """uint8 codes [n, K] of the rows `rows` (integers [n]) of what `to_fragments` stored.

    Row r of a tile lies in the 64 bytes of lanes 4 (r % 8) .. + 3: in the low nibbles for r < 8, else in the high ones.
    """
    columns = tiles.shape[1]
    lanes = tiles.view(-1, columns, 8, 64)[rows // FRAGMENT_ROWS, :, rows % 8]
    high = (rows % FRAGMENT_ROWS >= 8).view(-1, 1, 1)
    nibbles = torch.where(high, lanes >> 4, lanes & 15).view(-1, columns, 4, 4, 2, 2)  # t; i, h, j >> 1
    return nibbles.permute(0, 1, 3, 5, 2, 4).reshape(-1, columns * FRAGMENT_K)[:, :K]


def to_byte_fragments(codes: Tensor) -> Tensor:
    """int8 [N, K] -> int8 [tiles of N, tiles of K, 1024]: layout `cuda` of csrc/cuda/weight.cuh.

    Half h of a tile holds k = 32 h ..; lane 4 g + t owns 16 bytes of it. Byte 8 i + 4 p + 2 j + e of them is row
    g + 8 j, k = 32 h + 16 i + 8 p + 2 t + e.
    """
    N, K = codes.shape
    rows, columns = ceil_div(N, FRAGMENT_ROWS), ceil_div(K, FRAGMENT_K)
    whole = torch.nn.functional.pad(codes, (0, columns * FRAGMENT_K - K, 0, rows * FRAGMENT_ROWS - N))
    tiles = whole.view(rows, 2, 8, columns, 2, 2, 2, 4, 2)  # tile; j, g; tile; h, i, p, t, e
    return tiles.permute(0, 3, 4, 2, 7, 5, 6, 1, 8).reshape(rows, columns, 1024)


def from_byte_fragments(tiles: Tensor, N: int, K: int) -> Tensor:
    """The int8 [N, K] that `to_byte_fragments` was given."""
    rows, columns = tiles.shape[:2]
    codes = tiles.view(rows, columns, 2, 8, 4, 2, 2, 2, 2).permute(0, 7, 3, 1, 2, 5, 6, 4, 8)
    return codes.reshape(rows * FRAGMENT_ROWS, columns * FRAGMENT_K)[:N, :K].contiguous()


def take_byte_fragments(tiles: Tensor, rows: Tensor, K: int) -> Tensor:
    """int8 [n, K]: the rows `rows` (integers [n]) of what `to_byte_fragments` stored."""
    columns = tiles.shape[1]
    parts = tiles.view(-1, columns, 2, 8, 4, 2, 2, 2, 2)  # h, g, t, i, p, j, e
    taken = parts[
        rows // FRAGMENT_ROWS, :, :, rows % 8, :, :, :, rows % FRAGMENT_ROWS // 8
    ]  # [n, columns, h, t, i, p, e]
    return taken.permute(0, 1, 2, 4, 5, 3, 6).reshape(-1, columns * FRAGMENT_K)[:, :K].contiguous()
