"""Forward-mode derivatives through a swapped model: a layer takes (x, x') to (y, y') and reads its weight once.

    y  = x W^T + b                  W with all that was learned
    y' = x' W^T + x Delta^T + b'    Delta = sum_s sigmas[g, s] Z_s A^T over C, sum_s sigmas[g, s] Z_s over W, as is b'

x and x' are the halves of a dual tensor (torch.autograd.forward_ad). They go through W as rows of one launch; x Delta^T
is a launch that reads no W. A layer packs (y, y') itself: the jvp of an autograd.Function runs after its forward, and
would read W a second time. Norms, activations, softmax and rotary embeddings between the layers are torch's own, whose
formulas carry tangents. Of attention that is its math form alone: `tangents` makes scaled_dot_product_attention take it
and gives back what was chosen before, and a model whose attention is no torch op is refused.

A custom op without a formula for tangents drops them without a word, and the derivative is wrong: `tangents` with
`watch` raises for the first function that is given a tangent and returns none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from . import rng
from .layers import ZOLinear, perturbation_of
from .parameters import Perturbed, ZODense, ZOEmbedding, mixture
from .perturbation import add_per_group, group_values

ATTENTIONS = ("eager", "sdpa")  # of transformers: made of torch ops, each with a formula for tangents
# Functions that may be given a tangent and return none: of a tensor they take the shape, the dtype, or the value alone.
CONSTANTS = set(
    "detach _unpack_dual __get__ zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "new_tensor expand_as view_as reshape_as type_as to".split()
)


def differentiate(model: nn.Module, weights: bool) -> None:
    """Prepare what a method perturbs of `model` (every ZOLinear, and modules of `parameters`) for `tangents`.

    weights: the method perturbs the weights of ZOLinear layers; else their C, where they have one. `layers.release`
    undoes it. Raises ValueError for attention without a math form, and for modules that are compiled.
    """
    for name, module in model.named_modules():
        attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(attention, str) and attention not in ATTENTIONS:
            raise ValueError(
                f"{name or 'the model'} has attention by {attention!r}, which carries no tangents; load the model with "
                f"attn_implementation {' or '.join(map(repr, ATTENTIONS))}"
            )
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise ValueError(f"{name or 'the model'} is compiled, where tangents can't be followed; take it as it was")
    for module in model.modules():
        if isinstance(module, ZOLinear):
            module.probe = _along_weight if weights else _along_coeff
        elif isinstance(module, Perturbed):
            mixin = next((m for kind, m in _MIXINS.items() if isinstance(module, kind)), None)
            if mixin is not None:
                module.__class__ = mixture(mixin, type(module).__bases__[1])  # type: ignore[assignment, arg-type]


@contextlib.contextmanager
def tangents(model: nn.Module, watch: bool = False) -> Iterator[None]:
    """Inside, `perturbed(model, seeds, sigmas)` evaluates the clean model, and sum_s sigmas[g, s] Z_s is the tangent of
    what row group g has; `forward_ad.unpack_dual` of a result has its derivative.

    watch: raise RuntimeError where a tangent is dropped; it costs some microseconds for each torch function.
    """
    handle = perturbation_of(model)
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _Watch() if watch else contextlib.nullcontext():
        handle.tangent = True
        try:
            yield
        finally:
            handle.tangent = False


class _Watch(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in CONSTANTS:
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if results and not any(map(_has_tangent, results)) and any(map(_has_tangent, tree_leaves((args, kwargs)))):
            name = resolve_name(function) or str(function)
            raise RuntimeError(
                f"{name} drops tangents: it was given one and returned none, so the derivative would be wrong; take "
                "another implementation of it (attn_implementation='sdpa', say), or a method that takes differences"
            )
        return out


def _has_tangent(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None


# --- layers -----------------------------------------------------------------------------------------------------------


def _dual(x: Tensor, clean: Callable[[Tensor], Tensor], along: Callable[[Tensor], Tensor] | None) -> Tensor:
    """clean(x) with the tangent clean(x') + along(x): `clean` is linear and runs once over the rows of both."""
    rows, tangent = forward_ad.unpack_dual(x)
    moved = along(rows) if along is not None else None
    if tangent is None:
        y = clean(rows)
    else:
        y, passed = clean(torch.stack((rows, tangent))).unbind()
        moved = passed if moved is None else moved + passed
    return y if moved is None else forward_ad.make_dual(y, moved)


def _along_coeff(layer: ZOLinear, x: Tensor, sigmas: Tensor, bias: Tensor | None) -> Tensor:
    """The probe of a ZOLinear whose C has tangents, or which has none."""
    p, basis, coeff = layer.perturbation, layer.basis, layer.coeff
    if coeff is not None and basis is None:
        raise RuntimeError(f"layer {layer.name!r} has no basis yet; call compute_basis or set_basis first")

    def clean(rows: Tensor) -> Tensor:
        return torch.ops.zoact.zo_linear(
            rows, layer.weight, layer.scale, layer.offset, layer.nested, None, layer.base_basis, layer.base_coeff,
            basis if coeff is not None else None, coeff, None, None, None, None, None,
            layer.format, layer.layout, layer.group_size, layer.out_features,
        )  # fmt: skip

    def along(rows: Tensor) -> Tensor:
        return torch.ops.zoact.zo_linear(
            rows, None, None, None, None, None, None, None, basis, None, None, None, p.seeds, sigmas, layer.param_id,
            "dense", "row", -1, layer.out_features, p.noise, sigmas.shape[0],
        )  # fmt: skip

    y = _dual(x, clean, along if coeff is not None else None)
    return y if bias is None else (y + bias).to(y.dtype)


def _along_weight(layer: ZOLinear, x: Tensor, sigmas: Tensor, bias: Tensor | None) -> Tensor:
    """The probe of a ZOLinear whose dense weight has tangents."""
    y = _through_weight(layer, layer.weight, layer.param_id, x, sigmas)
    return y if bias is None else (y + bias).to(y.dtype)


def _through_weight(
    module: ZOLinear | ZODense, weight: Tensor, param_id: Tensor | None, x: Tensor, sigmas: Tensor
) -> Tensor:
    """x W^T with its tangent, W [N, K] dense; param_id: of its noise, None where it has none."""
    p, N = module.perturbation, weight.shape[0]

    def product(rows: Tensor, weight: Tensor | None, *noise: Tensor | None, groups: int = 1) -> Tensor:
        return torch.ops.zoact.zo_dense_linear(
            rows, weight, None, None, None, None, *noise, None, None, None, "dense", "row", -1, N, p.noise,
            groups=groups,
        )  # fmt: skip

    def along(rows: Tensor) -> Tensor:
        return product(rows, None, p.seeds, sigmas, param_id, groups=sigmas.shape[0])

    return _dual(x, lambda rows: product(rows, weight, None, None, None), along if param_id is not None else None)


class _TangentDense(ZODense):
    def forward(self, x: Tensor) -> Tensor:
        p, weight, bias = self.perturbation, self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if not p.active:
            return super().forward(x)
        sigmas = p.sigmas_of(self.zo_name, x)
        y = _through_weight(self, weight.detach(), self.zo_ids.get("weight"), x, sigmas)
        if bias is None or "bias" not in self.zo_ids:
            return y if bias is None else (y + bias).to(y.dtype)
        return add_per_group(y, group_values(bias, p, sigmas, self.zo_ids["bias"]))


class _TangentEmbedding(ZOEmbedding):
    def forward(self, ids: Tensor) -> Tensor:
        p, weight = self.perturbation, self._parameters["weight"]
        assert weight is not None
        if not p.active:
            return super().forward(ids)
        ids = self.own_ids(ids)
        sigmas, rows = p.sigmas_of(self.zo_name, ids), nn.functional.embedding(ids, weight.detach())
        moved = rows.new_zeros(len(sigmas), ids.numel() // len(sigmas), rows.shape[-1], dtype=torch.float32)
        for s, seed in enumerate(p.seeds):
            z = rng.noise_of_rows(p.noise, seed, self.zo_ids["weight"], ids.reshape(-1), rows.shape[-1])
            moved += sigmas[:, s, None, None] * z.view_as(moved)
        return forward_ad.make_dual(rows, moved.to(rows.dtype).view_as(rows))


_MIXINS: dict[type[Perturbed], type[Perturbed]] = {ZODense: _TangentDense, ZOEmbedding: _TangentEmbedding}
