"""What the launchers of all ops share: tensors into kernel arguments."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tiles


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Contiguous, a copy only where needed."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with a contiguous last axis; a copy only where strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


@functools.cache
def arch_of(device: torch.device) -> str:
    """`Problem.arch` of a device: what its kernels are compiled for."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def shape(x: Tensor, M: int, N: int, K: int, stored: Stored) -> tiles.Shape:
    """What the tile of a product of x may depend on."""
    product = "tf32" if tf32(x) else str(x.dtype).removeprefix("torch.")
    return tiles.Shape(arch_of(x.device), product, "flat" if stored.flat else stored.constants[0], M, N, K)


def tf32(x: Tensor) -> bool:
    """Whether torch was asked to multiply fp32 matrices like x in tf32: torch.backends.cuda.matmul.fp32_precision,
    which the older switches set too, and which answers after any of them without a warning (torch 2.9 to 2.13)."""
    on_gpu = x.dtype == torch.float32 and x.device.type == "cuda"
    return on_gpu and torch.backends.cuda.matmul.fp32_precision == "tf32"


def options(device: torch.device, warps: int, stages: int = 1) -> dict[str, Any]:
    """How every kernel is launched: products and sums rounded apart (law 2.1).

    NVIDIA: without a limit ptxas aims at a multiple of 8 registers below what a kernel needs, and spills a few values.
    AMD: one shape of matrix instruction for tiles of every width, so that a row's bits do not depend on it (law 2.4).
    """
    special = (
        dict(matrix_instr_nonkdim=16) if arch_of(device).startswith("gfx") else dict(maxnreg=255 if warps <= 4 else 168)
    )
    return dict(num_warps=warps, num_stages=stages, enable_fp_fusion=False, **special)


class Stored(NamedTuple):
    """A weight as the kernels take it; triton_ops/dequant.py explains the fields."""

    tensors: tuple[Tensor | None, ...]  # codes, scale, offset, nested
    sizes: tuple[int, int]  # code_stride, groups
    constants: tuple[str, int, bool]  # FORMAT, SPAN, FLAT

    @property
    def flat(self) -> bool:
        return self.constants[2]

    @classmethod
    def of(
        cls, weight: Tensor | None, scale: Tensor | None, offset: Tensor | None, nested: Tensor | None, format: str,
        group_size: int, K: int,
    ) -> Stored:  # fmt: skip
        if weight is None:
            return cls((None,) * 4, (0, 0), ("none", 0, False))
        flat = weight.dim() == 1
        whole_row = not flat and (group_size == -1 or group_size >= K)
        span = 0 if whole_row or scale is None else K if group_size == -1 else group_size
        groups = scale.shape[1] if scale is not None and not flat else 0
        return cls((weight, scale, offset, nested), (0 if flat else weight.shape[1], groups), (format, span, flat))
