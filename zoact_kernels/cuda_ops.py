"""The compiled CUDA implementation (csrc/cuda): tensors become the structs of kernels.h here, and nowhere else.

A call launches on the current stream of its tensors' device and waits for nothing. What changes from step to step is
read on the device (law 2.6), so a captured graph replays with new noise. Rows are batch-invariant.

`Gpu` is all that knows of torch.cuda. Tests put the CPU in its place, and csrc/cuda compiled for it, and run the very
same launcher there (tests/cuda_lane.py).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native
from .layouts import ceil_div
from .workspace import Scratch

if TYPE_CHECKING:
    from .dispatch import Problem

_HALF = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALF)
_ALIGNMENT = 16  # bytes of a copy into shared memory
_UPDATE_TILE = 512  # elements of a block of zo_update: UPDATE_TILE of kernels.h
_MOST = 1 << 24  # what the kernels' 32-bit sizes bear
_MOST_STRIDE = 1 << 28  # elements between rows of x
_MOST_ROWS = 64 * 65535  # of x: a grid has 65535 blocks of 64

# ---------------------------------------------------------------------------------------------------------------------
# The structs of csrc/cuda/kernels.h

_TYPES = {"pointer": ctypes.c_void_p, "int64": ctypes.c_int64, "bool": ctypes.c_bool}
_ENUMS = ("DType", "Format", "Noise", "Mask", "Rule")


class Struct(ctypes.Structure):
    """A struct of kernels.h: a tensor goes in as its pointer, an enum by its name, a dtype as it is; None is null or 0.

    Tensors live as long as the struct.
    """

    kinds: dict[str, str]  # field -> kind
    tensors: dict[str, Tensor]

    def __init__(self, **fields: Any) -> None:
        if fields.keys() != self.kinds.keys():
            raise TypeError(f"{type(self).__name__} has {set(self.kinds)}, got {set(fields)}")
        self.tensors = {}
        values = []
        for name, kind in self.kinds.items():  # for a product 8 of the 24 us that a call costs the host
            value = fields[name]
            if value is None:
                value = None if kind == "pointer" else 0
            elif kind == "pointer":
                self.tensors[name] = value
                value = value.data_ptr()
            elif kind in _ENUMS:
                value = native.dtype(value) if kind == "DType" else native.enum(kind, value)
            values.append(value)
        super().__init__(*values)

    def point(self, field: str, tensor: Tensor) -> None:
        self.tensors[field] = tensor
        setattr(self, field, tensor.data_ptr())


def _struct(name: str, text: str, first: type[Struct] | None = None) -> type[Struct]:
    """A Struct of lines `kind: fields`, in the order of kernels.h; `first` is a struct that it begins with."""
    kinds = dict(first.kinds) if first else {}
    for line in text.strip().splitlines():
        kind, _, names = line.partition(":")
        kinds |= dict.fromkeys(names.split(), kind.strip())
    types = [(field, _TYPES.get(kind, ctypes.c_int32)) for field, kind in kinds.items()]
    return type(name, (Struct,), {"_fields_": types, "kinds": kinds})


ZoUpdate = _struct(
    "ZoUpdate",
    """
    int64: layers tiles
    pointer: coeffs exp_avgs exp_avg_sqs sizes first_counts first_tiles param_ids seeds weights
    int64: S
    bool: weights_per_layer
    Noise: noise
    Rule: rule
    pointer: hyper skip stream
    """,
)
ZoPerturb = _struct(
    "ZoPerturb",
    """
    pointer: w
    DType: dtype
    int64: N C w_stride
    pointer: seeds weights
    int64: S
    Noise: noise
    pointer: param_id
    int64: row_offset cols
    pointer: basis
    int64: R
    Mask: mask
    pointer: mask_value mask_seed noise_scale rounding_seed stream
    """,
)
ZoLinear = _struct(
    "ZoLinear",
    """
    pointer: x y
    DType: dtype
    int64: M x_stride
    pointer: codes scale offset nested
    Format: format
    DType: scale_dtype
    int64: N K group_size
    pointer: bias
    DType: bias_dtype
    pointer: base_basis base_coeff
    int64: base_rank
    pointer: basis
    bool: basis_per_group
    pointer: coeff coeff_groups projected
    int64: R
    pointer: seeds sigmas
    int64: S
    Noise: noise
    pointer: param_id
    int64: row_offset cols G
    pointer: workspace stream
    """,
)
ZoDenseLinear = _struct(
    "ZoDenseLinear",
    """
    Mask: mask
    pointer: mask_value mask_seed noise_scale
    """,
    first=ZoLinear,
)
Dequantize = _struct(
    "Dequantize",
    """
    pointer: codes scale offset nested
    Format: format
    DType: scale_dtype code_dtype
    int64: N K group_size
    pointer: out
    DType: dtype
    int64: row_start rows
    pointer: stream
    """,
)

# ---------------------------------------------------------------------------------------------------------------------
# Where the kernels run


def runs_on(arch: str, archs: tuple[str, ...]) -> bool:
    """Whether kernels compiled for `archs` run on a GPU `arch` ("sm_86").

    Machine code of 80 runs on 8.0 and on later 8.x, that of 90a on 9.0 alone; PTX of the last one on all that follow.
    """
    if not archs:
        return False
    device = int(arch.removeprefix("sm_"))

    def fits(code: str) -> bool:
        built = int(code.rstrip("af"))
        return built == device if code.endswith("a") else built // 10 == device // 10 and built <= device

    return any(map(fits, archs)) or int(archs[-1].rstrip("af")) <= device


class Gpu:
    """The CUDA devices of this process, and the kernels for them."""

    type = "cuda"

    def missing(self, arch: str) -> str | None:
        """Why no kernel runs on a device `arch`; None where they do. The device may be elsewhere."""
        if not arch:
            return "torch finds no CUDA device"
        if not arch.startswith("sm_"):
            return f"{arch} is no NVIDIA GPU"
        if reason := native.why_no_cuda():
            return reason
        if not runs_on(arch, native.cuda_archs()):
            return f"compiled for {', '.join(native.cuda_archs())}, not for {arch}: ZOACT_CUDA_ARCHS names others"
        return None

    def library(self) -> Any:
        return native.cuda()

    def call(self, name: str, problem: Struct) -> None:
        """Launches; raises RuntimeError with what the library says."""
        function = getattr(self.library(), name)
        function.restype = ctypes.c_char_p
        if message := function(ctypes.byref(problem)):
            raise RuntimeError(f"{name}: {message.decode()}")

    def guard(self, tensor: Tensor) -> AbstractContextManager:
        """The device of `tensor` is the current one inside."""
        return torch.cuda.device_of(tensor)

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A result."""
        return torch.empty(shape, dtype=dtype, device=device)

    def scratch(self, device: torch.device) -> Scratch:
        """Padded copies of x and workspaces of one call."""
        return Scratch(device)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Contiguous, a copy only where needed."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % _ALIGNMENT == 0


