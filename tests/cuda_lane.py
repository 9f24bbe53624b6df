"""csrc/cuda without a GPU: its sources compiled by the host compiler against cuda_shim.h, behind cuda_ops.Cuda.

`Lane` is the compiled library in one mode of the shim, and the launcher of the package on it. Calls take the arguments
of reference.py; a weight in layout `row` is brought into layout `cuda`.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import itertools
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_fence import fenced, span
from torch import Tensor

from zoact_kernels import cuda_ops, layouts, reference
from zoact_kernels.dispatch import Problem
from zoact_kernels.formats import FORMATS, PackedWeight

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
STEMS = tuple(source.stem for source in sorted((CSRC / "cuda").glob("*.cu")))
FLAGS = (
    "-std=c++17 -O1 -g0 -shared -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
    " -Wno-unused-function"
).split()
SANITIZERS = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all".split()
MODES = tuple(itertools.product(("ascending", "descending", "random"), ("late", "early")))

PADDING = {name: row.padding for name, row in FORMATS.items() if row.bits == 4}
ALIGNED = ("x", "y", "codes", "workspace", "w", "out", "noise_scale")  # fields whose address matters modulo 16


class Host(cuda_ops.Gpu):
    """The CPU as the device of a launcher, `library` its kernels, which get copies of all tensors between fences."""

    type = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self.kernels = library
        self.is_capturing = False
        self.given: Tensor | None = None  # what the next allocation takes
        self.moved: dict[int, int] = {}  # address in a table of pointers -> that of its copy
        self.behind: dict[int, Tensor] = {}  # address of such a copy -> what it is of
        self.record: Path | None = None  # a folder that takes the calls, for cuda_sanitize_driver.cpp

    def missing(self, arch: str) -> str | None:
        return None

    def library(self) -> ctypes.CDLL:
        return self.kernels

    def guard(self, tensor: Tensor) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def stream(self, device: torch.device) -> int:
        return 0

    def capturing(self) -> bool:
        return self.is_capturing

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.given is not None:
            given, self.given = self.given, None
            assert (given.shape, given.dtype) == (shape, dtype)
            return given
        return torch.full(shape, float("nan"), dtype=dtype)

    def scratch(self, device: torch.device) -> Any:
        return SimpleNamespace(take=lambda *shape, dtype=torch.float32: torch.full(shape, float("nan"), dtype=dtype))

    def call(self, name: str, problem: cuda_ops.Struct) -> None:
        tensors = {field: t for field, t in problem.tensors.items() if t.numel()}
        for field in ("coeffs", "exp_avgs", "exp_avg_sqs"):
            if self.moved and field in tensors:
                tensors[field] = torch.tensor([self.moved.get(where, 0) for where in tensors[field].tolist()])
        alignments = ((t, 16 if field in ALIGNED else t.element_size()) for field, t in tensors.items())
        with fenced(alignments) as copies:
            for field, tensor in tensors.items():
                setattr(problem, field, copies[tensor.data_ptr()])
            if self.record:
                record(self.record, name, problem, {copies[t.data_ptr()]: t for t in tensors.values()} | self.behind)
            super().call(name, problem)


class Lane:
    """The kernels `stems` of `csrc` compiled for the host into `folder`."""

    def __init__(self, folder: Path, csrc: Path = CSRC, stems: tuple[str, ...] = STEMS) -> None:
        compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
        if compiler is None:
            pytest.skip("no C++ compiler (c++, g++, clang++) to compile csrc/cuda for the host")
        target = folder / "lane.so"
        command = [compiler, *FLAGS, f"-I{HERE}"]
        sources = [str(csrc / f"cuda/{stem}.cu") for stem in stems]
        subprocess.run([*command, "-x", "c++", *sources, str(HERE / "cuda_driver.cpp"), "-o", str(target)], check=True)
        self.host = Host(ctypes.CDLL(str(target)))
        self.cuda = cuda_ops.Cuda(self.host)
        self.mode()

    def mode(self, order: str = "ascending", delivery: str = "late") -> Lane:
        self.host.kernels.set_mode(("ascending", "descending", "random").index(order), delivery == "early")
        return self

    def launches(self) -> list[int]:
        """Bytes of shared memory of each launch since the last question."""
        shared = (ctypes.c_int64 * 16)()
        count = self.host.kernels.take_launches(shared, len(shared))
        assert count <= len(shared)
        return list(shared)[:count]

    def zo_perturb_(self, *args: Any, **named: Any) -> None:
        self.cuda.zo_perturb_(*args, **named)

    def zo_update_(self, coeffs, exp_avgs, exp_avg_sqs, *args: Any, **named: Any) -> None:
        states = (*coeffs, *exp_avgs, *exp_avg_sqs)
        with fenced((t, 16) for t in states) as copies:
            self.host.moved = copies
            self.host.behind = {copies[t.data_ptr()]: t for t in states if t.numel()}
            try:
                self.cuda.zo_update_(coeffs, exp_avgs, exp_avg_sqs, *args, **named)
            finally:
                self.host.moved, self.host.behind = {}, {}

    def zo_linear(self, **arguments: Any) -> Tensor:
        return self._product("zo_linear", arguments)

    def zo_dense_linear(self, **arguments: Any) -> Tensor:
        return self._product("zo_dense_linear", arguments)

    def _product(self, op: str, arguments: dict) -> Tensor:
        """The weight comes in layout `row`; x goes in rows on 16 bytes with NaN behind them, where nothing is read."""
        names = inspect.signature(getattr(reference, op)).parameters
        needed = {name: None for name, p in names.items() if p.default is p.empty}
        arguments = needed | dict(format="dense", layout="row", group_size=-1) | arguments
        x = arguments["x"]
        M, K = x.shape
        rows = torch.full((M, -(-K // 8) * 8 + 8), float("nan"), dtype=x.dtype)[:, :K]
        arguments["x"] = rows.copy_(x)
        arguments["weight"] = arranged(arguments["weight"], arguments["format"], K)
        return getattr(self.cuda, op)(**arguments)

    def dequantize(self, packed: PackedWeight, out: Tensor, row_start: int = 0) -> None:
        """Rows row_start .. of `packed`, in layout `row`, into out [rows, K]."""
        K = packed.in_features
        weight = arranged(packed.weight, packed.format, K)
        self.host.given = out
        self.cuda.dequantize(
            weight, packed.scale, packed.offset, packed.nested, packed.format, "cuda", packed.group_size,
            packed.out_features, K, out.dtype, row_start, out.shape[0],
        )  # fmt: skip


def record(folder: Path, name: str, problem: cuda_ops.Struct, copies: dict[int, Tensor]) -> None:
    """Writes a call: its struct, the buffers at the addresses `copies` and where pointers to them are stored."""
    buffers = {address: ctypes.string_at(address, span(tensor)) for address, tensor in copies.items()}
    index = {address: number for number, address in enumerate(buffers)}
    pointers = []
    for where, content in [(-1, bytes(problem)), *enumerate(buffers.values())]:
        for offset in range(0, len(content) - 7, 8):
            target = index.get(int.from_bytes(content[offset : offset + 8], "little"))
            if target is not None:
                pointers.append((where, offset, target))

    def numbers(*values: int) -> bytes:
        return b"".join(value.to_bytes(8, "little", signed=True) for value in values)

    parts = [numbers(len(name)), name.encode(), numbers(len(bytes(problem))), bytes(problem), numbers(len(buffers))]
    for address, content in buffers.items():
        parts += [numbers(address % 16, len(content)), content]
    parts += [numbers(len(pointers)), *(numbers(*pointer) for pointer in pointers)]
    (folder / f"{len(list(folder.iterdir()))}.call").write_bytes(b"".join(parts))


def sanitized(folder: Path, csrc: Path = CSRC) -> Path:
    """The driver of recorded calls, built under sanitizers; skips where the compiler has none."""
    driver = folder / "sanitized"
    sources = [str(source) for source in sorted((csrc / "cuda").glob("*.cu"))]
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-g0")]
    command = ["c++", *flags, *SANITIZERS, f"-I{HERE}", "-x", "c++", *sources, str(HERE / "cuda_sanitize_driver.cpp")]
    run = subprocess.run([*command, "-o", str(driver)], text=True, capture_output=True)
    if run.returncode and "sanitize" in run.stderr:
        pytest.skip("no compiler with AddressSanitizer")
    assert run.returncode == 0, run.stderr
    return driver


def arranged(weight: Tensor | None, format: str, K: int) -> Tensor | None:
    """Codes of layout `row` in layout `cuda`; a dense weight as it is."""
    if weight is None or format == "dense":
        return weight
    return layouts.to_byte_fragments(weight) if format == "int8" else layouts.to_fragments(weight, K, PADDING[format])


def planted(csrc: Path, folder: Path, file: str, text: str, fault: str) -> Path:
    """A copy of `csrc` with the first `text` of `file` replaced."""
    copy = Path(shutil.copytree(csrc, folder / "csrc"))
    source = copy / file
    before = source.read_text()
    assert text in before, f"{file} has no {text!r}"
    source.write_text(before.replace(text, fault, 1))
    return copy


def takes(packed: PackedWeight | None, K: int) -> bool:
    """Whether the kernels take this weight, in the layout that they read."""
    if packed is None:
        return True
    layout = "cuda" if packed.has_layout("cuda") else packed.layout
    dtype = packed.weight.dtype if packed.format == "dense" else torch.float16
    problem = Problem(
        "zo_linear", "cpu", dtype, 1, packed.out_features, K, packed.format, layout, packed.group_size,
        packed.weight.dtype, None if packed.scale is None else packed.scale.dtype,
    )  # fmt: skip
    return cuda_ops.Cuda(Host(ctypes.CDLL(None))).refusal(problem) is None
