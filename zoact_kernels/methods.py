"""The published methods, each a short class over the general step: its formulas, its defaults, what it trains.

    zo-act   C of every layer, right basis from activations, once                       arXiv 2607.01125
    mezo     every parameter, dense normal noise, SGD                                   arXiv 2305.17333

Defaults are the published ones where there are any; they stand in the signature of `__init__`, the rest is ZeroOrder's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .layers import Perturbation, ZOLinear, zo_layers
from .trainables import Coefficients, Trainable, coefficients, weights
from .zeroth_order import MODES, RECENT, Evaluation, LoggedStep, StepResult, ZeroOrder

__all__ = [
    "METHODS",
    "MODES",
    "RECENT",
    "Evaluation",
    "LoggedStep",
    "StepResult",
    "ZOAct",
    "ZeroOrder",
    "arguments",
    "create",
]


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


class MeZO(ZeroOrder):
    """theta +- sigma z, z ~ N(0, I);  d = (f+ - f-) / (2 sigma);  theta <- theta - lr (d z + wd theta).

    All parameters take part, norms, biases and embeddings too, a tied head once. Weights in 16 bits are rounded
    stochastically.
    """

    name, paper = "mezo", "arXiv 2305.17333"
    summary = "all weights along dense normal noise, by SGD"
    dense = True

    def __init__(
        self, model: nn.Module, *, sigma: float = 1e-3, lr: float = 1e-6, optimizer: str = "sgd", **others: Any
    ) -> None:
        super().__init__(model, sigma=sigma, lr=lr, optimizer=optimizer, **others)

    def find(self, model: nn.Module, handle: Perturbation) -> list[Trainable]:
        return weights(model, handle)


METHODS: dict[str, type[ZeroOrder]] = {method.name: method for method in (ZOAct, ZOActOneSided, MeZO)}


def arguments(method: str) -> dict[str, Any]:
    """The arguments of a named method beside the model, with its defaults. Raises ValueError for an unknown one."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; known are {', '.join(METHODS)}")
    found: dict[str, Any] = {}
    for kind in reversed(METHODS[method].__mro__):
        if "__init__" in vars(kind) and issubclass(kind, ZeroOrder):
            parameters = inspect.signature(kind.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return found


def create(method: str, model: nn.Module, **changes: Any) -> ZeroOrder:
    """The optimizer of a named method; `changes` are further or other arguments of its class."""
    known = arguments(method)
    for name in changes.keys() - known.keys():
        raise ValueError(f"method {method} has no argument {name!r}; it has {', '.join(known)}")
    return METHODS[method](model, **changes)
