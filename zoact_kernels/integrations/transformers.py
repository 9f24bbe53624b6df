"""Local models: a Hugging Face directory (safetensors) or a GGUF file -> a model whose linears are ZOLinear.

A directory is read shard by shard and tensor by tensor: an empty model is built on the meta device and every linear
that `swap` would take is quantised panel by panel while it is read, so the dense model never exists. What that way
cannot do (a new head, renamed weights, a model that uses a linear's `.weight` without calling it) is loaded by
transformers whole and then swapped; `Loaded.report` is the same either way.

Nothing is unpickled, downloaded or executed from the directory. transformers itself is imported by the functions that
need it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import rng
from .. import swap as swapping
from ..layers import ZOLinear, best_layout, zo_layers
from ..perturbation import Perturbation
from ..quantize import quantize
from ..swap import Swapped, SwapReport, Where, ZOConfig
from .panels import assemble

TASKS = {"causal-lm": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}
PANEL_WEIGHTS = 1 << 20  # weights read and quantised at a time, 4 MB in fp32
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


class Loaded(NamedTuple):
    """A loaded model. `tokenizer` is None when there is none beside the weights."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase | None
    report: SwapReport


class _NotStreamable(Exception):
    """Why a directory cannot be read tensor by tensor; it is then loaded whole."""


def load_model(
    path: str | os.PathLike[str],
    config: ZOConfig | None = None,
    *,
    where: Where = None,
    dtype: torch.dtype = torch.float32,
    task: str = "causal-lm",
) -> Loaded:
    """A local model, in eval mode on the CPU, its linears swapped and everything but their C frozen.

    path: a `.gguf` file (Llama architecture), a directory with one such file, or a Hugging Face directory with
        `config.json` and safetensors.
    config: format and ranks; None is `ZOConfig(rank=0)`, plain low-bit inference. A GGUF keeps its own packed formats.
    where: as in `swap`; for a GGUF it says which layers have a rank.
    dtype: of everything that stays dense, and of the activations.
    task: "causal-lm", or "classification" (Hugging Face directories only).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no safetensors (pickled weights are refused), a damaged file, an unknown task, a rank larger than
            a layer's in_features, no layer to swap.
    """
    path = Path(path)
    config = config or ZOConfig(rank=0)
    if task not in TASKS:
        raise ValueError(f"`task` is {task!r}; {', '.join(map(repr, TASKS))} are allowed")
    if not path.exists():
        raise FileNotFoundError(f"`path` is {str(path)!r}, and there is no such file or directory")
    if path.is_dir() and not list(path.glob("*.safetensors")) and len(ggufs := list(path.glob("*.gguf"))) == 1:
        path = ggufs[0]
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"`path` is the file {str(path)!r}; a .gguf file or a Hugging Face directory is allowed")
        if task != "causal-lm":
            raise ValueError(f"`task` is {task!r}; a GGUF file holds a causal language model, 'causal-lm'")
        from .gguf import load_gguf

        model, tokenizer = load_gguf(path, config, where=where, dtype=dtype)
        return Loaded(model, tokenizer, _report(model, {}, {}))
    _shards(path)  # before transformers is asked, which would look for pickles
    try:
        json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} needs a `config.json` that can be read: {problem}") from problem
    try:
        model, report = _stream(path, config, where, dtype, task)
    except _NotStreamable:
        model = _auto(task).from_pretrained(
            str(path), dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        model.eval().requires_grad_(False)
        report = swapping.swap(model, config, where)
    return Loaded(model, _tokenizer(path), report)


def _report(model: Any, kinds: dict[str, str], skipped: dict[str, str]) -> SwapReport:
    """The report of a model whose linears were packed while they were read; `kinds`: what they would have been."""
    rows = []
    for name, layer in zo_layers(model).items():
        sizes = (layer.out_features, layer.in_features)
        dense = math.prod(sizes) * layer.dense_dtype.itemsize
        nbytes = layer.packed().nbytes
        kind = kinds.get(name, "Linear")
        rows.append(Swapped(name, kind, layer.format, layer.layout, sizes, layer.rank, nbytes, dense))
    return SwapReport(tuple(rows), skipped)


def _auto(task: str) -> Any:
    import transformers

    return getattr(transformers, TASKS[task])


def _tokenizer(path: Path) -> Any:
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((path / name).exists() for name in files):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)


