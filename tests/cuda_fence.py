"""Copies of tensors between pages that nobody may touch: a kernel that leaves a tensor stops at once (cuda_shim.h).

A tensor ends where the page behind it begins, but for the alignment that it needs, less than 16 bytes. What fills its
pages beside it is checked for writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable, Iterator

from torch import Tensor

NAN_BYTE = 0xFF
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, *(ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int), ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_NONE, _FAILED = 0, ctypes.c_void_p(-1).value


def span(tensor: Tensor) -> int:
    """Bytes from the first element to the last."""
    return (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.element_size()


@contextlib.contextmanager
def fenced(tensors: Iterable[tuple[Tensor, int]]) -> Iterator[dict[int, int]]:
    """Address of each (tensor, alignment) -> address of its copy; afterwards the tensors hold what the copies hold.

    An alignment of 16 keeps the address as it is modulo 16; another has to divide it.
    """
    page, copies = mmap.PAGESIZE, {}
    try:
        for tensor, alignment in tensors:
            size, address = span(tensor) if tensor.numel() else 0, tensor.data_ptr()
            if size == 0 or address in copies:
                continue
            room = -(-(size + 16) // page) * page
            start = _libc.mmap(None, room + 2 * page, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            assert start != _FAILED, "mmap"
            assert not _libc.mprotect(start + page, room, mmap.PROT_READ | mmap.PROT_WRITE)
            ctypes.memset(start + page, NAN_BYTE, room)
            end = start + page + room
            to = end - size
            to -= (to - address) % 16 if alignment == 16 else to % alignment
            ctypes.memmove(to, address, size)
            copies[address] = start, room + 2 * page, to, size, end
        yield {address: to for address, (_, _, to, _, _) in copies.items()}
        for address, (start, _, to, size, end) in copies.items():
            beside = ctypes.string_at(start + page, to - start - page) + ctypes.string_at(to + size, end - to - size)
            if beside.strip(bytes([NAN_BYTE])):
                raise RuntimeError("a write outside of a tensor")
            ctypes.memmove(address, to, size)
    finally:
        for start, total, *_ in copies.values():
            _libc.munmap(start, total)
