"""Directions made of several noises, as a pool of probes has ranked them: MeZO-GV and MeZO-Greedy.

    pool      f_k = f(theta + sigma Delta_k), k = 1 ... p;  ranked, the lowest first
    guided    v = mean of the better half of the Delta_k - mean of the worse half
    greedy    v = the best Delta_k
    then      d = (f(theta + sigma v) - f(theta - sigma v)) / (2 sigma);  theta <- rule(theta, d v)

v is never a tensor: its row groups and its update are sums over the seeds of the pool, so it is made of exactly the
noises that were probed, in every parameter. Delta is that of the method it is put on: Z over W, or Z A^T over C, where
a pool costs next to nothing but its forwards.

The mean squared length of a guided v is 4/p of a Delta's: at p = 2 the radius is sqrt(2) sigma in effect. And there the
ranking only decides the sign of v, which d v does not have: without history, the step at p = 2 is MeZO's along
Delta_1 - Delta_2, for twice its forwards. What was seen of the pool counts from p = 4 on, or with history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import estimators
from ..zeroth_order import Evaluation, Radii, ZeroOrder
from .activation import ZOAct
from .dense import MeZO


class _Pooled(ZeroOrder):
    """queries: p, even. A step takes p + 2 evaluations, two of them in a forward.

    A step is logged with its seeds in the order of their rank, and losses [p + 2, B]: of the pool in that order, of
    +v and of -v. The signal is |f(+v) - f(-v)|; its floor is not measured, so floor_every has no effect.
    """

    known_sides = ("two-sided",)

    def __init__(self, model: nn.Module, *, queries: int = 2, scaling: str = "plain", **others: Any) -> None:
        if queries < 2 or queries % 2:
            raise ValueError(f"queries is {queries}; a pool has an even number of seeds, at least 2")
        if scaling == "std":
            raise ValueError("scaling is 'std'; a step has one difference, which has no spread")
        super().__init__(model, queries=queries, scaling=scaling, **others)
        self.groups = 2
        mix = self.mix(queries)
        self._mix = mix.to(self.device)
        single = self.sigma * torch.eye(queries)
        self._pool = [Radii.of(pair.contiguous(), self.device) for pair in single.chunk(queries // 2)]
        self._pair = Radii.of(self.sigma * torch.stack((mix, -mix)).float(), self.device)

    @staticmethod
    def mix(queries: int) -> Tensor:
        """Weights of the ranked noises in v, float64 [p]."""
        raise NotImplementedError

    def _estimate(self, parts: Sequence[Evaluation], rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        pool = torch.cat([self._evaluate(parts, 1.0, rows, radii) for radii in self._pool])
        ranked = (pool - pool[:1]).mean(dim=1).argsort(stable=True)  # differenced per example; NaN comes last
        self._seeds.copy_(self._seeds[ranked])
        pair = self._evaluate(parts, 1.0, rows, self._pair)
        d = estimators.weights(pair, self.sides, 1, self.sigma, scaling=self.scaling, clip=self.clip)
        return torch.cat((pool[ranked], pair)), d * self._mix

    def _floor_is_due(self) -> bool:
        return False

    def _signal(self, losses: Tensor) -> float:
        return float(estimators.contrasts(losses[-2:], self.sides, 1).abs())


class _Guided(_Pooled):
    @staticmethod
    def mix(queries: int) -> Tensor:
        half = torch.full((queries // 2,), 2 / queries, dtype=torch.float64)
        return torch.cat((half, -half))


class _Greedy(_Pooled):
    @staticmethod
    def mix(queries: int) -> Tensor:
        return torch.eye(queries, dtype=torch.float64)[0]


class MeZOGV(_Guided, MeZO):
    """MeZO along the guided v. lr is the published one for OPT-13B."""

    name, paper = "mezo-gv", "arXiv 2601.04710"
    summary = "MeZO along the better noises of a pool minus the worse"

    def __init__(self, model: nn.Module, *, lr: float = 2e-7, **others: Any) -> None:
        super().__init__(model, lr=lr, **others)


class MeZOGVHistory(MeZOGV):
    """The best seed of a step is probed again in the next one, beside p - 1 new ones; a skipped step leaves it."""

    name = "mezo-gv-history"
    summary = "MeZO-GV whose best seed stays in the pool"

    def __init__(self, model: nn.Module, **others: Any) -> None:
        super().__init__(model, **others)
        self._best = super()._draw()[-1:].to(self.device)  # new, as all of the first pool

    def own_state(self) -> dict[str, Tensor]:
        return {"best": self._best}

    def _draw(self) -> Tensor:
        return torch.cat((super()._draw()[:-1], self._best.cpu()))

    def _settle(self) -> None:
        super()._settle()
        self._best.copy_(torch.where(self.rule.skip, self._best, self._seeds[:1]))


class MeZOGreedy(_Greedy, MeZO):
    """MeZO along the best noise of the pool."""

    name, paper = "mezo-greedy", "arXiv 2601.04710"
    summary = "MeZO along the best noise of a pool"

    def __init__(self, model: nn.Module, *, lr: float = 2e-7, **others: Any) -> None:
        super().__init__(model, lr=lr, **others)


class ZOActGV(_Guided, ZOAct):
    """ZO-Act along the guided v, of Z A^T."""

    name, paper = "zo-act-gv", "arXiv 2601.04710"
    summary = "coefficients along the better noises of a pool minus the worse"


class ZOActGreedy(_Greedy, ZOAct):
    """ZO-Act along the best Z A^T of the pool."""

    name, paper = "zo-act-greedy", "arXiv 2601.04710"
    summary = "coefficients along the best noise of a pool"
