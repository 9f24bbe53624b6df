"""S [Q, R] between a basis of a layer's outputs and one of its inputs, both fixed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..layers import ZOLinear, base_product, zo_layers
from ..perturbation import Perturbation
from .base import Trainable


class Between(Trainable):
    """S [Q, R] of a ZOLinear: D(W) + U S A^T, U [N, Q] `layer.out_basis`, A [K, R] its basis; noise Z [Q, R].

    coeff is U S, which is what a clean forward and an export see.
    """

    def __init__(self, name: str, layer: ZOLinear) -> None:
        assert layer.coeff is not None and layer.basis is not None and layer.out_basis is not None
        self.name, self.parameter = name, f"{name}.weight"
        self.layer, self.coeff, self.left, self.param_id = layer, layer.coeff, layer.out_basis, layer.param_id
        self.value = torch.zeros(self.left.shape[1], layer.rank, device=self.left.device)
        self.basis_shape = layer.in_features, layer.rank
        layer.probe = functools.partial(probe_between, self)

    @property
    def basis(self) -> Tensor | None:
        return self.layer.basis

    @basis.setter
    def basis(self, basis: Tensor | None) -> None:
        self.layer.basis = basis

    @torch.no_grad()
    def settle(self) -> None:
        self.coeff.copy_(self.left @ self.value)

    def check(self) -> None:
        if self.layer.coeff is not self.coeff:
            raise RuntimeError(f"layer {self.name} got another coeff since; create the optimizer after setting bases")
        if not self.left.is_inference() and not self.left._version:  # asked of the host: a look would wait
            raise RuntimeError(f"layer {self.name} has bases of zeros, which learn nothing; call `prepare` first")

    def held(self) -> dict[str, Tensor]:
        return {"left": self.left}

    def anatomy(self) -> dict[str, Any]:
        layer = self.layer
        return {
            "name": self.name, "param_id": int(layer.param_id), "out_features": layer.out_features,
            "in_features": layer.in_features, "rank": layer.rank, "origin": layer.origin,
        }  # fmt: skip


class Nodes(Between):
    """S [Q, R] as above, and noise on the output along U: D(W) + U S A^T, y + Z U^T, each row of y its own of Z [n, Q].

    noise, rows: Z_s [S, n, Q] and x A [n, R], mean over the groups, of the last perturbed forward.
    """

    noise: Tensor
    rows: Tensor

    def __init__(self, name: str, layer: ZOLinear) -> None:
        super().__init__(name, layer)
        layer.probe = functools.partial(probe_nodes, self)


def probe_between(own: Between, layer: ZOLinear, x: Tensor, sigmas: Tensor, bias: Tensor | None) -> Tensor:
    """y_g = x_g (D(W) + U (S + sum_s sigmas[g, s] Z_s) A^T)^T + bias, the product with W once for equal copies of x."""
    y, h, copies = _given(own, layer, x, bias)
    h = h.repeat(copies, *(1,) * (h.dim() - 1)).view(sigmas.shape[0], -1, own.value.shape[1])
    side = (h @ group_cores(own.value, layer.perturbation, sigmas, own.param_id).mT) @ own.left.T
    return _joined(y, side, copies, x)


def probe_nodes(own: Nodes, layer: ZOLinear, x: Tensor, sigmas: Tensor, bias: Tensor | None) -> Tensor:
    """y_g = x_g (D(W) + U S A^T)^T + bias + (sum_s sigmas[g, s] Z_s) U^T, Z_s [n, Q] a row for each of a group's n."""
    y, h, copies = _given(own, layer, x, bias)
    p, (groups, Q, R) = layer.perturbation, (sigmas.shape[0], *own.value.shape)
    own.noise = noises(p, own.param_id, x[..., 0].numel() // groups, Q)
    h = h.repeat(copies, *(1,) * (h.dim() - 1)).view(groups, -1, R)
    own.rows = h.mean(dim=0)
    side = (h @ own.value.T + torch.tensordot(sigmas, own.noise, 1)) @ own.left.T
    return _joined(y, side, copies, x)


def _given(own: Between, layer: ZOLinear, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """(base product, x A) of as many rows of x as its equal copies have, or of all, and the number of copies."""
    p = layer.perturbation
    assert own.basis is not None
    if layer.known is not None:
        one, y = layer.known
    else:
        one = x[: len(x) // p.copies] if len(x) % p.copies == 0 else x
        if not torch.equal(x.view(-1, *one.shape), one.expand(len(x) // len(one), *one.shape)):
            one = x
        y = base_product(layer, one, bias)
    return y, one.float() @ own.basis, len(x) // len(one)


def _joined(y: Tensor, side: Tensor, copies: int, x: Tensor) -> Tensor:
    return (y.float() + side.view(copies, *y.shape)).to(y.dtype).view(*x.shape[:-1], -1)


def group_cores(value: Tensor, p: Perturbation, sigmas: Tensor, param_id: Tensor) -> Tensor:
    """value + sum_s sigmas[g, s] Z_s of every row group, [G, Q, R]: every Z_s is made once, however many groups."""
    z = noises(p, param_id, *value.shape)
    return torch.addmm(value.flatten(), sigmas, z.flatten(1)).view(-1, *value.shape)


def noises(p: Perturbation, param_id: Tensor, rows: int, cols: int) -> Tensor:
    """Z_s [S, rows, cols] of all seeds."""
    z = torch.zeros(len(p.seeds), rows, cols, device=p.seeds.device)
    one = torch.ones(1, device=z.device)
    for own, seed in zip(z, p.seeds.split(1), strict=True):
        torch.ops.zoact.zo_perturb_(own, seed, one, param_id, noise=p.noise)
    return z


def between(model: nn.Module, kind: type[Between] = Between) -> list[Trainable]:
    """S of every layer with bases on both sides. Raises ValueError if there is none."""
    found: list[Trainable] = [
        kind(rng.strip_prefixes(name), layer) for name, layer in zo_layers(model).items() if layer.out_basis is not None
    ]
    if not found:
        raise ValueError("no layer of the model has bases of its inputs and outputs; `prepare` gives them")
    return found
