"""Structures of a perturbation, each as its plain definition: which noise it draws, and the Delta [N, K] it stands for.

    right-basis   Z [N, R], basis A [K, R] given   Delta = Z A^T   mean estimate grad A A^T   ZO-Act, AGZO, LOZO
    dense         Z [N, K]                         Delta = Z       mean estimate grad         MeZO, FZOO (signs)

Kernels never build Delta; tests, tools and the reader do, here, from the same words of the generator (design law 2.1).
"Mean estimate" is E[<grad, Delta> Delta], grad [N, K] being the gradient in the weight: it is why a learning rate does
not transfer from one row of this table to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import rng


@dataclass(frozen=True)
class Direction:
    """One structure. `shape(N, K, R)` is the shape of its noise, `expand(z, basis)` the Delta [N, K] it stands for."""

    name: str
    needs_basis: bool
    shape: Callable[[int, int, int], tuple[int, int]]
    expand: Callable[[Tensor, Tensor | None], Tensor]


def _right_basis(z: Tensor, basis: Tensor | None) -> Tensor:
    assert basis is not None
    return z @ basis.to(z.dtype).T


DIRECTIONS: dict[str, Direction] = {
    direction.name: direction
    for direction in (
        Direction("right-basis", True, lambda N, K, R: (N, R), _right_basis),
        Direction("dense", False, lambda N, K, R: (N, K), lambda z, basis: z),
    )
}


def delta(
    direction: str,
    seed: int,
    param_id: int,
    out_features: int,
    in_features: int,
    *,
    basis: Tensor | None = None,
    noise: str = "normal",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Delta [out_features, in_features] of one parameter for one seed, in `dtype`, on the basis' device.

    basis: [K, R] for a direction that needs one. Raises ValueError for an unknown direction, a missing basis, or a
    basis whose first size is not `in_features`.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; known are {', '.join(DIRECTIONS)}")
    structure = DIRECTIONS[direction]
    if structure.needs_basis and (basis is None or basis.dim() != 2 or basis.shape[0] != in_features):
        given = None if basis is None else tuple(basis.shape)
        raise ValueError(f"basis is {given}; direction {direction!r} needs ({in_features}, rank)")
    rank = basis.shape[1] if basis is not None else 0
    rows, cols = structure.shape(out_features, in_features, rank)
    z = rng.noise(noise, seed, param_id, rows, cols, device="cpu" if basis is None else basis.device)
    return structure.expand(z.to(dtype), basis)
