"""Keys and values that stand before every sequence in each layer of a decoder, through transformers' cache.

    row group g attends to [K_i + sum_s sigmas[g, s] Z_s, keys of its tokens], values alike, in every layer i

A `Prefix` is a child of the model's body and two hooks on it: a forward that brings no cache, or an empty one, gets one
that begins with the prefix, so losses, evaluation and `generate()` see it alike. Masks and positions are the caller's,
who counts its own tokens alone; here they are moved right by the length of the prefix. transformers 4.56 or later.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..activations import evaluating
from ..perturbation import Perturbation, Released, group_values
from .base import Trainable
from .lora import set_aside

KINDS = ("keys", "values")


class Prefix(nn.Module, Released):
    """Buffers `keys_<i>`, `values_<i>` [tokens, heads * width] fp32 of each layer i, in no state_dict.

    They are trained and perturbed in fp32, and rounded once, to the dtype of the body's activations, in a forward.
    """

    def __init__(self, name: str, layers: int, tokens: int, heads: int, width: int) -> None:
        super().__init__()
        self.zo_name, self.layers, self.tokens, self.heads, self.width = name, layers, tokens, heads, width
        self.dtype = torch.float32  # of the activations
        self.perturbation: Perturbation | None = None
        self.zo_ids: dict[str, Tensor] = {}
        for i in range(layers):
            for kind in KINDS:
                self.register_buffer(f"{kind}_{i}", torch.zeros(tokens, heads * width), persistent=False)

    def attach(self, body: nn.Module) -> Prefix:
        """From now on every sequence that `body` is given begins with this prefix."""
        body.add_module("prefix", self)
        self.hooks = (
            body.register_forward_pre_hook(self._begin, with_kwargs=True),
            body.register_forward_hook(self._end, with_kwargs=True),
        )
        return self

    def remove(self, model: nn.Module) -> None:
        """Undo `attach`, wherever in `model` that was."""
        for hook in self.hooks:
            hook.remove()
        for module in list(model.modules()):
            if module._modules.get("prefix") is self:
                del module.prefix

    def release(self) -> None:
        self.perturbation, self.zo_ids = None, {}

    def tensor(self, kind: str, layer: int) -> Tensor:
        return self.get_buffer(f"{kind}_{layer}")

    def states(self, kind: str, layer: int, x: Tensor) -> Tensor:
        """Keys or values of a layer as each row of x has them, [rows, heads, tokens, width]."""
        own, p = self.tensor(kind, layer), self.perturbation
        if p is None or not p.active:
            groups = own[None]
        else:
            groups = group_values(own, p, p.sigmas_of(self.zo_name, x), self.zo_ids[f"{kind}_{layer}"])
        groups = groups.to(self.dtype).view(-1, self.tokens, self.heads, self.width).transpose(1, 2)
        return groups.repeat_interleave(x.shape[0] // len(groups), dim=0)

    def _begin(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        from transformers import DynamicCache

        kwargs = dict(zip(inspect.signature(body.forward).parameters, args, strict=False)) | kwargs
        x = next(kwargs[key] for key in ("input_ids", "inputs_embeds") if kwargs.get(key) is not None)
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if cache is None:
            cache = DynamicCache(config=body.config)
        elif not isinstance(cache, DynamicCache):
            raise ValueError(f"`past_key_values` is a {type(cache).__name__}; a prefix stands in a DynamicCache")
        if cache.get_seq_length() == 0:
            for i in range(self.layers):
                cache.update(self.states("keys", i, x), self.states("values", i, x), i)
        moved: dict[str, Any] = {"past_key_values": cache}
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ValueError("`attention_mask` is no [sequences, tokens]; with a prefix it has to be, or None")
            moved["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.tokens), mask], dim=1)
        for key in ("position_ids", "cache_position"):
            if kwargs.get(key) is not None:
                moved[key] = kwargs[key] + self.tokens
        return (), kwargs | moved

    def _end(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Without `use_cache` a body returns no cache; this one had one only for the prefix."""
        if kwargs.get("use_cache") is False and isinstance(output, Mapping):
            return type(output)(**{key: value for key, value in output.items() if key != "past_key_values"})
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> Prefix:
        """Moves, and keeps fp32; another dtype is that of the activations."""
        self.dtype = fn(torch.zeros(0, dtype=self.dtype)).dtype

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self


