"""A GGUF file, read without trusting it and without mapping it.

    header     magic, version (2 or 3), counts, key/value metadata, one (name, shape, type, offset) per tensor
    data       tensors at aligned offsets; rows of [N, K] stand whole, K in blocks of 1 or 32 weights

`read_header` checks every count, length and offset against the size of the file before it reads or allocates what they
announce, so a truncated or corrupted file ends in a `GGUFError` that names the file, the field and the byte, never in a
crash or a huge allocation. Arrays of the metadata (the vocabulary, the merges) are walked and counted, not kept.

`TensorReader` then reads panels of rows into one buffer that is used again, and `unpack` turns a panel into our row
layout: the blocks of Q4_0, Q4_1 and Q8_0 are re-interleaved, scales and offsets keep their fp16 bits, so nothing is
requantised. (A memory map would be simpler, but its pages stay resident and count in the peak of loading.)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm, prod
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from ..formats import PackedWeight


class GGUFError(ValueError):
    """The file is not a GGUF that we can load; the message names file, field, byte and what is allowed."""


class BlockType(NamedTuple):
    """How one GGML type stores `weights` neighbours of a row in `nbytes` bytes."""

    name: str
    weights: int
    nbytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    8: BlockType("Q8_0", 32, 34),
    30: BlockType("BF16", 1, 2),
}
# Only for the error message, which should say Q4_K and not 12.
OTHER_TYPES = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}  # 7 is bool
STRING, ARRAY = 8, 9
MAX_STRING = 1 << 24  # bytes; the longest seen is a chat template of some 20 kB
MAX_NAME = 1 << 16  # bytes of a key or a tensor name, the specification's limit for keys
PANEL_BYTES = 1 << 16  # read at a time; 1 << 19 loads SmolLM2 in 1.7 s in place of 2.4, with a peak 4 MB higher


class ArrayOf(NamedTuple):
    """An array of the metadata: its length and the GGUF type of its elements; the elements are not kept."""

    length: int
    type: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in torch's order ([N, K] or [N]), `start` its first byte in the file."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.weights * self.type.nbytes


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF says about itself: metadata by key, tensors by name."""

    path: str
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def error(self, message: str) -> GGUFError:
        return GGUFError(f"{self.path}: {message}")


class _Cursor:
    """Reads a header forwards; every read says what it is for and is refused if the file is too short for it."""

    def __init__(self, file: BinaryIO, path: str, size: int):
        self.file, self.path, self.size, self.at = file, path, size, 0

    def error(self, message: str, at: int | None = None) -> GGUFError:
        return GGUFError(f"{self.path}: at byte {self.at if at is None else at}: {message}")

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.error(
                f"{what} takes {count} bytes, but the file ends after {self.size - self.at}; is it complete?"
            )

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise self.error(f"{what} takes {count} bytes, but only {len(data)} could be read")
        self.at += count
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str, longest: int = MAX_STRING) -> str:
        start = self.at
        length = self.number("Q", f"the length of {what}")
        if length > longest:
            raise self.error(f"{what} announces {length} bytes; at most {longest} are allowed", start)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as problem:
            raise self.error(f"{what} is not UTF-8 ({problem.reason})", start) from None

    def value(self, kind: int, what: str) -> Any:
        if kind in SCALARS:
            start = self.at
            number = self.number(SCALARS[kind], what)
            if kind != 7:
                return number
            if number > 1:
                raise self.error(f"{what} is a boolean with the value {number}; 0 and 1 are allowed", start)
            return bool(number)
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        raise self.error(f"{what} has the value type {kind}; 0 to 12 are allowed", self.at - 4)

    def array(self, what: str) -> ArrayOf:
        kind, start = self.number("I", f"the type of the array {what}"), self.at
        count = self.number("Q", f"the length of the array {what}")
        if kind in SCALARS:
            width = struct.calcsize("<" + SCALARS[kind])
            self.need(count * width, f"the array {what} of {count} values")
            self.at += count * width
            self.file.seek(self.at)
        elif kind == STRING:
            self.need(count * 8, f"the array {what} of {count} strings")
            for index in range(count):
                self.string(f"string {index} of {what}")
        else:
            raise self.error(
                f"the array {what} holds values of type {kind}; numbers and strings are allowed", start - 4
            )
        return ArrayOf(count, kind)


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Metadata and tensor table of a GGUF file, checked against its size; no tensor data is read.

    Raises GGUFError for anything that is not a complete little-endian GGUF of version 2 or 3 with tensors of the types
    in `BLOCK_TYPES`, and OSError if the file cannot be opened.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        cursor = _Cursor(file, path, os.fstat(file.fileno()).st_size)
        magic = cursor.take(4, "the magic")
        if magic != b"GGUF":
            raise cursor.error(f"the file starts with {magic!r}; a GGUF starts with b'GGUF'", 0)
        version = cursor.number("I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            raise cursor.error(
                "the file is big-endian; little-endian files are supported"
                if swapped
                else f"the GGUF version is {version}; 2 and 3 are supported",
                4,
            )
        tensor_count = cursor.number("Q", "the number of tensors")
        pair_count = cursor.number("Q", "the number of metadata entries")
        # The least that an entry can take: an empty key with a one-byte value; a tensor without name and dimensions.
        cursor.need(pair_count * 13 + tensor_count * 24, f"{pair_count} metadata entries and {tensor_count} tensors")
        metadata = _read_metadata(cursor, pair_count)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise cursor.error(f"`general.alignment` is {alignment!r}; a power of two up to 1048576 is allowed")
        if metadata.get("split.count", 1) not in (0, 1):
            raise cursor.error(f"the model is split into {metadata['split.count']} files; merge them into one first")
        tensors = _read_tensor_table(cursor, tensor_count, alignment)
    return GGUFHeader(path, version, metadata, tensors)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        start = cursor.at
        key = cursor.string(f"the key of metadata entry {index}", MAX_NAME)
        if key in metadata:
            raise cursor.error(f"the metadata key {key!r} stands there twice", start)
        kind = cursor.number("I", f"the type of `{key}`")
        metadata[key] = cursor.value(kind, f"`{key}`")
    return metadata


