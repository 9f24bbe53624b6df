"""A Llama-architecture GGUF as a transformers model whose linears keep the file's packed blocks.

    Q4_1, Q4_0 -> int4, group 32      Q8_0 -> int8, group 32      F32, F16, BF16 -> dense
    file rows -> one panel of rows -> its slice of a ZOLinear's storage

The whole file is checked against its own metadata first (names, shapes, types, ranges), then an empty model is built
on the meta device and filled tensor by tensor. No weight ever exists dequantised and nothing is requantised: the
decoded values equal `gguf.quants.dequantize` exactly. A packed embedding stays packed; if the model is tied it is the
head's own storage. Peak memory of loading: the packed weights plus one panel.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .. import swap as swapping
from ..embedding import PackedEmbedding
from ..formats import PackedWeight
from ..layers import ZOLinear, best_layout
from ..perturbation import Perturbation
from ..quantize import quantize
from ..rng import assign_param_ids
from .gguf_file import GGUFError, GGUFHeader, TensorInfo, TensorReader, read_header, unpack
from .panels import assemble

__all__ = ["GGUFError", "llama_config", "load_gguf", "load_gguf_model", "load_gguf_tokenizer", "read_header"]

LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
BLOCK_NAME = re.compile(r"blk\.(0|[1-9]\d*)\.([a-z_]+)\.(weight|bias)")


def load_gguf(
    path: str | os.PathLike[str],
    config: swapping.ZOConfig | None = None,
    *,
    where: swapping.Where = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase | None]:
    """Model and tokenizer of a GGUF file, see `load_gguf_model`; None in place of a tokenizer that the file lacks."""
    model = load_gguf_model(path, config, where=where, dtype=dtype)
    return model, load_gguf_tokenizer(path)


def load_gguf_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer inside a GGUF file, None if it has none. Raises GGUFError if it cannot be built.

    This is what `AutoTokenizer.from_pretrained(folder, gguf_file=name)` ends in, without its way through a full
    `GGUFReader`: 0.5 s and 48 MB at the peak in place of 4.3 s and 167 MB for the 49 152 tokens of SmolLM2.
    """
    path = Path(path)
    header = read_header(path)
    if not getattr(header.metadata.get("tokenizer.ggml.tokens"), "length", 0):
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except Exception as problem:  # the tokenizers library raises bare Exceptions
        raise header.error(f"its tokenizer cannot be built: {problem!r}") from problem


