"""A small Llama as a GGUF: written by the real `gguf` library, or byte by byte by `Forge`, which may lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

TYPES = ("Q4_0", "Q4_1", "Q8_0", "F16", "F32", "BF16")
CODES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}


@dataclass
class Tiny:
    """Sizes of a small Llama. 70 tokens are no multiple of 64 or 16, K = 96 and 160 none of 64; heads of 24 rows."""

    layers: int = 2
    width: int = 96
    heads: int = 4
    kv_heads: int = 2
    inner: int = 160
    vocabulary: int = 70
    tied: bool = True
    bias: bool = False
    types: dict[str, str] = field(default_factory=dict)  # parts of names -> type; else Q4_1

    def metadata(self) -> dict[str, Any]:
        return {
            "general.architecture": "llama",
            "llama.block_count": self.layers,
            "llama.context_length": 64,
            "llama.embedding_length": self.width,
            "llama.feed_forward_length": self.inner,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.rope.dimension_count": self.width // self.heads,
            "llama.rope.freq_base": 10000.0,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        keys = self.kv_heads * (self.width // self.heads)
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocabulary, self.width)}
        for block in range(self.layers):
            for name, shape in {
                "attn_norm": (self.width,),
                "attn_q": (self.width, self.width),
                "attn_k": (keys, self.width),
                "attn_v": (keys, self.width),
                "attn_output": (self.width, self.width),
                "ffn_norm": (self.width,),
                "ffn_gate": (self.inner, self.width),
                "ffn_up": (self.inner, self.width),
                "ffn_down": (self.width, self.inner),
            }.items():
                shapes[f"blk.{block}.{name}.weight"] = shape
                if self.bias and name.startswith("attn_") and "norm" not in name:
                    shapes[f"blk.{block}.{name}.bias"] = shape[:1]
        shapes["output_norm.weight"] = (self.width,)
        if not self.tied:
            shapes["output.weight"] = (self.vocabulary, self.width)
        return shapes

    def type_of(self, name: str, shape: tuple[int, ...]) -> str:
        chosen = next((kind for piece, kind in self.types.items() if f".{piece}" in f".{name}"), "Q4_1")
        return chosen if len(shape) == 2 else "F32"

    def tensors(self, seed: int = 0) -> dict[str, tuple[str, np.ndarray, tuple[int, ...]]]:
        """name -> (type, bytes as the gguf library quantises them, shape)."""
        generator = np.random.default_rng(seed)
        out = {}
        for name, shape in self.shapes().items():
            kind = self.type_of(name, shape)
            values = generator.standard_normal(shape).astype(np.float32) * 0.3 + (len(shape) == 1)
            out[name] = (kind, gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]), shape)
        return out

    def write(self, path: Path, seed: int = 0, **metadata: Any) -> dict[str, torch.Tensor]:
        """The file by gguf's own writer; returns its tensors dequantised by gguf, in the model's order and names."""
        writer = gguf.GGUFWriter(str(path), "llama")
        for key, value in (self.metadata() | metadata).items():
            if isinstance(value, str) and key != "general.architecture":
                writer.add_string(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
        dense = {}
        for name, (kind, data, shape) in self.tensors(seed).items():
            writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind])
            values = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).copy())
            dense[hf_name(name)] = unpermuted(values, name, self.width // self.heads).reshape(shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return dense

    def forge(self) -> Forge:
        """The same, honest so far."""
        return Forge(self.metadata(), [(n, CODES[k], s, d.tobytes()) for n, (k, d, s) in self.tensors().items()])


PLACES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip


def hf_name(name: str) -> str:
    *block, kind, suffix = name.split(".")
    return ".".join([*(["model.layers", block[1]] if block else []), PLACES[kind], suffix])


def unpermuted(values: torch.Tensor, name: str, head_dim: int) -> torch.Tensor:
    """llama.cpp keeps rotary pairs of rows side by side, transformers half a head apart."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return values
    rows = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


@dataclass
class Forge:
    """A GGUF written field by field, so that every field can lie."""

    metadata: dict[str, Any]
    tensors: list[tuple[str, int, tuple[int, ...], bytes]]
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    tensor_count: int | None = None
    pair_count: int | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    tail: bytes = b""

    def header(self) -> bytes:
        parts = [self.magic, struct.pack("<I", self.version)]
        parts += [struct.pack("<Q", len(self.tensors) if self.tensor_count is None else self.tensor_count)]
        parts += [struct.pack("<Q", len(self.metadata) if self.pair_count is None else self.pair_count)]
        for key, value in self.metadata.items():
            parts += [text(key), value if isinstance(value, bytes) else typed(value)]
        offset = 0
        for name, kind, shape, data in self.tensors:
            parts += [text(name), struct.pack("<I", len(shape)), *(struct.pack("<Q", size) for size in shape[::-1])]
            parts += [struct.pack("<IQ", kind, self.offsets.get(name, offset))]
            offset += -(-len(data) // self.alignment) * self.alignment
        return b"".join(parts)

    def bytes(self) -> bytes:
        out = bytearray(self.header())
        for *_, data in self.tensors:
            out += bytes(-len(out) % self.alignment)
            out += data
        return bytes(out) + self.tail


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def typed(value: Any) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value >= 0 else struct.pack("<Ii", 5, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(item) for item in value)
