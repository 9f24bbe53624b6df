"""Factors of a low-rank term: coefficients on a fixed basis, and pairs that are renewed now and then."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..basis import recompress
from ..formats import CHUNK
from ..layers import ZOLinear, zo_layers
from ..parameters import Factors, Perturbed, ZODense, ZOEmbedding
from ..perturbation import Perturbation
from .base import Trainable, untied_layers
from .weight import Weight, weights


class Coefficients(Trainable):
    """C of a ZOLinear, noise Z [N, R]."""

    def __init__(self, name: str, layer: ZOLinear) -> None:
        assert layer.coeff is not None
        self.name, self.parameter = name, f"{name}.weight"
        self.layer, self.value, self.param_id = layer, layer.coeff, layer.param_id
        self.basis_shape = layer.in_features, layer.rank

    @property
    def basis(self) -> Tensor | None:
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


class LowRank(Trainable):
    """C [N, R] against a V [K, R] that the method renews: W + C V^T, noise Z [N, R].

    When V is renewed, what C has come to goes into W, from fp32 and once in many steps; beside a frozen W it goes into
    the layer's delta (base_basis, base_coeff), re-compressed to a bounded rank. So no step writes W, all layers move in
    one launch, moments are of C's size, and what a step adds is never rounded to 16 bits on its own.

    weight: W [N, K], which is written, or None where it is frozen. sites: the modules that have W, or one ZOLinear.
    owners: which unswapped modules have matrices of this kind.
    """

    owners: tuple[type[Perturbed], ...] = (ZODense, ZOEmbedding)

    def __init__(
        self, name: str, parameter: str, param_id: Tensor, coeff: Tensor, basis: Tensor, weight: Tensor | None,
        sites: list[tuple[nn.Module, str]],
    ) -> None:  # fmt: skip
        self.name, self.parameter, self.param_id = name, parameter, param_id
        self.value = self.coeff = coeff
        self._basis, self.weight, self.sites = basis, weight, sites
        self.basis_shape = tuple(basis.shape)  # type: ignore[assignment]
        self.basis_id = torch.tensor([rng.param_id(f"{parameter}#V")], device=param_id.device)

    @classmethod
    def of_layer(cls, name: str, layer: ZOLinear, rank: int, delta_rank: int) -> LowRank:
        """Takes over what the layer has learned before; delta_rank: of its delta, if W is frozen."""
        name, device = rng.strip_prefixes(name), layer.weight.device
        rank = cls.fitting(rank, layer.out_features, layer.in_features)
        if rank > layer.in_features:
            raise ValueError(f"rank is {rank}; {name}.weight is {layer.out_features} x {layer.in_features}")
        if not layer.frozen and layer.layout != "row":
            layer.weight, layer.layout = layer.packed().to_layout("row").weight, "row"
        weight = None if layer.frozen else layer.weight
        before = [(layer.base_basis, layer.base_coeff), (layer.basis, layer.coeff)]
        learned = [(a, c.detach()) for a, c in before if a is not None and c is not None]
        learned = [(a[:, used], c[:, used]) for a, c in learned if (used := c.any(0)).any()]
        layer.base_basis = layer.base_coeff = None
        if weight is not None:
            for a, c in learned:
                add_low_rank(weight, c, a, layer.param_id, torch.zeros(1, dtype=torch.int64))
        else:
            a = torch.cat([torch.zeros(layer.in_features, 0, device=device), *(a for a, _ in learned)], dim=1)
            c = torch.cat([torch.zeros(layer.out_features, 0, device=device), *(c for _, c in learned)], dim=1)
            layer.base_basis, layer.base_coeff, _ = recompress(a, c, max(delta_rank, a.shape[1]))
        layer.set_basis(torch.zeros(layer.in_features, rank, device=device))
        assert layer.coeff is not None and layer.basis is not None
        sites: list[tuple[nn.Module, str]] = [(layer, "weight")]
        return cls(name, f"{name}.weight", layer.param_id, layer.coeff, layer.basis, weight, sites)

    @classmethod
    def of_weight(cls, w: Weight, rank: int) -> LowRank:
        """The same of a table, or of a linear that was not swapped."""
        rank = cls.fitting(rank, *w.value.shape)
        coeff, basis = (torch.zeros(size, rank, device=w.value.device) for size in w.value.shape)
        for owner, key in w.sites:
            assert isinstance(owner, Perturbed)
            owner.zo_factors[key] = Factors(basis, coeff)
        return cls(w.name, w.name, w.param_id, coeff, basis, w.value, w.sites)

    @staticmethod
    def fitting(rank: int, N: int, K: int) -> int:
        """The rank that a matrix [N, K] gets where `rank` is asked for."""
        return rank

    @property
    def basis(self) -> Tensor | None:
        return self._basis

    @basis.setter
    def basis(self, basis: Tensor | None) -> None:
        assert basis is not None
        self._basis.copy_(basis)

    @torch.no_grad()
    def renew(self, seed: Tensor) -> tuple[Tensor, float]:
        """Fold C, draw V from `seed` (int64 [1], on the device). Returns (V_old^T V_new / K [R, R], error of the fold).

        The error is that of the re-compression, relative; 0 where W takes all.
        """
        error, old = 0.0, self._basis.clone()
        if self.weight is not None:
            add_low_rank(self.weight, self.coeff, old, self.param_id, seed)
        else:
            layer = self.sites[0][0]
            assert isinstance(layer, ZOLinear) and layer.base_basis is not None and layer.base_coeff is not None
            a, c = torch.cat([layer.base_basis, old], 1), torch.cat([layer.base_coeff, self.coeff], 1)
            a, c, error = recompress(a, c, layer.base_basis.shape[1])
            layer.base_basis.copy_(a)
            layer.base_coeff.copy_(c)
        self.value.zero_()
        self.coeff.zero_()
        self.draw(seed)
        return old.T @ self._basis / len(old), error

    def draw(self, seed: Tensor) -> None:
        """V ~ N(0, 1), noise of the parameter `name#V`."""
        fill_normal(self._basis, seed, self.basis_id)

    def check(self) -> None:
        owner, key = self.sites[0]
        if isinstance(owner, ZOLinear):
            same = owner.coeff is self.coeff and owner.basis is self._basis
        else:
            same = isinstance(owner, Perturbed) and owner.zo_factors[key].coeff is self.coeff
        if not same or (self.weight is not None and getattr(owner, key).data_ptr() != self.weight.data_ptr()):
            raise RuntimeError(
                f"{self.name} has other tensors since; make the optimizer after moving or copying a model"
            )

    def held(self) -> dict[str, Tensor]:
        if self.weight is not None:
            return {"weight": self.weight}
        layer = self.sites[0][0]
        assert isinstance(layer, ZOLinear) and layer.base_basis is not None and layer.base_coeff is not None
        return {"base_basis": layer.base_basis, "base_coeff": layer.base_coeff}

    def room(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mine = self.held()
        if self.weight is None and "base_basis" in held:  # a delta that began with more has more columns
            width = held["base_basis"].shape[-1]
            mine |= {key: mine[key].new_zeros(len(mine[key]), width) for key in ("base_basis", "base_coeff")}
        return mine

    def take(self, held: Mapping[str, Tensor]) -> None:
        if self.weight is None:
            layer, room = self.sites[0][0], self.room(held)
            layer.base_basis, layer.base_coeff = room["base_basis"], room["base_coeff"]
        super().take(held)

    def written(self) -> list[Tensor]:
        return [] if self.weight is None else [self.weight]

    def whole(self) -> Tensor | None:
        """W + C V^T, a copy on the CPU; None for a frozen W."""
        if self.weight is None:
            return None
        return (self.weight.float() + self.coeff.detach() @ self._basis.T).to(self.weight.dtype).cpu()

    def anatomy(self) -> dict[str, Any]:
        owner, (K, R), N = self.sites[0][0], self._basis.shape, self.coeff.shape[0]
        told = {"name": self.name, "param_id": int(self.param_id)}
        if not isinstance(owner, ZOLinear):
            assert self.weight is not None
            return {**told, "shape": [N, K], "dtype": str(self.weight.dtype).removeprefix("torch."), "rank": R}
        dtype = "" if self.weight is None else str(self.weight.dtype).removeprefix("torch.")
        return {**told, "out_features": N, "in_features": K, "rank": R, "origin": owner.origin, "written": dtype}


class Core(LowRank):
    """S [R, R] between U [N, R] and V [K, R], both orthonormal and renewed together: W + c U S V^T, noise Z [R, R].

    c = sqrt(N K) / R makes the mean squared norm of a direction N K, as of a dense one. coeff is c U S, which is what
    the forward and the fold see.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        (N, R), K, device = self.coeff.shape, self._basis.shape[0], self.coeff.device
        self.value, self.left = torch.zeros(R, R, device=device), torch.zeros(N, R, device=device)
        self.scale = math.sqrt(N * K) / R
        self.left_id = torch.tensor([rng.param_id(f"{self.parameter}#U")], device=device)
        factors = Factors(self._basis, self.coeff, self.left, self.scale)
        for owner, key in self.sites:
            if isinstance(owner, ZOLinear):
                owner.probe = functools.partial(probe_core, factors)
            elif isinstance(owner, Perturbed):
                owner.zo_factors[key] = factors

    @staticmethod
    def fitting(rank: int, N: int, K: int) -> int:
        """No more than there are directions: a head of two classes has two."""
        return min(rank, N, K)

    def draw(self, seed: Tensor) -> None:
        """U and V: Q of the QR of normal matrices whose R has a positive diagonal, which makes it unique."""
        for factor, param_id in ((self._basis, self.basis_id), (self.left, self.left_id)):
            fill_normal(factor, seed, param_id)
            q, r = torch.linalg.qr(factor.double())
            factor.copy_(q * torch.where(r.diagonal() < 0, -1.0, 1.0))

    @torch.no_grad()
    def settle(self) -> None:
        self.coeff.copy_(self.scale * (self.left @ self.value))

    def held(self) -> dict[str, Tensor]:
        return {**super().held(), "left": self.left}


