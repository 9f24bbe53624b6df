"""Coefficients C [N, R] on a basis A [K, R] of the layer's own input activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..layers import Perturbation, ZOLinear, zo_layers
from ..trainables import Coefficients, Trainable, coefficients
from ..zeroth_order import ZeroOrder


class ZOAct(ZeroOrder):
    """W_eff = D(W) + (C +- sigma Z) A^T, A [K, R] the top directions of a layer's inputs, C trained, by Adam.

    Layers of rank 0 are left alone. Basis first (`compute_basis`): a basis set later gives a layer another C.
    """

    name, paper = "zo-act", "arXiv 2607.01125"
    summary = "coefficients on a one-shot activation basis"
    basis = "activations"

    @property
    def layers(self) -> dict[str, ZOLinear]:
        """The trained layers by name."""
        return {name: t.layer for name, t in self.trainables.items() if isinstance(t, Coefficients)}

    def find(self, model: nn.Module, handle: Perturbation) -> list[Trainable]:
        return coefficients(model)

    @classmethod
    def adopt(cls, model: nn.Module, layers: Sequence[str], state: Mapping[str, Tensor]) -> None:
        found = zo_layers(model)
        for name, layer in found.items():
            if layer.rank and name not in layers:
                layer.rank, layer.coeff, layer.basis = 0, None, None
        device = next(iter(found.values())).param_id.device
        bases = {key: a.to(device) for key, a in state.items() if key.startswith("basis/")}  # layers share them
        for name, index in zip(layers, state["basis_of"].tolist(), strict=True):
            found[name].set_basis(bases[f"basis/{index}"], state[f"coeff/{name}"].to(device))


class ZOActOneSided(ZOAct):
    """ZO-Act with forward differences, as a text that cites the paper has it."""

    name = "zo-act-one-sided"
    summary = "the same by forward differences"

    def __init__(self, model: nn.Module, *, sides: str = "one-sided", **others: Any) -> None:
        super().__init__(model, sides=sides, **others)
