"""Ordinary modules whose own parameters a method perturbs: norms, biases, embeddings, linears that were not swapped.

    ZOVector      any module      runs once per row group, with parameters p + sum_s sigmas[g, s] Z_s (copies)
    ZOEmbedding   nn.Embedding    rows that are looked up get their rows of Z; the table is not copied
    ZODense       nn.Linear       one zo_dense_linear over all row groups

`perturb(module, ...)` mixes one of them into the module's class, as parametrisations of torch do: names, state_dict,
attributes and whoever holds the module see no difference, and outside `perturbed(...)` the module's own forward runs.
A parameter that several modules share (a tied head) has one param_id, hence one noise, in all of them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import rng
from .perturbation import Mask, Perturbation, Released, add_per_group, group_values, scaled


class Factors(NamedTuple):
    """A matrix W [N, K] that is W + C V^T, with noise on C: Z [N, R], or scale U Z with Z [R, R] where there is a U."""

    basis: Tensor  # V [K, R] fp32
    coeff: Tensor  # C [N, R] fp32
    left: Tensor | None = None  # U [N, R] fp32
    scale: float = 1.0

    def noise_of_rows(self, p: Perturbation, seed: Tensor, param_id: Tensor, rows: Tensor) -> Tensor:
        """Rows `rows` [n] of Delta, [n, K] fp32."""
        R = self.basis.shape[1]
        if self.left is None:
            return _product(rng.noise_of_rows(p.noise, seed, param_id, rows, R), self.basis.T)
        z = rng.noise(p.noise, seed, param_id, R, R, device=rows.device)
        return _product(self.scale * _product(self.left[rows], z), self.basis.T)

    def coeff_groups(self, p: Perturbation, sigmas: Tensor, param_id: Tensor) -> Tensor | None:
        """scale U sum_s sigmas[g, s] Z_s, [groups, N, R]; None without a U, where a kernel makes the noise."""
        if self.left is None:
            return None
        R = self.basis.shape[1]
        cores = group_values(self.basis.new_zeros(R, R), p, sigmas, param_id)
        return torch.stack([self.scale * (self.left @ core) for core in cores])  # one by one: the same bits for any G


class Perturbed(nn.Module, Released):
    """What the three have in common. zo_name: of the module, for messages."""

    perturbation: Perturbation
    zo_name: str
    zo_ids: dict[str, Tensor]  # of the parameters that are perturbed: key -> param_id, int64 [1]
    zo_masks: dict[str, Mask]
    zo_factors: dict[str, Factors]  # of a matrix that is trained through them
    zo_scales: dict[str, Tensor]  # fp32 [1], on the device: a parameter's own factor on sigmas

    def release(self) -> None:
        del self.perturbation, self.zo_name, self.zo_ids, self.zo_masks, self.zo_factors, self.zo_scales
        self.__class__ = type(self).__bases__[1]  # (this mixin, what it was)


class ZOVector(Perturbed):
    """Each row group runs with parameters of its own, in fp32 where they are stored in 16 bits.

    A clean group runs so too: it has to differ from the others by nothing but the noise.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        p = self.perturbation
        if not p.active:
            return super().forward(x, *args, **kwargs)
        if args or kwargs:
            raise ValueError(f"{self.zo_name!r} is called with more than one argument, whose rows can't be told apart")
        sigmas = p.sigmas_of(self.zo_name, x)
        moved = {key: _moved(self, key, sigmas) for key in self.zo_ids}
        usual = self._parameters
        dtype = _own(self, next(iter(self.zo_ids))).dtype
        fixed: dict[str, Any] = {key: None if v is None else v.detach().float() for key, v in usual.items()}
        rows = x.float() if x.is_floating_point() and dtype.itemsize < 4 else x
        parts = []
        try:
            for g, part in enumerate(rows.chunk(sigmas.shape[0])):
                self._parameters = fixed | {key: values[g] for key, values in moved.items()}
                parts.append(super().forward(part))
        finally:
            self._parameters = usual
        return torch.cat(parts).to(dtype)


