"""Triton kernels compiled without a GPU: the launches of an op recorded, each built for a target, its code read.

A launch is specialised as it is at run time (divisibility by 16 of pointers and sizes, sizes of one, absent tensors),
so what is measured is what ships. Import this only where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# Bytes of shared memory that one program may have: CUDA programming guide, table of compute capabilities; CDNA 3.
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
TENSOR_CORE = {
    "sm_80": "HMMA", "sm_86": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA",
    "gfx942": "v_mfma",
}  # fmt: skip
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


class Code(NamedTuple):
    """What a kernel became. `loops`: instructions of each loop body that multiplies on tensor cores."""

    registers: int
    threads: int
    stack: int
    local: int  # loads and stores of local memory (spills)
    shared: int
    text: str


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels launched inside are written down instead."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = [p.name for p in self.params]
        options = {k: named.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in named}
        launches.append(Launch(self, dict(zip(names, args, strict=False)) | named, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def _source(launch: Launch) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(launch.kernel.params):
        value = launch.arguments[p.name]
        if p.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not isinstance(value, bool)):
            signature[p.name], constants[(i,)] = "constexpr", value
            continue
        divisible = False
        if isinstance(value, torch.Tensor):
            signature[p.name], divisible = _TYPES[value.dtype], value.data_ptr() % 16 == 0
        else:
            signature[p.name], divisible = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def build(launch: Launch, name: str) -> Code:
    """The launch compiled for the target `name` of TARGETS."""
    target = TARGETS[name]
    compiled = triton.compile(_source(launch), target=target, options=launch.options)
    threads, shared = compiled.metadata.num_warps * target.warp_size, compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def field(key: str) -> int:
            return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])  # type: ignore[index]

        spilled = field("vgpr_spill_count") + field("sgpr_spill_count")
        return Code(field("vgpr_count"), threads, field("private_segment_fixed_size"), spilled, shared, text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])

        def tool(*command: str) -> str:
            return subprocess.run(
                [TOOLS / command[0], *command[1:], path], check=True, capture_output=True, text=True
            ).stdout

        usage = tool("cuobjdump", "-res-usage")
        text = tool("nvdisasm", "-c")
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return Code(
        int(found["REG"]), threads, int(found["STACK"]), len(re.findall(r"\b(?:LDL|STL)\b", text)), shared, text
    )
