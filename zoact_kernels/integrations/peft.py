"""What was learned, as an ordinary PEFT LoRA directory, and back.

    y = x D(W)^T + (x A) C^T          lora_A.weight = A^T [R, K]     lora_B.weight = C [N, R]     alpha = R, so scale 1

A delta learned earlier (`base_basis`, `base_coeff`) stands beside it: A' = [base_basis | A], C' = [base_coeff | C].
PEFT is not imported: the format is a JSON and a safetensors file. Files are written beside the target under another
name, flushed and moved, so a full disk or a kill leaves the old adapter or none, never half of one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ZOLinear, zo_layers
from ..rng import strip_prefixes
from ..trainables.prefix import KINDS, from_activations, prefix_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Options of a LoRA that change what is computed or stored beyond A and B, with the only value we can take over.
REFUSED: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    # The others of these subtract the first B A from the base weight, which a frozen low-bit weight cannot take.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


def lora_factors(layer: ZOLinear) -> tuple[Tensor, Tensor] | None:
    """(A' [K, R'], C' [N, R']) of a layer's whole learned delta C' A'^T, fp32 on the CPU; None if it has none.

    Of a delta learned earlier the columns that are used, one at least.
    """
    pairs: Any = [(layer.base_basis, layer.base_coeff), (layer.basis, layer.coeff)]
    pairs = [(basis, coeff) for basis, coeff in pairs if basis is not None and coeff is not None]
    if not pairs:
        return None
    bases, coeffs = (torch.cat([tensor.detach() for tensor in each], 1) for each in zip(*pairs, strict=True))
    if layer.base_coeff is not None:  # a delta has columns to spare
        used = coeffs.any(0)
        used[0] |= ~used.any()
        bases, coeffs = bases[:, used], coeffs[:, used]
    return bases.float().cpu(), coeffs.float().cpu()


def export_lora(model: nn.Module, directory: str | os.PathLike[str], base_model_name: str | None = None) -> Path:
    """Write the adapter of a swapped model: `adapter_model.safetensors`, `adapter_config.json`; returns the directory.

    base_model_name: recorded as the base model's name or path, for tools that look for it.

    Raises:
        ValueError: the model has no layer with a basis, so there is nothing to export.
        OSError: it cannot be written; what stood there before still stands.
    """
    factors = {name: pair for name, layer in zo_layers(model).items() if (pair := lora_factors(layer)) is not None}
    if not factors:
        raise ValueError("`model` has no ZOLinear with a basis; compute_basis or import_lora comes before export_lora")
    names = {name: strip_prefixes(name) for name in factors}
    ranks = {names[name]: basis.shape[1] for name, (basis, _) in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}  # PEFT reads the keys as patterns
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if _has_head(model) else None,
        "base_model_name_or_path": base_model_name,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(zo_layers(model)[name].origin == "conv1d" for name in factors),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    tensors = {}
    for name, (basis, coeff) in factors.items():
        tensors[f"{PREFIX}{names[name]}.lora_A.weight"] = basis.T.contiguous()
        tensors[f"{PREFIX}{names[name]}.lora_B.weight"] = coeff.contiguous()
    return _write(directory, tensors, config)


def export_prefix(model: nn.Module, directory: str | os.PathLike[str], base_model_name: str | None = None) -> Path:
    """Write the prefix of a model as PEFT's prefix tuning without a projection; files, return and OSError as above.

    prompt_embeddings [tokens, layers * 2 * heads * width] fp32: keys and values of layer 0, then of layer 1 ... PEFT
    reads that of a language model; of a classifier it wants the head as well, which was not trained and is not here.
    Raises ValueError: the model has no prefix, or has a LoRA as well, which one adapter can't hold beside it.
    """
    prefix = prefix_of(model)
    if prefix is None:
        raise ValueError("`model` has no prefix; a method that trains one comes before export_prefix")
    if any(lora_factors(layer) is not None for layer in zo_layers(model).values()):
        raise ValueError("`model` has a prefix and a LoRA; a PEFT adapter is one of them, so merge the LoRA first")
    tensors = [prefix.tensor(kind, layer) for layer in range(prefix.layers) for kind in KINDS]
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM" if _has_head(model) else "SEQ_CLS",
        "base_model_name_or_path": base_model_name,
        "num_virtual_tokens": prefix.tokens,
        "num_layers": prefix.layers,
        "num_attention_heads": prefix.heads,
        "token_dim": prefix.heads * prefix.width,
        "encoder_hidden_size": prefix.heads * prefix.width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "inference_mode": True,
    }
    return _write(directory, {"prompt_embeddings": torch.cat(tensors, dim=1).cpu()}, config)


def export_adapter(model: nn.Module, directory: str | os.PathLike[str], base_model_name: str | None = None) -> Path:
    """The model's prefix if it has one, else its LoRA."""
    return (export_lora if prefix_of(model) is None else export_prefix)(model, directory, base_model_name)