class ZOEmbedding(Perturbed):
    """Row group g gets table[ids] + sum_s sigmas[g, s] Z_s[ids]: the same rows of noise that an update has.

    Ids [1, T] that a model looks up for all its sequences (positions) are looked up for each, as many as the table
    before it saw, since row groups can't share what they get.
    """

    def forward(self, ids: Tensor) -> Tensor:
        p, factors = self.perturbation, self.zo_factors.get("weight")
        ids = self.own_ids(ids) if p.active else ids
        table = super().forward(ids)
        dtype = table.dtype
        if factors is not None:
            table = table.float() + _product(factors.coeff[ids], factors.basis.T)
        if not p.active:
            return table.to(dtype)
        sigmas = scaled(p.sigmas_of(self.zo_name, ids), self.zo_scales.get("weight"))
        groups, width = sigmas.shape[0], table.shape[-1]
        rows, where = ids.reshape(-1), None
        if ids.device.type == "cpu":  # elsewhere it would wait for the device
            rows, where = rows.unique(return_inverse=True)
        moved = clean = table.reshape(groups, -1, width).float()
        mask = self.zo_masks.get("weight", Mask())
        for s, seed in enumerate(p.seeds):
            if factors is None:
                z = rng.noise_of_rows(p.noise, seed, self.zo_ids["weight"], rows, width)
            else:
                z = factors.noise_of_rows(p, seed, self.zo_ids["weight"], rows)
            if mask.kind == "random":
                assert mask.seed is not None and mask.value is not None
                z = z * rng.mask_of_rows(mask.seed, self.zo_ids["weight"], mask.value, rows, width)
            z = (z if where is None else z[where]).view(groups, -1, width)
            if mask.kind == "magnitude":
                assert mask.value is not None
                z = z * (clean.abs() <= mask.value)
            moved = moved + sigmas[:, s, None, None] * z
        return moved.to(dtype).view(table.shape)

    def own_ids(self, ids: Tensor) -> Tensor:
        """Ids of every sequence."""
        p = self.perturbation
        if len(ids) == 1 < p.sequences:
            return ids.expand(p.sequences, *ids.shape[1:])
        p.sequences = len(ids)
        return ids


class ZODense(Perturbed):
    """y_g = x_g (W + sum_s sigmas[g, s] Z_s)^T + b_g through one op."""

    def forward(self, x: Tensor) -> Tensor:
        p, factors = self.perturbation, self.zo_factors.get("weight")
        weight, bias = _own(self, "weight"), self._parameters["bias"]
        if not p.active and factors is None:
            return super().forward(x)
        sigmas = p.sigmas_of(self.zo_name, x) if p.active else p.sigmas[:1]
        own_sigmas = scaled(sigmas, self.zo_scales.get("weight"))
        if factors is not None:
            param_id, moves = self.zo_ids["weight"], p.active and "bias" in self.zo_ids
            own = factors.coeff_groups(p, own_sigmas, param_id) if p.active else None
            seeded = (p.seeds, own_sigmas, param_id) if p.active and own is None else (None, None, None)
            y = torch.ops.zoact.zo_linear(
                x, weight, None, None, None, None if moves else bias, None, None, factors.basis, factors.coeff, own,
                None, *seeded, "dense", "row", -1, weight.shape[0], p.noise, sigmas.shape[0] if p.active else 1,
            )  # fmt: skip
            return add_per_group(y, _moved(self, "bias", sigmas)) if moves else y
        noisy, mask = "weight" in self.zo_ids, self.zo_masks.get("weight", Mask())
        y = torch.ops.zoact.zo_dense_linear(
            x, weight, None, None, None, None if "bias" in self.zo_ids else bias,
            p.seeds if noisy else None, own_sigmas if noisy else None, self.zo_ids.get("weight"), None, mask.value,
            mask.seed, "dense", "row", -1, weight.shape[0], p.noise, "weight", mask.kind, sigmas.shape[0],
        )  # fmt: skip
        if bias is None or "bias" not in self.zo_ids:
            return y
        return add_per_group(y, _moved(self, "bias", sigmas))


def perturb(module: nn.Module, name: str, ids: dict[str, Tensor], perturbation: Perturbation) -> None:
    """From now on `perturbed` moves the parameters `ids` (key -> param_id) of a module that was not perturbed before.

    name: of the module, for messages. `layers.release` undoes it.
    """
    # A subclass with a forward of its own may do more than look up or multiply, so it runs as it is.
    mixin = next((m for kind, m in MIXINS.items() if getattr(type(module), "forward", None) is kind.forward), ZOVector)
    module.__class__ = mixture(mixin, type(module))  # type: ignore[arg-type]  # mypy: classes do not hash
    assert isinstance(module, Perturbed)
    module.perturbation, module.zo_name, module.zo_ids = perturbation, name, ids
    module.zo_masks, module.zo_factors, module.zo_scales = {}, {}, {}


MIXINS: dict[type[nn.Module], type[Perturbed]] = {nn.Embedding: ZOEmbedding, nn.Linear: ZODense}


@functools.cache
def mixture(mixin: type[Perturbed], kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.__name__}({kind.__name__})", (mixin, kind), {"__module__": __name__})


def _moved(module: Perturbed, key: str, sigmas: Tensor) -> Tensor:
    """Parameter `key` as each row group has it, fp32 [groups, *shape]."""
    own, mask = _own(module, key), module.zo_masks.get(key, Mask())
    own_sigmas = scaled(sigmas, module.zo_scales.get(key))
    return group_values(own, module.perturbation, own_sigmas, module.zo_ids[key], mask)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., R] @ b [R, K], R being small: a row's bits depend on no other row, which a BLAS does not promise."""
    total = a.new_zeros(*a.shape[:-1], b.shape[1])
    for r in range(b.shape[0]):
        total.addcmul_(a[..., r, None], b[r])
    return total


def _own(module: nn.Module, key: str) -> Tensor:
    value = module._parameters[key]
    assert value is not None
    return value.detach()