def _span(group_size: int, K: int) -> int:
    return group_size if group_size > 0 else max(K, 1)


class Cuda:
    """csrc/cuda behind the schema; arguments are checked before they get here."""

    name = "cuda"
    batch_invariant = True

    def __init__(self, gpu: Gpu | None = None) -> None:
        self.gpu = gpu or Gpu()
        self._table = functools.cache(self._make_table)

    # Dispatch --------------------------------------------------------------------------------------------------------

    def refusal(self, problem: Problem) -> str | None:
        p = problem
        if p.device != self.gpu.type:
            return f"tensors are on {p.device}"
        if (reason := self.gpu.missing(p.arch)) is not None:
            return reason
        if p.op in ("zo_update_", "zo_perturb_"):
            return None if p.dtype in _FLOATS else f"{p.dtype} is not float32, bfloat16 or float16"
        product = p.op != "dequantize"
        if p.dtype not in (_HALF if product else _FLOATS):
            return f"{p.dtype} is not bfloat16 or float16" if product else f"{p.dtype} is more than float32"
        if max(p.N, p.K, p.rank, p.base_rank, p.seeds) > _MOST or p.M > _MOST_ROWS:
            return f"a size is above {_MOST} (rows of x: {_MOST_ROWS})"
        if p.format == "dense":
            return self._dense_refusal(p, product)
        if p.format != "none":
            if p.layout != "cuda":
                return f"the weight is in layout {p.layout!r}; these kernels read 'cuda'"
            if product and p.group_size % 32 and 0 < p.group_size < p.K:
                return f"group_size is {p.group_size}, not a multiple of 32"
            if p.scale_dtype not in (*_FLOATS, torch.uint8):
                return f"scales are {p.scale_dtype}"
        if "noise on the scales" in p.features:
            return "noise on the scales is left to the reference"
        return None

    def _dense_refusal(self, p: Problem, product: bool) -> str | None:
        if p.layout != "row":
            return f"the dense weight is in layout {p.layout!r}; these kernels read 'row'"
        if p.code_dtype not in _FLOATS or (product and p.code_dtype != p.dtype):
            return f"the dense weight is {p.code_dtype}" + (f", x is {p.dtype}" if product else "")
        if product and p.K % 8:
            return f"K is {p.K}; rows of a dense weight have to be multiples of 8"
        return None

    def cost(self, problem: Problem) -> tuple[float, float]:
        """(flops, bytes). Modelled from the text of the kernels, never measured on a GPU.

        A block takes 64 rows of x, so from the 65th on the weight is read and decoded once more: where few rows share
        a weight this is what one needs, and above other implementations with larger tiles win. A weight costs some
        1.3 instructions to decode for int4 (eight codes: four lop3, four FMA, two shifts) or int8, 4 for a codebook,
        each as dear as 16 flops of the tensor cores; from sm_90 on mma.sync reaches three quarters of what they can do.
        """
        p = problem
        blocks = ceil_div(max(p.M, 1), 64)
        decode = {"int8": 20.0, "int4": 20.0, "nf4": 64.0, "fp4": 64.0}.get(p.format, 0.0)
        bits = {"dense": 8 * p.code_dtype.itemsize, "int8": 9, "int4": 5, "nf4": 5, "fp4": 5, "none": 0}[p.format]
        flops = 2.0 * p.M * p.N * p.K + 2.0 * p.M * (p.rank + p.base_rank) * (p.N + p.K)
        if p.arch.startswith("sm_") and int(p.arch[3:]) >= 90:
            flops *= 4 / 3
        moved = bits / 8 * p.N * p.K * blocks + p.dtype.itemsize * p.M * (p.N + p.K) + 4.0 * p.rank * (p.N + p.K)
        return flops + decode * blocks * p.N * p.K, moved

    # Launch ----------------------------------------------------------------------------------------------------------

    def _launch(self, name: str, problem: Struct, device: torch.device) -> None:
        problem.stream = self.gpu.stream(device)
        self.gpu.call(name, problem)

    def _rows(self, x: Tensor, scratch: Scratch) -> Tensor:
        """x [..., K] as [M, K], rows on 16 bytes: a copy, padded, only where strides or address leave no other way."""
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        M, K = rows.shape
        step = _ALIGNMENT // x.element_size()
        if (
            (rows.stride(1) == 1 or K <= 1)
            and ((rows.stride(0) % step == 0 and rows.stride(0) < _MOST_STRIDE) or M <= 1)
            and _is_aligned(rows)
        ):
            return rows
        padded = scratch.take(M, ceil_div(K, step) * step, dtype=x.dtype)[:, :K]
        return padded.copy_(rows)

    def _product(self, kind: type[Struct], x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, format,
                 group_size, N, noise, groups, row_offset, **special) -> Tensor:  # fmt: skip
        """y of zo_linear or of zo_dense_linear, as `kind` says; `special`: the fields that the two do not share."""
        name = "zo_linear" if kind is ZoLinear else "zo_dense_linear"
        with self.gpu.guard(x):
            y = self.gpu.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
            if y.numel() == 0:
                return y
            scratch = self.gpu.scratch(x.device)
            rows = self._rows(x, scratch)
            M, K = rows.shape
            if weight is not None and not _is_aligned(weight):
                weight = weight.clone()
            if bias is not None:
                bias = (bias if bias.dtype in _FLOATS else bias.float()).contiguous()
            seeds, sigmas = _dense(seeds, sigmas)
            problem = kind(
                x=rows, y=y, dtype=x.dtype, M=M, x_stride=rows.stride(0) if M > 1 else 0,
                codes=weight, scale=scale, offset=offset, nested=nested, format=format,
                scale_dtype=None if scale is None else scale.dtype, N=N, K=K, group_size=_span(group_size, K),
                bias=bias, bias_dtype=None if bias is None else bias.dtype,
                seeds=seeds, sigmas=sigmas, S=0 if seeds is None else seeds.numel(),
                noise="none" if seeds is None else noise, param_id=param_id, row_offset=row_offset, G=groups,
                workspace=None, stream=None, **special,
            )  # fmt: skip
            size = getattr(self.gpu.library(), f"{name}_workspace")
            size.restype = ctypes.c_int64
            workspace = scratch.take(size(ctypes.byref(problem)))
            problem.point("workspace", workspace)
            self._launch(name, problem, x.device)
        return y

    def zo_linear(self, x, weight, scale, offset, nested, bias, base_basis, base_coeff, basis, coeff, coeff_groups,
                  projected, seeds, sigmas, param_id, format, layout, group_size, out_features, noise="normal",
                  groups=1, row_offset=0, cols=0):  # fmt: skip
        base_basis, base_coeff, basis, coeff, coeff_groups, projected = _dense(
            base_basis, base_coeff, basis, coeff, coeff_groups, projected
        )
        rank = projected.shape[-1] if projected is not None else basis.shape[-1] if basis is not None else 0
        return self._product(
            ZoLinear, x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, format, group_size,
            out_features, noise, groups, row_offset, cols=cols or rank, base_basis=base_basis, base_coeff=base_coeff,
            base_rank=0 if base_basis is None else base_basis.shape[-1], basis=basis,
            basis_per_group=basis is not None and basis.dim() == 3, coeff=coeff, coeff_groups=coeff_groups,
            projected=projected, R=rank,
        )  # fmt: skip

    def zo_dense_linear(self, x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, noise_scale, mask_value,
                        mask_seed, format, layout, group_size, out_features, noise="normal", noise_on="weight",
                        mask="none", groups=1, row_offset=0, cols=0):  # fmt: skip
        (noise_scale,) = _dense(noise_scale)
        low_rank = dict.fromkeys(
            ("base_basis", "base_coeff", "base_rank", "basis", "basis_per_group", "coeff", "coeff_groups", "projected",
             "R")
        )  # fmt: skip
        return self._product(
            ZoDenseLinear, x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, format, group_size,
            out_features, noise, groups, row_offset, cols=cols or x.shape[-1], mask=mask, mask_value=mask_value,
            mask_seed=mask_seed, noise_scale=noise_scale, **low_rank,
        )  # fmt: skip

    def dequantize(self, weight, scale, offset, nested, format, layout, group_size, out_features, in_features, dtype,
                   row_start=0, rows=-1):  # fmt: skip
        K, count = in_features, out_features - row_start if rows < 0 else rows
        with self.gpu.guard(weight):
            out = self.gpu.empty(count, K, dtype=dtype, device=weight.device)
            if not _is_aligned(weight):
                weight = weight.clone()
            problem = Dequantize(
                codes=weight, scale=scale, offset=offset, nested=nested, format=format,
                scale_dtype=None if scale is None else scale.dtype,
                code_dtype=weight.dtype if format == "dense" else None, N=out_features, K=K,
                group_size=_span(group_size, K), out=out, dtype=dtype, row_start=row_start, rows=count, stream=None,
            )  # fmt: skip
            self._launch("dequantize", problem, weight.device)
        return out

    def zo_update_(self, coeffs, exp_avgs, exp_avg_sqs, param_ids, seeds, weights, hyper, skip, rule, noise="normal",
                   row_offsets=()):  # fmt: skip
        device = coeffs[0].device
        offsets = row_offsets or [0] * len(coeffs)
        pointers = tuple(tuple(t.data_ptr() for t in tensors) for tensors in (coeffs, exp_avgs, exp_avg_sqs))
        sizes = tuple(c.numel() for c in coeffs)
        firsts = tuple(offset * c.shape[1] for offset, c in zip(offsets, coeffs, strict=True))
        with self.gpu.guard(coeffs[0]):
            table, tiles = self._table(pointers, sizes, firsts, device)
            seeds, weights, param_ids, hyper = _dense(seeds, weights, param_ids, hyper)
            problem = ZoUpdate(
                layers=len(coeffs), tiles=tiles, **table, param_ids=param_ids, seeds=seeds, weights=weights,
                S=seeds.numel(), weights_per_layer=weights.dim() == 2, noise=noise, rule=rule, hyper=hyper, skip=skip,
                stream=None,
            )  # fmt: skip
            self._launch("zo_update", problem, device)

    def _make_table(self, pointers, sizes, firsts, device) -> tuple[dict[str, Tensor | None], int]:
        """(the tables of zo_update on the device, by field; tiles). Kept for ever, 48 bytes a layer and set of layers:
        a captured graph goes on reading them, and nobody says when it ends."""
        if self.gpu.capturing():
            raise RuntimeError(
                "zo_update_ meets these tensors for the first time while a CUDA graph is captured, where no table of "
                "their addresses can be copied to the device: run the step once before it is captured"
            )
        tiles = tuple(itertools.accumulate((ceil_div(size, _UPDATE_TILE) for size in sizes), initial=0))
        names = ("coeffs", "exp_avgs", "exp_avg_sqs", "sizes", "first_counts", "first_tiles")
        columns = (*pointers, sizes, firsts, tiles)
        whole = torch.tensor([item for column in columns for item in column], dtype=torch.int64, device=device)
        parts = whole.split([len(column) for column in columns])
        return {n: part if part.numel() else None for n, part in zip(names, parts, strict=True)}, tiles[-1]

    def zo_perturb_(self, w, seeds, weights, param_id, basis=None, noise_scale=None, mask_value=None, mask_seed=None,
                    rounding_seed=None, noise="normal", mask="none", row_offset=0, cols=0):  # fmt: skip
        with self.gpu.guard(w):
            target = w if w.stride(1) == 1 or w.shape[1] <= 1 else w.contiguous()
            rank = 0 if basis is None else basis.shape[1]
            seeds, weights, basis, noise_scale = _dense(seeds, weights, basis, noise_scale)
            problem = ZoPerturb(
                w=target, dtype=w.dtype, N=w.shape[0], C=w.shape[1], w_stride=target.stride(0), seeds=seeds,
                weights=weights, S=seeds.numel(), noise=noise, param_id=param_id, row_offset=row_offset,
                cols=cols or rank or w.shape[1], basis=basis, R=rank, mask=mask, mask_value=mask_value,
                mask_seed=mask_seed, noise_scale=noise_scale, rounding_seed=rounding_seed, stream=None,
            )  # fmt: skip
            self._launch("zo_perturb", problem, w.device)
            if target is not w:
                w.copy_(target)
