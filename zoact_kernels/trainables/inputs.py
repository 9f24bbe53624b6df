"""Matrices that move along the inputs of their own layer, as the step at hand sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..basis import recompress
from ..layers import ZOLinear
from ..parameters import ZODense
from .factors import LowRank


class AlongInputs(LowRank):
    """W + sum_s sigmas[g, s] Z_s A^T, noise Z [N, R]; A [K, R] is another one at each step.

    So what a step adds can't wait in coefficients for the next one:
    a dense W takes it at once, value = W, along = A: W += sum weights Z A^T, in 16 bits rounded stochastically;
    a frozen W has a delta with columns for `window` steps: base_basis gets A in those of this step, base_coeff what the
    rule has put in value = C [N, R], which is zero between steps. Before they are used a second time, all is compressed
    into the delta's other columns (`compress`). One SVD in `window` steps, and only it loses anything.
    """

    owners = (ZODense,)
    basis = None  # of no snapshot, since no step reads the A of another  # type: ignore[assignment]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.basis_shape = None
        self.start_id = torch.tensor([rng.param_id(f"{self.parameter}#A")], device=self.param_id.device)
        self.window, self.columns = 0, torch.zeros(0, dtype=torch.int64)
        if self.weight is not None:
            self.value, self.along = self.weight, self._basis

    @staticmethod
    def fitting(rank: int, N: int, K: int) -> int:
        return min(rank, K)

    def open(self, window: int, columns: Tensor) -> None:
        """Give the delta of a frozen W its columns for `window` steps, the first ones.

        columns: int64 [R of the method], on the device, filled by the method: those of the step at hand.
        """
        self.window, self.columns = window * len(columns), columns[: self._basis.shape[1]]
        if self.weight is None:
            a, c = self._delta()
            layer = self._layer()
            layer.base_basis, layer.base_coeff = (
                torch.cat([m.new_zeros(len(m), self.window), m], dim=1) for m in (a, c)
            )

    @torch.no_grad()
    def point(self, basis: Tensor) -> None:
        """A [K, R] of this step, before the layer uses it; zeros: it stays out of this step."""
        self._basis.copy_(basis)
        if self.weight is None:
            self._delta()[0].index_copy_(1, self.columns, self._basis)

    @torch.no_grad()
    def settle(self) -> None:
        if self.weight is None:
            self._delta()[1].index_add_(1, self.columns, self.value)
            self.value.zero_()

    @torch.no_grad()
    def compress(self) -> float:
        """Empty the columns of the window into the others. Returns the error of that, relative; 0 for a dense W."""
        if self.weight is not None:
            return 0.0
        a, c = self._delta()
        new_a, new_c, error = recompress(a, c, a.shape[1] - self.window)
        for old, new in ((a, new_a), (c, new_c)):
            old[:, : self.window] = 0
            old[:, self.window :] = new
        return error

    def held(self) -> dict[str, Tensor]:
        return super().held() if self.weight is None else {}

    def whole(self) -> Tensor | None:
        return None if self.weight is None else self.weight.to("cpu", copy=True)

    def _layer(self) -> ZOLinear:
        layer = self.sites[0][0]
        assert isinstance(layer, ZOLinear)
        return layer

    def _delta(self) -> tuple[Tensor, Tensor]:
        layer = self._layer()
        assert layer.base_basis is not None and layer.base_coeff is not None
        return layer.base_basis, layer.base_coeff
