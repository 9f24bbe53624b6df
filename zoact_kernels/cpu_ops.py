"""The compiled CPU implementation (csrc/cpu): tensors become pointers and sizes here, and nowhere else.

One module compiled for several instruction sets; the best that the processor has runs unless `using("cpu", isa=...)`
says otherwise. avx2 and avx512 agree bit for bit; base (no FMA) and the int4 of avx512vnni (csrc/cpu/digits.h) differ
within tolerance. Rows are batch-invariant.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import native
from .layouts import ceil_div
from .native import dtype as _dtype
from .native import enum as _enum

if TYPE_CHECKING:
    from .dispatch import Problem

_ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
_isa: contextvars.ContextVar[str | None] = contextvars.ContextVar("zoact_isa", default=None)


def _ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Contiguous, a copy only where needed; the caller holds them while their pointers are in use."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with a contiguous last axis; a copy only where strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _stored(weight, scale, offset, nested, format, layout, group_size, N, K) -> tuple:
    """The struct Weight of csrc/cpu/kernels.h, field by field."""
    flat = scale is not None and layout == "row" and weight is not None and weight.dim() == 1
    span = group_size if group_size > 0 else max(K, 1)
    return (
        _ptr(weight), _ptr(scale), _ptr(offset), _ptr(nested), _enum("Format", format), _enum("Layout", layout),
        _dtype(weight.dtype) if format == "dense" and weight is not None else 0,
        0 if scale is None else _dtype(scale.dtype), N, K, span, flat,
    )  # fmt: skip


def _direction(seeds, sigmas, noise, param_id, row_offset, cols, groups) -> tuple:
    """The struct Direction of csrc/cpu/kernels.h, field by field."""
    if seeds is None:
        return 0, 0, 0, groups, _enum("Noise", "none"), 0, 0, 0
    return (_ptr(seeds), _ptr(sigmas), seeds.numel(), groups, _enum("Noise", noise), int(param_id) & 0xFFFFFFFF,
            row_offset, cols)  # fmt: skip


class Cpu:
    """csrc/cpu behind the schema; arguments are checked before they get here."""

    name = "cpu"
    batch_invariant = True

    @staticmethod
    @contextlib.contextmanager
    def force_isa(isa: str) -> Iterator[None]:
        if isa not in native.isas():
            have = ", ".join(native.isas()) or f"none ({native.why_missing()})"
            raise ValueError(f"`isa` is {isa!r}; this machine and build can run: {have}")
        token = _isa.set(isa)
        try:
            yield
        finally:
            _isa.reset(token)

    @staticmethod
    def isa() -> str:
        return _isa.get() or native.isas()[0]

    def refusal(self, problem: Problem) -> str | None:
        p = problem
        if native.module() is None:
            return f"no compiled module: {native.why_missing()}"
        if p.device != "cpu":
            return f"tensors are on {p.device}"
        if p.dtype not in _ACTIVATIONS:
            return f"{p.dtype} is not float32, bfloat16 or float16"
        if p.scale_dtype is not None and p.scale_dtype not in (*_ACTIVATIONS, torch.uint8):
            return f"scales are {p.scale_dtype}"
        if p.layout == "cuda":
            return "the weight is in layout 'cuda'; these kernels read 'row' and 'cpu'"
        if p.format == "dense" and p.code_dtype not in _ACTIVATIONS:
            return f"the dense weight is {p.code_dtype}"
        if "noise on the scales" in p.features and (len(p.features) > 1 or "flat blocks" in p.features):
            return "noise on the scales goes without masks and noise_scale, and not with blocks that run across rows"
        return None

    def cost(self, problem: Problem) -> tuple[float, float]:
        """(flops, bytes), each operand counted once: what the kernel does when nothing but the roof limits it."""
        p = problem
        bits = {"dense": 8 * p.code_dtype.itemsize, "int8": 9, "int4": 5, "nf4": 5, "fp4": 5, "none": 0}[p.format]
        flops = 2.0 * p.M * p.N * p.K + 2.0 * p.M * (p.rank + p.base_rank) * (p.N + p.K)
        moved = bits / 8 * p.N * p.K + p.dtype.itemsize * p.M * (p.N + p.K) + 4.0 * p.rank * (p.N + p.K)
        return flops, moved

    def zo_linear(self, x, weight, scale, offset, nested, bias, base_basis, base_coeff, basis, coeff, coeff_groups,
                  projected, seeds, sigmas, param_id, format, layout, group_size, out_features, noise="normal",
                  groups=1, row_offset=0, cols=0):  # fmt: skip
        K = x.shape[-1]
        rows = _matrix(x)
        y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
        bias, base_basis, base_coeff, basis, coeff, coeff_groups, projected, seeds, sigmas = _dense(
            bias, base_basis, base_coeff, basis, coeff, coeff_groups, projected, seeds, sigmas
        )
        rank = projected.shape[-1] if projected is not None else basis.shape[-1] if basis is not None else 0
        native.module().zo_linear(
            self.isa(), _ptr(rows), _ptr(y), _dtype(x.dtype), rows.shape[0], rows.stride(0),
            *_stored(weight, scale, offset, nested, format, layout, group_size, out_features, K),
            _ptr(bias), 0 if bias is None else _dtype(bias.dtype),
            _ptr(base_basis), _ptr(base_coeff), 0 if base_basis is None else base_basis.shape[-1],
            _ptr(basis), basis is not None and basis.dim() == 3, _ptr(coeff), _ptr(coeff_groups), _ptr(projected), rank,
            *_direction(seeds, sigmas, noise, param_id, row_offset, cols or rank, groups), groups, native.threads(),
        )  # fmt: skip
        return y

    def zo_dense_linear(self, x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, noise_scale, mask_value,
                        mask_seed, format, layout, group_size, out_features, noise="normal", noise_on="weight",
                        mask="none", groups=1, row_offset=0, cols=0):  # fmt: skip
        K = x.shape[-1]
        rows = _matrix(x)
        y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
        columns = ceil_div(K, K if group_size == -1 else group_size) if noise_on == "scale" else K  # of Z
        bias, seeds, sigmas, noise_scale = _dense(bias, seeds, sigmas, noise_scale)
        native.module().zo_dense_linear(
            self.isa(), _ptr(rows), _ptr(y), _dtype(x.dtype), rows.shape[0], rows.stride(0),
            *_stored(weight, scale, offset, nested, format, layout, group_size, out_features, K),
            _ptr(bias), 0 if bias is None else _dtype(bias.dtype),
            *_direction(seeds, sigmas, noise, param_id, row_offset, cols or columns, groups), noise_on == "scale",
            _enum("Mask", mask), 0.0 if mask_value is None else float(mask_value),
            0 if mask_seed is None else int(mask_seed), _ptr(noise_scale), groups, native.threads(),
        )  # fmt: skip
        return y

    def zo_update_(self, coeffs, exp_avgs, exp_avg_sqs, param_ids, seeds, weights, hyper, skip, rule, noise="normal",
                   row_offsets=()):  # fmt: skip
        if bool(skip):
            return
        seeds, weights, param_ids, hyper = _dense(seeds, weights, param_ids, hyper)
        native.module().zo_update(
            self.isa(), [_ptr(c) for c in coeffs], [_ptr(m) for m in exp_avgs],
            [_ptr(v) for v in exp_avg_sqs], [c.shape[0] for c in coeffs], [c.shape[1] for c in coeffs],
            list(row_offsets) or [0] * len(coeffs), _ptr(param_ids), _ptr(seeds), _ptr(weights),
            seeds.numel(), weights.dim() == 2, _enum("Noise", noise), _enum("Rule", rule), _ptr(hyper),
            native.threads(),
        )  # fmt: skip

    def zo_perturb_(self, w, seeds, weights, param_id, basis=None, noise_scale=None, mask_value=None, mask_seed=None,
                    rounding_seed=None, noise="normal", mask="none", row_offset=0, cols=0):  # fmt: skip
        target = w if w.stride(1) == 1 or w.shape[1] <= 1 else w.contiguous()
        rank = 0 if basis is None else basis.shape[1]
        seeds, weights, basis, noise_scale = _dense(seeds, weights, basis, noise_scale)
        native.module().zo_perturb(
            self.isa(), _ptr(target), _dtype(w.dtype), w.shape[0], w.shape[1], target.stride(0),
            _ptr(seeds), _ptr(weights), seeds.numel(), _enum("Noise", noise), int(param_id) & 0xFFFFFFFF,
            row_offset, cols or rank or w.shape[1], _ptr(basis), rank, _enum("Mask", mask),
            0.0 if mask_value is None else float(mask_value), 0 if mask_seed is None else int(mask_seed),
            _ptr(noise_scale), rounding_seed is not None, 0 if rounding_seed is None else int(rounding_seed),
            native.threads(),
        )  # fmt: skip
        if target is not w:
            w.copy_(target)

    def dequantize(self, weight, scale, offset, nested, format, layout, group_size, out_features, in_features, dtype,
                   row_start=0, rows=-1):  # fmt: skip
        count = out_features - row_start if rows < 0 else rows
        out = torch.empty((count, in_features), dtype=dtype)
        native.module().dequantize(
            self.isa(), *_stored(weight, scale, offset, nested, format, layout, group_size, out_features, in_features),
            row_start, count, _ptr(out), _dtype(dtype), native.threads(),
        )  # fmt: skip
        return out
