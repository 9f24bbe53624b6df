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


@functools.cache
def arch_of(device: torch.device) -> str:
    """`Problem.arch` of a device: what its kernels are compiled for."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


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

# (flop/s, bytes/s) that turn a modelled cost into seconds: one core of the machine in benchmarks/results, and the half
# precision and memory speed of an A100's data sheet. Only ratios between implementations on one device matter.
ROOF = {"cpu": (1.2e11, 1.2e10), "cuda": (3.1e14, 2.0e12)}

# (name, op): which implementation runs an op, or with op "" every op.
_forced: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("zoact_forced", default=None)


@contextlib.contextmanager
def using(name: str, isa: str | None = None, op: str = "") -> Iterator[None]:
    """Run every op inside the block, or only `op`, by the implementation `name`; `isa` picks a CPU instruction set.

    Raises:
        ValueError: no such implementation or op, or this machine has no such instruction set.
    """
    names = [i.name for i in IMPLEMENTATIONS]
    if name not in names:
        raise ValueError(f"`name` is {name!r}; implementations are {', '.join(names)}")
    if isa is not None and name != "cpu":
        raise ValueError(f"`isa` is {isa!r}, but only the implementation 'cpu' has instruction sets")
    if op and not hasattr(Reference, op):
        raise ValueError(f"`op` is {op!r}; it may be one of torch.ops.zoact, as in 'zo_linear'")
    token = _forced.set((name, op))
    try:
        with Cpu.force_isa(isa) if isa else contextlib.nullcontext():
            yield
    finally:
        _forced.reset(token)


def _seconds(implementation: Implementation, problem: Problem) -> float:
    flops, moved = implementation.cost(problem)
    peak, bandwidth = ROOF.get(problem.device, ROOF["cpu"])
    return max(flops / peak, moved / bandwidth)


@functools.lru_cache(maxsize=8192)
def choose(problem: Problem, forced: str | None = None, batch_invariant: bool = False) -> Implementation:
    """The implementation that runs `problem`: the cheapest that does not decline; `forced` allows only one.

    An implementation that has no such op at all (panel is zo_linear alone) leaves it to the others, forced or not.

    Raises:
        RuntimeError: `forced` declines, or none is left when `batch_invariant` is asked for.
    """
    reasons = {}
    if not any(i.name == forced and hasattr(i, problem.op) for i in IMPLEMENTATIONS):
        forced = None
    best: tuple[float, Implementation] | None = None
    for implementation in IMPLEMENTATIONS:
        if forced is not None and implementation.name != forced:
            continue
        reason = implementation.refusal(problem)
        if reason is None and batch_invariant and not implementation.batch_invariant:
            reason = "its rows depend on how many rows there are (batch_invariant is False)"
        if reason is not None:
            reasons[implementation.name] = reason
            continue
        seconds = _seconds(implementation, problem)
        if best is None or seconds < best[0]:
            best = (seconds, implementation)
    if best is None:
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RuntimeError(f"no implementation takes {problem.op} {_brief(problem)}: {said}")
    return best[1]


class Explanation(NamedTuple):
    """Why an op runs where it does: the chosen name, who declined and why, modelled seconds of the others."""

    chosen: str
    refusals: dict[str, str]
    seconds: dict[str, float]


def explain(problem: Problem) -> Explanation:
    refusals = {i.name: r for i in IMPLEMENTATIONS if (r := i.refusal(problem)) is not None}
    seconds = {i.name: _seconds(i, problem) for i in IMPLEMENTATIONS if i.name not in refusals}
    return Explanation(implementation(problem).name, refusals, seconds)


def _brief(p: Problem) -> str:
    return f"(M={p.M} N={p.N} K={p.K} {p.format} {p.layout} rank={p.rank} groups={p.groups} {p.dtype} on {p.device})"


def implementation(problem: Problem):  # no type: its op functions are those of the schema
    """What runs `problem` here and now, `using` respected."""
    name, op = _forced.get() or (None, "")
    return choose(problem, name if op in ("", problem.op) else None)
