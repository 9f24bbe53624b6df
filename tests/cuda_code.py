"""csrc/cuda as machine code, without a GPU: built by nvcc, read with nvdisasm, held to limits.

    python tests/cuda_code.py > benchmarks/results/cuda_machine_code.json     all architectures, as setup.py builds them

The K loop of a kernel is the smallest loop that holds its tensor-core instructions and the copies of later stages. Its
instructions are counted as they stand, branches that are hardly ever taken and all.
"""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cuda_lane import CSRC, STEMS, Lane

from zoact_kernels import formats

ROOT = CSRC.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
ARCHS: tuple[str, ...] = tuple(SETUP["CUDA_ARCHS"].split())
TABLE = ROOT / "benchmarks/results/cuda_machine_code.json"
THREADS = 128  # of a block, in every kernel
# Shared memory that a block may have, in KB: CUDA programming guide, table of compute capabilities.
SHARED = {"80": 163, "86": 99, "89": 99, "90a": 227, "100": 227, "120": 99}
MOST_OTHERS = 24  # instructions beside each tensor-core instruction of int4 with 64 rows of x
# kernel -> the most of them where it is more, and why.
EXCEPTIONS = {
    "noise_kernel": (90, "Z is made in the K loop: 250 instructions for four values, twice where rows are not aligned"),
}
WIDE = ("product_kernel", "noise_kernel", "unpack_kernel", "copy_kernel", "update_kernel")


class Code(NamedTuple):
    """What a kernel became."""

    registers: int
    stack: int
    local: int  # loads and stores of local memory (spills)
    shared: int  # bytes, given at launch
    hmma: int  # tensor-core instructions in the K loop
    outside: int  # and outside of it
    others: float  # other instructions of the K loop, for each of them
    wide: int  # copies and loads of 16 bytes in the kernel
    narrow: int  # copies of fewer


def tool(name: str) -> str | None:
    """nvdisasm or cuobjdump, of the toolkit or as Triton brings it along."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(path) if path.exists() else None


def output(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], text=True, capture_output=True, check=True).stdout


def kernel_name(mangled: str) -> str:
    """`product_kernel<bf16, int4, false, 8>`: values of an enum by name."""
    name = output("c++filt", mangled).strip()
    name = re.sub(r"\(zo::Format\)(\d)", lambda m: list(formats.FORMATS)[int(m[1])], name)
    name = re.sub(r"\(zo::Noise\)(\d)", lambda m: ("none", "normal", "rademacher")[int(m[1])], name)
    name = re.sub(r"\(zo::Rule\)(\d)", lambda m: ("sgd", "momentum", "adam", "adamw")[int(m[1])], name)
    name = re.sub(r"zo::|cuda::|_GLOBAL__N_\w*::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\(\w+\)$", "", name)


def k_loop(lines: list[str]) -> list[str]:
    """Of code with labels: the smallest loop that multiplies on tensor cores and copies; [] where none does."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.L\w+):", line))}
    loops = []
    for end, line in enumerate(lines):
        back = re.search(r"\bBRA\b.*?(\.L\w+)", line)
        start = labels.get(back[1], end) if back else end
        inside = lines[start : end + 1]
        if start < end and all(any(op in text for text in inside) for op in ("HMMA", "LDGSTS")):
            loops.append(inside)
    return min(loops, key=len, default=[])


def measure(cubin: Path) -> dict[str, Code]:
    """Each kernel of a cubin; `shared` is not in it."""
    usage = dict(re.findall(r"Function (\w+):\s*(.*)", output(tool("cuobjdump") or "", "-res-usage", cubin)))
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", output(tool("nvdisasm") or "", "-c", cubin), flags=re.MULTILINE)
    found = {}
    for mangled, text in zip(parts[1::2], parts[2::2], strict=True):
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if re.match(r"\.L\w+:|/\*[0-9a-f]{4,}\*/", line)]
        code = [line for line in k_loop(lines) if line.startswith("/*")]
        hmma = sum("HMMA" in line for line in code)
        resources = dict(re.findall(r"(REG|STACK):(\d+)", usage[mangled]))
        copies = re.findall(r"\bLDGSTS\S*", text)
        found[kernel_name(mangled)] = Code(
            int(resources["REG"]), int(resources["STACK"]), len(re.findall(r"\b(?:LDL|STL)\b", text)), 0, hmma,
            len(re.findall(r"\bHMMA\b", text)) - hmma, round(len(code) / hmma - 1, 1) if hmma else 0.0,
            len(re.findall(r"\b(?:LDGSTS|LDG?|STG?)\.\S*128", text)), sum(".128" not in copy for copy in copies),
        )  # fmt: skip
    return found


