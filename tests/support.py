"""Which implementation takes what: the table of support.md, from `refusal` alone. `python tests/support.py` writes it.

test_support.py holds dispatch to the committed table: what it promises may not be declined, and what it does not
promise may not be taken unnoticed. That what is taken is computed rightly is for the tests of each op.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES, WEIGHTS, stored, weight_arguments

from zoact_kernels import ops
from zoact_kernels.cuda_ops import Cuda, Gpu
from zoact_kernels.dispatch import IMPLEMENTATIONS, Problem

TABLE = Path(__file__).with_name("support.md")
# Implementation, architecture of the device ("" for the CPU), layout of the weight where it has that.
COLUMNS = (
    ("cpu", "", "cpu"), ("cpu", "", "row"), ("triton", "sm_80", "row"), ("triton", "gfx942", "row"),
    ("panel", "sm_80", "row"), ("panel", "sm_80", "cuda"), ("cuda", "sm_80", "cuda"),
)  # fmt: skip
N, K, R, G, S = 96, 192, 4, 2, 1


class Elsewhere(Gpu):
    """A machine with CUDA kernels for every GPU, whatever was compiled here."""

    def missing(self, arch: str) -> str | None:
        return None


def _linear(weight: str, dtype: torch.dtype, feature: str) -> Problem:
    noisy = feature != "bare"
    basis = torch.zeros(*((G,) if feature == "basis per group" else ()), K, R) if noisy else None
    return ops.linear_problem(
        torch.zeros(2 * G, K, dtype=dtype), bias=None,
        base_basis=torch.zeros(K, 3) if feature == "base" else None,
        base_coeff=torch.zeros(N, 3) if feature == "base" else None,
        basis=None if feature == "projected" else basis,
        projected=torch.zeros(2 * G, R) if feature == "projected" else None,
        coeff=torch.zeros(N, R) if noisy else None,
        coeff_groups=torch.zeros(G, N, R) if feature == "coeff per group" else None,
        **_noise(noisy, "rademacher" if feature == "rademacher" else "normal"),
        **weight_arguments(stored(weight, N, K)), out_features=N, groups=G,
        cols=9 if feature == "a shard" else 0, row_offset=5 if feature == "a shard" else 0,
    )  # fmt: skip


def _dense(weight: str, dtype: torch.dtype, feature: str) -> Problem:
    masked = {"magnitude mask": "magnitude", "random mask": "random"}.get(feature, "none")
    return ops.dense_problem(
        torch.zeros(2 * G, K, dtype=dtype), bias=None, **_noise(True, "normal"),
        noise_scale=torch.zeros(N, K) if feature == "noise_scale" else None,
        mask=masked, mask_value=torch.zeros(1) if masked != "none" else None,
        mask_seed=torch.zeros(1, dtype=torch.int64) if masked == "random" else None,
        noise_on="scale" if feature == "on the scales" else "weight",
        **weight_arguments(stored(weight, N, K)), out_features=N, groups=G,
    )  # fmt: skip


def _noise(noisy: bool, kind: str) -> dict[str, Any]:
    if not noisy:
        return dict(seeds=None, sigmas=None, param_id=None)
    number = torch.zeros(1, dtype=torch.int64)
    return dict(seeds=number, sigmas=torch.zeros(G, S), param_id=number, noise=kind)


def rows() -> Iterator[tuple[tuple[str, str, str, str], Problem]]:
    """((op, weight, dtype, feature), the problem on the CPU in layout row)."""
    for weight, dtype in itertools.product(WEIGHTS, DTYPES):
        yield ("zo_linear", weight, dtype, "low-rank"), _linear(weight, DTYPES[dtype], "low-rank")
    features = ("bare", "rademacher", "base", "projected", "basis per group", "coeff per group", "a shard")
    for feature, dtype in itertools.product(features, DTYPES):
        yield ("zo_linear", "int4-g32", dtype, feature), _linear("int4-g32", DTYPES[dtype], feature)
    for weight, dtype in itertools.product(WEIGHTS, DTYPES):
        yield ("zo_dense_linear", weight, dtype, "dense noise"), _dense(weight, DTYPES[dtype], "")
    for feature, dtype in itertools.product(("magnitude mask", "random mask", "noise_scale", "on the scales"), DTYPES):
        yield ("zo_dense_linear", "int4-g32", dtype, feature), _dense("int4-g32", DTYPES[dtype], feature)
    for rule, noise in itertools.product(ops.RULES, ops.NOISES):
        problem = Problem("zo_update_", "cpu", torch.float32, N=N, rank=1, seeds=1, noise=noise)
        yield ("zo_update_", "", "f32", f"{rule}, {noise}"), problem
    extras: dict[str, dict[str, Any]] = {
        "dense": {}, "basis": {"rank": R}, "magnitude mask": {"features": ("magnitude mask",)},
        "random mask": {"features": ("random mask",)}, "noise_scale": {"features": ("noise_scale",)},
    }  # fmt: skip
    for dtype, noise, (feature, extra) in itertools.product(DTYPES, ops.NOISES, extras.items()):
        problem = Problem("zo_perturb_", "cpu", DTYPES[dtype], N=N, K=K, seeds=1, noise=noise, **extra)
        yield ("zo_perturb_", "", dtype, f"{feature}, {noise}"), problem
    for weight, dtype in itertools.product(WEIGHTS, DTYPES):
        if (packed := stored(weight, N, K)) is not None:
            scale = None if packed.scale is None else packed.scale.dtype
            problem = Problem("dequantize", "cpu", DTYPES[dtype], 0, N, K, packed.format, "row", packed.group_size,
                              packed.weight.dtype, scale)  # fmt: skip
            yield ("dequantize", weight, dtype, ""), problem


def elsewhere(problem: Problem, weight: str, column: tuple[str, str, str]) -> Problem:
    """The problem as a column has it: on its device, the weight in its layout, if it has that there."""
    _, arch, layout = column
    flat = "flat" in weight
    if not weight or flat or problem.format == "none" or (layout == "cuda" and problem.format == "dense"):
        layout = "row"
    return problem._replace(device="cuda" if arch else "cpu", arch=arch, layout=layout)


def answers() -> dict[tuple[str, str, str, str], list[str]]:
    """Of each row, column by column: "yes" or why not."""
    implementations = {i.name: i for i in IMPLEMENTATIONS} | {"cuda": Cuda(Elsewhere())}
    return {
        row: [implementations[c[0]].refusal(elsewhere(problem, row[1], c)) or "yes" for c in COLUMNS]
        for row, problem in rows()
    }


def text() -> str:
    """The table, reasons numbered below it."""
    found = answers()
    reasons = list(dict.fromkeys(a for row in found.values() for a in row if a != "yes"))
    heads = [" ".join(filter(None, (name, arch, f"({layout})"))) for name, arch, layout in COLUMNS]
    lines = [
        "# What each implementation takes",
        "",
        "Written by `python tests/support.py`; a test holds dispatch to it. A column names an implementation, where it "
        "runs, and the layout of",
        "the weight there. The reference takes everything. A number stands for a reason, below.",
        "",
        "| op | weight | x | what | " + " | ".join(heads) + " |",
        "|" + "---|" * (4 + len(COLUMNS)),
    ]
    alike: dict[tuple[str, ...], list[str]] = {}  # rows that differ in the dtype of x alone share a line
    for (op, weight, dtype, feature), cells in found.items():
        numbered = (c if c == "yes" else str(reasons.index(c) + 1) for c in cells)
        alike.setdefault((op, weight, feature, *numbered), []).append(dtype)
    for (op, weight, feature, *numbered), dtypes in alike.items():
        lines.append("| " + " | ".join([op, weight, " ".join(dtypes), feature, *numbered]) + " |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]) + "\n"


if __name__ == "__main__":
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(text(), encoding="utf-8")
    temporary.replace(TABLE)
