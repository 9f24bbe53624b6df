"""An embedding table that stays packed; a lookup dequantises the looked-up rows only.

    table   PackedWeight [N, K]: N = vocabulary, K = width; nested and flat scales excepted
    ids     integers [...]  ->  [..., K] in `dtype`

A tied model reads one weight twice, as a table and as `lm_head`. `PackedEmbedding(head)` owns nothing then: it looks
its rows up in the head's storage, whatever layout the head keeps. In layout `cpu` a row is a column of a block of 64,
so the gather has a stride of 64 (or the width of the last block); in layout `cuda` it takes 64 bytes in every 512.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from .formats import FORMATS, PackedWeight
from .layouts import BLOCK, ceil_div, pack_nibbles, padded_columns, take_byte_fragments, take_fragments


class HoldsPacked(Protocol):
    """What a tied head has to offer; ZOLinear does."""

    def packed(self) -> PackedWeight: ...


class PackedEmbedding(nn.Module):
    """Rows of a packed table, `forward(ids)` -> [..., embedding_dim] in `dtype`; frozen.

    Made of a `PackedWeight`, which it keeps as buffers in layout `row`, or of the head that it is tied to, which it
    refers to: the head stays the owner in `state_dict` and in `.to(device)`, and a deep copy of a model ties its own.
    `model.to(dtype)` changes the dtype of what is looked up, never the stored table.
    """

    codes: Tensor | None
    scale: Tensor | None
    offset: Tensor | None

    def __init__(self, table: PackedWeight | HoldsPacked, dtype: torch.dtype = torch.float32):
        super().__init__()
        owned = table.to_layout("row") if isinstance(table, PackedWeight) else None
        packed = table if isinstance(table, PackedWeight) else table.packed()
        if packed.nested is not None or packed.flat:
            raise ValueError(
                f"`table` is {packed.format} with nested or flat scales; an embedding needs a scale per row"
            )
        self.num_embeddings, self.embedding_dim = packed.out_features, packed.in_features
        self.format, self.group_size = packed.format, packed.group_size
        self.dtype = dtype
        self.padding_idx = None  # nn.Embedding has one: the row that gets no gradient. A frozen table needs none.
        # In a tuple, because nn.Module would register the head here a second time, under a second name.
        self._head = () if isinstance(table, PackedWeight) else (table,)
        self.register_buffer("codes", owned.weight if owned else None)
        self.register_buffer("scale", owned.scale if owned else None)
        self.register_buffer("offset", owned.offset if owned else None)

    @property
    def tied(self) -> bool:
        """Whether the table is the storage of the model's head."""
        return bool(self._head)

    @property
    def head(self) -> HoldsPacked | None:
        """The head that the table is tied to."""
        return self._head[0] if self._head else None

    @property
    def weight(self) -> Tensor:
        """The packed codes, for code that asks an embedding for its device; `dequantize` gives [N, K]."""
        return self.packed().weight

    def packed(self) -> PackedWeight:
        """The table, whoever owns it."""
        if self._head:
            return self._head[0].packed()
        assert self.codes is not None
        return PackedWeight(
            self.format,
            "row",
            self.group_size,
            self.num_embeddings,
            self.embedding_dim,
            self.codes,
            self.scale,
            self.offset,
        )

    def forward(self, ids: Tensor) -> Tensor:
        rows = take_rows(self.packed(), ids.reshape(-1))
        return rows.dequantize(self.dtype).reshape(*ids.shape, self.embedding_dim)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole table, dense [num_embeddings, embedding_dim]."""
        return self.packed().dequantize(dtype or self.dtype)

    def extra_repr(self) -> str:
        tied = ", tied to the head" if self.tied else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}{tied}"

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


def take_rows(table: PackedWeight, ids: Tensor) -> PackedWeight:
    """Rows `ids` (integers [n]) of a packed weight, as a weight of n rows in layout `row`.

    Raises IndexError for an id outside 0..N - 1, if ids are on the CPU (on a device that would wait for it).
    """
    N, K = table.out_features, table.in_features
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= N:
            raise IndexError(f"`ids` has {low if low < 0 else high}; the table has rows 0..{N - 1}")
    stored = {name: tensor for name, tensor in table.tensors.items() if name != "nested"}
    if table.layout != "cpu":
        rows = {name: tensor[ids] for name, tensor in stored.items() if table.layout == "row" or name != "weight"}
        if table.layout == "cuda":
            fmt = FORMATS[table.format]
            if fmt.bits == 4:
                rows["weight"] = pack_nibbles(take_fragments(table.weight, ids, K), fmt.padding)
            else:
                rows["weight"] = take_byte_fragments(table.weight, ids, K)
    else:
        rows = {name: _take_columns(tensor, N, ids) for name, tensor in stored.items()}
        # Not contiguous(), which leaves the odd strides of a dimension of size 1, and `view` minds them.
        rows = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in rows.items()}
        if FORMATS[table.format].bits == 4:
            rows["weight"] = rows["weight"].view(torch.uint8)[:, : ceil_div(K, 2)].contiguous()
        elif FORMATS[table.format].bits == 8:
            rows["weight"] = rows["weight"][:, :K].contiguous()
    return PackedWeight(table.format, "row", table.group_size, ids.numel(), K, **rows)


def _take_columns(storage: Tensor, N: int, ids: Tensor) -> Tensor:
    """Columns `ids` of layout `cpu`: blocks of [depth, 64], the last of [depth, its width] -> [n, depth]."""
    padded = padded_columns(N)
    depth = storage.numel() // padded
    whole, width = padded // BLOCK, padded % BLOCK
    split = whole * BLOCK * depth
    block, column = ids // BLOCK, ids % BLOCK
    if not whole:
        return storage.view(depth, width)[:, column].T
    body = storage[:split].view(whole, depth, BLOCK)
    if not width:
        return body[block, :, column]
    tail = storage[split:].view(depth, width)[:, column.clamp(max=width - 1)].T
    return torch.where((block == whole)[:, None], tail, body[block.clamp(max=whole - 1), :, column])
