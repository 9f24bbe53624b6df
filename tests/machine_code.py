"""Triton kernels compiled without a GPU: the launches of an op recorded, each built for a target, its code read.

A launch is specialised as it is at run time (divisibility by 16 of pointers and sizes, sizes of one, absent tensors),
so what is measured is what ships. Import this only where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from zoact_kernels.formats import expected_shapes
from zoact_kernels.rng import KINDS
from zoact_kernels.triton_ops import Triton, host

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
    """What a kernel became."""

    registers: int
    threads: int
    stack: int
    local: int  # loads and stores of local memory (spills)
    shared: int
    text: str

    def k_loop(self, instruction: str) -> list[str]:
        """The first innermost loop that holds `instruction`; [] if none does. A loop ends in a branch back."""
        lines = self.text.splitlines()
        labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.L\w+):", line.strip()))}
        loops = []
        for end, line in enumerate(lines):
            back = re.search(r"(?:\bBRA\b|\bs_c?branch\w*\b).*?(\.L\w+)", line)
            start = labels.get(back[1], end) if back else end
            if start < end and any(instruction in text for text in lines[start:end]):
                loops.append((start, end))
        inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
        first, last = min(inner, default=(0, 0))
        return lines[first:last]


_OPCODE = re.compile(r"\s*(?:/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)|((?:[vs]|ds|global|buffer)_\w+))")


def opcodes(lines: list[str]) -> list[str]:
    """The instructions of some lines of SASS or of AMD's assembler."""
    return [found[1] or found[2] for found in map(_OPCODE.match, lines) if found]


def per_core(loop: list[str], core: str) -> float:
    """Other instructions for each tensor-core instruction of a loop."""
    found = opcodes(loop)
    cores = sum(name.startswith(core) for name in found)
    return (len(found) - cores) / max(cores, 1)


def wide_loads(loop: list[str]) -> int:
    """Loads of 16 bytes from global memory in a loop, those into shared memory among them."""
    return sum(bool(re.match(r"LDG(STS)?\..*\.128|(global|buffer)_load_dwordx4", name)) for name in opcodes(loop))


