"""The grid of cases of the linear ops, and a cover of it: every pair of values of any two columns occurs in some case.

`make test` runs the cover, `make soak` the grid. A case is a NamedTuple of plain values, so its id says what it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoact_kernels import native
from zoact_kernels.formats import PackedWeight
from zoact_kernels.quantize import quantize

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# name -> format, group_size, dtype of the scales (of the weight, for dense) and what is special about it
WEIGHTS: dict[str, tuple[str, int, torch.dtype, str]] = {
    "int4-g32": ("int4", 32, F16, ""),
    "int4-g64-sym": ("int4", 64, F32, "symmetric"),
    "int4-g40-bf16": ("int4", 40, BF16, ""),
    "int4-row-f32": ("int4", -1, F32, ""),
    "int8-g32": ("int8", 32, F16, ""),
    "int8-row": ("int8", -1, F32, ""),
    "nf4-g64": ("nf4", 64, F32, ""),
    "nf4-g64-nested": ("nf4", 64, F32, "nested"),
    "nf4-g64-flat": ("nf4", 64, F32, "flat"),
    "fp4-g128-nested-flat": ("fp4", 128, F32, "nested flat"),
    "fp4-g96": ("fp4", 96, F16, ""),
    "dense-f32": ("dense", -1, F32, ""),
    "dense-bf16": ("dense", -1, BF16, ""),
    "dense-f16": ("dense", -1, F16, ""),
    "none": ("dense", -1, F32, "absent"),
}
DTYPES = {"f32": F32, "bf16": BF16, "f16": F16}
SHAPES = ((5, 1), (16, 64), (33, 100), (61, 480), (64, 63), (65, 130), (130, 257), (200, 72))  # (N, K): nothing divides
ROWS = (1, 2, 3, 7, 13)  # of a row group: M is this times G

LINEAR: dict[str, Sequence[Any]] = {
    "weight": tuple(WEIGHTS),
    "rank": (0, 1, 3, 4, 16, 64),
    "groups": (1, 2, 5),
    "shape": SHAPES,
    "dtype": tuple(DTYPES),
    "rows": ROWS,
    "bias": ("none", "f32", "same"),
    "seeds": (0, 1, 3),
    "noise": ("normal", "rademacher"),
    "basis": ("shared", "per-group", "projected"),
    "coeff": ("none", "shared", "groups", "both"),
    "base_rank": (0, 5),
    "row_offset": (0, 70),
}
DENSE: dict[str, Sequence[Any]] = {
    "weight": tuple(WEIGHTS),
    "groups": (1, 2, 5),
    "shape": SHAPES,
    "dtype": tuple(DTYPES),
    "rows": ROWS,
    "bias": ("none", "f32", "same"),
    "seeds": (0, 1, 3),
    "noise": ("normal", "rademacher"),
    "mask": ("none", "magnitude", "random"),
    "noise_scale": (False, True),
    "clean_group": (False, True),
    "row_offset": (0, 70),
}
# What `make soak` takes in full; the other columns take their values in turn.
LINEAR_SOAK = ("weight", "rank", "groups", "shape", "dtype")
DENSE_SOAK = ("weight", "groups", "shape", "dtype", "mask")


class Case(NamedTuple):
    """One row of a grid, by column name."""

    values: tuple[tuple[str, Any], ...]

    def __getattr__(self, name: str) -> Any:
        for key, value in self.values:
            if key == name:
                return value
        raise AttributeError(name)

    def __str__(self) -> str:
        named = dict(self.values)
        N, K = named.pop("shape")
        rows, groups = named.pop("rows"), named.pop("groups")
        words = [f"M{rows * groups}-N{N}-K{K}-G{groups}", f"{named.pop('weight')}"]
        for name, value in named.items():
            if value not in ("none", False) and not (value == 0 and name in ("row_offset", "base_rank")):
                words.append(value if isinstance(value, str) else f"{name}{int(value)}")
        return "-".join(words)


def cover(grid: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Few rows in which every pair of values of any two columns occurs: greedy, always the same ones."""
    names = list(grid)
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(grid[names[a]]))
        for j in range(len(grid[names[b]]))
    }
    cases = []
    while left:
        row = dict(min(left))
        for column in sorted(set(range(len(names))) - set(row), key=lambda c: (-len(grid[names[c]]), c)):

            def gain(i: int, column: int = column, row: dict = row, left: set = left) -> int:
                pairs = (tuple(sorted(((column, i), other))) for other in row.items())
                return sum(pair in left for pair in pairs)

            choices = range(len(grid[names[column]]))
            row[column] = max(choices, key=lambda i: (gain(i), -((i - len(cases)) % len(choices))))
        left -= {tuple(sorted(pair)) for pair in itertools.combinations(row.items(), 2)}
        cases.append(Case(tuple((names[c], grid[names[c]][row[c]]) for c in range(len(names)))))
    return cases