def load_gguf_model(
    path: str | os.PathLike[str],
    config: swapping.ZOConfig | None = None,
    *,
    where: swapping.Where = None,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """The model of a GGUF file, in eval mode, on the CPU, every linear a `ZOLinear`, everything but C frozen.

    config: the ranks, and the format of linears that the file stores unpacked (F32, F16, BF16). Packed linears keep the
        file's codes whatever it says. None: rank 0 and the file's own formats, plain inference.
    where: as in `swap`. Linears it leaves out, those of `config.skip` and the head have rank 0 and the file's format.
    dtype: of norms, biases and looked-up embeddings, and so of the activations.

    Raises:
        GGUFError: truncated, corrupted, contradictory or unsupported file; before anything is built, unless it is the
            data that is damaged (a scale is not finite).
        ValueError: another dtype than float32, bfloat16, float16; a rank larger than a layer's in_features; `where`
            leaves no layer.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"`dtype` is {dtype}; torch.float32, torch.bfloat16 and torch.float16 are allowed")
    header = read_header(path)
    shape = llama_config(header, dtype)
    names = _match_tensors(header, shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    plan = _plan_ranks(model, names, config, where)
    tied = "lm_head" not in names.values()
    ids = assign_param_ids(f"{target}.weight" for target in (*plan, "lm_head"))
    perturbation = Perturbation()
    layout = (config and config.layout) or best_layout(torch.device("cpu"))

    def linear(name: str, target: str) -> ZOLinear:
        info, bias = header.tensors[name], header.tensors.get(name.removesuffix(".weight") + ".bias")
        head_dim = shape.head_dim if ".attn_q." in name or ".attn_k." in name else 0
        layer = ZOLinear.from_packed(
            _read_packed(reader, info, layout, head_dim, config if plan.get(target) is not None else None),
            None if bias is None else reader.vector(bias, head_dim).to(dtype),
            rank=plan.get(target) or 0,
            name=target,
            param_id=ids[f"{target}.weight"],
            perturbation=perturbation,
            layout=layout,
        )
        layer.dense_dtype = dtype
        return layer

    with TensorReader(header) as reader, _one_thread():
        head = linear("token_embd.weight" if tied else "output.weight", "lm_head")
        model.lm_head = head
        table = head if tied else _read_packed(reader, header.tensors["token_embd.weight"], "row")
        model.model.embed_tokens = PackedEmbedding(table, dtype)
        for name, target in names.items():
            if target in plan:
                parent, _, child = target.rpartition(".")
                setattr(model.get_submodule(parent), child, linear(name, target))
            elif name != "token_embd.weight" and target != "lm_head":
                norm = nn.Parameter(reader.vector(header.tensors[name]).to(dtype), requires_grad=False)
                model.get_submodule(target).weight = norm
        model.model.rotary_emb = type(model.model.rotary_emb)(shape)
        if "rope_freqs.weight" in header.tensors:  # Llama 3's scaling, as factors of the wavelengths
            for inv_freq in (model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq):
                inv_freq /= reader.vector(header.tensors["rope_freqs.weight"])
    return model.eval()


def _plan_ranks(
    model: nn.Module,
    names: dict[str, str],
    config: swapping.ZOConfig | None,
    where: swapping.Where,
) -> dict[str, int | None]:
    """Rank of each linear but the head, by its name in the model; None: `config` and `where` leave it alone."""
    plan: dict[str, int | None] = {}
    for target in names.values():
        module = model.get_submodule(target)
        if not isinstance(module, nn.Linear) or target == "lm_head":
            continue
        plan[target] = None
        skipped = config is None or any(fnmatch.fnmatch(target, pattern) for pattern in config.skip)
        if config is not None and not skipped and swapping.wanted(where, target, module):
            plan[target] = config.rank_of(target)
            if config.rank_of(target) > module.in_features:
                raise ValueError(
                    f"`rank` is {config.rank_of(target)}, but layer {target!r} has in_features={module.in_features}"
                )
    if config is not None and not any(rank is not None for rank in plan.values()):
        raise ValueError(f"`where` is {where!r} and `skip` is {config.skip!r}; they leave none of {len(plan)} linears")
    return plan


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Panels are some 30 000 elements: with a second thread on a busy machine, loading took 10 s in place of 2."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def llama_config(header: GGUFHeader, dtype: torch.dtype = torch.float32) -> LlamaConfig:
    """The metadata of a Llama-architecture GGUF as a `LlamaConfig`, every value checked against the tensors' shapes.

    A tied head is packed together with the embedding, so no two parameters are left for transformers to tie, and
    `tie_word_embeddings` is False either way.

    Raises GGUFError naming the key, its value and what is allowed.
    """
    read = _Keys(header)
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise header.error(f"`general.architecture` is {architecture!r}; 'llama' is supported")
    if read.integer("expert_count", 0) > 0:
        raise header.error("it is a mixture of experts (`llama.expert_count` > 0); dense models are supported")
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise header.error("tensor `token_embd.weight` [vocabulary, width] is missing")
    vocabulary, width = table.shape
    read.equal("embedding_length", width, "the width of `token_embd.weight`")
    heads = read.positive("attention.head_count")
    kv_heads = read.positive("attention.head_count_kv", heads)
    if heads % kv_heads or width % heads:
        raise header.error(f"{heads} heads, {kv_heads} key/value heads and width {width} do not divide one another")
    head_dim = read.positive("attention.key_length", width // heads)
    read.equal("attention.value_length", head_dim, "`attention.key_length`", head_dim)
    read.equal("rope.dimension_count", head_dim, "the size of a head", head_dim)
    if head_dim % 2:
        raise header.error(f"a head has {head_dim} dimensions; rotary embedding needs an even number")
    blocks = {int(match[1]) for name in header.tensors if (match := BLOCK_NAME.fullmatch(name))}
    read.equal("block_count", len(blocks), "the number of blocks among the tensors")
    if blocks != set(range(len(blocks))):
        raise header.error(f"the tensors have blocks {sorted(blocks)[:8]}...; 0 to {len(blocks) - 1} are expected")

    def token(key: str) -> int | None:
        value = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and not (isinstance(value, int) and 0 <= value < vocabulary):
            raise header.error(f"`tokenizer.ggml.{key}_token_id` is {value!r}; 0 to {vocabulary - 1} are allowed")
        return value

    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and getattr(tokens, "length", -1) > vocabulary:
        raise header.error(f"`tokenizer.ggml.tokens` has {tokens.length} tokens; the embedding has {vocabulary} rows")
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=read.positive("feed_forward_length"),
        num_hidden_layers=len(blocks),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=read.positive("context_length"),
        rms_norm_eps=read.real("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope(header, read),
        bos_token_id=token("bos"),
        eos_token_id=token("eos"),
        pad_token_id=token("padding"),
        tie_word_embeddings=False,
        dtype=dtype,
    )


class _Keys:
    """Reads `llama.*` metadata with a type and a range; a default makes a key optional."""

    def __init__(self, header: GGUFHeader):
        self.header = header

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.header.metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.header.error(f"`llama.{key}` is {_missing(value)}; an integer is needed")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if not 0 < value < 1 << 31:
            raise self.header.error(f"`llama.{key}` is {value}; a positive 32-bit integer is needed")
        return value

    def equal(self, key: str, needed: int, why: str, default: int | None = None) -> None:
        value = self.integer(key, default)
        if value != needed:
            raise self.header.error(f"`llama.{key}` is {value}, but {why} is {needed}")

    def real(self, key: str, default: float | None = None) -> float:
        value = self.header.metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.header.error(f"`llama.{key}` is {_missing(value)}; a positive finite number is needed")
        return float(value)


def _missing(value: object) -> str:
    return "missing" if value is None else repr(value)


def _rope(header: GGUFHeader, read: _Keys) -> dict[str, Any]:
    """Rotary parameters. Llama 3's factors come as tensor `rope_freqs.weight`, applied when the model is built."""
    rope: dict[str, Any] = {"rope_theta": read.real("rope.freq_base", 10000.0), "rope_type": "default"}
    kind = header.metadata.get("llama.rope.scaling.type", "none")
    factor = read.real("rope.scaling.factor", read.real("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise header.error(f"`llama.rope.scaling.type` is {kind!r}; 'none' and 'linear' are supported")
    if factor != 1.0 and (kind == "linear" or "llama.rope.scaling.type" not in header.metadata):
        rope |= {"rope_type": "linear", "factor": factor}
    return rope


def _match_tensors(header: GGUFHeader, shape: LlamaConfig) -> dict[str, str]:
    """Name in the file -> module of the model, for every weight; all present, shaped right, and none left over."""
    width, inner, head_dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    queries, keys = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim
    sizes = {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    needed: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens", (shape.vocab_size, width)),
        "output_norm.weight": ("model.norm", (width,)),
    }
    optional: dict[str, tuple[int, ...]] = {"rope_freqs.weight": (head_dim // 2,)}
    if "output.weight" in header.tensors:
        needed["output.weight"] = ("lm_head", (shape.vocab_size, width))
    for block in range(shape.num_hidden_layers):
        for name, target in NORMS.items():
            needed[f"blk.{block}.{name}.weight"] = (f"model.layers.{block}.{target}", (width,))
        for name, target in LINEARS.items():
            needed[f"blk.{block}.{name}.weight"] = (f"model.layers.{block}.{target}", sizes[name])
            optional[f"blk.{block}.{name}.bias"] = sizes[name][:1]
    for name, expected in ({name: size for name, (_, size) in needed.items()} | optional).items():
        info = header.tensors.get(name)
        if info is None and name in needed:
            raise header.error(f"tensor `{name}` is missing; shape {expected} is expected")
        if info is not None and info.shape != expected:
            raise header.error(f"tensor `{name}` has shape {info.shape}; the metadata need {expected}")
        if info is not None and len(expected) == 1 and info.type.weights > 1:
            raise header.error(f"tensor `{name}` has the type {info.type.name}; a vector needs F32, F16 or BF16")
    if extra := sorted(header.tensors.keys() - needed.keys() - optional.keys()):
        raise header.error(f"{len(extra)} tensors have no place in a Llama model: {', '.join(extra[:4])}")
    return {name: target for name, (target, _) in needed.items()}


def _read_packed(
    reader: TensorReader, info: TensorInfo, layout: str, head_dim: int = 0, config: swapping.ZOConfig | None = None
) -> PackedWeight:
    """One matrix of the file in `layout`; an unpacked type is quantised by `config` if there is one."""

    def panels() -> Iterator[PackedWeight]:
        for raw in reader.panels(info, head_dim):
            panel = unpack(info.type.name, raw, info.name, reader.header)
            if config is not None and panel.format == "dense":
                panel = quantize(
                    panel.weight,
                    config.format,
                    config.group_size,
                    method=config.quantizer,
                    scale_dtype=config.scale_dtype,
                )
            yield panel

    return assemble(panels(), info.shape[0], layout)