def probe_core(factors: Factors, layer: ZOLinear, x: Tensor, sigmas: Tensor, bias: Tensor | None) -> Tensor:
    """y_g = x_g (W + c U (S + sum_s sigmas[g, s] Z_s) V^T)^T + bias."""
    own = factors.coeff_groups(layer.perturbation, sigmas, layer.param_id)
    return torch.ops.zoact.zo_linear(
        x, layer.weight, layer.scale, layer.offset, layer.nested, bias, layer.base_basis, layer.base_coeff,
        factors.basis, factors.coeff, own, None, None, None, None, layer.format, layer.layout, layer.group_size,
        layer.out_features, groups=sigmas.shape[0],
    )  # fmt: skip


def fill_normal(out: Tensor, seed: Tensor, param_id: Tensor) -> None:
    """out [rows, cols] fp32 <- Z."""
    torch.ops.zoact.zo_perturb_(out.zero_(), seed, torch.ones(1, device=seed.device), param_id)


def add_low_rank(w: Tensor, coeff: Tensor, basis: Tensor, param_id: Tensor, seed: Tensor) -> None:
    """w [N, K] += coeff basis^T, in place; in 16 bits from fp32, rounded stochastically by `seed`."""
    if w.dtype == torch.float32:
        w.addmm_(coeff, basis.T)
        return
    rows = max(1, CHUNK // w.shape[1])
    for start in range(0, len(w), rows):
        panel = w[start : start + rows].float().addmm_(coeff[start : start + rows], basis.T)
        w[start : start + rows] = rng.round_stochastic(panel, w.dtype, seed, param_id, row_offset=start)


def low_rank(
    model: nn.Module, handle: Perturbation, rank: int, delta_rank: int, kind: type[LowRank] = LowRank
) -> list[Trainable]:
    """Every matrix that is a `kind` as one, every other parameter itself; packed tables stay as they are."""
    layers = [kind.of_layer(name, layer, rank, delta_rank) for name, layer in untied_layers(model).items()]
    others = weights(model, handle, swapped=False)
    found: list[Trainable] = [*layers]
    for w in others:
        matrix = w.key == "weight" and all(isinstance(owner, kind.owners) for owner, _ in w.sites)
        found.append(kind.of_weight(w, rank) if matrix else w)
    order = {rng.strip_prefixes(name): i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda t: order[t.parameter.rpartition(".")[0]])  # a replay finds them in this order
