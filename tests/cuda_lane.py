"""csrc/cuda without a GPU: its sources compiled by the host compiler against cuda_shim.h, called through ctypes.

`Lane` is the compiled library in one mode of the shim. Calls take the arguments of reference.py; what a launcher
prepares (tables of pointers, weights in layout `cuda`, a workspace) is prepared here.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from ctypes import c_bool, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_fence import fenced, span
from torch import Tensor

from zoact_kernels import layouts
from zoact_kernels.formats import PackedWeight

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
STEMS = tuple(source.stem for source in sorted((CSRC / "cuda").glob("*.cu")))
FLAGS = (
    "-std=c++17 -O1 -g0 -shared -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
    " -Wno-unused-function"
).split()
SANITIZERS = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all".split()
MODES = tuple(itertools.product(("ascending", "descending", "random"), ("late", "early")))

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
FORMATS = {"dense": 0, "int8": 1, "int4": 2, "nf4": 3, "fp4": 4}
NOISES = {"none": 0, "normal": 1, "rademacher": 2}
MASKS = {"none": 0, "magnitude": 1, "random": 2}
RULES = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 3}
PADDING = {"int4": 8, "nf4": 7, "fp4": 0}
ALIGNED = ("x", "y", "codes", "workspace", "w", "out", "noise_scale")  # fields whose address matters modulo 16
DIRECTION = ("mask_value", "mask_seed", "noise_scale")  # of a dense direction


class Struct(ctypes.Structure):
    """A struct of csrc/cuda/kernels.h; tensors that its pointers point into stay alive with it."""

    def __init__(self, **fields: Any) -> None:
        self.tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        assert fields.keys() == {name for name, _ in self._fields_}, fields.keys() ^ {n for n, _ in self._fields_}
        super().__init__(**{n: v.data_ptr() if isinstance(v, Tensor) else v for n, v in fields.items()})


def struct(name: str, text: str) -> type[Struct]:
    """A Structure from lines `type: names`, in the order of kernels.h."""
    types = {"pointer": c_void_p, "enum": c_int32, "int64": c_int64, "bool": c_bool, "float": c_float}
    fields = []
    for line in text.strip().splitlines():
        kind, _, names = line.partition(":")
        fields += [(field, types[kind.strip()]) for field in names.split()]
    return type(name, (Struct,), {"_fields_": fields})


ZoUpdate = struct(
    "ZoUpdate",
    """
    int64: layers tiles
    pointer: coeffs exp_avgs exp_avg_sqs sizes first_counts first_tiles param_ids seeds weights
    int64: S
    bool: weights_per_layer
    enum: noise rule
    pointer: hyper skip stream
    """,
)
ZoPerturb = struct(
    "ZoPerturb",
    """
    pointer: w
    enum: dtype
    int64: N C w_stride
    pointer: seeds weights
    int64: S
    enum: noise
    pointer: param_id
    int64: row_offset cols
    pointer: basis
    int64: R
    enum: mask
    pointer: mask_value mask_seed noise_scale rounding_seed stream
    """,
)
ZoLinear = struct(
    "ZoLinear",
    """
    pointer: x y
    enum: dtype
    int64: M x_stride
    pointer: codes scale offset nested
    enum: format scale_dtype
    int64: N K group_size
    pointer: bias
    enum: bias_dtype
    pointer: base_basis base_coeff
    int64: base_rank
    pointer: basis
    bool: basis_per_group
    pointer: coeff coeff_groups projected
    int64: R
    pointer: seeds sigmas
    int64: S
    enum: noise
    pointer: param_id
    int64: row_offset cols G
    pointer: workspace stream
    """,
)

ZoDenseLinear = type(
    "ZoDenseLinear",
    (Struct,),
    {"_fields_": [*ZoLinear._fields_, ("mask", c_int32), *((n, c_void_p) for n in DIRECTION)]},
)

Dequantize = struct(
    "Dequantize",
    """
    pointer: codes scale offset nested
    enum: format scale_dtype code_dtype
    int64: N K group_size
    pointer: out
    enum: dtype
    int64: row_start rows
    pointer: stream
    """,
)


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
        self.library = ctypes.CDLL(str(target))
        self.record: Path | None = None  # a folder that takes the calls, for cuda_sanitize_driver.cpp
        self.mode()

    def mode(self, order: str = "ascending", delivery: str = "late") -> Lane:
        self.library.set_mode(("ascending", "descending", "random").index(order), delivery == "early")
        return self

    def launches(self) -> list[int]:
        """Bytes of shared memory of each launch since the last question."""
        shared = (c_int64 * 16)()
        count = self.library.take_launches(shared, len(shared))
        assert count <= len(shared)
        return list(shared)[:count]

    def call(self, name: str, problem: Struct, behind: dict[int, Tensor] | None = None) -> None:
        """Calls the launcher with copies of the problem's tensors between fences.

        `behind`: address -> tensor of copies that tables of pointers lead to.
        """
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        tensors = {field: t for field, t in problem.tensors.items() if t.numel()}
        alignments = ((t, 16 if field in ALIGNED else t.element_size()) for field, t in tensors.items())
        with fenced(alignments) as copies:
            for field, tensor in tensors.items():
                setattr(problem, field, copies[tensor.data_ptr()])
            if self.record:
                record(self.record, name, problem, {copies[t.data_ptr()]: t for t in tensors.values()} | (behind or {}))
            if message := function(ctypes.byref(problem)):
                raise RuntimeError(message.decode())

    def zo_perturb_(
        self, w, seeds, weights, param_id, basis=None, noise_scale=None, mask_value=None, mask_seed=None,
        rounding_seed=None, noise="normal", mask="none", row_offset=0, cols=0,
    ) -> None:  # fmt: skip
        rank = 0 if basis is None else basis.shape[1]
        problem = ZoPerturb(
            w=w, dtype=DTYPES[w.dtype], N=w.shape[0], C=w.shape[1], w_stride=w.stride(0), seeds=seeds, weights=weights,
            S=seeds.numel(), noise=NOISES[noise], param_id=param_id, row_offset=row_offset,
            cols=cols or rank or w.shape[1], basis=basis, R=rank, mask=MASKS[mask], mask_value=mask_value,
            mask_seed=mask_seed, noise_scale=noise_scale, rounding_seed=rounding_seed, stream=None,
        )  # fmt: skip
        self.call("zo_perturb", problem)

    def zo_update_(
        self, coeffs, exp_avgs, exp_avg_sqs, param_ids, seeds, weights, hyper, skip, rule, noise="normal",
        row_offsets=(),
    ) -> None:  # fmt: skip
        offsets = list(row_offsets) or [0] * len(coeffs)
        tiles = list(itertools.accumulate((-(-c.numel() // 512) for c in coeffs), initial=0))

        def table(tensors, copies) -> Tensor | None:
            return torch.tensor([copies.get(t.data_ptr(), 0) for t in tensors]) if tensors else None

        with fenced((t, 16) for t in (*coeffs, *exp_avgs, *exp_avg_sqs)) as copies:
            problem = ZoUpdate(
                layers=len(coeffs), tiles=tiles[-1], coeffs=table(coeffs, copies), exp_avgs=table(exp_avgs, copies),
                exp_avg_sqs=table(exp_avg_sqs, copies), sizes=torch.tensor([c.numel() for c in coeffs]),
                first_counts=torch.tensor([o * c.shape[1] for o, c in zip(offsets, coeffs, strict=True)]),
                first_tiles=torch.tensor(tiles), param_ids=param_ids, seeds=seeds, weights=weights, S=seeds.numel(),
                weights_per_layer=weights.dim() == 2, noise=NOISES[noise], rule=RULES[rule], hyper=hyper, skip=skip,
                stream=None,
            )  # fmt: skip
            behind = {copies[t.data_ptr()]: t for t in (*coeffs, *exp_avgs, *exp_avg_sqs) if t.numel()}
            self.call("zo_update", problem, behind)

    def zo_linear(
        self, x, weight=None, scale=None, offset=None, nested=None, bias=None, base_basis=None, base_coeff=None,
        basis=None, coeff=None, coeff_groups=None, projected=None, seeds=None, sigmas=None, param_id=None,
        format="dense", layout="row", group_size=-1, out_features=0, noise="normal", groups=1, row_offset=0, cols=0,
        dense=None,
    ) -> Tensor:  # fmt: skip
        """`weight` comes in layout `row` and goes in layout `cuda`; rows of x are padded to 16 bytes.

        `dense`: the fields of ZoDenseLinear beyond these, and zo_dense_linear is called.
        """
        M, K = x.shape
        rows = torch.full((M, -(-K // 8) * 8 + 8), float("nan"), dtype=x.dtype)[:, :K]  # what lies behind K is not read
        rows.copy_(x)
        y = torch.full((M, out_features), float("nan"), dtype=x.dtype)
        weight = arranged(weight, format, K)
        rank = projected.shape[-1] if projected is not None else basis.shape[-1] if basis is not None else 0
        fields = dict(
            x=rows, y=y, dtype=DTYPES[x.dtype], M=M, x_stride=rows.stride(0), codes=weight, scale=scale, offset=offset,
            nested=nested, format=FORMATS[format], scale_dtype=0 if scale is None else DTYPES[scale.dtype],
            N=out_features, K=K, group_size=group_size if group_size > 0 else max(K, 1), bias=bias,
            bias_dtype=0 if bias is None else DTYPES[bias.dtype], base_basis=base_basis, base_coeff=base_coeff,
            base_rank=0 if base_basis is None else base_basis.shape[-1], basis=basis,
            basis_per_group=basis is not None and basis.dim() == 3, coeff=coeff, coeff_groups=coeff_groups,
            projected=projected, R=rank, seeds=seeds, sigmas=sigmas, S=0 if seeds is None else seeds.numel(),
            noise=NOISES["none" if seeds is None else noise], param_id=param_id, row_offset=row_offset,
            cols=cols or rank or K, G=groups, workspace=None, stream=None,
        ) | (dense or {})  # fmt: skip
        name, kind = ("zo_linear", ZoLinear) if dense is None else ("zo_dense_linear", ZoDenseLinear)
        size = getattr(self.library, f"{name}_workspace")
        size.restype = c_int64
        room = torch.full((size(ctypes.byref(kind(**fields))),), float("nan"))
        self.call(name, kind(**fields | dict(workspace=room)))
        return y

    def dequantize(self, packed: PackedWeight, out: Tensor, row_start: int = 0) -> None:
        """Rows row_start .. of `packed`, in layout `row`, into out [rows, K]."""
        K, scale = packed.in_features, packed.scale
        weight = arranged(packed.weight, packed.format, K)
        problem = Dequantize(
            codes=weight, scale=scale, offset=packed.offset, nested=packed.nested, format=FORMATS[packed.format],
            scale_dtype=0 if scale is None else DTYPES[scale.dtype], code_dtype=DTYPES.get(packed.weight.dtype, 0),
            N=packed.out_features, K=K, group_size=packed.group_size if packed.group_size > 0 else max(K, 1),
            out=out, dtype=DTYPES[out.dtype], row_start=row_start, rows=out.shape[0], stream=None,
        )  # fmt: skip
        self.call("dequantize", problem)

    def zo_dense_linear(self, mask="none", noise_on="weight", **arguments: Any) -> Tensor:
        assert noise_on == "weight"
        dense = {name: arguments.pop(name, None) for name in DIRECTION} | dict(mask=MASKS[mask])
        return self.zo_linear(**arguments, dense=dense)


def record(folder: Path, name: str, problem: Struct, copies: dict[int, Tensor]) -> None:
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
    """Whether zo_linear.cu has a path for this weight."""
    if packed is None:
        return True
    if packed.format == "dense":
        return K % 8 == 0
    span = packed.group_size if packed.group_size > 0 else K
    return not packed.flat and (span % 32 == 0 or span >= K)
