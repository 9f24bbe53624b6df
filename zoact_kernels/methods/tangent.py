"""The exact derivative along a random direction, by forward-mode differentiation: no radius and no difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import estimators, tangent
from ..zeroth_order import Evaluation, ZeroOrder
from .activation import ZOAct
from .dense import MeZO


class _Forward(ZeroOrder):
    """d_j = <grad f, Delta_j>, the derivative of the loss along Delta_j;  g = mean_j d_j Delta_j.

    One forward with a tangent beside every activation, in place of two or more without. A row group has the clean model
    and a direction of its own, so several queries are stacked or sequential as ever. The losses of a step are those of
    the clean model, once for each query; its signal is sigma |d_j|.

    sigma scales the tangents on their way, and they are divided by it at the end: no result depends on it, but 16 bits
    have to hold them. There is nothing to difference, so floor_every has no effect.
    """

    known_sides = (estimators.TANGENT,)

    def __init__(self, model: nn.Module, *, sides: str = estimators.TANGENT, **others: Any) -> None:
        super().__init__(model, sides=sides, **others)
        tangent.differentiate(model, weights=self.dense)
        self._slopes = torch.zeros(self.queries, dtype=torch.float64, device=self.device)  # sigma d_j
        self._watched = False  # whether a whole step was, for tangents that get lost

    def _floor_is_due(self) -> bool:
        return False

    def _estimate(self, parts: Sequence[Evaluation], rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        losses, slopes = [], []
        with tangent.tangents(self.model, watch=not self._watched):
            for part in parts:
                seen: list[Tensor] = []
                losses.append(self._evaluate([_parted(part, seen)], 1.0, rows))
                slopes.append(torch.cat(seen))
        self._watched = True
        table = torch.cat(slopes, dim=1)
        self._slopes.copy_(estimators.contrasts(table, self.sides, self.queries))
        given = (table, self.sides, self.queries, self.sigma)
        return torch.cat(losses, dim=1), estimators.weights(*given, scaling=self.scaling, clip=self.clip)

    def _signal(self, losses: Tensor) -> float:
        return float(self._slopes.abs().mean())

    def _reason(self, losses: Tensor, weights: Tensor) -> str:
        if torch.isfinite(losses).all() and not torch.isfinite(weights).all():
            return "the derivative is not finite, though the losses are"
        return super()._reason(losses, weights)


def _parted(evaluate: Evaluation, seen: list[Tensor]) -> Evaluation:
    """`evaluate` without the tangent of what it returns, which goes to `seen` as [groups, B] float64."""

    def primal(groups: int) -> Tensor:
        losses = evaluate(groups)
        clean, slope = forward_ad.unpack_dual(losses)
        if slope is None:
            raise ValueError("the losses carry no tangent: they were detached, or do not depend on what is trained")
        seen.append(slope.double().reshape(groups, -1))
        return clean

    return primal


class ForwardGradient(_Forward, ZOAct):
    """ZO-Act by derivatives: along Z A^T, C trained by Adam."""

    name, paper = "forward-gradient", "arXiv 2402.11592"
    summary = "coefficients along exact derivatives, one forward with tangents"


class ForwardGradientDense(_Forward, MeZO):
    """MeZO by derivatives, as ZO-Bench has it: all weights along dense noise, by SGD."""

    name, paper = "forward-gradient-dense", "arXiv 2402.11592"
    summary = "all weights along exact derivatives, by SGD"
