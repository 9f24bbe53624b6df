"""The state of an optimizer as one flat dict of tensors, which can be a safetensors file.

    <counter>            numbers of the optimizer itself, [] each
    coeff/<name>         the value of each trainable;  held/<name>/<key>  what else it has
    basis/<i>            A, once for all trainables that share it;  basis_of  int64 [L], the i of each, -1 for none
    rule/<key>           moments of the update rule;  method/<key>  what a method keeps besides

`state_of` makes one, `restore` takes it over whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .optim import check_entries
from .trainables import Trainable

WHAT = "state of the optimizer"


def state_of(
    counters: Mapping[str, Tensor], trainables: Mapping[str, Trainable], rule: Any, own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of all of it. rule: `optim.SGD` or like it; own: of the method, see `ZeroOrder.own_state`."""
    bases = {id(t.basis): t.basis for t in trainables.values() if t.basis is not None}
    order = list(bases)
    basis_of = [-1 if t.basis is None else order.index(id(t.basis)) for t in trainables.values()]
    state = {**counters, "basis_of": torch.tensor(basis_of)}
    state |= {f"basis/{i}": a.clone() for i, a in enumerate(bases.values())}
    state |= {f"coeff/{name}": value.detach().clone() for name, value in rule.coeffs.items()}
    for name, trainable in trainables.items():
        state |= {f"held/{name}/{key}": tensor.detach().clone() for key, tensor in trainable.held().items()}
    state |= {f"method/{key}": tensor.clone() for key, tensor in own.items()}
    return state | {f"rule/{key}": value for key, value in rule.state_dict().items()}


@torch.no_grad()
def restore(
    state: Mapping[str, Tensor],
    counters: Mapping[str, Tensor],
    trainables: Mapping[str, Trainable],
    rule: Any,
    own: Mapping[str, Tensor],
) -> None:
    """Take over what `state_of` gave for an equally configured optimizer; the counters are left to the caller.

    Raises ValueError for entries that are missing, unknown or of another shape, before anything is changed.
    """
    bases = {key: tensor for key, tensor in state.items() if key.startswith("basis/")}
    held: dict[str, dict[str, Tensor]] = {name: {} for name in trainables}
    rest: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, _, what = key.removeprefix("held/").rpartition("/")
        if key.startswith("held/") and name in held:
            held[name][what] = tensor
        elif not key.startswith(("rule/", "basis/")):
            rest[key] = tensor
    wanted = {**counters, "basis_of": torch.zeros(len(trainables))}
    wanted |= {f"coeff/{name}": value for name, value in rule.coeffs.items()}
    check_entries(rest, wanted | {f"method/{key}": tensor for key, tensor in own.items()}, WHAT)
    basis_of = dict(zip(trainables, state["basis_of"].tolist(), strict=True))
    for name, trainable in trainables.items():
        given = tuple(bases[f"basis/{basis_of[name]}"].shape) if f"basis/{basis_of[name]}" in bases else None
        if basis_of[name] >= 0 and given != trainable.basis_shape:
            raise ValueError(f"{WHAT}: the basis of {name} is {given}; here it is {trainable.basis_shape}")
        trainable.check_held(held[name])
    # The last to check, and the first to write
    rule.load_state_dict({key.removeprefix("rule/"): t for key, t in state.items() if key.startswith("rule/")})
    bases = {key: a.to(rule.param_ids.device, copy=True) for key, a in bases.items()}
    for name, trainable in trainables.items():
        if trainable.basis_shape is not None:
            trainable.basis = bases.get(f"basis/{basis_of[name]}")
        trainable.take(held[name])
        rule.coeffs[name].copy_(state[f"coeff/{name}"])
        trainable.settle()
    for key, tensor in own.items():
        tensor.copy_(state[f"method/{key}"])
