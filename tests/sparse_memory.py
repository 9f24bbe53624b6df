"""Tensors far apart in memory that costs nothing: an anonymous mapping whose pages come into being when touched."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

# Elements from one row to the next: row 2 begins past 2^31 elements, where a product of 32-bit numbers wraps.
FAR = (1 << 30) + 8
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux: counts as used when it is touched


def far_rows(tensor: Tensor, stride: int = FAR) -> Tensor:
    """`tensor` [M, K] with its rows `stride` elements apart."""
    M, K = tensor.shape
    memory = mmap.mmap(-1, ((M - 1) * stride + K) * tensor.element_size(), flags=FLAGS)
    spread = torch.frombuffer(memory, dtype=tensor.dtype).as_strided((M, K), (stride, 1))
    spread.copy_(tensor)
    return spread


def last_rows(tensor: Tensor, rows: int) -> Tensor:
    """A contiguous [rows, K] whose last rows are `tensor`; what lies before is zero and mostly not there."""
    count, K = tensor.shape
    memory = mmap.mmap(-1, rows * K * tensor.element_size(), flags=FLAGS)
    whole = torch.frombuffer(memory, dtype=tensor.dtype).view(rows, K)
    whole[rows - count :] = tensor
    return whole
