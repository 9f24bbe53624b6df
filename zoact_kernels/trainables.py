"""What a method moves: one object for each parameter, with how a forward perturbs it and what a snapshot holds of it.

    kind           value [rows, cols] = shape of Z      row group g runs with
    Coefficients   C [N, R] of a ZOLinear with a basis  D(W) + (C + sum_s sigmas[g, s] Z_s) A^T

A rule (optim) moves `value` along the same Z: probe and update address the noise by (seed, param_id, row, column), and
both take it from one of these objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import rng
from .layers import ZOLinear, zo_layers


class Trainable:
    """One parameter. name: unique in the model. value [rows, cols]: what the rule moves in place, along a Z so shaped.

    param_id: int64 [1], of the noise. gain: what a method's direction multiplies the estimate along Z by.
    basis: A [K, R] where there is one, which several trainables may share.
    """

    name: str
    value: Tensor
    param_id: Tensor
    gain = 1.0
    basis: Tensor | None = None
    basis_shape: tuple[int, int] | None = None

    def check(self) -> None:
        """Raises RuntimeError if the model does not use `value` any more."""

    def held(self) -> dict[str, Tensor]:
        """What a snapshot has to hold besides `value` and `basis`; the tensors themselves, by name."""
        return {}

    def take(self, held: Mapping[str, Tensor]) -> None:
        """Take over what `held` gave. Raises ValueError, nothing changed, where it does not fit."""
        if held:
            raise ValueError(f"state of {self.name} has {', '.join(held)}, unknown here: it belongs to another method")

    def anatomy(self) -> dict[str, Any]:
        """What a replay without the model has to know, as JSON values."""
        raise NotImplementedError


class Coefficients(Trainable):
    """C of a ZOLinear, noise Z [N, R]."""

    def __init__(self, name: str, layer: ZOLinear) -> None:
        assert layer.coeff is not None
        self.name, self.layer, self.value, self.param_id = name, layer, layer.coeff, layer.param_id
        self.basis_shape = layer.in_features, layer.rank
        layer.probe = None  # C is what a layer perturbs unless told otherwise

    @property
    def basis(self) -> Tensor | None:  # type: ignore[override]
        return self.layer.basis

    @basis.setter
    def basis(self, basis: Tensor | None) -> None:
        self.layer.basis = basis

    def check(self) -> None:
        if self.layer.coeff is not self.value:
            raise RuntimeError(f"layer {self.name} got another coeff since; create the optimizer after setting bases")

    def anatomy(self) -> dict[str, Any]:
        layer = self.layer
        return {
            "name": self.name,
            "param_id": int(layer.param_id),
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "rank": layer.rank,
            "origin": layer.origin,
        }


def coefficients(model: nn.Module) -> list[Trainable]:
    """C of every layer that has a rank, in module order. Raises ValueError if there is none."""
    found: list[Trainable] = [
        Coefficients(rng.strip_prefixes(name), layer) for name, layer in zo_layers(model).items() if layer.rank > 0
    ]
    if not found:
        raise ValueError("no layer of the model can be trained; swap it with ZOConfig(rank=1) or more")
    return found
