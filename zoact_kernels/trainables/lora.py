"""The factors of a LoRA beside a frozen weight of any format.

    y = x D(W)^T + (x A)(alpha / rank B)^T        A [K, R] is lora_A^T, Kaiming-uniform;  B [N, R] is lora_B, 0

The layer holds alpha / rank A as its basis and B as its coefficients, so B moves as coefficients do and an export has
scale 1.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..layers import ZOLinear, zo_layers
from ..perturbation import group_values
from .base import Trainable, untied_layers
from .factors import Coefficients


class LoraB(Coefficients):
    """B [N, R], over what the layer had learned before (its base delta).

    fixed: whether A stays as it is, and so is a basis; else it is a trainable of its own (LoraA).
    """

    def __init__(self, name: str, layer: ZOLinear, fixed: bool) -> None:
        super().__init__(name, layer)
        self.fixed = fixed
        if not fixed:
            self.basis_shape = None

    @property
    def basis(self) -> Tensor | None:
        return self.layer.basis if self.fixed else None

    @basis.setter
    def basis(self, basis: Tensor | None) -> None:
        self.layer.basis = basis

    def held(self) -> dict[str, Tensor]:
        layer = self.layer
        if layer.base_basis is None or layer.base_coeff is None:
            return {}
        return {"base_basis": layer.base_basis, "base_coeff": layer.base_coeff}

    def room(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sizes = {"base_basis": self.layer.in_features, "base_coeff": self.layer.out_features}
        rank = next((tensor.shape[-1] for tensor in held.values()), 0)
        return {k: self.layer.weight.new_zeros(n, rank, dtype=torch.float32) for k, n in sizes.items()} if held else {}

    def take(self, held: Mapping[str, Tensor]) -> None:
        room = self.room(held)
        self.layer.base_basis, self.layer.base_coeff = room.get("base_basis"), room.get("base_coeff")
        super().take(held)


class LoraA(Trainable):
    """A [K, R], noise Z_A [K, R] of the parameter `name#A`: a row group runs with both factors moved,

    D(W) + alpha / rank (B + sum_s sigmas[g, s] Z_s) (A + sum_s sigmas[g, s] Z_As)^T, the product of the two noises
    included. That is no sum of fixed directions, so each row group gets its own A: G copies of [K, R] in a forward.
    """

    def __init__(self, name: str, layer: ZOLinear, a: Tensor, scale: float) -> None:
        assert layer.basis is not None
        self.name, self.parameter, self.of = f"{name}#A", f"{name}.weight#A", name
        self.layer, self.value, self.scale, self.scaled = layer, a, scale, layer.basis
        self.param_id = torch.tensor([rng.param_id(self.parameter)], device=a.device)
        self.probe = layer.probe = functools.partial(probe_pair, a, self.param_id, scale)

    @torch.no_grad()
    def settle(self) -> None:
        torch.mul(self.value, self.scale, out=self.scaled)

    def check(self) -> None:
        if self.layer.basis is not self.scaled or self.layer.probe is not self.probe:
            raise RuntimeError(
                f"layer {self.of} got another basis or method since; make the optimizer after moving or copying a model"
            )

    def anatomy(self) -> dict[str, Any]:
        return {"name": self.name, "param_id": int(self.param_id), "beside": self.of}


def probe_pair(
    a: Tensor, param_id: Tensor, scale: float, layer: ZOLinear, x: Tensor, sigmas: Tensor, bias: Tensor | None
) -> Tensor:
    """y_g = x_g D(W)^T + scale (x_g A_g) (B + sum_s sigmas[g, s] Z_s)^T + bias, A_g = A + sum_s sigmas[g, s] Z_As."""
    p = layer.perturbation
    own = group_values(a, p, sigmas, param_id).mul_(scale)
    return torch.ops.zoact.zo_linear(
        x, layer.weight, layer.scale, layer.offset, layer.nested, bias, layer.base_basis, layer.base_coeff, own,
        layer.coeff, None, None, p.seeds, sigmas, layer.param_id, layer.format, layer.layout, layer.group_size,
        layer.out_features, p.noise, sigmas.shape[0],
    )  # fmt: skip


def loras(
    model: nn.Module, targets: Sequence[str] | str, rank: int, alpha: float, seed: int, *, both: bool
) -> list[Trainable]:
    """A LoRA of `rank` in each layer that `targets` name, B alone or `both` factors trained, A drawn by `seed`.

    targets: last parts of layer names ("q_proj"), or patterns of whole ones ("model.layers.0.*"), as a list or in one
    text with commas. What these layers learned before stays as their base delta. Raises ValueError for a target without
    a layer, a rank that is larger than a layer's in_features, and for learned coefficients elsewhere, with nothing
    changed.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; it has to be positive and finite")
    chosen = _chosen(untied_layers(model), targets)
    for name, layer in chosen.items():
        if not 1 <= rank <= layer.in_features:
            raise ValueError(f"rank is {rank}; {name} with in_features={layer.in_features} allows 1 to that")
    set_aside(model, chosen)
    found: list[Trainable] = []
    for name, layer in chosen.items():
        name = rng.strip_prefixes(name)
        a, scale = kaiming(name, layer, rank, seed), alpha / rank
        layer.set_basis(a * scale)
        found.append(LoraB(name, layer, fixed=not both))
        if both:
            found.append(LoraA(name, layer, a, scale))
    return found