def _write(directory: str | os.PathLike[str], tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    from safetensors.torch import save

    directory = Path(directory)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    _write_together(directory, {WEIGHTS: save(tensors, {"format": "pt"}), CONFIG: text.encode("utf-8")})
    return directory


def _has_head(model: nn.Module) -> bool:
    """Whether it is a language model: it has an output projection."""
    ask = getattr(model, "get_output_embeddings", None)
    return hasattr(model, "lm_head") or (ask is not None and ask() is not None)


def _write_together(directory: Path, files: dict[str, bytes]) -> None:
    """Write all the files or none: each in full under a temporary name, then all moved into place."""
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    try:
        for name, data in files.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=directory)
            written[temporary] = name
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, name in list(written.items()):
            os.chmod(temporary, 0o644)  # mkstemp gives 0o600, and adapters are made to be shared
            os.replace(temporary, directory / name)
            del written[temporary]
    except BaseException:
        for temporary in written:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def import_lora(model: nn.Module, directory: str | os.PathLike[str]) -> dict[str, int]:
    """Continue from a PEFT LoRA: its product B A becomes C A^T of the layers it names. Returns the rank of each.

    A's columns are made orthonormal by QR, A^T = Q T: basis Q [K, R], C = scale B T^T, the same product. An A that is
    orthonormal already (one of ours) is taken as it is, bit for bit, and layers with equal A share one tensor.
    Layers the adapter does not name keep what they have.

    Raises ValueError, before the model is changed, for a directory that is no LoRA in safetensors, for options beyond A
    and B (DoRA, biases, whole modules, ...), for modules the model has no ZOLinear for, and for shapes that do not fit.
    """
    directory = Path(directory)
    config = _read_config(directory)
    tensors = _read_weights(directory)
    layers = {strip_prefixes(name): layer for name, layer in zo_layers(model).items()}
    pairs = _pair_up(tensors, directory, layers)
    learned: dict[str, tuple[Tensor, Tensor]] = {}
    shared: dict[tuple[torch.Size, bytes], Tensor] = {}
    for name, (a, b) in pairs.items():
        basis, coeff = _orthonormal(a.double(), b.double() * _scale(config, name, a.shape[0], directory))
        device: Any = layers[name].weight.device
        learned[name] = (shared.setdefault((basis.shape, basis.numpy().tobytes()), basis.to(device)), coeff.to(device))
    for name, (basis, coeff) in learned.items():
        layers[name].set_basis(basis, coeff)
    return {name: basis.shape[1] for name, (basis, _) in learned.items()}


def import_prefix(model: nn.Module, directory: str | os.PathLike[str]) -> int:
    """Give a model the prefix of PEFT's prefix tuning, in place of one as long. Returns its number of tokens.

    Raises ValueError, before the model is changed, for a directory that is no such adapter in safetensors, for one with
    a projection, for a tensor of another shape than the model's keys and values ask for, and for encoders.
    """
    directory = Path(directory)
    config, tensors = _read_json(directory), _read_weights(directory)
    if config.get("peft_type") != "PREFIX_TUNING" or config.get("prefix_projection"):
        kind = f"{config.get('peft_type')!r}, prefix_projection {config.get('prefix_projection')!r}"
        raise ValueError(f"{directory / CONFIG}: `peft_type` is {kind}; a prefix is 'PREFIX_TUNING' without projection")
    stored = tensors.get("prompt_embeddings")
    if stored is None or stored.dim() != 2 or len(stored) < 1 or not stored.isfinite().all():
        raise ValueError(
            f"{directory / WEIGHTS} has no finite `prompt_embeddings` [tokens, numbers], one token at least"
        )
    before = prefix_of(model)
    prefix = before or from_activations(model, len(stored), 0)
    parts = [(kind, layer) for layer in range(prefix.layers) for kind in KINDS]
    wanted = (prefix.tokens, len(parts) * prefix.heads * prefix.width)
    if tuple(stored.shape) != wanted:
        if before is None:
            prefix.remove(model)
        raise ValueError(f"{directory / WEIGHTS}: prompt_embeddings is {tuple(stored.shape)}; the model needs {wanted}")
    for (kind, layer), part in zip(parts, stored.chunk(len(parts), dim=1), strict=True):
        prefix.tensor(kind, layer).copy_(part)
    return prefix.tokens