@contextlib.contextmanager
def recorded(target: str = "sm_80", tf32: bool = False) -> Iterator[list[Launch]]:
    """Kernels launched inside are written down instead, as they would be on `target`, with torch set to tf32 or not."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = [p.name for p in self.params]
        options = {k: named.pop(k) for k in list(named) if k not in names}
        launches.append(Launch(self, dict(zip(names, args, strict=False)) | named, options))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(host, "arch_of", lambda device: target),
        mock.patch.object(host, "tf32", lambda x: tf32 and x.dtype == torch.float32),
    ):
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


_built: dict[tuple[str, ...], Code] = {}


def build(launch: Launch, name: str) -> Code:
    """The launch compiled for the target `name` of TARGETS; the same launch of another case only once."""
    source = _source(launch)
    key = name, source.hash(), str(launch.options)
    if key not in _built:
        _built[key] = _build(source, launch.options, name)
    return _built[key]


def _build(source: ASTSource, options: dict[str, Any], name: str) -> Code:
    target = TARGETS[name]
    compiled = triton.compile(source, target=target, options=options)
    threads, shared = compiled.metadata.num_warps * target.warp_size, compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def field(key: str) -> int:
            return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])  # type: ignore[index]

        # Scalar registers spill into lanes of vector registers, not into memory.
        stack, spilled = field("private_segment_fixed_size"), field("vgpr_spill_count")
        return Code(field("vgpr_count"), threads, stack, spilled, shared, text)
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


# ---------------------------------------------------------------------------------------------------------------------
# What ships: every kernel in every configuration that the rules of tiles.py pick, on sizes of real layers.

DTYPES = {"f32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
STORED = ("f32", "bf16", "f16")
# name -> format, group_size, dtype of the scales (of the weight, for dense), offset, nested, flat
WEIGHTS: dict[str, tuple[str, int, torch.dtype, bool, bool, bool]] = {
    "int4": ("int4", 64, torch.float16, True, False, False),
    "int4-g32": ("int4", 32, torch.float16, True, False, False),
    "int4-sym": ("int4", 128, torch.float16, False, False, False),
    "int8": ("int8", -1, torch.float32, False, False, False),
    "nf4": ("nf4", 64, torch.float32, False, False, False),
    "nf4-nested": ("nf4", 64, torch.float32, False, True, False),
    "fp4-flat": ("fp4", 96, torch.float32, False, False, True),
    "dense-bf16": ("dense", -1, torch.bfloat16, False, False, False),
    "dense-f32": ("dense", -1, torch.float32, False, False, False),
}


def _weight(name: str, N: int, K: int) -> dict[str, Any]:
    format, group_size, dtype, offset, nested, flat = WEIGHTS[name]
    code, scale = expected_shapes(format, "row", group_size, N, K, flat)
    stored = dtype if format == "dense" else torch.int8 if format == "int8" else torch.uint8

    def scales(there: bool) -> torch.Tensor | None:
        return torch.zeros(scale, dtype=torch.uint8 if nested else dtype) if there else None

    return dict(
        weight=torch.zeros(code, dtype=stored), scale=scales(format != "dense"), offset=scales(offset),
        nested=torch.zeros(300) if nested else None, format=format, layout="row", group_size=group_size, out_features=N,
    )  # fmt: skip


def _seeded(S: int, G: int) -> dict[str, Any]:
    return dict(
        seeds=torch.zeros(S, dtype=torch.int64), sigmas=torch.zeros(G, S), param_id=torch.zeros(1, dtype=torch.int64)
    )


def linear(weight: str, dtype: str, M: int, N: int, noise: str = "normal", R: int = 16) -> None:
    Triton().zo_linear(
        torch.zeros(M, 1024, dtype=DTYPES[dtype]), **_weight(weight, N, 1024), **_seeded(2, 2), bias=torch.zeros(N),
        base_basis=None, base_coeff=None, basis=torch.zeros(1024, R), coeff=torch.zeros(N, R), coeff_groups=None,
        projected=None, noise=noise, groups=2,
    )  # fmt: skip


def dense(weight: str, dtype: str, M: int, noise: str = "normal", mask: str = "none", on: str = "weight") -> None:
    Triton().zo_dense_linear(
        torch.zeros(M, 1024, dtype=DTYPES[dtype]), **_weight(weight, 1024, 1024), **_seeded(2, 2), bias=None,
        noise_scale=None, mask_value=None if mask == "none" else torch.zeros(1),
        mask_seed=torch.zeros(1, dtype=torch.int64) if mask == "random" else None, noise=noise, noise_on=on, mask=mask,
        groups=2,
    )  # fmt: skip


def update(rule: str, noise: str) -> None:
    tensors = [torch.zeros(4096, 16) for _ in range(3)]
    moments = {"sgd": 0, "momentum": 1, "adamw": 2}[rule]
    one = torch.zeros(1, dtype=torch.int64)
    Triton().zo_update_(
        tensors[:1], tensors[1:2] if moments else [], tensors[2:] if moments == 2 else [], one, one, torch.zeros(1),
        torch.zeros(7), torch.zeros(1, dtype=torch.bool), rule, noise,
    )  # fmt: skip


def perturb(dtype: str, noise: str, mask: str = "none", R: int = 0, rounding: bool = False) -> None:
    one = torch.zeros(1, dtype=torch.int64)
    Triton().zo_perturb_(
        torch.zeros(1024, 1024, dtype=DTYPES[dtype]), one, torch.zeros(1), one, torch.zeros(1024, R) if R else None,
        None, None if mask == "none" else torch.zeros(1), one if mask == "random" else None,
        one if rounding else None, noise, mask,
    )  # fmt: skip


def unpack(weight: str, dtype: str) -> None:
    stored = _weight(weight, 1024, 1024)
    Triton().dequantize(**stored, in_features=1024, dtype=DTYPES[dtype])


# N = 8192 leaves K whole, N = 2048 splits it. M: one tile of x of each width; 40 is more than one.
CASES: dict[str, Callable[[], None]] = {
    **{f"linear-{w}-bf16-M16": partial(linear, w, "bf16", 16, 8192) for w in WEIGHTS},
    **{f"linear-{w}-bf16-M64": partial(linear, w, "bf16", 64, 8192) for w in WEIGHTS},
    **{f"linear-int4-{d}-M{M}-split": partial(linear, "int4", d, M, 2048) for d in DTYPES for M in (16, 32, 64)},
    **{f"linear-nf4-{d}-M{M}": partial(linear, "nf4", d, M, 8192, "rademacher", 64) for d in STORED for M in (16, 32)},
    **{f"dense-{w}-bf16-M16": partial(dense, w, "bf16", 16) for w in ("int4", "nf4", "dense-bf16")},
    **{f"dense-int4-{d}-M{M}": partial(dense, "int4", d, M) for d in DTYPES for M in (32, 64)},
    "dense-int4-tf32-M64-rademacher": partial(dense, "int4", "tf32", 64, "rademacher"),
    "dense-int4-f16-M16-rademacher-random": partial(dense, "int4", "f16", 16, "rademacher", "random"),
    "dense-int4-bf16-M16-magnitude": partial(dense, "int4", "bf16", 16, "normal", "magnitude"),
    "dense-int4-bf16-M32-scale": partial(dense, "int4", "bf16", 32, "normal", "none", "scale"),
    "dense-nf4-nested-f16-M16-scale": partial(dense, "nf4-nested", "f16", 16, "rademacher", "none", "scale"),
    **{f"update-{r}-{n}": partial(update, r, n) for r in ("sgd", "momentum", "adamw") for n in KINDS},
    **{f"perturb-{d}-normal": partial(perturb, d, "normal") for d in STORED},
    "perturb-bf16-rademacher-random-rounding": partial(perturb, "bf16", "rademacher", "random", 0, True),
    "perturb-f16-rounding": partial(perturb, "f16", "normal", "none", 0, True),
    "perturb-bf16-basis": partial(perturb, "bf16", "normal", "none", 16, True),
    **{f"dequantize-{w}-bf16": partial(unpack, w, "bf16") for w in WEIGHTS},
}
# What `make test` compiles, for one target.
QUICK = (
    "linear-int4-bf16-M16-split", "linear-nf4-bf16-M64", "linear-int4-f32-M16-split", "dense-int4-bf16-M32",
    "update-adamw-normal", "perturb-bf16-normal", "dequantize-int4-bf16",
)  # fmt: skip


def launches(case: str, target: str) -> list[Launch]:
    with recorded(target, "-tf32-" in case) as found:
        CASES[case]()
    return found


def instruction(kernel: str, target: str) -> str:
    """The tensor-core instruction of a kernel. The left operand of `project` is 16 or 32 ranks, too few for wgmma."""
    return "HMMA" if kernel == "project_kernel" and target.startswith("sm") else TENSOR_CORE[target]


# What the K loop of an int4 product may cost beside a tensor-core instruction of 64 or more rows of x.
BUDGET = {"HMMA": 24, "HGMMA": 64, "UTCHMMA": 64}
# target -> the fault of its int4 products that is known, and why.
EXCEPTIONS = {
    "gfx942": (
        "not all of x and w in 16-byte loads",
        "4 waves are 256 threads: of the 2048 bytes of codes of a step each takes 8, of 16 or 32 rows of x 8 or 16",
    )
}


def faults(case: str, launch: Launch, code: Code, target: str) -> list[str]:
    """What of the machine code is not as it has to be."""
    kernel = launch.kernel.__name__
    core = instruction(kernel, target)
    loop = code.k_loop(core)
    limit = 512 if target == "gfx942" else 168 if code.threads > 128 else 255
    multiplies = kernel in ("product_kernel", "dense_kernel", "project_kernel") and "f32-M" not in case
    multiplies |= kernel in ("product_kernel", "dense_kernel") and "-tf32-M" in case
    byte_codes = "int4" in case or "int8" in case
    packed = byte_codes or "nf4" in case or "fp4" in case
    wide = kernel in ("update_kernel", "perturb_kernel") and target != "gfx942"
    int4 = kernel == "product_kernel" and "int4" in case and "f32-M" not in case
    BN, BM, BK = (launch.arguments.get(name, 0) for name in ("BN", "BM", "BK"))
    loaded = 16 * code.threads * wide_loads(loop)
    # One thread multiplies for all on sm_100, so there the loop has a branch around it.
    blocks = 1 + sum(bool(re.match(r"\.L\w+:", line.strip())) for line in loop[1:])
    checks = {
        f"stack of {code.stack} bytes": code.stack > 0,
        f"{code.local} accesses to local memory": code.local > 0,
        f"{code.registers} registers of {limit}": code.registers > limit,
        f"{code.shared} bytes of shared memory": code.shared > SHARED[target] * 1024,
        f"no {core} in a loop": multiplies and not loop,
        f"{blocks} blocks in the K loop": int4 and core in ("HMMA", "HGMMA") and blocks > 1,
        f"{per_core(loop, core):.1f} instructions beside each {core}": int4 and BM >= 64 and core in BUDGET
        and per_core(loop, core) > BUDGET[core],
        "not all of x and w in 16-byte loads": int4 and loaded < 2 * BM * BK + BN * BK // 2,
        "integers converted to floats in the K loop": kernel == "product_kernel" and byte_codes
        and any(re.search(r"\bI2F|v_cvt_f32_[iu]", line) for line in loop),
        f"{core} of an fp32 x": not multiplies and "f32-M" in case and target != "gfx942" and core in code.text,
        "the weight is no register operand of wgmma": kernel == "product_kernel" and core == "HGMMA" and packed
        and multiplies and not any(re.search(r"HGMMA\S* R\d+, R\d+, gdesc", line) for line in loop),
        "no 16-byte store": wide and not re.search(r"STG\S*\.128", code.text),
        "no 16-byte load": wide and not re.search(r"LDG\S*\.128", code.text),
        "fused multiply and add": launch.options.get("enable_fp_fusion", True),
    }  # fmt: skip
    return [what for what, wrong in checks.items() if wrong]


def unexcused(faults: list[str], target: str) -> list[str]:
    """Those that EXCEPTIONS does not name."""
    return [fault for fault in faults if fault != EXCEPTIONS.get(target, ("",))[0]]


def depths(code: Code) -> set[str]:
    """Depths in k of the tensor-core instructions, where their names tell: a row's bits may not depend on the tile."""
    found = re.findall(r"\bHMMA\.\d\d8(\d+)|HGMMA\.64x\d+x(\d+)|v_mfma_f32_\d+x\d+x(\d+)", code.text)
    return {depth for each in found for depth in each if depth}


if __name__ == "__main__":  # python tests/machine_code.py [target ...] > benchmarks/results/machine_code.json
    table: dict[str, Any] = {"triton": triton.__version__, "cases": {}}
    for target in sys.argv[1:] or TARGETS:
        for case in CASES:
            for launch in launches(case, target):
                code = build(launch, target)
                core = instruction(launch.kernel.__name__, target)
                loop = code.k_loop(core)
                row = dict(
                    registers=code.registers, threads=code.threads, stack=code.stack, local=code.local,
                    shared=code.shared, depth=sorted(depths(code)), instructions_of_k_loop=len(opcodes(loop)),
                    tensor_core_in_k_loop=sum(name.startswith(core) for name in opcodes(loop)),
                    others_per_tensor_core=round(per_core(loop, core), 1), wide_loads_in_k_loop=wide_loads(loop),
                    faults=faults(case, launch, code, target),
                )  # fmt: skip
                table["cases"].setdefault(f"{case} {launch.kernel.__name__}", {})[target] = row
                print(target, case, launch.kernel.__name__, row, file=sys.stderr)
    print(json.dumps(table, indent=1))