def kaiming(name: str, layer: ZOLinear, rank: int, seed: int) -> Tensor:
    """A [K, R] fp32, uniform in +-1/sqrt(K): Kaiming's for a slope of sqrt(5), as LoRA has it; drawn as `name#A`."""
    K, device = layer.in_features, layer.weight.device
    u = rng.uniform(seed, rng.param_id(f"{name}.weight#A"), K, rank, device=device).double()  # rounded once
    return ((2 * u - 1) / math.sqrt(K)).float()


def _chosen(layers: Mapping[str, ZOLinear], targets: Sequence[str] | str) -> dict[str, ZOLinear]:
    if isinstance(targets, str):
        targets = [target for target in targets.split(",") if target]
    if not targets:
        raise ValueError("targets is empty; it has names of layers, as in ['q_proj', 'v_proj']")
    last = {name: name.rpartition(".")[2] for name in layers}
    hits = {t: [n for n in layers if last[n] == t or fnmatch.fnmatchcase(n, t)] for t in targets}
    for target, names in hits.items():
        if not names:
            raise ValueError(
                f"targets has {target!r}, and no swapped layer is called so; give some of: "
                f"{', '.join(sorted(set(last.values())))}"
            )
    return {name: layer for name, layer in layers.items() if any(name in names for names in hits.values())}


def set_aside(model: nn.Module, chosen: Mapping[str, ZOLinear]) -> None:
    """Coefficients of an earlier method become part of the base delta of `chosen` layers; others may have none.

    Raises ValueError, before anything is changed, for learned coefficients elsewhere.
    """
    layers = zo_layers(model)
    for name, layer in layers.items():
        if name not in chosen and layer.coeff is not None and layer.basis is not None and bool(layer.coeff.any()):
            raise ValueError(
                f"{name} has learned coefficients, which are not trained here: add it to the targets if there are any, "
                "or merge them first"
            )
    for layer in layers.values():
        if layer.coeff is not None and layer.basis is not None and (used := layer.coeff.detach().any(0)).any():
            a, c = layer.basis[:, used], layer.coeff.detach()[:, used]
            if layer.base_basis is not None and layer.base_coeff is not None:
                a, c = torch.cat([layer.base_basis, a], 1), torch.cat([layer.base_coeff, c], 1)
            layer.base_basis, layer.base_coeff = a.contiguous(), c.contiguous()
        layer.rank, layer.coeff, layer.basis = 0, None, None
