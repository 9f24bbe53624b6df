"""csrc/cuda without a GPU: its sources compiled by the host compiler against cuda_shim.h, behind cuda_ops.Cuda.

`Lane` is the compiled library in one mode of the shim, and the launcher of the package on it. Calls take the arguments
of reference.py; a weight in layout `row` is brought into layout `cuda`.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import itertools
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
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
MODES = tuple(itertools.product(("ascending", "descending", "random"), ("late", "early")))

PADDING = {name: row.padding for name, row in FORMATS.items() if row.bits == 4}
FENCE = 64  # elements of NaN on either side of what a launcher allocates


class Host(cuda_ops.Gpu):
    """The CPU as the device of a launcher, `library` its kernels. What the launcher allocates lies between fences."""

    type = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self.kernels = library
        self.is_capturing = False
        self.rooms: list[tuple[Tensor, int]] = []
        self.given: Tensor | None = None  # what the next allocation takes

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
        count = math.prod(shape)
        room = torch.full((count + 2 * FENCE,), float("nan"), dtype=dtype)
        self.rooms.append((room, count))
        assert room.data_ptr() % 16 == 0
        return room[FENCE : FENCE + count].view(shape)

    def check_fences(self) -> None:
        for room, count in self.rooms:
            assert room[:FENCE].isnan().all(), "a write before an allocation"
            assert room[FENCE + count :].isnan().all(), "a write behind an allocation"
        self.rooms.clear()


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

    def zo_perturb_(self, *args: Any, **named: Any) -> None:
        self.cuda.zo_perturb_(*args, **named)
        self.host.check_fences()

    def zo_update_(self, *args: Any, **named: Any) -> None:
        self.cuda.zo_update_(*args, **named)
        self.host.check_fences()

    def zo_linear(self, **arguments: Any) -> Tensor:
        return self._product("zo_linear", arguments)

    def zo_dense_linear(self, **arguments: Any) -> Tensor:
        return self._product("zo_dense_linear", arguments)

    def _product(self, op: str, arguments: dict) -> Tensor:
        """The weight comes in layout `row`; x in rows on 16 bytes with NaN behind them, where nothing may be read."""
        names = inspect.signature(getattr(reference, op)).parameters
        needed = {name: None for name, p in names.items() if p.default is p.empty}
        arguments = needed | dict(format="dense", layout="row", group_size=-1) | arguments
        x, format = arguments["x"], arguments["format"]
        M, K = x.shape
        rows = torch.full((M, -(-K // 8) * 8 + 8), float("nan"), dtype=x.dtype)
        rows[:, :K] = x
        if format in PADDING and arguments["weight"] is not None:
            fragments = layouts.to_fragments(arguments["weight"], K, PADDING[format])
            arguments |= dict(weight=fragments, layout="cuda")
        y = getattr(self.cuda, op)(**arguments | dict(x=rows[:, :K]))
        self.host.check_fences()
        return y

    def dequantize(self, packed: PackedWeight, out: Tensor, row_start: int = 0) -> None:
        """Rows row_start .. of `packed`, in layout `row`, into out [rows, K]."""
        K, weight = packed.in_features, packed.weight
        if packed.format in PADDING:
            weight = layouts.to_fragments(weight, K, PADDING[packed.format])
        self.host.given = out
        self.cuda.dequantize(
            weight, packed.scale, packed.offset, packed.nested, packed.format, "cuda", packed.group_size,
            packed.out_features, K, out.dtype, row_start, out.shape[0],
        )  # fmt: skip


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
    layout = "cuda" if packed.format in PADDING and not packed.flat else packed.layout
    dtype = packed.weight.dtype if packed.format == "dense" else torch.float16
    problem = Problem(
        "zo_linear", "cpu", dtype, 1, packed.out_features, K, packed.format, layout, packed.group_size,
        packed.weight.dtype, None if packed.scale is None else packed.scale.dtype,
    )  # fmt: skip
    return cuda_ops.Cuda(Host(ctypes.CDLL(None))).refusal(problem) is None
