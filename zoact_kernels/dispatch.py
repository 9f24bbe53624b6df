"""Which code runs: `choose(problem)`, a pure function of the problem (sizes, dtypes, format, features).

Each implementation either takes a problem or says why not; among those that take it the lowest modelled cost wins.
`explain` tells all of it, `using` forces one, and a forced implementation that declines raises (design law 2.7).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from . import reference
from .cpu_ops import Cpu
from .cuda_ops import Cuda
from .triton_ops import Panel, Triton
from .triton_ops.host import arch_of as arch_of


class Problem(NamedTuple):
    """Everything dispatch may look at. `features` names the optional parts of a call that an implementation may lack"""

    op: str
    device: str  # type only: "cpu", "cuda"
    dtype: torch.dtype  # of x, w or the coefficients
    M: int = 0
    N: int = 0
    K: int = 0
    format: str = "dense"
    layout: str = "row"
    group_size: int = -1
    code_dtype: torch.dtype = torch.float32
    scale_dtype: torch.dtype | None = None
    rank: int = 0
    base_rank: int = 0
    groups: int = 1
    seeds: int = 0
    noise: str = "none"
    features: tuple[str, ...] = ()
    arch: str = ""  # of a "cuda" device: "sm_90", "gfx942"; "" elsewhere, or where torch sees no such device
    tf32: bool = False  # x . W^T of an fp32 x on "cuda" in tf32, since torch is set to that; never anything with noise


class Implementation(Protocol):
    """One way to run the ops. Its op functions take the arguments of the schema, checked."""

    name: str
    batch_invariant: bool  # law 2.4: a row's bits depend on the row and the layer alone

    def refusal(self, problem: Problem) -> str | None: ...

    def cost(self, problem: Problem) -> tuple[float, float]: ...


class Reference:
    """The specification itself, as the implementation of last resort."""

    name = "reference"
    batch_invariant = False  # its matrix products are the vendor's

    zo_linear = staticmethod(reference.zo_linear)
    zo_dense_linear = staticmethod(reference.zo_dense_linear)
    zo_update_ = staticmethod(reference.zo_update_)
    zo_perturb_ = staticmethod(reference.zo_perturb_)
    dequantize = staticmethod(reference.dequantize)

    def refusal(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> tuple[float, float]:
        """(flops, bytes): the kernels' work, and D(W) and every Z written and read once more. Its products are fp32,
        which the tensor cores behind ROOF["cuda"] do not do: an A100 then has a sixteenth of its half precision."""
        p = problem
        flops = 2.0 * p.M * p.N * p.K + 2.0 * p.M * p.rank * (p.N + p.K) * p.groups
        flops *= 16 if p.device == "cuda" else 1
        return flops, 4.0 * (5 * p.N * p.K + p.M * (p.N + p.K) + 40.0 * p.seeds * p.N * max(p.rank, 1))


# Of equal costs the first wins.
IMPLEMENTATIONS: tuple[Implementation, ...] = (Cuda(), Triton(), Panel(), Cpu(), Reference())


class Roof(NamedTuple):
    """What a device can reach: dense products with fp32 sums, by the type of their operands, and memory."""

    half: float  # flop/s of bf16 and fp16
    tf32: float
    fp32: float
    memory: float  # bytes/s


# They turn a modelled cost into seconds; only ratios between implementations on one device matter. "cpu": one core of
# the machine in benchmarks/results. GPUs: data sheets and architecture white papers of NVIDIA and AMD, no sparsity.
ROOF = {
    "cpu": Roof(1.2e11, 1.2e11, 1.2e11, 1.2e10),
    "sm_80": Roof(312e12, 156e12, 19.5e12, 2.04e12),  # A100 80 GB SXM
    "sm_86": Roof(125e12, 62.5e12, 31.2e12, 0.60e12),  # A10
    "sm_89": Roof(165e12, 82.6e12, 82.6e12, 1.01e12),  # RTX 4090; L40S: 362, 183, 91.6 and 0.86
    "sm_90": Roof(989e12, 495e12, 67e12, 3.35e12),  # H100 SXM
    "sm_100": Roof(2250e12, 1125e12, 75e12, 8.0e12),  # B200
    "sm_120": Roof(209e12, 105e12, 105e12, 1.79e12),  # RTX 5090
    "gfx942": Roof(1307e12, 654e12, 163e12, 5.3e12),  # MI300X
}

# (names, op): which implementations run an op, or with op "" every op.
_forced: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("zoact_forced", default=None)


@contextlib.contextmanager
def using(name: str, isa: str | None = None, op: str = "") -> Iterator[None]:
    """Run every op inside the block, or only `op`, by the implementation `name`; `isa` picks a CPU instruction set.

    Of several names, "cuda,triton", the first that takes a problem runs it: which one that is depends on the layer,
    never on the number of rows.

    Raises:
        ValueError: no such implementation or op, or this machine has no such instruction set.
    """
    names = [i.name for i in IMPLEMENTATIONS]
    if not set(name.split(",")) <= set(names):
        raise ValueError(f"`name` is {name!r}; implementations are {', '.join(names)}")
    if isa is not None and "cpu" not in name.split(","):
        raise ValueError(f"`isa` is {isa!r}, but only the implementation 'cpu' has instruction sets")
    if op and not hasattr(Reference, op):
        raise ValueError(f"`op` is {op!r}; it may be one of torch.ops.zoact, as in 'zo_linear'")
    token = _forced.set((name, op))
    try:
        with Cpu.force_isa(isa) if isa else contextlib.nullcontext():
            yield
    finally:
        _forced.reset(token)


def roof(problem: Problem) -> Roof:
    """That of the problem's device; of a GPU that stands nowhere in ROOF, an A100's."""
    return ROOF.get(problem.arch or problem.device, ROOF["sm_80" if problem.device == "cuda" else "cpu"])


def _seconds(implementation: Implementation, problem: Problem) -> float:
    flops, moved = implementation.cost(problem)
    device = roof(problem)
    peak = device.tf32 if problem.tf32 else device.fp32 if problem.dtype == torch.float32 else device.half
    return max(flops / peak, moved / device.memory)


@functools.lru_cache(maxsize=8192)
def choose(problem: Problem, forced: str | None = None, batch_invariant: bool = False) -> Implementation:
    """The implementation that runs `problem`: the cheapest that does not decline, or the first of `forced`, names
    with commas between, that does not.

    An implementation that has no such op at all (panel is zo_linear alone) leaves it to the others, forced or not.

    Raises:
        RuntimeError: all of `forced` decline, or none is left when `batch_invariant` is asked for.
    """
    reasons = {}
    named = {i.name: i for i in IMPLEMENTATIONS if hasattr(i, problem.op)}
    wanted = [named[name] for name in (forced or "").split(",") if name in named]
    best: tuple[float, Implementation] | None = None
    for implementation in wanted or IMPLEMENTATIONS:
        reason = implementation.refusal(problem)
        if reason is None and batch_invariant and not implementation.batch_invariant:
            reason = "its rows depend on how many rows there are (batch_invariant is False)"
        if reason is not None:
            reasons[implementation.name] = reason
            continue
        if wanted:
            return implementation
        seconds = _seconds(implementation, problem)
        if best is None or seconds < best[0]:
            best = (seconds, implementation)
    if best is None:
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RuntimeError(f"no implementation takes {problem.op} {_brief(problem)}: {said}")
    return best[1]


class Explanation(NamedTuple):
    """Why an op runs where it does: the chosen name, who declined and why, modelled seconds of the others.

    `products`: the type in which x . W^T is multiplied, "float32 as tf32" where torch is set to that.
    """

    chosen: str
    refusals: dict[str, str]
    seconds: dict[str, float]
    products: str = ""


def explain(problem: Problem) -> Explanation:
    refusals = {i.name: r for i in IMPLEMENTATIONS if (r := i.refusal(problem)) is not None}
    seconds = {i.name: _seconds(i, problem) for i in IMPLEMENTATIONS if i.name not in refusals}
    return Explanation(implementation(problem).name, refusals, seconds, _products(problem))


def _products(p: Problem) -> str:
    return str(p.dtype).removeprefix("torch.") + " as tf32" * p.tf32


def _brief(p: Problem) -> str:
    return (
        f"(M={p.M} N={p.N} K={p.K} {p.format} {p.layout} rank={p.rank} groups={p.groups} {_products(p)} on {p.device})"
    )


def implementation(problem: Problem):  # no type: its op functions are those of the schema
    """What runs `problem` here and now, `using` respected."""
    name, op = _forced.get() or (None, "")
    return choose(problem, name if op in ("", problem.op) else None)
