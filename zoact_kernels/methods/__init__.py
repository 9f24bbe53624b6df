"""The published methods, each a short class over the general step: its formulas, its defaults, what it trains.

    zo-act   C of every layer, right basis from activations, once                       arXiv 2607.01125
    mezo     every parameter, dense normal noise, SGD                                   arXiv 2305.17333
    fzoo     random signs, one-sided, differences divided by their spread               arXiv 2506.09034
    sparse-mezo, zo-sparse   MeZO under a mask by magnitude, or by chance               arXiv 2402.15751, 2402.11592
    zo-sign, zo-momentum, zo-adam   MeZO with another rule                              arXiv 2402.11592
    zo-conservative   the better of both sides and of staying                           arXiv 2402.11592
    mezo-bcd, zo-act-bcd, zo-module-wise   one block, or one module, at a time          arXiv 2501.19099, 2402.11592
    lozo, lozo-m   U V^T, V renewed now and then, SGD or momentum in the factor         arXiv 2410.07698
    forward-gradient, forward-gradient-dense   ZO-Act and MeZO by exact derivatives     arXiv 2402.11592
    mezo-gv, mezo-gv-history, mezo-greedy   MeZO along sums of noises that a pool ranks  arXiv 2601.04710
    zo-act-gv, zo-act-greedy   the same over C                                          arXiv 2601.04710
    qzo      the scales of a low-bit model, clipped differences                          arXiv 2505.13430
    zo-finetuner   MeZO, the noise of each tensor scaled by a learned net               arXiv 2510.00419
    subzero  U Z V^T, U and V orthonormal and renewed now and then, SGD                 arXiv 2410.08989
    mezo-lora, mezo-prefix   both factors of a LoRA; keys and values of a prefix        arXiv 2305.17333
    p-rge    B of a LoRA whose A is random and fixed, several queries in one forward    arXiv 2409.15520
    agzo     Z A^T, A of the inputs of each step's own clean forward, SGD               arXiv 2601.17261
    zo-act-tail, zo-act-node   few numbers behind the last attention, of this package  arXiv 2607.01125, 2210.03310
    hi-zfo, hi-zfo-dense   ZO-Act, or MeZO, and gradients for the blocks that matter     arXiv 2601.05501

Defaults are the published ones where there are any; they stand in the signature of `__init__`, the rest is ZeroOrder's.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..zeroth_order import MODES, RECENT, Evaluation, LoggedStep, StepResult, ZeroOrder
from .activation import AGZO, ZOAct, ZOActOneSided
from .blocks import MeZOBCD, ZOActBCD, ZOModuleWise
from .dense import FZOO, MeZO, SparseMeZO, ZOAdam, ZOConservative, ZOMomentum, ZOSign, ZOSparse
from .hybrid import HiZFO, HiZFODense
from .learned import ZOFinetuner
from .lora import PRGE, MeZOLoRA, MeZOPrefix
from .low_rank import LOZO, LOZOM, SubZero
from .node import ZOActNode
from .prior import MeZOGreedy, MeZOGV, MeZOGVHistory, ZOActGreedy, ZOActGV
from .scales import QZO
from .tail import ZOActTail
from .tangent import ForwardGradient, ForwardGradientDense

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

METHODS: dict[str, type[ZeroOrder]] = {
    method.name: method
    for method in (
        ZOAct,
        ZOActOneSided,
        MeZO,
        FZOO,
        SparseMeZO,
        ZOSparse,
        ZOSign,
        ZOMomentum,
        ZOAdam,
        ZOFinetuner,
        ZOConservative,
        MeZOBCD,
        ZOActBCD,
        ZOModuleWise,
        LOZO,
        LOZOM,
        SubZero,
        QZO,
        MeZOLoRA,
        MeZOPrefix,
        PRGE,
        AGZO,
        ForwardGradient,
        ForwardGradientDense,
        MeZOGV,
        MeZOGVHistory,
        MeZOGreedy,
        ZOActGV,
        ZOActGreedy,
        ZOActTail,
        ZOActNode,
        HiZFO,
        HiZFODense,
    )
}


def arguments(method: str) -> dict[str, Any]:
    """The arguments of a named method beside the model, with its defaults. Raises ValueError for an unknown one."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; known are {', '.join(METHODS)}")
    found: dict[str, Any] = {}
    for kind in reversed(METHODS[method].__mro__):
        if "__init__" in vars(kind) and issubclass(kind, ZeroOrder):
            parameters = inspect.signature(kind.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    return found


def create(method: str, model: nn.Module, **changes: Any) -> ZeroOrder:
    """The optimizer of a named method; `changes` are further or other arguments of its class."""
    known = arguments(method)
    for name in changes.keys() - known.keys():
        raise ValueError(f"method {method} has no argument {name!r}; it has {', '.join(known)}")
    return METHODS[method](model, **changes)
