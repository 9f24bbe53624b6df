"""The case table: which products are timed. A case is a row, never a script."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# name -> (out_features, in_features): layers of real models, one ideal shape, two awkward ones.
SHAPES = {
    "smollm2-135m.q_proj": (576, 576),
    "smollm2-135m.k_proj": (192, 576),
    "smollm2-135m.up_proj": (1536, 576),
    "smollm2-135m.down_proj": (576, 1536),
    "llama-3.2-1b.q_proj": (2048, 2048),
    "llama-3.2-1b.up_proj": (8192, 2048),
    "llama-3.2-1b.down_proj": (2048, 8192),
    "llama-3-8b.q_proj": (4096, 4096),
    "llama-3-8b.up_proj": (14336, 4096),
    "llama-3-8b.down_proj": (4096, 14336),
    "awkward.prime": (1021, 1009),
    "awkward.thin": (7, 4097),
}
IDEAL = "llama-3-8b.q_proj"

ROWS = (1, 2, 8, 32, 128, 512, 2048)
FORMATS = ("int4", "nf4", "int8", "dense")
RANKS = (0, 1, 8, 64)
GROUPS = (1, 2, 8)
LAYERS = 210  # of the model that zo_update_ updates in one call: those of SmolLM2-135M


@dataclass(frozen=True)
class Case:
    """One timed call of an op: M rows in all, in `groups` row groups, over a [N, K] weight.

    zo_perturb_ and dequantize have no rows (M = 0); zo_update_ takes LAYERS coefficients [N, rank] with Adam's moments.
    residency: "cache", one weight called again and again; "rotating", a ring of weights of at least 300 MB, so that
    each call reads its weight from memory. dtype: of x, y and the scales of int4 and int8; A and C are fp32 to our op.
    """

    shape: str
    M: int
    format: str = "int4"
    group_size: int = 64
    rank: int = 8
    groups: int = 2
    residency: str = "cache"
    threads: int = 1
    op: str = "zo_linear"
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def N(self) -> int:
        return SHAPES[self.shape][0]

    @property
    def K(self) -> int:
        return SHAPES[self.shape][1]

    @property
    def flops(self) -> float:
        """Multiply-adds of the base product, of h = x A and of h (C + sigma Z)^T, times two; 0 without rows."""
        return 2.0 * self.M * (self.N * self.K + self.rank * (self.K + 2 * self.N))

    @property
    def packed_bytes(self) -> float:
        """Of codes and scales, which a call has to read once."""
        bits = {"int4": 4, "nf4": 4, "int8": 8, "dense": 8 * self.itemsize}[self.format]
        scales = 0 if self.format == "dense" else 32 if self.format == "nf4" else 8 * self.itemsize
        return self.N * self.K * (bits + scales / self.group_size) / 8

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x."""
        return 4 if self.dtype == "float32" else 2

    @property
    def bytes(self) -> float:
        """Packed weight, x, y, A and C, once each; what an op without rows reads and writes."""
        if self.op == "zo_update_":
            return 6.0 * 4 * LAYERS * self.N * self.rank
        if self.op == "zo_perturb_":
            return 2.0 * self.packed_bytes
        if self.op == "dequantize":
            return self.packed_bytes + self.itemsize * self.N * self.K
        return self.packed_bytes + (self.itemsize * self.M + 4.0 * self.rank) * (self.N + self.K)

    def __str__(self) -> str:
        op = "" if self.op == "zo_linear" else f"{self.op} "
        rows = f" M={self.M} R={self.rank} G={self.groups}" if self.M else f" R={self.rank}" if self.rank else ""
        threads = "" if self.threads == 1 else f" threads={self.threads}"
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{op}{self.shape} {self.format}{rows}{dtype} {self.residency}{threads}"


def full() -> Iterator[Case]:
    """Every combination, groups only where they divide M."""
    for shape, format, rank, groups, M in itertools.product(SHAPES, FORMATS, RANKS, GROUPS, ROWS):
        if M % groups == 0 and (rank or groups == 1):
            yield Case(shape, M, format, rank=rank, groups=groups)
            if M <= 8:
                yield Case(shape, M, format, rank=rank, groups=groups, residency="rotating")


def table() -> Iterator[Case]:
    """A cover of `full`: every pair of values of any two columns occurs in some case, the largest products left out."""
    cases = [case for case in full() if case.flops < 3e10]
    columns = ("shape", "M", "format", "rank", "groups", "residency")
    pairs = {
        case: [(a, b, getattr(case, a), getattr(case, b)) for a, b in itertools.combinations(columns, 2)]
        for case in cases
    }
    missing = set(itertools.chain.from_iterable(pairs.values()))
    while missing:
        case = max(cases, key=lambda case: sum(pair in missing for pair in pairs[case]))
        missing.difference_update(pairs[case])
        yield case


