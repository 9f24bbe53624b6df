"""How noise meets the parameters of a model: the handle that its layers read, and the values of every row group.

Outside `layers.perturbed(...)` a handle is not active, and whoever reads it computes what the model does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops  # ops registers torch.ops.zoact


class Perturbation:
    """What every layer of one model reads before it runs: is there a perturbation, with which seeds and sigmas.

    One object per model, shared by its layers; a deep copy of the model gets its own. Tensors are updated in place,
    so a captured graph replays with new noise.
    """

    active: bool
    idle = False  # True: a stand-in that is never active, for modules whose turn it isn't
    seeds: Tensor  # int64 [S]
    sigmas: Tensor  # fp32 [G, S]
    groups: int
    noise: str
    copies: int  # of the batch that a forward is given: `groups`, or fewer where groups share one between them
    leading: tuple[int, ...]  # sizes that the leading dimension of a layer's x may have; () = any multiple of groups
    sequences: int  # leading size of the last table's ids in this block, 0 before: how often ids [1, T] stand for
    tangent: bool  # noise is not added to a value, but is its tangent (room `tangent`)

    def __init__(self) -> None:
        self.active = False
        self.seeds = torch.zeros(1, dtype=torch.int64)
        self.sigmas = torch.zeros(1, 1)
        self.groups = self.copies = 1
        self.noise = "normal"
        self.leading, self.sequences = (), 0
        self.tangent = False

    def set(self, seeds: Tensor, sigmas: Tensor, noise: str, leading: tuple[int, ...], copies: int = 0) -> None:
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise ValueError(f"`seeds` is {seeds.dtype} {tuple(seeds.shape)}; it has to be int64 [S]")
        if sigmas.dtype != torch.float32 or sigmas.dim() != 2 or sigmas.shape[1] != seeds.shape[0]:
            raise ValueError(
                f"`sigmas` is {sigmas.dtype} {tuple(sigmas.shape)}; it has to be float32 [G, S] with S = {len(seeds)}"
            )
        if sigmas.device != seeds.device:
            raise ValueError(f"`sigmas` is on {sigmas.device} and `seeds` on {seeds.device}; they have to be together")
        if noise not in ops.NOISES:
            raise ValueError(f"`noise` is {noise!r}; kinds are {', '.join(ops.NOISES)}")
        if self.seeds.shape == seeds.shape and self.seeds.device == seeds.device:
            self.seeds.copy_(seeds)
        else:
            self.seeds = seeds.clone()
        if self.sigmas.shape == sigmas.shape and self.sigmas.device == sigmas.device:
            self.sigmas.copy_(sigmas)
        else:
            self.sigmas = sigmas.clone()
        self.groups, self.noise, self.leading, self.sequences = sigmas.shape[0], noise, leading, 0
        self.copies = copies or self.groups

    def sigmas_of(self, name: str, x: Tensor, row_group: int | None = None) -> Tensor:
        """Sigmas [groups, S] of the row groups in x, whose leading size they divide; of `row_group` alone where given.

        Raises ValueError, with the name of the layer, where the model has regrouped rows (design law 2.10).
        """
        if row_group is not None:
            return self.sigmas[row_group : row_group + 1]
        if x.shape[0] % self.groups and x.shape[0] % self.copies == 0 and self.copies < self.groups:
            rows, queries = x.shape[0] // self.copies, self.groups // self.copies
            raise ValueError(
                f"layer {name!r} got {rows} rows of a copy of the batch; {queries} queries can't share them"
            )
        if x.shape[0] % self.groups or (self.leading and x.shape[0] not in self.leading):
            allowed = " or ".join(map(str, self.leading)) if self.leading else f"a multiple of {self.groups}"
            raise ValueError(
                f"layer {name!r} got x of shape {tuple(x.shape)}, but with {self.groups} row groups its leading size "
                f"has to be {allowed}: the model regroups rows here; leave the layer out of the swap or pass row_group"
            )
        return self.sigmas


class Mask(NamedTuple):
    """Which entries of a parameter take part: "magnitude" |w| <= value, or "random" a share `value` of them by `seed`.

    value fp32 [1], seed int64 [1]: on the device of the parameter. A magnitude is that of the clean weight, so that
    probes and update agree on it.
    """

    kind: str = "none"
    value: Tensor | None = None
    seed: Tensor | None = None


class Released:
    """Mixed into the modules of `parameters`, which a method perturbs: back to what they were."""

    def release(self) -> None:
        raise NotImplementedError


def group_values(
    value: Tensor,
    p: Perturbation,
    sigmas: Tensor,
    param_id: Tensor,
    mask: Mask = Mask(),  # noqa: B008
) -> Tensor:
    """value + sum_s sigmas[g, s] Z_s of every row group g, fp32 [groups, *value.shape]: a copy each, so for vectors.

    Differentiable in sigmas that ask for it. Where the noise is a tangent: value, with the sum as its tangent.
    """
    if sigmas.requires_grad:
        one = torch.eye(len(p.seeds), device=sigmas.device)
        z = group_values(torch.zeros_like(value), p, one, param_id, mask)  # [S, *value.shape]
        if mask.kind == "magnitude" and mask.value is not None:  # zeros pass it
            z = z * (value.detach().abs() <= mask.value)
        return value.detach().float() + torch.tensordot(sigmas, z, 1)
    clean = value.detach().float().expand(sigmas.shape[0], *value.shape).clone(memory_format=torch.contiguous_format)
    moved = torch.zeros_like(clean) if p.tangent else clean
    for row, own in zip(moved, sigmas, strict=True):
        torch.ops.zoact.zo_perturb_(
            row.view(1, -1), p.seeds, own, param_id, None, None, mask.value, mask.seed, None, p.noise, mask.kind
        )
    return torch.autograd.forward_ad.make_dual(clean, moved) if p.tangent else moved


def scaled(sigmas: Tensor, factor: Tensor | None) -> Tensor:
    """Sigmas [G, S] of one parameter, whose own factor is fp32 [1] or none."""
    return sigmas if factor is None else sigmas * factor


def add_per_group(y: Tensor, values: Tensor) -> Tensor:
    """y [groups * m, ..., n] plus values [groups, n], each to its own rows."""
    groups, n = values.shape
    return (y.reshape(groups, -1, n) + values[:, None]).to(y.dtype).view(y.shape)
