"""ZOLinear: a linear layer over a frozen packed weight, with a low-rank term that a seeded perturbation can move.

    y_g = x_g D(W)^T + (x_g A)(C + sum_s sigmas[g, s] Z_s)^T + b

Only C is trained. Outside `perturbed(...)` the sum is absent and the layer is an ordinary linear layer.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import native
from .cuda_ops import Cuda
from .dispatch import Problem, arch_of
from .formats import FORMATS, PackedWeight
from .perturbation import Mask, Perturbation, Released, add_per_group, group_values, scaled

# (layer, x, sigmas of the row groups in x, bias to add) -> y
Probe = Callable[["ZOLinear", Tensor, Tensor, "Tensor | None"], Tensor]


def best_layout(device: torch.device) -> str:
    """The layout in which the compiled kernels for `device` want a weight that has it; "row" without such kernels."""
    if device.type == "cpu" and native.module() is not None:
        return "cpu"
    return "cuda" if device.type == "cuda" and native.cuda() is not None else "row"


def settled(packed: PackedWeight, *, reuse: bool = False) -> PackedWeight:
    """`packed` as the fastest implementation on its device wants it; `reuse` as in `PackedWeight.to_layout`.

    For tensors that only stand for some on a GPU (FakeTensor) nothing is loaded: they are in layout "row".
    """
    weight = packed.weight
    fake = isinstance(weight, torch._subclasses.FakeTensor) and weight.device.type == "cuda"
    wish = "row" if fake else best_layout(weight.device)
    if wish == "cuda":
        wish = gpu_layout(packed, arch_of(weight.device))
    return packed.to_layout(wish if packed.has_layout(wish) else "row", reuse=reuse)


def gpu_layout(packed: PackedWeight, arch: str) -> str:
    """The layout of `packed` on a GPU `arch`: "cuda" if csrc/cuda is compiled for it and multiplies by this weight."""
    problem = Problem(
        "zo_linear", "cuda", torch.bfloat16, 1, packed.out_features, packed.in_features, packed.format, "cuda",
        packed.group_size, torch.uint8, None if packed.scale is None else packed.scale.dtype, arch=arch,
    )  # fmt: skip
    return "cuda" if packed.has_layout("cuda") and Cuda().refusal(problem) is None else "row"


class ZOLinear(nn.Module):
    """Drop-in for `nn.Linear` over a packed weight (int4, int8, nf4, fp4 or dense), frozen.

    Buffers: `weight`, `scale`, `offset`, `nested` (the packed weight, see `formats`), `bias` [N] frozen,
    `basis` A [K, R] fp32 (None until `set_basis`; may be one tensor for several layers), `param_id` int64 [1],
    `base_basis` [K, Rb] and `base_coeff` [N, Rb] (a delta already learned, optional). Parameter: `coeff` C [N, R] fp32.
    The packed tensors, A and C keep their dtypes under `model.to(dtype)`. `state_dict` holds the weight in row layout.
    """

    weight: Tensor
    scale: Tensor | None
    offset: Tensor | None
    nested: Tensor | None
    bias: Tensor | None
    basis: Tensor | None
    base_basis: Tensor | None
    base_coeff: Tensor | None
    param_id: Tensor
    coeff: nn.Parameter | None

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        rank: int = 0,
        name: str = "",
        param_id: int = 0,
        perturbation: Perturbation | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= rank <= packed.in_features:
            raise ValueError(f"`rank` is {rank}; layer {name!r} with in_features={packed.in_features} allows 0 to that")
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.format, self.layout, self.group_size = packed.format, packed.layout, packed.group_size
        self.rank, self.name = rank, name
        self.origin = "linear"  # what `unswap` makes of it again: "linear", "conv1d" or "linear4bit"
        self.dense_dtype = torch.float32  # of the weight that `unswap` restores
        self.perturbation = perturbation or Perturbation()
        self.frozen = packed.format != "dense"  # no method may write the weight
        self.probe: Probe | None = None  # how a method perturbs the weight, if not by C
        self.out_basis: Tensor | None = (
            None  # U [N, Q] fp32 of what is learned between it and `basis`, if a method has one
        )
        self.known: tuple[Tensor, Tensor] | None = None  # rows x [n, K] and x W^T [n, N] of a forward
        self.bias_id: Tensor | None = None  # int64 [1], of the bias' noise, if a method moves that too
        self.mask, self.bias_mask = Mask(), Mask()  # of what a dense method moves
        self.sigma_scale: Tensor | None = None  # fp32 [1], on the device: the weight's own factor on sigmas
        self.bias_sigma_scale: Tensor | None = None  # and the bias'
        device = packed.weight.device
        self.register_buffer("weight", packed.weight)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("offset", packed.offset)
        self.register_buffer("nested", packed.nested)
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())
        self.register_buffer("basis", None)
        self.register_buffer("base_basis", None)
        self.register_buffer("base_coeff", None)
        self.register_buffer("param_id", torch.tensor([param_id], dtype=torch.int64, device=device))
        self.coeff = (
            nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device)) if rank else None
        )

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        rank: int = 0,
        name: str = "",
        param_id: int | None = None,
        perturbation: Perturbation | None = None,
        layout: str | None = None,
    ) -> ZOLinear:
        """A layer over `packed`, moved to the layout that its device's kernels want (or to `layout`).

        Raises:
            ValueError: rank larger than in_features; tensors that do not fit the format.
        """
        from .rng import param_id as id_of

        return cls(
            packed.to_layout(layout) if layout else settled(packed),
            bias,
            rank=rank,
            name=name,
            param_id=id_of(f"{name}.weight") if param_id is None else param_id,
            perturbation=perturbation,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        format: str = "int4",
        group_size: int | None = None,
        rank: int = 0,
        name: str = "",
        method: str = "mse",
    ) -> ZOLinear:
        """Quantise an `nn.Linear` (weight [N, K], fp32, bf16 or fp16) and wrap it."""
        from .quantize import quantize

        packed = quantize(linear.weight.detach(), format, group_size, method=method)
        layer = cls.from_packed(packed, linear.bias, rank=rank, name=name)
        layer.dense_dtype = linear.weight.dtype
        return layer

    def forward(self, x: Tensor, row_group: int | None = None) -> Tensor:
        """x [..., K] -> [..., N]; under a perturbation group g owns the g-th part of the leading dimension.

        `row_group` says instead that all rows of x belong to that one group (models that regroup rows).
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"`x` has shape {tuple(x.shape)}; layer {self.name!r} has in_features={self.in_features}")
        p = self.perturbation
        if p.active and self.bias_id is not None and self.bias is not None:
            own = scaled(p.sigmas_of(self.name, x, row_group), self.bias_sigma_scale)
            return add_per_group(
                self._forward(x, row_group, None), group_values(self.bias, p, own, self.bias_id, self.bias_mask)
            )
        return self._forward(x, row_group, self.bias)

    def _forward(self, x: Tensor, row_group: int | None, bias: Tensor | None) -> Tensor:
        seeds = sigmas = None
        groups = 1
        p = self.perturbation
        if p.active and (self.coeff is not None or self.probe is not None):
            seeds, sigmas = p.seeds, scaled(p.sigmas_of(self.name, x, row_group), self.sigma_scale)
            groups = sigmas.shape[0]
            if self.probe is not None:
                return self.probe(self, x, sigmas, bias)
            if self.basis is None:
                raise RuntimeError(f"layer {self.name!r} has no basis yet; call compute_basis or set_basis first")
        side = self.coeff is not None and self.basis is not None
        return torch.ops.zoact.zo_linear(
            x, self.weight, self.scale, self.offset, self.nested, bias, self.base_basis, self.base_coeff,
            self.basis if side else None, self.coeff if side else None, None, None, seeds, sigmas,
            self.param_id if seeds is not None else None, self.format, self.layout, self.group_size, self.out_features,
            p.noise, groups,
        )  # fmt: skip

    def packed(self) -> PackedWeight:
        """The stored weight, sharing this layer's tensors."""
        return PackedWeight(
            format=self.format,
            layout=self.layout,
            group_size=self.group_size,
            out_features=self.out_features,
            in_features=self.in_features,
            weight=self.weight,
            scale=self.scale,
            offset=self.offset,
            nested=self.nested,
        )

    def set_basis(self, basis: Tensor, coeff: Tensor | None = None) -> None:
        """Take A [K, R] fp32 (shared if several layers get one tensor), the rank with it; C becomes `coeff` or zero.

        Raises:
            ValueError: wrong shape or dtype, or a rank larger than in_features.
        """
        if basis.dim() != 2 or basis.shape[0] != self.in_features or not 1 <= basis.shape[1] <= self.in_features:
            raise ValueError(
                f"`basis` has shape {tuple(basis.shape)}; layer {self.name!r} needs ({self.in_features}, R) "
                f"with R in 1..{self.in_features}"
            )
        if basis.dtype != torch.float32:
            raise ValueError(f"`basis` is {basis.dtype}; it has to be torch.float32")
        self.rank = basis.shape[1]
        shape = (self.out_features, self.rank)
        if coeff is None:
            coeff = torch.zeros(shape, device=basis.device)
        if tuple(coeff.shape) != shape or coeff.dtype != torch.float32:
            raise ValueError(f"`coeff` is {coeff.dtype} {tuple(coeff.shape)}; it has to be torch.float32 {shape}")
        self.basis = basis
        self.coeff = nn.Parameter(coeff.detach().clone())

    def delta(self) -> Tensor:
        """What has been learned, C A^T plus the base delta, as fp32 [N, K]."""
        out = torch.zeros(self.out_features, self.in_features, device=self.weight.device)
        if self.basis is not None and self.coeff is not None:
            out += self.coeff.detach() @ self.basis.T
        if self.base_basis is not None and self.base_coeff is not None:
            out += self.base_coeff @ self.base_basis.T
        return out

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """D(W) [N, K], without what has been learned."""
        return torch.ops.zoact.dequantize(
            self.weight, self.scale, self.offset, self.nested, self.format, self.layout, self.group_size,
            self.out_features, self.in_features, dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, group_size={self.group_size}, layout={self.layout}, rank={self.rank}"
        )

    # Storage ---------------------------------------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        """Dtypes stay. On another kind of device the weight takes the layout that is wanted there, one layer at a time:
        where it goes as it is, the order of its codes changes in place, after the move."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        leaves = fn(self.weight.new_empty(0)).device.type != self.weight.device.type
        if leaves and self.layout == "cpu":
            self._store(self.packed().to_layout("row"))
        super()._apply(keep_dtype, recurse)
        if leaves:
            self._store(settled(self.packed(), reuse=True))
        return self

    def _store(self, packed: PackedWeight) -> None:
        self.layout = packed.layout
        self.weight, self.scale, self.offset = packed.weight, packed.scale, packed.offset

    def _anatomy(self) -> Tensor:
        return torch.tensor(
            [list(FORMATS).index(self.format), self.group_size, self.out_features, self.in_features],
            dtype=torch.int64,
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        row = self.packed().to_layout("row")
        for key, tensor in (("weight", row.weight), ("scale", row.scale), ("offset", row.offset)):
            if tensor is not None:
                whole = tensor.untyped_storage().nbytes() == tensor.nbytes
                destination[prefix + key] = tensor if whole else tensor.clone()
        destination[prefix + "anatomy"] = self._anatomy()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        given = state_dict.pop(prefix + "anatomy", None)
        if given is not None and not torch.equal(given.cpu(), self._anatomy()):
            errors.append(
                f"layer {self.name or prefix!r} is {self.format} (format, group_size, out_features, in_features = "
                f"{self._anatomy().tolist()}); the file holds {given.tolist()}"
            )
            return
        keys = {key: state_dict.get(prefix + key) for key in ("weight", "scale", "offset", "nested")}
        if self.layout != "row" and keys["weight"] is not None:
            row = PackedWeight(
                format=self.format, layout="row", group_size=self.group_size, out_features=self.out_features,
                in_features=self.in_features, **keys,
            )  # fmt: skip
            stored = row.to_layout(self.layout)
            for key, tensor in (("weight", stored.weight), ("scale", stored.scale), ("offset", stored.offset)):
                if tensor is not None:
                    state_dict[prefix + key] = tensor
        basis = state_dict.get(prefix + "basis")
        if basis is not None and (self.basis is None or self.basis.shape != basis.shape):
            self.set_basis(torch.empty_like(basis, device=self.weight.device), None)
        for key in ("base_basis", "base_coeff"):
            tensor = state_dict.get(prefix + key)
            if tensor is not None and (getattr(self, key) is None or getattr(self, key).shape != tensor.shape):
                setattr(self, key, torch.empty_like(tensor, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)


def base_product(layer: ZOLinear, x: Tensor, bias: Tensor | None) -> Tensor:
    """x D(W)^T + bias and what an earlier delta adds, without the layer's C."""
    return torch.ops.zoact.zo_linear(
        x, layer.weight, layer.scale, layer.offset, layer.nested, bias, layer.base_basis, layer.base_coeff, None, None,
        None, None, None, None, None, layer.format, layer.layout, layer.group_size, layer.out_features,
    )  # fmt: skip


def zo_layers(model: nn.Module) -> dict[str, ZOLinear]:
    """The ZOLinear layers of `model` by qualified name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ZOLinear)}


def perturbation_of(model: nn.Module) -> Perturbation:
    """The one Perturbation that the layers of `model` share.

    Raises:
        ValueError: the model has no ZOLinear, or its layers come from different models.
    """
    handles = (module.perturbation for module in _perturbable(model))
    found = {id(handle): handle for handle in handles if not handle.idle}
    if len(found) != 1:
        what = "no ZOLinear layer: swap it first" if not found else "layers of several swapped models"
        raise ValueError(f"`model` has {what}")
    return next(iter(found.values()))


def release(model: nn.Module) -> Perturbation:
    """No method perturbs anything but C of `model` any more; the handle of its layers, a new one where it has none."""
    held = [m.perturbation for m in _perturbable(model) if not m.perturbation.idle]
    # Layers that were swapped since (a dense twin) have a handle of their own, and what `module.release` frees another
    layers = {id(m.perturbation) for m in zo_layers(model).values()}
    found = {id(handle): handle for handle in held if id(handle) in layers} or {id(handle): handle for handle in held}
    if len(found) > 1:
        raise ValueError("`model` has layers of several swapped models")
    handle = next(iter(found.values()), None) or Perturbation()
    for module in model.modules():
        if isinstance(module, ZOLinear):
            module.perturbation = handle
            module.probe = module.bias_id = module.sigma_scale = module.bias_sigma_scale = None
            module.mask = module.bias_mask = Mask()
        elif isinstance(module, Released):
            module.release()
    return handle


def _perturbable(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(getattr(m, "perturbation", None), Perturbation)]


@contextlib.contextmanager
def perturbed(
    model: nn.Module,
    seeds: Tensor,
    sigmas: Tensor,
    noise: str = "normal",
    leading: tuple[int, ...] = (),
    copies: int = 0,
) -> Iterator[Perturbation]:
    """Inside the block every forward sees G row groups: group g runs with C + sum over s of sigmas[g, s] Z(seeds[s]).

    seeds int64 [S], sigmas fp32 [G, S], both on the model's device; the batch has G equal parts along its leading
    dimension. `leading` lists the leading sizes a layer may meet (G * B, and G * B * T where a model flattens tokens);
    anything else raises with the layer's name, since rows and groups must never mix. `copies`: of one batch, that the
    forward is given, if these are not the groups themselves.

    Raises:
        ValueError: bad seeds or sigmas, or on another device than the model.
        RuntimeError: the model is perturbed already.
    """
    handle = perturbation_of(model)
    if handle.active:
        raise RuntimeError("`model` is perturbed already; `perturbed` blocks do not nest")
    first = _perturbable(model)[0]
    device = next(itertools.chain(first.buffers(), first.parameters())).device
    for name, tensor in (("seeds", seeds), ("sigmas", sigmas)):
        if tensor.device != device:
            raise ValueError(f"`{name}` is on {tensor.device}; the model is on {device}: move it there")
    handle.set(seeds, sigmas, noise, tuple(leading), copies)
    handle.active = True
    try:
        yield handle
    finally:
        handle.active = False
