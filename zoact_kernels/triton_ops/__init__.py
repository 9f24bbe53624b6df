"""The Triton implementation: kernels for NVIDIA (Ampere and newer) and AMD GPUs. Importing this imports no Triton.

words.py and dequant.py hold the device functions that all kernels share, one file per op holds its kernels and their
launcher, tiles.py the rules that pick a tile. Tests run the kernels on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

import torch

from .tiles import Shape, linear_rule

if TYPE_CHECKING:
    from ..dispatch import Problem

_ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_TRITON = (3, 6)
OLDEST = 80  # sm_80: Triton has no tensor-core products before: they become scalar FMAs that spill


def interpreted() -> bool:
    """Whether Triton, if anybody imported it, runs kernels on the CPU: TRITON_INTERPRET=1, which tests set."""
    knobs = getattr(sys.modules.get("triton"), "knobs", None)
    return knobs is not None and bool(knobs.runtime.interpret)


@functools.cache
def _missing(arch: str) -> str | None:
    """Why kernels cannot run on a "cuda" tensor of a device `arch`; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'zoact_kernels[triton]'"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    if not arch:
        return "torch finds no CUDA or ROCm device"
    if arch.startswith("sm_") and int(arch[3:]) < OLDEST:
        return f"{arch} is below sm_{OLDEST}"
    return None


# Instructions of a thread to dequantise one weight (benchmarks/results/machine_code.json: 7 to 12 for int4), and the
# half-precision flops of the tensor cores in the time of one: peak flop/s over (multiprocessors x 128 x clock).
INSTRUCTIONS = 8.0
FLOPS_OF_INSTRUCTION = {"sm_86": 8.0, "sm_89": 4.0, "sm_90": 30.0, "sm_100": 60.0, "sm_120": 4.0}  # others: 16


def _dequantize(p: Problem) -> float:
    """The work of dequantising D(W) once, as flops of the products that the time would do for."""
    if p.format in ("dense", "none"):
        return 0.0
    half = FLOPS_OF_INSTRUCTION.get(p.arch, 16.0)
    return INSTRUCTIONS * p.N * p.K * (half / 2 if p.tf32 else 2.0 if p.dtype == torch.float32 else half)


def _cost(p: Problem) -> tuple[float, float]:
    """(flops, bytes), each operand counted once."""
    bits = {"dense": 8 * p.code_dtype.itemsize, "int8": 9, "int4": 5, "nf4": 5, "fp4": 5, "none": 0}[p.format]
    flops = 2.0 * p.M * p.N * p.K + 2.0 * p.M * (p.rank + p.base_rank) * (p.N + p.K)
    moved = bits / 8 * p.N * p.K + p.dtype.itemsize * p.M * (p.N + p.K) + 4.0 * p.rank * (p.N + p.K)
    return flops, moved


class Triton:
    """triton_ops behind the schema; arguments are checked before they get here."""

    name = "triton"
    batch_invariant = True

    def refusal(self, problem: Problem) -> str | None:
        p = problem
        if p.device != "cuda" and not (p.device == "cpu" and interpreted()):
            return f"tensors are on {p.device}"
        if p.device == "cuda" and (reason := _missing(p.arch)) is not None:
            return reason
        if p.dtype not in _ACTIVATIONS:
            return f"{p.dtype} is not float32, bfloat16 or float16"
        if p.layout != "row":
            return f"the weight is in layout {p.layout!r}; these kernels read 'row'"
        if p.format == "dense" and p.code_dtype not in _ACTIVATIONS:
            return f"the dense weight is {p.code_dtype}"
        if "noise on the scales" in p.features and len(p.features) > 1:
            return "noise on the scales goes without masks and noise_scale, and not with blocks that run across rows"
        return None

    def cost(self, problem: Problem) -> tuple[float, float]:
        """(flops, bytes), each operand counted once, and D(W) dequantised for every tile of rows of x."""
        p = problem
        flops, moved = _cost(p)
        product = "tf32" if p.tf32 else str(p.dtype).removeprefix("torch.")
        rows = linear_rule(Shape(p.arch, product, p.format, p.M, p.N, p.K)).BM  # no tuned table: dispatch is pure
        return flops + _dequantize(p) * -(-p.M // rows), moved

    def zo_linear(self, *args, **named):
        from .zo_linear import zo_linear

        return zo_linear(*args, **named)

    def zo_dense_linear(self, *args, **named):
        from .zo_dense_linear import zo_dense_linear

        return zo_dense_linear(*args, **named)

    def dequantize(self, *args, **named):
        from .dequantize import dequantize

        return dequantize(*args, **named)

    def zo_update_(self, *args, **named):
        from .zo_update import zo_update_

        zo_update_(*args, **named)

    def zo_perturb_(self, *args, **named):
        from .zo_perturb import zo_perturb_

        zo_perturb_(*args, **named)


class Panel:
    """triton_ops/panel.py: for many rows, dequantise a panel once and let the vendor multiply."""

    name = "panel"
    batch_invariant = False  # the vendor's GEMM depends on M

    def refusal(self, problem: Problem) -> str | None:
        p = problem
        read = p._replace(layout="row") if p.layout == "cuda" else p  # the op dequantises it
        if (reason := Triton().refusal(read)) is not None:
            return reason
        if p.op != "zo_linear" or p.format == "none":
            return f"{p.op} without a weight has no panel" if p.op == "zo_linear" else f"{p.op} has no panel"
        if p.device == "cuda" and "dtype_out" not in torch.ops.aten.mm.overloads():
            return f"torch {torch.__version__} has no product of half precision with fp32 sums (mm with out_dtype)"
        return None

    def cost(self, problem: Problem) -> tuple[float, float]:
        """(flops, bytes): D(W) written and read, and the fp32 sums."""
        p = problem
        flops, moved = _cost(p)
        return (
            flops + _dequantize(p),
            moved + 2.0 * p.dtype.itemsize * p.N * p.K + 8.0 * p.M * p.N,
        )

    def zo_linear(self, *args, **named):
        from .panel import zo_linear

        return zo_linear(*args, **named)