class PrefixTensor(Trainable):
    """Keys or values [tokens, heads * width] of one layer."""

    def __init__(self, prefix: Prefix, kind: str, layer: int) -> None:
        self.name = self.parameter = f"{prefix.zo_name}.{layer}.{kind}"
        self.prefix, self.kind, self.layer = prefix, kind, layer
        self.value = prefix.tensor(kind, layer)
        self.param_id = torch.tensor([rng.param_id(self.name)], device=self.value.device)

    def check(self) -> None:
        if self.prefix.tensor(self.kind, self.layer) is not self.value or not self.prefix.zo_ids:
            raise RuntimeError(
                f"{self.name} is another tensor, or another method's, since; make the optimizer after moving or copying"
            )

    def anatomy(self) -> dict[str, Any]:
        p = self.prefix
        sizes = {"layers": p.layers, "tokens": p.tokens, "heads": p.heads, "width": p.width}
        return {"name": self.name, "param_id": int(self.param_id), "prefix": {"name": p.zo_name, **sizes}}


def prefixes(model: nn.Module, handle: Perturbation, tokens: int, seed: int) -> list[PrefixTensor]:
    """The tensors of the model's prefix; it gets one if it has none. `handle` is what perturbs it.

    Raises ValueError for a model without a cache of keys and values (encoders), for a prefix of another length, and for
    layers with learned coefficients, which would have to be trained too.
    """
    set_aside(model, {})
    own = prefix_of(model)
    if own is None:
        own = from_activations(model, tokens, seed)
    elif own.tokens != tokens:
        raise ValueError(f"tokens is {tokens}; the model has a prefix of {own.tokens} already")
    found = [PrefixTensor(own, kind, layer) for layer in range(own.layers) for kind in KINDS]
    own.perturbation, own.zo_ids = handle, {f"{t.kind}_{t.layer}": t.param_id for t in found}
    return found


def prefix_of(model: nn.Module) -> Prefix | None:
    return next((module for module in model.modules() if isinstance(module, Prefix)), None)


@torch.no_grad()
def from_activations(model: nn.Module, tokens: int, seed: int) -> Prefix:
    """A new prefix of the model: the keys and values that a forward over `tokens` random tokens has.

    Raises ValueError for a model without a cache of keys and values, one shape in all layers.
    """
    # Asked of the type: wrappers forward unknown attributes to what they wrap.
    found: list[Any] = [module for module in model.modules() if hasattr(type(module), "get_output_embeddings")]
    if not found:
        raise ValueError(f"{type(model).__name__} is no Hugging Face model, and a prefix goes through its cache")
    if getattr(found[0].config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(found[0]).__name__} is an encoder-decoder; a prefix is for decoders: take another method"
        )
    u = rng.uniform(seed, rng.param_id("prefix"), 1, tokens, device=found[0].device).double()
    body, cache = _body(found, (u * found[0].config.get_text_config().vocab_size).long())
    states: list[list[Any]] = [[getattr(layer, kind, None) for kind in KINDS] for layer in getattr(cache, "layers", ())]
    shapes = {tuple(t.shape) if t is not None else None for pair in states for t in pair}
    shape = next(iter(shapes), None)
    if len(shapes) != 1 or shape is None or len(shape) != 4 or (shape[0], shape[2]) != (1, tokens):
        told = ", ".join(map(str, shapes)) or "none"
        raise ValueError(
            f"{type(body).__name__} keeps no keys and values of one shape (1, heads, {tokens}, width) for its layers "
            f"(it gave: {told}), which a prefix needs; decoders do, encoders don't: take another method"
        )
    path = next(name for name, module in model.named_modules() if module is body)
    prefix = Prefix(rng.strip_prefixes(f"{path}.prefix"), len(states), tokens, shape[1], shape[3])
    prefix.dtype = states[0][0].dtype
    for layer, pair in enumerate(states):
        for kind, tensor in zip(KINDS, pair, strict=True):
            setattr(prefix, f"{kind}_{layer}", tensor[0].transpose(0, 1).reshape(tokens, -1).float().clone())
    return prefix.attach(body)


def _body(models: Sequence[Any], ids: Tensor) -> tuple[Any, Any]:
    """The innermost of nested Hugging Face models whose forward takes a cache, and the cache that ids [1, n] leave.

    It is the first to return, and the one that is really called: OPT's causal model calls the decoder in its body.
    """
    seen: list[tuple[Any, Any]] = []
    hooks = [
        model.register_forward_hook(lambda module, args, output: seen.append((module, output)))
        for model in models
        if "past_key_values" in inspect.signature(model.forward).parameters
    ]
    try:
        with evaluating(models[0]):
            models[0](input_ids=ids, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    body, output = seen[0] if seen else (models[0], None)
    return body, getattr(output, "past_key_values", None)