def import_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> dict[str, int]:
    """`import_lora`, or `import_prefix` for an adapter of that kind: then no layer has a rank."""
    if _read_json(Path(directory)).get("peft_type") == "PREFIX_TUNING":
        import_prefix(model, directory)
        return {}
    return import_lora(model, directory)


def _read_json(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"`directory` is {str(directory)!r}; there is no {CONFIG} in it, so it is no PEFT adapter"
        ) from None
    except ValueError as problem:
        raise ValueError(f"{path} is no JSON: {problem}") from problem
    if not isinstance(config, dict):
        raise ValueError(f"{path}: it is a {type(config).__name__}; an adapter's configuration is needed")
    return config


def _read_config(directory: Path) -> dict[str, Any]:
    path, config = directory / CONFIG, _read_json(directory)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: `peft_type` is {config.get('peft_type')!r}; 'LORA' can be imported")
    for key, allowed in REFUSED.items():
        if config.get(key) not in allowed:
            raise ValueError(f"{path}: `{key}` is {config[key]!r}; an imported LoRA has only A and B: {allowed[-1]!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{path}: `{key}` is {config[key]!r}; names with numbers are needed")
    return config


def _read_weights(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / WEIGHTS
    if not path.exists():
        pickled = (directory / "adapter_model.bin").exists()
        found = "only adapter_model.bin, which can run code when it is loaded" if pickled else "none"
        raise ValueError(f"{directory} needs its weights in {WEIGHTS}; there is {found}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as problem:
        raise ValueError(f"{path} cannot be read: {problem}") from problem


def _pair_up(
    tensors: dict[str, Tensor], directory: Path, layers: dict[str, ZOLinear]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (lora_A [R, K], lora_B [N, R]), every tensor used and every shape checked."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            raise ValueError(
                f"{directory / WEIGHTS} holds {key!r}; only lora_A.weight and lora_B.weight can be imported"
            )
        halves.setdefault(strip_prefixes(match[1]), {})[match[2]] = tensor
    if not halves:
        raise ValueError(f"{directory / WEIGHTS} is empty")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, half in halves.items():
        if name not in layers:
            raise ValueError(
                f"the adapter has a module {name!r}, for which `model` has no ZOLinear; swap that layer too"
            )
        if half.keys() != {"A", "B"}:
            raise ValueError(f"{directory / WEIGHTS}: {name!r} has only lora_{next(iter(half))}; A and B are needed")
        a, b, layer = half["A"], half["B"], layers[name]
        rank = a.shape[0]
        if a.shape != (rank, layer.in_features) or b.shape != (layer.out_features, rank) or rank < 1:
            raise ValueError(
                f"{name!r}: lora_A is {tuple(a.shape)} and lora_B {tuple(b.shape)}; the layer needs "
                f"(R, {layer.in_features}) and ({layer.out_features}, R) with R >= 1"
            )
        if not (a.is_floating_point() and b.is_floating_point() and a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{name!r}: lora_A and lora_B have to hold finite floating point numbers")
        if layer.base_basis is not None:
            raise ValueError(f"layer {name!r} has a learned base delta already; import into a model without one")
        pairs[name] = (a, b)
    return pairs


def _scale(config: dict[str, Any], name: str, rank: int, directory: Path) -> float:
    """alpha / R, or alpha / sqrt(R) for rsLoRA; patterns as PEFT reads them, the first that ends the name wins."""

    def of(pattern_key: str, key: str) -> Any:
        for pattern, value in (config.get(pattern_key) or {}).items():
            with contextlib.suppress(re.error):
                if re.match(rf"(.*\.)?({pattern})$", name):
                    return value
        return config.get(key, 8)

    alpha, stated = of("alpha_pattern", "lora_alpha"), of("rank_pattern", "r")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{directory / CONFIG}: lora_alpha of {name!r} is {alpha!r}; a finite number is needed")
    if stated != rank:
        raise ValueError(f"{directory / CONFIG}: r of {name!r} is {stated!r}, but its lora_A has {rank} rows")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _orthonormal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(basis [K, R'], coeff [N, R']) fp32, coeff basis^T = b a for a [R, K] and b [N, R] in fp64; R' = min(R, K)."""
    rank = a.shape[0]
    # fp32 columns are orthonormal to about 1e-6; anything further off would change the radius of the perturbation.
    if rank <= a.shape[1] and torch.allclose(a @ a.T, torch.eye(rank, dtype=a.dtype), rtol=0, atol=1e-5):
        return a.T.float().contiguous(), b.float()
    q, t = torch.linalg.qr(a.T)
    return q.float().contiguous(), (b @ t.T).float()
