"""swap(model, config, where) replaces linear layers by ZOLinear; unswap and merge bring ordinary layers back."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import rng
from .embedding import PackedEmbedding
from .formats import FORMATS
from .integrations.bitsandbytes import from_linear4bit, is_linear4bit, to_linear4bit
from .layers import ZOLinear, perturbation_of, perturbed, zo_layers
from .perturbation import Perturbation
from .quantize import quantize

__all__ = [
    "Perturbation",
    "SwapReport",
    "ZOConfig",
    "merge",
    "perturbation_of",
    "perturbed",
    "swap",
    "unswap",
    "zo_layers",
]

Where = Callable[[str, nn.Module], bool] | str | Iterable[str] | None


@dataclass(frozen=True)
class ZOConfig:
    """What a swapped layer is made of.

    rank 0 is plain low-bit inference. `ranks` maps name patterns (fnmatch) to ranks of their own, first match wins.
    `group_size` None takes the format's default, -1 is one group a row. `skip` are name patterns left alone, besides
    the model's output embeddings, where `swap` is not given a `where` of its own.
    """

    format: str = "int4"
    group_size: int | None = None
    rank: int = 1
    ranks: Mapping[str, int] = field(default_factory=dict)
    quantizer: str = "mse"
    scale_dtype: torch.dtype | None = None  # None: the format's own
    skip: tuple[str, ...] = ("lm_head", "*.lm_head")
    layout: str | None = None  # None: what the device's kernels want

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"`format` is {self.format!r}; formats are {', '.join(FORMATS)}")
        if self.quantizer not in ("mse", "minmax"):
            raise ValueError(f"`quantizer` is {self.quantizer!r}; it has to be 'mse' or 'minmax'")
        for name, rank in {"rank": self.rank, **{f"ranks[{k!r}]": r for k, r in self.ranks.items()}}.items():
            if not isinstance(rank, int) or rank < 0:
                raise ValueError(f"`{name}` is {rank!r}; it has to be an integer of at least 0")

    def rank_of(self, name: str) -> int:
        return next((rank for pattern, rank in self.ranks.items() if fnmatch.fnmatch(name, pattern)), self.rank)


@dataclass(frozen=True)
class Swapped:
    name: str
    kind: str  # class of the module that stood here
    format: str
    layout: str
    shape: tuple[int, int]  # out_features, in_features
    rank: int
    nbytes: int  # of the packed weight
    dense_nbytes: int  # of the weight that stood here


@dataclass(frozen=True)
class SwapReport:
    """What was swapped, and for every linear layer that was not, the reason."""

    swapped: tuple[Swapped, ...]
    skipped: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.swapped)

    def __str__(self) -> str:
        before = sum(s.dense_nbytes for s in self.swapped)
        lines = [f"{len(self.swapped)} layers swapped, {before / 1e6:.1f} MB -> {self.nbytes / 1e6:.1f} MB"]
        lines += [f"  {name}: left as it is: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def swap(
    model: nn.Module,
    config: ZOConfig | None = None,
    where: Where = None,
    example: Any = None,
    progress: Callable[[str], None] | None = None,
) -> SwapReport:
    """Replace the linear layers of `model`, in place, by ZOLinear over packed weights.

    Takes `nn.Linear`, transformers' `Conv1D` and bitsandbytes' `Linear4bit` (its codes are kept, not requantised).
    `where` is a predicate (name, module) -> bool, or name patterns. `example` is what a dry forward is called with: a
    dict of keyword arguments or a tuple, of batch-first tensors; a Hugging Face model needs none. The dry forward runs
    before anything is changed and finds the layers that must be left alone: those whose own forward is not called (a
    functional use of `.weight`) and those that regroup rows (experts, sequence-first).

    Raises:
        ValueError: nothing to swap, rank larger than a layer's in_features, or a weight that can't be quantised; the
            model is unchanged unless a weight is at fault (its name is in the message).
    """
    config = config or ZOConfig()
    chosen, skipped = candidates(model, config, where)
    observed = dry_run(model, chosen, example)
    for name in list(chosen):
        reason = observed.get(name)
        if reason:
            skipped[name] = reason
            del chosen[name]
    if not chosen:
        said = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "it has no linear layer"
        raise ValueError(f"`model` has no layer to swap: {said}")
    for name, module in chosen.items():
        in_features = shape_of(module)[1]
        if config.rank_of(name) > in_features:
            raise ValueError(f"`rank` is {config.rank_of(name)}, but layer {name!r} has in_features={in_features}")
    every = [f"{name}.weight" for name, module in model.named_modules() if is_linear(module)]
    already = zo_layers(model)
    every += [f"{name}.weight" for name in already]
    ids = rng.assign_param_ids(every)
    handle = perturbation_of(model) if already else Perturbation()
    swapped = []
    for name, module in chosen.items():
        if progress:
            progress(name)
        layer = _convert(name, module, config, ids[f"{name}.weight"], handle)
        dense_nbytes = math.prod(shape_of(module)) * layer.dense_dtype.itemsize
        swapped.append(
            Swapped(
                name,
                type(module).__name__,
                layer.format,
                layer.layout,
                shape_of(module),
                layer.rank,
                layer.packed().nbytes,
                dense_nbytes,
            )
        )
        put(model, name, layer)
    return SwapReport(tuple(swapped), skipped)


def unswap(model: nn.Module, merge: bool = False) -> nn.Module:
    """Put ordinary layers back, in place: D(W) in the dtype that stood there, plus C A^T if `merge`.

    Without `merge` what was learned is dropped. A `Linear4bit` comes back as itself, bytes and all, unless merged.
    Returns the model.
    """
    for name, layer in zo_layers(model).items():
        bias = None if layer.bias is None else layer.bias.clone()
        if layer.origin == "linear4bit" and not merge:
            put(model, name, to_linear4bit(layer.packed(), bias, layer.dense_dtype))
            continue
        weight = layer.dequantize(torch.float32) + layer.delta() if merge else layer.dequantize(layer.dense_dtype)
        weight = weight.to(layer.dense_dtype)
        if layer.origin == "conv1d":
            put(model, name, _to_conv1d(weight, bias))
            continue
        linear = nn.Linear(
            layer.in_features, layer.out_features, bias is not None, device="meta", dtype=layer.dense_dtype
        )
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias)
        put(model, name, linear)
    return model


def dense_twin(model: nn.Module, dtype: torch.dtype = torch.float32) -> SwapReport:
    """Make the weights of a swapped model dense, in place, for methods that train the weights themselves.

    What was learned is merged; every ZOLinear becomes one of format "dense", layout "row", rank 0; a packed embedding
    becomes an nn.Embedding, a head that it is tied to an nn.Linear with the very same parameter.
    """
    for layer in zo_layers(model).values():
        layer.dense_dtype = dtype
    tables = {name: module for name, module in model.named_modules() if isinstance(module, PackedEmbedding)}
    heads = {id(layer): name for name, layer in zo_layers(model).items()}
    tied = {name: heads[id(table.head)] for name, table in tables.items() if table.tied}
    unpacked = {name: None if name in tied else table.dequantize(dtype) for name, table in tables.items()}
    unswap(model, merge=True)
    for name, weight in unpacked.items():
        if weight is None:
            weight = model.get_submodule(tied[name]).weight  # type: ignore[assignment]
        assert isinstance(weight, Tensor)
        table = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
        table.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        put(model, name, table)
    report = swap(model, ZOConfig(format="dense", rank=0, layout="row"))
    return report


def merge(model: nn.Module) -> nn.Module:
    """Fold what was learned into dense weights: every ZOLinear becomes a layer with W = D(W) + C A^T, in place."""
    return unswap(model, merge=True)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, GPT-2's linear layer: weight [K, N]. Known by name, so that nothing is imported to ask."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _to_conv1d(weight: Tensor, bias: Tensor | None) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(*weight.shape)
    module.weight = nn.Parameter(weight.T.contiguous())
    module.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype) if bias is None else bias)
    return module


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1], weight.shape[0]


def candidates(model: nn.Module, config: ZOConfig, where: Where) -> tuple[dict[str, nn.Module], dict[str, str]]:
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if key == "weight" and not is_linear(module):
                owners[id(parameter)] = name
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        parameter = getattr(module, "weight", None)
        if where is None and (module is head or any(fnmatch.fnmatch(name, pattern) for pattern in config.skip)):
            skipped[name] = "output embeddings and `skip` patterns are left alone unless `where` names them"
        elif id(parameter) in owners:
            skipped[name] = f"its weight is tied to {owners[id(parameter)]!r}"
        elif isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            skipped[name] = "its owner uses the weight without calling it"
        elif _has_own_forward(module):
            skipped[name] = f"{type(module).__name__} has a forward of its own"
        elif not wanted(where, name, module):
            skipped[name] = "`where` leaves it out"
        elif min(shape_of(module)) == 0:
            skipped[name] = "it is empty"
        else:
            owners[id(parameter)] = name
            chosen[name] = module
    return chosen, skipped


def _has_own_forward(module: nn.Module) -> bool:
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return own and not is_linear4bit(module)


def wanted(where: Where, name: str, module: nn.Module) -> bool:
    if where is None:
        return True
    if callable(where):
        return bool(where(name, module))
    patterns = [where] if isinstance(where, str) else list(where)
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _convert(name: str, module: nn.Module, config: ZOConfig, param_id: int, handle: Perturbation) -> ZOLinear:
    origin, bias = "linear", getattr(module, "bias", None)
    if is_linear4bit(module):
        origin, packed = "linear4bit", from_linear4bit(module)
        dense_dtype: torch.dtype = module.weight.quant_state.dtype  # type: ignore[union-attr, assignment]
    else:
        parameter = module.weight
        assert isinstance(parameter, Tensor)
        weight = parameter.detach()
        if is_conv1d(module):
            origin, weight = "conv1d", weight.T
        dense_dtype = weight.dtype
        try:
            packed = quantize(
                weight, config.format, config.group_size, method=config.quantizer, scale_dtype=config.scale_dtype
            )
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    layer = ZOLinear.from_packed(
        packed, bias, rank=config.rank_of(name), name=name, param_id=param_id, perturbation=handle, layout=config.layout
    )
    layer.origin, layer.dense_dtype = origin, dense_dtype
    layer.train(module.training)
    return layer


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is, and wherever else the model holds the same module."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key in [key for key, child in parent._modules.items() if child is old]:
            setattr(parent, key, module)


# The dry forward ------------------------------------------------------------------------------------------------------


def dry_run(model: nn.Module, chosen: dict[str, nn.Module], example: Any) -> dict[str, str]:
    """Reasons to leave layers alone, found by running two stacked copies of small examples through the model.

    Two batch shapes are tried where we make the examples ourselves, so that an expert which happens to get as many rows
    as one of them needs is still found out by the other.
    """
    examples = [(_stack(example), _tokens(example))] if example is not None else _made_up(model)
    reasons: dict[str, str] = {}
    for (args, kwargs), tokens in examples:
        calls: dict[str, list[Tensor]] = {name: [] for name in chosen}
        handles = [_record(module, calls[name]) for name, module in chosen.items()]
        training = model.training
        model.eval()
        batch = _leading(args, kwargs)
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            model.train(training)
        for name, seen in calls.items():
            if not seen:
                reasons.setdefault(name, "its own forward was not called in a dry forward")
            for x in seen:
                if reason := _regroups(x, batch, tokens):
                    reasons.setdefault(name, reason)
    return reasons


def _record(module: nn.Module, seen: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))


def _regroups(x: Tensor, batch: int, tokens: int | None) -> str | None:
    rows = x.shape[0] if x.dim() > 1 else 0
    flat = x.dim() == 2 and (rows % batch == 0 if tokens is None else rows == batch * tokens)
    if rows != batch and not flat:
        return f"it regroups rows: in a dry forward of {batch} sequences its input was {tuple(x.shape)}"
    half = rows // 2
    if not torch.allclose(x[:half].float(), x[half:].float(), rtol=1e-2, atol=1e-3 * float(x.abs().max())):
        return "it regroups rows: two equal halves of a batch were not equal halves of its input"
    return None


def _made_up(model: nn.Module) -> list[tuple[tuple[tuple, dict], int | None]]:
    """Token ids for a Hugging Face model; nothing for others, whose layers are then all trusted."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None or not hasattr(model, "get_input_embeddings"):
        return []
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    made: list[tuple[tuple[tuple, dict], int | None]] = []
    for sequences, tokens in ((3, 5), (2, 7)):
        ids = (torch.arange(sequences * tokens, device=device).view(sequences, tokens) * 7919 + 11) % vocabulary
        made.append((_stack({"input_ids": ids}), tokens))
    return made


def _stack(example: Any) -> tuple[tuple, dict]:
    """Two copies along the leading dimension, as (args, kwargs)."""

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value

    if isinstance(example, Mapping):
        return (), {key: twice(value) for key, value in example.items()}
    values = example if isinstance(example, (tuple, list)) else (example,)
    return tuple(twice(value) for value in values), {}


def _tokens(example: Any) -> int | None:
    """Tokens of a sequence in the first tensor of `example`: ids [B, T] or vectors [B, T, K]; None: can't tell."""
    args, kwargs = _stack(example)
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim())
    if first.dim() == (3 if first.is_floating_point() else 2):
        return first.shape[1]
    return 1 if first.dim() == 2 else None


def _leading(args: tuple, kwargs: dict) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise ValueError("`example` holds no tensor; pass the inputs of one forward, batch first")
