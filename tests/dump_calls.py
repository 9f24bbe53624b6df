"""`--dump-calls DIR`: the kernel calls of the tests with all they read, for tests/sanitize_driver.cpp.

A call of the compiled module becomes one record: its name, the test that made it, its arguments after the ISA. Where a
pointer of `cpu_ops._ptr` is handed over stand the bytes from there to the last element of its tensor, as before the
call. Calls that differ in values alone are recorded once. A file for each kernel and process appears when the tests
are done.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from zoact_kernels import cpu_ops, native

KERNELS = "zo_linear zo_dense_linear zo_update zo_perturb dequantize".split()
MOST_BYTES = 8 << 20  # of a recorded call


def extent(tensor: Tensor) -> int:
    """Bytes from data_ptr to the end of the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def encoded(values: Any, extents: dict[int, int]) -> tuple[bytes, tuple]:
    """Arguments as the driver reads them, and what tells this call from others: numbers, extents, no contents."""
    data, key = struct.pack("<q", len(values)), []
    for value in values:
        if isinstance(value, list | tuple):
            items, shape = encoded(value, extents)
            data, key = data + b"l" + items, [*key, shape]
        elif isinstance(value, int) and value in extents:
            size = extents[value]
            data += struct.pack("<cqq", b"p", value % 64, size) + ctypes.string_at(value, size)
            key.append(("pointer", size))
        elif isinstance(value, float):
            data, key = data + struct.pack("<cd", b"f", value), [*key, value]
        else:
            data += b"i" + (value & (2**64 - 1)).to_bytes(8, "little")
            key.append(value)
    return data, tuple(key)


class CallDump:
    """Replaces the functions of the compiled module by ones that record and call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.extents: dict[int, int] = {}  # of the tensors whose pointers were taken since the last call
        self.seen: set[tuple] = set()
        self.files: dict[str, BinaryIO] = {}
        cpu_ops._ptr = self.pointer
        for name in KERNELS:
            setattr(native.module(), name, self.recording(name, getattr(native.module(), name)))

    def pointer(self, tensor: Tensor | None) -> int:
        address = 0 if tensor is None else tensor.data_ptr()
        if tensor is not None and address:  # an empty tensor may be at 0
            self.extents[address] = max(extent(tensor), self.extents.get(address, 0))
        return address

    def recording(self, name: str, kernel: Any) -> Any:
        def record_and_call(isa: str, *arguments: Any) -> None:
            extents, self.extents = self.extents, {}
            if extents and sum(extents.values()) <= MOST_BYTES:
                data, key = encoded(arguments[:-1], extents)  # the driver chooses the threads
                if (name, key) not in self.seen:
                    self.seen.add((name, key))
                    self.write(name, os.environ.get("PYTEST_CURRENT_TEST", "no test"), data)
            kernel(isa, *arguments)

        return record_and_call

    def write(self, name: str, test: str, data: bytes) -> None:
        if name not in self.files:
            self.folder.mkdir(parents=True, exist_ok=True)
            worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
            self.files[name] = (self.folder / f"{name}-{worker}.part").open("wb")
        for text in (name.encode(), test.encode()):
            self.files[name].write(struct.pack("<q", len(text)) + text)
        self.files[name].write(data)

    def pytest_unconfigure(self) -> None:
        for file in self.files.values():
            file.close()
            Path(file.name).replace(Path(file.name).with_suffix(".calls"))
