"""What a method moves: one object for each parameter, with how a forward perturbs it and what a snapshot holds of it.

    kind           value [rows, cols] = shape of Z      row group g runs with
    Coefficients   C [N, R] of a ZOLinear with a basis  D(W) + (C + sum_s sigmas[g, s] Z_s) A^T
    Weight         any parameter of a dense model       W + sum_s sigmas[g, s] Z_s
    Scales         the scales of a low-bit weight       (q - zero) (scale + sum_s sigmas[g, s] Z_s)
    LowRank        a matrix, V renewed now and then     W + (C + sum_s sigmas[g, s] Z_s) V^T
    Core           a matrix, U and V renewed            W + c U (S + sum_s sigmas[g, s] Z_s) V^T

A rule (optim) moves `value` along the same Z: probe and update address the noise by (seed, param_id, row, column), and
both take it from one of these objects.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import rng
from .basis import recompress
from .embedding import PackedEmbedding
from .formats import CHUNK
from .layers import Mask, Perturbation, ZOLinear, zo_layers
from .optim import check_entries
from .parameters import Factors, Perturbed, ZODense, ZOEmbedding, perturb


class Trainable:
    """One parameter. name: unique in the model. value [rows, cols]: what the rule moves in place, along a Z so shaped.

    param_id: int64 [1], of the noise. gain: what a method's direction multiplies the estimate along Z by.
    basis: A [K, R] where there is one, which several trainables may share.
    """

    name: str
    value: Tensor
    param_id: Tensor
    parameter: str  # its name in the base model
    gain = 1.0
    mask = Mask()
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

    def settle(self) -> None:
        """Bring what follows from `value` up to date: called after it was moved or loaded, on the device alone."""

    def written(self) -> list[Tensor]:
        """The tensors of the base model that training changes."""
        return []

    def whole(self) -> Tensor | None:
        """The trained parameter of the base model, in its own shape, a copy on the CPU; None if an adapter holds it."""
        return None

    def anatomy(self) -> dict[str, Any]:
        """What a replay without the model has to know, as JSON values."""
        raise NotImplementedError


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


class Weight(Trainable):
    """A parameter itself: value is a view of it as [first size, rest], so the noise of an entry is at its flat address.

    A vector [n] is [n, 1]. owner, key: the module that has it.
    """

    def __init__(self, name: str, owner: nn.Module, key: str, param_id: Tensor) -> None:
        self.name = self.parameter = name
        self.owner, self.key, self.param_id = owner, key, param_id
        self.value = self._current().view(self._current().shape[0], -1)
        self.sites = [(owner, key)]  # several where it is tied

    def cover(self, mask: Mask) -> None:
        """Only what `mask` lets take part is perturbed and moved from now on."""
        self.mask = mask
        for owner, key in self.sites:
            if isinstance(owner, Perturbed):
                owner.zo_masks[key] = mask
            elif isinstance(owner, ZOLinear):
                setattr(owner, "mask" if key == "weight" else "bias_mask", mask)

    def held(self) -> dict[str, Tensor]:
        """The threshold of a mask by magnitude, which is that of the weights at the beginning."""
        return {"mask": self.mask.value} if self.mask.kind == "magnitude" and self.mask.value is not None else {}

    def take(self, held: Mapping[str, Tensor]) -> None:
        mine = self.held()
        check_entries(held, mine, f"state of {self.name}")
        for key, tensor in mine.items():
            tensor.copy_(held[key])

    def _current(self) -> Tensor:
        tensor = getattr(self.owner, self.key)
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    def check(self) -> None:
        if self._current().data_ptr() != self.value.data_ptr():
            raise RuntimeError(
                f"{self.name} is another tensor since; make the optimizer after moving or copying a model"
            )

    def written(self) -> list[Tensor]:
        return [self.value]

    def whole(self) -> Tensor:
        return self._current().to("cpu", copy=True)

    def anatomy(self) -> dict[str, Any]:
        current = self._current()
        return {
            "name": self.name,
            "param_id": int(self.param_id),
            "shape": list(current.shape),
            "dtype": str(current.dtype).removeprefix("torch."),
        }


class Scales(Trainable):
    """The scales [N, groups] of a low-bit weight, in fp32; the codes stay: w = (q - zero) (scale + sum sigma Z).

    zero = -offset / scale stays too, so an offset moves with its scale. floor: no scale comes nearer to 0, unless it
    began there; those that are negative (as GGUF has them) stay so. Untouched scales and offsets keep their bits.
    """

    def __init__(self, name: str, layer: ZOLinear, floor: float) -> None:
        packed = layer.packed().to_layout("row")
        if packed.scale is None or packed.flat:
            why = "has blocks that run across rows" if packed.flat else "has no scales"
            raise ValueError(f"{name} is {packed.format} and {why}; this method trains the scales of a low-bit model")
        self.name, self.parameter, self.param_id, self.layer = name, f"{name}.scale", layer.param_id, layer
        self.start, offsets = packed.scales().contiguous(), packed.offsets()
        self.value, self.floor = self.start.clone(), floor
        self.offset = None if offsets is None else offsets.contiguous()
        if self.offset is not None:
            self.start_offset = self.offset.clone()
            self.ratio = torch.where(self.start == 0, torch.zeros_like(self.start), self.offset / self.start)
        layer.weight, layer.layout, layer.nested = packed.weight, "row", None
        layer.scale, layer.offset = self.value, self.offset
        layer.probe = probe_scales

    @torch.no_grad()
    def settle(self) -> None:
        sign = torch.where(self.start < 0, -1.0, 1.0)
        self.value.copy_(sign * torch.maximum(sign * self.value, self.start.abs().clamp(max=self.floor)))
        if self.offset is not None:
            # A group of scale 0 is one value, its offset: it has no zero point to keep.
            still = (self.value == self.start) | (self.start == 0)
            self.offset.copy_(torch.where(still, self.start_offset, self.ratio * self.value))

    def check(self) -> None:
        if self.layer.scale is not self.value:
            raise RuntimeError(
                f"{self.name} has other scales since; make the optimizer after moving or copying a model"
            )

    def held(self) -> dict[str, Tensor]:
        if self.offset is None:
            return {"start": self.start}
        return {"start": self.start, "start_offset": self.start_offset, "ratio": self.ratio}

    def take(self, held: Mapping[str, Tensor]) -> None:
        mine = self.held()
        check_entries(held, mine, f"state of {self.name}")
        for key, tensor in mine.items():
            tensor.copy_(held[key])

    def written(self) -> list[Tensor]:
        return [self.value] if self.offset is None else [self.value, self.offset]

    def whole(self) -> Tensor:
        return self.value.to("cpu", copy=True)

    def anatomy(self) -> dict[str, Any]:
        layer = self.layer
        return {
            "name": self.name, "param_id": int(self.param_id), "out_features": layer.out_features, "rank": 0,
            "in_features": layer.in_features, "origin": layer.origin, "format": layer.format,
            "group_size": layer.group_size, "offset": self.offset is not None,
        }  # fmt: skip


def probe_scales(layer: ZOLinear, x: Tensor, sigmas: Tensor, bias: Tensor | None) -> Tensor:
    """y_g = x_g ((q - zero) (scale + sum_s sigmas[g, s] Z_s))^T + bias."""
    p = layer.perturbation
    return torch.ops.zoact.zo_dense_linear(
        x, layer.weight, layer.scale, layer.offset, layer.nested, bias, p.seeds, sigmas, layer.param_id, None, None,
        None, layer.format, layer.layout, layer.group_size, layer.out_features, p.noise, "scale", "none",
        sigmas.shape[0],
    )  # fmt: skip


class LowRank(Trainable):
    """C [N, R] against a V [K, R] that the method renews: W + C V^T, noise Z [N, R].

    When V is renewed, what C has come to goes into W, from fp32 and once in many steps; beside a frozen W it goes into
    the layer's delta (base_basis, base_coeff), re-compressed to a bounded rank. So no step writes W, all layers move in
    one launch, moments are of C's size, and what a step adds is never rounded to 16 bits on its own.

    weight: W [N, K], which is written, or None where it is frozen. sites: the modules that have W, or one ZOLinear.
    """

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

    def take(self, held: Mapping[str, Tensor]) -> None:
        mine = self.held()
        if self.weight is None and "base_basis" in held:  # a delta that began with more has more columns
            width = held["base_basis"].shape[-1]
            mine |= {key: mine[key].new_zeros(len(mine[key]), width) for key in ("base_basis", "base_coeff")}
        check_entries(held, mine, f"state of {self.name}")
        for key, tensor in mine.items():
            tensor.copy_(held[key])
        if self.weight is None:
            layer = self.sites[0][0]
            layer.base_basis, layer.base_coeff = mine["base_basis"], mine["base_coeff"]

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


def probe_dense(layer: ZOLinear, x: Tensor, sigmas: Tensor, bias: Tensor | None) -> Tensor:
    """y_g = x_g (W + sum_s sigmas[g, s] Z_s)^T + bias."""
    p = layer.perturbation
    return torch.ops.zoact.zo_dense_linear(
        x, layer.weight, layer.scale, layer.offset, layer.nested, bias, p.seeds, sigmas, layer.param_id, None,
        layer.mask.value, layer.mask.seed, layer.format, layer.layout, layer.group_size, layer.out_features, p.noise,
        "weight", layer.mask.kind, sigmas.shape[0],
    )  # fmt: skip


def weights(
    model: nn.Module, handle: Perturbation, *, swapped: bool = True, only: Callable[[str, Tensor], bool] | None = None
) -> list[Weight]:
    """Every parameter of a dense model, in module order, one that is tied once; `handle` is what perturbs them.

    swapped: False leaves out the weights of swapped layers and packed tables, which may then be in few bits. only:
    predicate (name, parameter) of those that take part among the others. Raises ValueError for weights in few bits
    otherwise, and for layers with coefficients of their own.
    """
    found: list[Weight] = []
    known: dict[int, Weight] = {}  # by the id of the parameter
    layers = zo_layers(model)
    taken = {int(layer.param_id) for layer in layers.values()}

    def param_id(name: str, device: torch.device) -> Tensor:
        number, tries = rng.param_id(name), 0
        while number in taken:
            tries += 1
            number = rng.param_id(f"{name}~{tries}")
        taken.add(number)
        return torch.tensor([number], device=device)

    for name, module in list(model.named_modules()):
        prefix = rng.strip_prefixes(f"{name}.") if name else ""
        if swapped and (isinstance(module, PackedEmbedding) or (isinstance(module, ZOLinear) and module.frozen)):
            raise ValueError(
                f"{name} is {module.format}, frozen, and this method trains the weights themselves: take the dense "
                "twin of the model (--dense, swap.dense_twin), or a method that trains something beside the weights"
            )
        if isinstance(module, ZOLinear) and swapped:
            if module.coeff is not None or module.base_coeff is not None:
                raise ValueError(f"{name} has coefficients beside its weight; swap with rank=0, or merge them first")
            if module.layout != "row":
                row = module.packed().to_layout("row")
                module.weight, module.layout = row.weight, "row"
            module.probe = probe_dense
            found.append(Weight(f"{prefix}weight", module, "weight", module.param_id))
        if isinstance(module, ZOLinear):
            if module.bias is not None and (only is None or only(f"{prefix}bias", module.bias)):
                module.bias_id = param_id(f"{prefix}bias", module.bias.device)
                found.append(Weight(f"{prefix}bias", module, "bias", module.bias_id))
            continue
        ids = {}
        for key, parameter in module._parameters.items():
            if parameter is None or not (only is None or only(f"{prefix}{key}", parameter)):
                continue
            if not parameter.is_contiguous():
                raise ValueError(f"{prefix}{key} is not contiguous; make it so before it is trained")
            if id(parameter) in known:
                known[id(parameter)].sites.append((module, key))
            else:
                number = param_id(f"{prefix}{key}", parameter.device)
                known[id(parameter)] = Weight(f"{prefix}{key}", module, key, number)
                found.append(known[id(parameter)])
            ids[key] = known[id(parameter)].param_id
        if ids:
            perturb(module, name, ids, handle)
    return found


def low_rank(
    model: nn.Module, handle: Perturbation, rank: int, delta_rank: int, kind: type[LowRank] = LowRank
) -> list[Trainable]:
    """Every matrix of a linear or a table as a `kind`, every other parameter itself; packed tables stay as they are."""
    layers = [kind.of_layer(name, layer, rank, delta_rank) for name, layer in untied_layers(model).items()]
    others = weights(model, handle, swapped=False)
    found: list[Trainable] = [*layers]
    for w in others:
        matrix = w.key == "weight" and all(isinstance(owner, ZODense | ZOEmbedding) for owner, _ in w.sites)
        found.append(kind.of_weight(w, rank) if matrix else w)
    order = {rng.strip_prefixes(name): i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda t: order[t.parameter.rpartition(".")[0]])  # a replay finds them in this order


def untied_layers(model: nn.Module) -> dict[str, ZOLinear]:
    """The ZOLinear layers by name, but for a head whose packed storage a table reads: a probe of the one would miss the
    other, and an update would move both.

    Raises ValueError if there is none.
    """
    heads = [module.head for module in model.modules() if isinstance(module, PackedEmbedding)]
    layers = {n: layer for n, layer in zo_layers(model).items() if not any(layer is head for head in heads)}
    if not layers:
        raise ValueError("`model` has no ZOLinear layer to train: swap it first")
    return layers


def scales(model: nn.Module, floor: float) -> list[Trainable]:
    """The scales of every low-bit layer, heads tied to a packed table left out."""
    return [Scales(rng.strip_prefixes(name), layer, floor) for name, layer in untied_layers(model).items()]


def coefficients(model: nn.Module) -> list[Trainable]:
    """C of every layer that has a rank, in module order. Raises ValueError if there is none."""
    found: list[Trainable] = [
        Coefficients(rng.strip_prefixes(name), layer) for name, layer in zo_layers(model).items() if layer.rank > 0
    ]
    if not found:
        raise ValueError("no layer of the model can be trained; swap it with ZOConfig(rank=1) or more")
    return found
