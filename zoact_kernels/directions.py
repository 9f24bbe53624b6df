"""Structures of a perturbation, each as its plain definition: which noise it draws, and the Delta [N, K] it stands for.

    structure     Z of a seed      given                              Delta            mean estimate
    dense         [N, K]                                              Z                grad
    masked        [N, K]           mask [N, K] of 0 and 1             mask * Z         mask * grad
    right-basis   [N, R]           basis A [K, R]                     Z A^T            grad A A^T
    uv            [N, R], is U     basis V [K, R], normal             Z V^T            grad V V^T; over all V: R grad
    uzv           [R, R]           basis V, left U [N, R],            c U Z V^T        c^2 U U^T grad V V^T;
                                   orthonormal; c = sqrt(N K) / R                      over all U, V: grad
    scale         [N, K / group]   codes q - zero [N, K]              codes * Z'       codes * sum of codes * grad
                                                                                       over the group
    multi-seed    that of each     weights c of the seeds             sum_s c_s Delta_s

Z is normal or random signs, which have the same mean. Z' is Z, each column as often as a group has weights. "Mean
estimate" is E[<grad, Delta> Delta], grad [N, K] being the gradient in the weight: it is why a learning rate does not
transfer from one row of this table to the next. That of a sum over seeds depends on how its weights came about.

    dense         MeZO and its rules, FZOO (signs), ZO Fine-tuner (times a number for each tensor), Forward gradient
    masked        Sparse-MeZO, ZO-Bench sparse            scale   QZO
    right-basis   ZO-Act, AGZO, P-RGE                     uzv     SubZero
    uv            LOZO (U from the noise of the parameter, V from that of `name#V` and a seed that changes slowly)
    multi-seed    every update; MeZO-GV's probes

Where both factors of a product are perturbed, as in MeZO over LoRA, no Delta exists that a radius only scales.

Kernels never build Delta; tests, tools and the reader do, here, from the same words of the generator (design law 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import rng


@dataclass(frozen=True)
class Direction:
    """A row of the table. shape(N, K, *given): of Z. expand(z, *given): Delta. mean(grad, *given): the last column."""

    name: str
    given: tuple[str, ...]  # names of what it is made from besides Z
    shape: Callable[..., tuple[int, int]]
    expand: Callable[..., Tensor]
    mean: Callable[..., Tensor]


def _rank(factor: Tensor) -> int:
    return factor.shape[1]


def _c(left: Tensor, basis: Tensor) -> float:
    return math.sqrt(len(left) * len(basis)) / _rank(basis)


def _spread(columns: Tensor, K: int, size: int) -> Tensor:
    """[N, groups] -> [N, K], each column `size` times; the last group may be short."""
    return columns.repeat_interleave(size, dim=1)[:, :K]


def _sums(product: Tensor, size: int) -> Tensor:
    """[N, K] -> [N, groups]."""
    return torch.stack([part.sum(dim=1) for part in product.split(size, dim=1)], dim=1)


DIRECTIONS: dict[str, Direction] = {
    direction.name: direction
    for direction in (
        Direction("dense", (), lambda N, K: (N, K), lambda z: z, lambda g: g),
        Direction("masked", ("mask",), lambda N, K, m: (N, K), lambda z, m: m * z, lambda g, m: m * g),
        Direction("uv", ("basis",), lambda N, K, v: (N, _rank(v)), lambda z, v: z @ v.T, lambda g, v: g @ v @ v.T),
        Direction(
            "right-basis", ("basis",), lambda N, K, a: (N, _rank(a)), lambda z, a: z @ a.T, lambda g, a: g @ a @ a.T
        ),
        Direction(
            "uzv", ("basis", "left"), lambda N, K, v, u: (_rank(u), _rank(v)),
            lambda z, v, u: _c(u, v) * u @ z @ v.T,
            lambda g, v, u: _c(u, v) ** 2 * u @ u.T @ g @ v @ v.T,
        ),
        Direction(
            "scale", ("codes", "group_size"), lambda N, K, q, size: (N, -(-K // size)),
            lambda z, q, size: q * _spread(z, K=q.shape[1], size=size),
            lambda g, q, size: q * _spread(_sums(q * g, size), K=q.shape[1], size=size),
        ),
    )
}  # fmt: skip


def delta(
    direction: str,
    seed: int,
    param_id: int,
    out_features: int,
    in_features: int,
    *,
    noise: str = "normal",
    dtype: torch.dtype = torch.float64,
    **given: Tensor | int,
) -> Tensor:
    """Delta [out_features, in_features] of one parameter for one seed, in `dtype`, where the given tensors are.

    given: what the structure takes, by the names of the table. Raises ValueError for an unknown direction, and for what
    is missing, unknown or of another shape.
    """
    structure, tensors = _structure(direction, out_features, in_features, given)
    rows, cols = structure.shape(out_features, in_features, *tensors)
    device = next((a.device for a in tensors if isinstance(a, Tensor)), torch.device("cpu"))
    z = rng.noise(noise, seed, param_id, rows, cols, device=device).to(dtype)
    return structure.expand(z, *(a.to(dtype) if isinstance(a, Tensor) else a for a in tensors))


def multi_seed(direction: str, seeds: Sequence[int], weights: Sequence[float], *where: int, **given: Any) -> Tensor:
    """sum_s weights[s] Delta_s [N, K]; the other arguments are those of `delta`."""
    parts = [w * delta(direction, seed, *where, **given) for seed, w in zip(seeds, weights, strict=True)]
    return torch.stack(parts).sum(dim=0)


def mean_estimate(direction: str, gradient: Tensor, **given: Tensor | int) -> Tensor:
    """E[<gradient, Delta> Delta] [N, K] over the noise, what is given being fixed. Raises as `delta` does."""
    structure, tensors = _structure(direction, gradient.shape[0], gradient.shape[1], given)
    return structure.mean(gradient, *tensors)


def lazy_factor(seed: int, param_id: int, size: int, rank: int, *, orthonormal: bool = False) -> Tensor:
    """A factor [size, rank] that `uv` or `uzv` keeps for some steps, float64: normal, and then the Q of its QR.

    The R of that QR has a positive diagonal, which makes Q unique. param_id: of `name#V` for V, of `name#U` for U.
    """
    factor = rng.noise("normal", seed, param_id, size, rank).double()
    if not orthonormal:
        return factor
    q, r = torch.linalg.qr(factor)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _structure(direction: str, N: int, K: int, given: dict[str, Any]) -> tuple[Direction, list[Any]]:
    """The structure and what is given for it, in its order."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; known are {', '.join(DIRECTIONS)}")
    structure = DIRECTIONS[direction]
    for name in given.keys() - set(structure.given):
        raise ValueError(f"{name} is given; direction {direction!r} takes {', '.join(structure.given) or 'nothing'}")
    sizes = {"basis": (K, "rank"), "left": (N, "rank"), "mask": (N, K), "codes": (N, K)}
    for name in structure.given:
        found = given.get(name)
        if name == "group_size":
            if not isinstance(found, int) or found < 1:
                raise ValueError(f"group_size is {found}; direction {direction!r} needs how many weights share a scale")
            continue
        shape, (rows, cols) = None if found is None else tuple(found.shape), sizes[name]
        if shape is None or len(shape) != 2 or shape[0] != rows or cols not in ("rank", shape[1]):
            raise ValueError(f"{name} is {shape}; direction {direction!r} needs ({rows}, {cols})")
    return structure, [given[name] for name in structure.given]