def full(grid: Mapping[str, Sequence[Any]], crossed: Sequence[str]) -> Iterator[Case]:
    """Every combination of the columns `crossed`; the others walk through their values at different paces."""
    rest = [name for name in grid if name not in crossed]
    for count, values in enumerate(itertools.product(*(grid[name] for name in crossed))):
        row = dict(zip(crossed, values, strict=True))
        for pace, name in enumerate(rest):
            row[name] = grid[name][(count * (2 * pace + 1) + count // 7 ** (pace % 4)) % len(grid[name])]
        yield Case(tuple((name, row[name]) for name in grid))


def check_grid(check: Callable[[Case], None], grid: Mapping[str, Sequence[Any]], crossed: Sequence[str]) -> None:
    """`check` every case of the full grid; the one at fault is named."""
    for case in full(grid, crossed):
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(str(case)) from error


def stored(name: str, N: int, K: int) -> PackedWeight | None:
    """The weight `name` of WEIGHTS in layout `row`, of about unit variance over K; None for W = 0."""
    format, group_size, dtype, special = WEIGHTS[name]
    if "absent" in special:
        return None
    w = torch.randn(N, K) / K**0.5 + 0.2 / K**0.5
    if format == "dense":
        return quantize(w.to(dtype), format)
    flat = "flat" in special
    packed = quantize(w, format, group_size, "minmax", scale_dtype=dtype, symmetric="symmetric" in special, flat=flat)
    return nested(packed) if "nested" in special else packed


def nested(packed: PackedWeight) -> PackedWeight:
    """The same codes with scales in 8 bits, as bitsandbytes keeps them: code[i] * absmax[block of 256] + offset."""
    assert packed.scale is not None
    flat = packed.scale.flatten().float()
    code = torch.linspace(-1, 1, 256)
    offset = flat.mean()
    blocks = torch.split(flat - offset, 256)
    absmax = torch.stack([block.abs().max().clamp(min=1e-6) for block in blocks])
    indices = [
        (block / a * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        for block, a in zip(blocks, absmax, strict=True)
    ]
    return PackedWeight(
        packed.format, packed.layout, packed.group_size, packed.out_features, packed.in_features, packed.weight,
        torch.cat(indices).view(packed.scale.shape), None, torch.cat([code, offset.view(1), absmax]),
    )  # fmt: skip


def layouts(packed: PackedWeight | None) -> list[PackedWeight | None]:
    """The weight in each layout that it has."""
    if packed is None or packed.flat:
        return [packed]
    return [packed, packed.to_layout("cpu")]


def weight_arguments(packed: PackedWeight | None) -> dict[str, Any]:
    """The arguments of an op that describe the weight."""
    if packed is None:
        return dict(weight=None, scale=None, offset=None, nested=None, format="dense", layout="row", group_size=-1)
    return dict(
        weight=packed.weight, scale=packed.scale, offset=packed.offset, nested=packed.nested,
        format=packed.format, layout=packed.layout, group_size=packed.group_size,
    )  # fmt: skip


def alike_isas(format: str) -> list[str]:
    """Those of this CPU whose products agree bit for bit: base has no fma, avx512vnni an int4 of its own."""
    return [isa for isa in native.isas() if isa != "base" and not (isa == "avx512vnni" and format == "int4")]


def activations(M: int, K: int, dtype: torch.dtype) -> Tensor:
    """x [M, K] with a mean of 3, where uncentred codes lose digits (law 2.3)."""
    return (torch.randn(M, K) + 3).to(dtype)


def bias_of(kind: str, N: int, dtype: torch.dtype) -> Tensor | None:
    return None if kind == "none" else torch.randn(N).to(F32 if kind == "f32" else dtype)


def linear_arguments(case: Case) -> dict[str, Any]:
    """The arguments of a zo_linear call, weight in layout `row`."""
    (N, K), G, R = case.shape, case.groups, case.rank
    M, dtype = case.rows * G, DTYPES[case.dtype]
    packed = stored(case.weight, N, K)
    some = R > 0
    S = case.seeds if some else 0
    per_group = some and case.basis == "per-group"
    return dict(
        x=activations(M, K, dtype),
        **weight_arguments(packed),
        out_features=N,
        bias=bias_of(case.bias, N, dtype),
        base_basis=torch.randn(K, case.base_rank) / K**0.5 if case.base_rank else None,
        base_coeff=torch.randn(N, case.base_rank) if case.base_rank else None,
        basis=torch.randn(*((G,) if per_group else ()), K, R) / K**0.5 if some and case.basis != "projected" else None,
        projected=torch.randn(M, R) if some and case.basis == "projected" else None,
        coeff=torch.randn(N, R) if some and case.coeff in ("shared", "both") else None,
        coeff_groups=torch.randn(G, N, R) if some and case.coeff in ("groups", "both") else None,
        seeds=torch.randint(-(2**63), 2**63 - 1, (S,)) if S else None,
        sigmas=torch.randn(G, S) if S else None,
        param_id=torch.tensor([0xDEADBEEF]) if S else None,
        noise=case.noise,
        groups=G,
        row_offset=case.row_offset,
    )


def dense_arguments(case: Case) -> dict[str, Any]:
    """The arguments of a zo_dense_linear call, weight in layout `row`."""
    (N, K), G, S = case.shape, case.groups, case.seeds
    dtype, mask = DTYPES[case.dtype], case.mask
    packed = stored(case.weight, N, K)
    sigmas = torch.randn(G, S) if S else None
    if sigmas is not None and case.clean_group:
        sigmas[0] = 0
    return dict(
        x=activations(case.rows * G, K, dtype),
        **weight_arguments(packed),
        out_features=N,
        bias=bias_of(case.bias, N, dtype),
        seeds=torch.randint(-(2**63), 2**63 - 1, (S,)) if S else None,
        sigmas=sigmas,
        param_id=torch.tensor([0xDEADBEEF]),
        noise_scale=torch.rand(N, K) if case.noise_scale else None,
        mask=mask,
        mask_value=None if mask == "none" else torch.tensor([0.3 / (1 if mask == "random" else K**0.5)]),
        mask_seed=torch.tensor([-5]) if mask == "random" else None,
        noise=case.noise,
        groups=G,
        row_offset=case.row_offset,
    )