def updates() -> Iterator[Case]:
    """The ops beside zo_linear: dense noise, in-place noise, the update of a whole model, decoding."""
    for M in (2, 32, 512):
        yield Case(IDEAL, M, "dense", rank=0, op="zo_dense_linear")
    yield Case(IDEAL, 32, "int4", rank=0, op="zo_dense_linear")
    for shape in (IDEAL, "smollm2-135m.up_proj"):
        yield Case(shape, 0, "dense", rank=0, op="zo_perturb_")
        for format in ("int4", "nf4"):
            yield Case(shape, 0, format, rank=0, op="dequantize")
    for rank in (1, 8):
        yield Case("smollm2-135m.up_proj", 0, "dense", rank=rank, op="zo_update_")


def targets() -> Iterator[Case]:
    """The cases that the claims in the README are about: one ideal shape, the ZO linear and the bare product."""
    for M in ROWS:
        groups = 2 if M > 1 else 1
        yield Case(IDEAL, M, "int4", rank=8, groups=groups)
        yield Case(IDEAL, M, "int4", rank=0, groups=1)
        if M <= 8:
            yield Case(IDEAL, M, "int4", rank=8, groups=groups, residency="rotating")
            yield Case(IDEAL, M, "int4", rank=0, groups=1, residency="rotating")
        yield Case(IDEAL, M, "nf4", rank=0, groups=1)
    yield from updates()


def smoke() -> Iterator[Case]:
    """Seconds: shows that the harness works."""
    for M in (1, 8, 64):
        yield Case("smollm2-135m.up_proj", M, "int4", groups=2 if M > 1 else 1)
    yield Case("smollm2-135m.down_proj", 8, "nf4")
    yield Case("awkward.prime", 8, "int8")
    yield Case("awkward.thin", 2, "dense")
    yield Case("smollm2-135m.k_proj", 4, "dense", rank=0, op="zo_dense_linear")
    yield Case("smollm2-135m.k_proj", 0, "dense", rank=0, op="zo_perturb_")
    yield Case("smollm2-135m.k_proj", 0, "nf4", rank=0, op="dequantize")
    yield Case("smollm2-135m.k_proj", 0, "dense", rank=1, op="zo_update_")


def quick() -> Iterator[Case]:
    """Minutes: the demo model's layers and the ideal shape."""
    for shape in ("smollm2-135m.q_proj", "smollm2-135m.up_proj", "smollm2-135m.down_proj", IDEAL):
        for M in (1, 8, 128, 512):
            yield Case(shape, M, "int4", rank=1 if shape != IDEAL else 8, groups=2 if M > 1 else 1)


def scaling() -> Iterator[Case]:
    """One thread against two; only an idle machine says anything here."""
    for M in (32, 128, 512):
        for threads in (1, 2):
            yield Case(IDEAL, M, "int4", rank=8, groups=2, threads=threads)


GPU_SHAPES = (IDEAL, "llama-3-8b.up_proj", "llama-3-8b.down_proj", "llama-3.2-1b.down_proj")
GPU_ROWS = (1, 2, 8, 16, 32, 128, 512, 4096)


def gpu_case(shape: str, M: int, **changes: Any) -> Case:
    """zo_linear with + and - stacked. Weights come from memory; with 4096 rows the products take a hundred times longer
    than reading them, and a ring of them would take minutes."""
    residency = "rotating" if M < 4096 else "cache"
    return Case(shape, M, groups=2 if M > 1 else 1, residency=residency, **{"dtype": "bfloat16", **changes})


def gpu_updates(dtype: str) -> Iterator[Case]:
    """The ops beside zo_linear, at the dtype of a GPU run."""
    for M in (2, 32, 512):
        for format in ("dense", "int4"):
            yield Case(IDEAL, M, format, rank=0, residency="rotating", op="zo_dense_linear", dtype=dtype)
    yield Case(IDEAL, 0, "dense", rank=0, residency="rotating", op="zo_perturb_", dtype=dtype)
    for format in ("int4", "nf4"):
        yield Case(IDEAL, 0, format, rank=0, residency="rotating", op="dequantize", dtype=dtype)
    for rank in (1, 8):
        yield Case("llama-3.2-1b.up_proj", 0, "dense", rank=rank, op="zo_update_")


PROFILES = {
    "smoke": smoke,
    "quick": quick,
    "targets": targets,
    "updates": updates,
    "scaling": scaling,
    "table": table,
    "full": full,
}
