"""Stored weights of every format and kind, for the tests of formats, layouts and quantisers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoact_kernels.formats import PackedWeight
from zoact_kernels.quantize import quantize

NS = (1, 7, 16, 63, 64, 65, 100)
KS = (1, 7, 8, 63, 64, 100, 193, 576)
SHAPES = tuple((N, K) for i, N in enumerate(NS) for j, K in enumerate(KS) if (i + j) % 3 == 0 or N * K == 100 * 193)


def weight(N: int, K: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    return (torch.randn(N, K) + mean).to(dtype)


def nested_of(packed: PackedWeight) -> PackedWeight:
    """The same codes with nested scales, as bitsandbytes stores them."""
    assert packed.scale is not None
    count = packed.scale.numel()
    nested = torch.cat((torch.linspace(-1, 1, 256), torch.tensor([1.5]), torch.rand(-(-count // 256)) + 0.1))
    scale = torch.randint(0, 256, packed.scale.shape, dtype=torch.uint8)
    return PackedWeight(packed.format, "row", packed.group_size, packed.out_features, packed.in_features,
                        packed.weight, scale, None, nested)  # fmt: skip


VARIANTS: dict[str, Callable[[Tensor], PackedWeight]] = {
    "dense-fp32": lambda w: quantize(w, "dense"),
    "dense-bf16": lambda w: quantize(w.bfloat16(), "dense"),
    "dense-fp16": lambda w: quantize(w.half(), "dense"),
    "int8-g64": lambda w: quantize(w, "int8"),
    "int8-row-bf16": lambda w: quantize(w, "int8", -1, scale_dtype=torch.bfloat16),
    "int4-g64": lambda w: quantize(w, "int4", method="minmax"),
    "int4-g32-fp32": lambda w: quantize(w, "int4", 32, "minmax", torch.float32),
    "int4-g8-bf16": lambda w: quantize(w, "int4", 8, "minmax", torch.bfloat16),
    "int4-row-symmetric": lambda w: quantize(w, "int4", -1, "minmax", symmetric=True),
    "nf4-g64": lambda w: quantize(w, "nf4"),
    "nf4-g32-fp16": lambda w: quantize(w, "nf4", 32, scale_dtype=torch.float16),
    "nf4-g64-flat": lambda w: quantize(w, "nf4", 64, flat=True),
    "nf4-g32-nested": lambda w: nested_of(quantize(w, "nf4", 32)),
    "fp4-row": lambda w: quantize(w, "fp4", -1),
    "fp4-g128-flat": lambda w: quantize(w, "fp4", 128, flat=True),
    "fp4-g64-flat-nested": lambda w: nested_of(quantize(w, "fp4", 64, flat=True)),
}


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)