def _read_tensor_table(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors, their offsets made absolute, in bounds, aligned and without overlap."""
    entries = []
    for index in range(count):
        at = cursor.at
        name = cursor.string(f"the name of tensor {index}", MAX_NAME)
        rank = cursor.number("I", f"the number of dimensions of tensor `{name}`")
        if not 1 <= rank <= 4:
            raise cursor.error(f"tensor `{name}` has {rank} dimensions; 1 to 4 are allowed", at)
        shape = tuple(cursor.number("Q", f"the shape of tensor `{name}`") for _ in range(rank))[::-1]
        kind = cursor.number("I", f"the type of tensor `{name}`")
        if kind not in BLOCK_TYPES:
            allowed = ", ".join(block.name for block in BLOCK_TYPES.values())
            given = OTHER_TYPES.get(kind, f"of number {kind}, which we do not know")
            raise cursor.error(f"tensor `{name}` has the type {given}; {allowed} are supported", cursor.at - 4)
        block = BLOCK_TYPES[kind]
        if prod(shape) == 0 or shape[-1] % block.weights:
            raise cursor.error(
                f"tensor `{name}` has shape {shape}; {block.name} needs rows of a positive multiple of {block.weights}",
                at,
            )
        offset = cursor.number("Q", f"the offset of tensor `{name}`")
        if offset % alignment:
            raise cursor.error(
                f"tensor `{name}` has offset {offset}, no multiple of the alignment {alignment}", cursor.at - 8
            )
        entries.append((offset, prod(shape) // block.weights * block.nbytes, name, block, shape))

    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    previous, end = "", 0
    for offset, nbytes, name, block, shape in sorted(entries, key=lambda entry: entry[:2]):
        if name in tensors:
            raise cursor.error(f"the tensor name `{name}` stands there twice")
        if offset < end:
            raise cursor.error(f"the data of tensors `{previous}` and `{name}` overlap at byte {base + offset}")
        if base + offset + nbytes > cursor.size:
            raise cursor.error(
                f"the data of tensor `{name}` ends at byte {base + offset + nbytes}, but the file has {cursor.size}; "
                "is it complete?",
                base + offset,
            )
        tensors[name] = TensorInfo(name, block, shape, base + offset, nbytes)
        previous, end = name, offset + nbytes
    return tensors


class TensorReader:
    """Reads rows of tensors into one buffer. Use as a context manager; a panel lives until the next one is read."""

    def __init__(self, header: GGUFHeader):
        self.header = header
        self._buffer = bytearray()

    def __enter__(self) -> TensorReader:
        self._file = open(self.header.path, "rb", buffering=0)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._buffer = bytearray()

    def panels(self, info: TensorInfo, head_dim: int = 0) -> Iterator[np.ndarray]:
        """The tensor as uint8 [rows, row_bytes] panels, in order, each of a multiple of 64 rows but the last.

        `head_dim` > 0 undoes llama.cpp's order of the rotary rows inside each head of so many rows: row (head, i, half)
        of the file is row (head, half, i) of the model. Rows move whole.
        """
        total = prod(info.shape[:-1])
        unit = lcm(64, head_dim or 1)  # 64 columns are one block of the cpu layout, so panels join without a seam
        step = max(unit, PANEL_BYTES // info.row_bytes // unit * unit)
        for first in range(0, total, step):
            panel = self._read(info, first, min(step, total - first))
            if head_dim:
                heads = panel.reshape(-1, head_dim // 2, 2, info.row_bytes)
                panel = heads.swapaxes(1, 2).reshape(panel.shape)
            yield panel

    def vector(self, info: TensorInfo, head_dim: int = 0) -> torch.Tensor:
        """A vector [N] of an unpacked type (F32, F16, BF16) as fp32; `head_dim` as in `panels`."""
        (raw,) = self.panels(info)
        values = unpack(info.type.name, raw, info.name, self.header).weight[0].float()
        return values.view(-1, head_dim // 2, 2).mT.reshape(-1) if head_dim else values

    def _read(self, info: TensorInfo, first: int, rows: int) -> np.ndarray:
        count, start = rows * info.row_bytes, info.start + first * info.row_bytes
        if len(self._buffer) < count:
            self._buffer = bytearray(count)
        view = memoryview(self._buffer)[:count]
        self._file.seek(start)
        done = 0
        while done < count:
            got = self._file.readinto(view[done:])
            if not got:
                raise self.header.error(
                    f"tensor `{info.name}`: the file ended at byte {start + done} while it was read"
                )
            done += got
        return np.frombuffer(view, np.uint8).reshape(rows, info.row_bytes)


def unpack(kind: str, raw: np.ndarray, name: str, header: GGUFHeader) -> PackedWeight:
    """A panel of GGUF rows, uint8 [rows, row_bytes], as a row-layout `PackedWeight`; copies, so `raw` may be reused.

    Q4_1  block = fp16 d | fp16 m | 16 bytes, w = d q + m      -> int4, group 32, scale d, offset m
    Q4_0  block = fp16 d | 16 bytes, w = d (q - 8)             -> int4, group 32, scale d
    Q8_0  block = fp16 d | 32 int8, w = d q                    -> int8, group 32, scale d
    F32, F16, BF16                                             -> dense

    Raises GGUFError if a scale, an offset or a dense value is not finite: no quantiser writes that, a torn file does.
    """
    rows = raw.shape[0]
    if kind in _DENSE:
        weight = torch.from_numpy(raw.copy()).view(_DENSE[kind])
        _check_finite(weight, "value", name, header)
        return PackedWeight("dense", "row", -1, rows, weight.shape[1], weight, None, None, None)
    blocks = raw.reshape(rows, -1, {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind])
    columns = blocks.shape[1] * 32
    scale = torch.from_numpy(np.ascontiguousarray(blocks[..., :2])).view(torch.float16)[..., 0]
    _check_finite(scale, "scale", name, header)
    if kind == "Q8_0":
        weight = torch.from_numpy(np.ascontiguousarray(blocks[..., 2:]).reshape(rows, columns)).view(torch.int8)
        return PackedWeight("int8", "row", 32, rows, columns, weight, scale, None, None)
    offset = None
    if kind == "Q4_1":
        offset = torch.from_numpy(np.ascontiguousarray(blocks[..., 2:4])).view(torch.float16)[..., 0]
        _check_finite(offset, "offset", name, header)
    # Theirs: byte i = weight i | weight 16 + i << 4. Ours: byte i = weight 2i | weight 2i + 1 << 4.
    codes = np.empty((rows, blocks.shape[1], 16), np.uint8)
    even, odd = blocks[..., -16::2], blocks[..., -15::2]
    codes[..., :8] = (even & 15) | (odd << 4)
    codes[..., 8:] = (even >> 4) | (odd & 0xF0)
    weight = torch.from_numpy(codes.reshape(rows, columns // 2))
    return PackedWeight("int4", "row", 32, rows, columns, weight, scale, offset, None)


_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _check_finite(values: torch.Tensor, what: str, name: str, header: GGUFHeader) -> None:
    if not torch.isfinite(values).all():
        raise header.error(f"tensor `{name}`: a {what} is infinite or not a number; the file is damaged")