def _shards(path: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it. Raises ValueError if there is none, or a shard is missing."""
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            raise ValueError(f"{index} is damaged: {problem!r}; it needs a `weight_map` of names to files") from problem
        if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise ValueError(f"{index}: `weight_map` names the file {bad[0]!r}; plain file names are allowed")
        files = [path / name for name in sorted(names)]
    else:
        files = sorted(path.glob("*.safetensors"))
        if len(files) > 1:
            files = [path / "model.safetensors"]
    if not files:
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        found = f"only {pickles[0]}, which can run code when it is loaded: convert it" if pickles else "none"
        raise ValueError(f"{path} needs its weights in safetensors; there is {found}")
    where = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                where.update(dict.fromkeys(shard.keys(), file))
        except (SafetensorError, OSError) as problem:
            raise ValueError(f"{file} cannot be read: {problem}") from problem
    return where


def _stream(path: Path, config: ZOConfig, where: Where, dtype: torch.dtype, task: str) -> tuple[Any, SwapReport]:
    """Build on the meta device, then read every tensor once, quantising linears on the way."""
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if getattr(shape, "quantization_config", None) is not None:
        raise _NotStreamable("it is quantised already")
    with torch.device("meta"):
        model = _auto(task).from_config(shape, dtype=dtype, trust_remote_code=False)
    source = _match(model, _shards(path))
    linears = [f"{name}.weight" for name, module in model.named_modules() if swapping.is_linear(module)]
    ids = rng.assign_param_ids(linears)
    chosen, skipped = swapping.candidates(model, config, where)
    if not chosen:
        raise ValueError(
            f"`where` is {where!r} and `skip` is {config.skip!r}; they leave none of {len(linears)} linears"
        )
    layout = config.layout or best_layout(torch.device("cpu"))
    handle = Perturbation()
    kinds: dict[str, str] = {}
    for name, module in chosen.items():
        in_features = swapping.shape_of(module)[1]
        if config.rank_of(name) > in_features:
            raise ValueError(f"`rank` is {config.rank_of(name)}, but layer {name!r} has in_features={in_features}")
    for name, module in chosen.items():
        key, file = source.pop(f"{name}.weight")
        packed = _quantised(key, file, module, config, layout, name)
        bias = None
        if module.bias is not None:
            key, file = source.pop(f"{name}.bias")
            bias = _read(key, file).to(dtype)
        layer = ZOLinear.from_packed(
            packed, bias, rank=config.rank_of(name), name=name, param_id=ids[f"{name}.weight"],
            perturbation=handle, layout=layout,
        )  # fmt: skip
        layer.origin, layer.dense_dtype = "conv1d" if swapping.is_conv1d(module) else "linear", dtype
        swapping.put(model, name, layer)
        kinds[name] = type(module).__name__
    for target, (key, file) in source.items():
        _fill(model, target, _read(key, file))
    model.tie_weights()
    _compute_buffers(model)
    model.eval().requires_grad_(False)
    for layer in zo_layers(model).values():
        layer.requires_grad_(True)
    _check_calls(model, chosen)
    return model, _report(model, kinds, skipped)


def _match(model: nn.Module, shards: dict[str, Path]) -> dict[str, tuple[str, Path]]:
    """Name in the model -> (name in the file, file). Raises _NotStreamable unless they cover each other plainly."""
    expected = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    found: dict[str, tuple[str, Path]] = {}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"position_ids$"]  # type: ignore[misc]
    for key, file in shards.items():
        target = next((name for name in (key, prefix + key, key.removeprefix(prefix)) if name in expected), None)
        if target is not None:
            found[target] = (key, file)
        elif not any(re.search(pattern, key) for pattern in ignored):
            raise _NotStreamable(f"tensor {key!r} has another name in the model, or no place in it")
    tied = getattr(model, "all_tied_weights_keys", {})
    if missing := [name for name in expected if name not in found and name not in tied]:
        raise _NotStreamable(f"tensor {missing[0]!r} is not in the files")
    return found


def _slices(key: str, file: Path, rows_last: bool) -> Iterator[Tensor]:
    """Panels [rows, K] of a stored matrix, top to bottom; `rows_last`: it is stored [K, N].

    The file is opened for each panel: a mapping's pages count as resident until it is closed.
    """
    from safetensors import safe_open

    first, total = 0, 1
    while first < total:
        with safe_open(file, framework="pt") as shard:
            stored = shard.get_slice(key)
            sizes = stored.get_shape()
            total, columns = sizes[::-1] if rows_last else sizes
            step = max(64, PANEL_WEIGHTS // max(columns, 1) // 64 * 64)
            last = min(first + step, total)
            panel = stored[:, first:last].T if rows_last else stored[first:last]
            panel = panel.contiguous().clone()  # the slice may be a view of the mapping
            del stored
        yield panel
        first = last


def _quantised(key: str, file: Path, module: nn.Module, config: ZOConfig, layout: str, name: str) -> Any:
    """The stored weight of a linear in the config's format, one panel at a time."""
    N, K = swapping.shape_of(module)
    expected = (K, N) if swapping.is_conv1d(module) else (N, K)
    if (stored := _stored_shape(key, file)) != expected:
        raise ValueError(f"{file}: tensor {key!r} has shape {stored}; `config.json` needs {expected}")
    try:
        panels = (
            quantize(panel, config.format, config.group_size, method=config.quantizer, scale_dtype=config.scale_dtype)
            for panel in _slices(key, file, swapping.is_conv1d(module))
        )
        return assemble(panels, N, layout)
    except ValueError as problem:
        raise ValueError(f"layer {name!r}: {problem}") from problem


def _stored_shape(key: str, file: Path) -> tuple[int, ...]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as shard:
        return tuple(shard.get_slice(key).get_shape())


def _read(key: str, file: Path) -> Tensor:
    """A stored tensor in memory of its own."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as shard:
        return shard.get_tensor(key).clone()


def _fill(model: nn.Module, target: str, value: Tensor) -> None:
    """Put a stored value in the place of a meta parameter or persistent buffer, in that one's dtype."""
    parent, _, name = target.rpartition(".")
    module = model.get_submodule(parent)
    empty = getattr(module, name)
    if empty.shape != value.shape:
        raise ValueError(f"tensor {target!r} has shape {tuple(value.shape)}; `config.json` needs {tuple(empty.shape)}")
    value = value.to(empty.dtype)
    setattr(module, name, nn.Parameter(value, requires_grad=False) if name in module._parameters else value)


def _compute_buffers(model: nn.Module) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, position ids): transformers' own initialisation of them.

    Everything else is marked as initialised first, which is how `from_pretrained` tells it what to leave alone.
    """
    for module in model.modules():
        empty = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        module._is_hf_initialized = not empty  # type: ignore[assignment]
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # type: ignore[operator]
    left: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    if empty_still := [name for name, tensor in left if tensor.is_meta]:
        raise _NotStreamable(f"{empty_still[0]!r} is neither in the files nor computed")


def _check_calls(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raise _NotStreamable if `swap` would have left one of the layers alone after its dry forward."""
    layers = zo_layers(model)
    try:
        reasons = swapping.dry_run(model, {name: layers[name] for name in chosen}, None)
    except Exception as problem:  # whatever a model does with a packed `.weight`; the dense way will say it properly
        raise _NotStreamable(f"its forward fails on packed weights: {problem!r}") from problem
    if reasons:
        raise _NotStreamable("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