def build(arch: str, folder: Path, stems: tuple[str, ...] = STEMS, csrc: Path = CSRC) -> dict[str, Code]:
    """The kernels of `stems` for one architecture; a warning of the compiler is an error."""
    found = {}
    for stem in stems:
        cubin = folder / f"{stem}.{arch}.cubin"
        command = ["nvcc", "-cubin", f"-arch=sm_{arch}", *SETUP["CUDA_FLAGS"], str(csrc / f"cuda/{stem}.cu")]
        run = subprocess.run([*command, "-o", str(cubin)], text=True, capture_output=True, check=True)
        assert "warning" not in run.stderr, run.stderr
        found |= measure(cubin)
    return found


def build_all(folder: Path) -> dict[str, dict[str, Code]]:
    """What ships: the library as setup.py builds it, taken apart again; architecture -> kernel -> code."""
    library = folder / "_cuda.so"
    with contextlib.redirect_stdout(sys.stderr):
        SETUP["compile_cuda"](library, folder / "build", "1")
    subprocess.run([str(tool("cuobjdump")), "-xelf", "all", str(library)], cwd=folder, check=True, capture_output=True)
    found: dict[str, dict[str, Code]] = {}
    for cubin in sorted(folder.glob("*.cubin")):
        arch = re.search(r"sm_(\w+)\.cubin$", cubin.name)
        assert arch is not None
        found.setdefault(arch[1], {}).update(measure(cubin))
    return found


def shared_memory(lane: Lane) -> dict[str, int]:
    """Kernel -> the shared memory that its launcher asks for, for all that ask for any: tiny calls in the shim."""
    found = {}
    cases = (
        ("dense", "dense, false", None), ("int8", "int8, false", 64), ("nf4", "nf4, false", 64),
        ("int4", "int4, true", 64), ("int4", "int4, false", 64),
    )  # fmt: skip
    for dtype, T in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        for M, tiles in ((1, 1), (32, 4), (33, 8)):
            x = torch.zeros(M, 64, dtype=dtype)
            for format, arguments, group_size in cases:
                stored = {"dense": dtype, "int8": torch.int8}.get(format, torch.uint8)
                w = torch.zeros(16, 32 if stored == torch.uint8 else 64, dtype=stored)
                scale = None if group_size is None else torch.zeros(16, 1)
                lane.zo_linear(
                    x=x, weight=w, scale=scale, offset=scale if "true" in arguments else None, format=format,
                    group_size=group_size or -1, out_features=16,
                )  # fmt: skip
                (found[f"product_kernel<{T}, {arguments}, {tiles}>"],) = lane.launches()
            for noise in ("normal", "rademacher"):
                for mask in ("none", "random"):
                    lane.zo_dense_linear(
                        x=x, out_features=16, noise=noise, mask=mask, mask_value=torch.zeros(1),
                        mask_seed=torch.zeros(1, dtype=torch.int64), seeds=torch.zeros(1, dtype=torch.int64),
                        sigmas=torch.zeros(1, 1), param_id=torch.zeros(1, dtype=torch.int64),
                    )  # fmt: skip
                    shaped = str(mask != "none").lower()
                    found[f"noise_kernel<{T}, {noise}, {shaped}, {tiles}>"], finish = lane.launches()
            found[f"finish_kernel<{T}, {tiles}>"] = finish
    return found


def faults(kernel: str, code: Code, arch: str) -> list[str]:
    """What of the machine code is not as it has to be."""
    stem = kernel.partition("<")[0]
    multiplies = stem in ("product_kernel", "noise_kernel")
    most = EXCEPTIONS[stem][0] if stem in EXCEPTIONS else MOST_OTHERS
    counted = kernel.endswith(" 8>") and (stem == "noise_kernel" or "int4" in kernel)
    checks = {
        f"stack of {code.stack} bytes": code.stack > 0,
        f"{code.local} accesses to local memory": code.local > 0,
        f"{code.registers} registers": code.registers > (168 if THREADS > 128 else 255),
        f"{code.shared} bytes of shared memory": code.shared > SHARED[arch] * 1024,
        "no tensor-core instruction in the K loop": multiplies and not code.hmma,
        f"{code.outside} of them outside": code.outside > 0,
        f"{code.others} other instructions for each of them": counted and code.others > most,
        "copies of fewer than 16 bytes": code.narrow > 0,
        "no access of 16 bytes": not code.wide and stem in WIDE,
    }
    return [what for what, wrong in checks.items() if wrong]


def compiler() -> str:
    return output("nvcc", "--version").strip().splitlines()[-1]


def table() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        shared, built = shared_memory(Lane(Path(folder))), build_all(Path(folder))
    return dict(
        nvcc=compiler(), threads=THREADS, exceptions=EXCEPTIONS, columns=Code._fields,
        kernels={
            kernel: {arch: built[arch][kernel]._replace(shared=shared.get(kernel, 0)) for arch in ARCHS}
            for kernel in sorted(built[ARCHS[0]])
        },
    )  # fmt: skip


if __name__ == "__main__":
    text = json.dumps(table(), indent=1)
    print(re.sub(r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()), text))  # a row of numbers in a line
