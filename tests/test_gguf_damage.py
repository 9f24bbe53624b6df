"""GGUF: never fooled by a damaged file, whatever field or byte of it lies."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from tiny_gguf import TYPES, Forge, Tiny

from zoact_kernels.integrations.gguf import (
    GGUFError,
    llama_config,
    load_gguf,
    load_gguf_model,
    load_gguf_tokenizer,
    read_header,
)
from zoact_kernels.integrations.gguf_file import BLOCK_TYPES, TensorReader

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


def test_forge_is_a_gguf(tmp_path):
    """The forger's honest file is what the real reader and ours take it for; version 2 and alignment 64 too."""
    path = tmp_path / "tiny.gguf"
    for version, alignment in ((3, 32), (2, 32), (3, 64)):
        forge = Tiny().forge()
        forge.version, forge.alignment = version, alignment
        if alignment != 32:
            forge.metadata["general.alignment"] = alignment
        path.write_bytes(forge.bytes())
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
        header = read_header(path)
        assert header.version == version and header.tensors.keys() == theirs.keys()
        for name, info in header.tensors.items():
            assert (info.start, info.nbytes) == (theirs[name].data_offset, theirs[name].n_bytes)
        load_gguf_model(path)


def test_read_header_keeps_no_arrays(tmp_path):
    path = tmp_path / "tiny.gguf"
    forge = Tiny().forge()
    forge.metadata |= {
        "tokenizer.ggml.tokens": ["a"] * 70,
        "flag": True,
        "less": -5,
        "wide": struct.pack("<Iq", 11, -(1 << 40)),
        "numbers": struct.pack("<IIQ3d", 9, 12, 3, 1.0, 2.0, 3.0),
    }
    path.write_bytes(forge.bytes())
    metadata = read_header(path).metadata
    assert metadata["tokenizer.ggml.tokens"] == (70, 8) and metadata["numbers"] == (3, 12)
    assert metadata["flag"] is True and metadata["less"] == -5 and metadata["wide"] == -(1 << 40)


def rewrite(**changes: Any):
    """A damage: metadata entries replaced, or dropped where None."""

    def damage(forge: Forge) -> None:
        for key, value in changes.items():
            key = key.replace("__", ".")
            if value is None:
                del forge.metadata[key]
            else:
                forge.metadata[key] = value

    return damage


def attribute(**changes: Any):
    def damage(forge: Forge) -> None:
        for key, value in changes.items():
            setattr(forge, key, value)

    return damage


def tensor(name: str, kind: int | None = None, shape: tuple | None = None, new_name: str | None = None, drop=False):
    """A damage to the entry of one tensor, its data left as it is."""

    def damage(forge: Forge) -> None:
        index = next(i for i, entry in enumerate(forge.tensors) if entry[0] == name)
        old = forge.tensors.pop(index)
        if not drop:
            kind_, shape_ = old[1] if kind is None else kind, old[2] if shape is None else shape
            forge.tensors.insert(index, (new_name or name, kind_, shape_, old[3]))

    return damage


def offset(name: str, value: int):
    return lambda forge: forge.offsets.update({name: value})


Q = "blk.0.attn_q.weight"
HUGE = (1 << 64) - 1
DAMAGES = {
    "empty magic": (attribute(magic=b"GGML"), r"byte 0: the file starts with b'GGML'"),
    "version 1": (attribute(version=1), "byte 4: the GGUF version is 1; 2 and 3"),
    "version 4": (attribute(version=4), "the GGUF version is 4"),
    "big-endian": (attribute(version=3 << 24), "big-endian"),
    "tensor count": (attribute(tensor_count=HUGE), "tensors takes .* bytes"),
    "one tensor more": (attribute(tensor_count=22), "tensor"),
    "pair count": (attribute(pair_count=1 << 60), "metadata entries"),
    "one pair more": (attribute(pair_count=11), "announces"),
    "one pair less": (attribute(pair_count=9), "tensor"),
    "long key": (lambda f: f.metadata.update({"k" * 70000: 1}), "announces 70000 bytes; at most 65536"),
    "string length": (rewrite(note=struct.pack("<IQ", 8, HUGE)), "`note` announces"),
    "string past the end": (rewrite(note=struct.pack("<IQ", 8, 1 << 24)), "`note` takes 16777216 bytes"),
    "string encoding": (rewrite(note=struct.pack("<IQ", 8, 2) + b"\xff\xfe"), "`note` is not UTF-8"),
    "value type": (rewrite(note=struct.pack("<I", 13)), "`note` has the value type 13"),
    "boolean": (rewrite(note=struct.pack("<IB", 7, 2)), "`note` is a boolean with the value 2"),
    "array length": (rewrite(note=struct.pack("<IIQ", 9, 8, HUGE)), "array `note` of .* strings"),
    "number array length": (rewrite(note=struct.pack("<IIQ", 9, 12, 1 << 60)), "array `note` of .* values"),
    "array in an array": (rewrite(note=struct.pack("<IIQ", 9, 9, 1)), "array `note` holds values of type 9"),
    "array type": (rewrite(note=struct.pack("<IIQ", 9, 99, 1)), "array `note` holds values of type 99"),
    "alignment 3": (rewrite(general__alignment=3), "alignment` is 3"),
    "alignment 0": (rewrite(general__alignment=0), "alignment` is 0"),
    "alignment text": (rewrite(general__alignment="x"), "alignment` is 'x'"),
    "split": (rewrite(split__count=2), "split into 2 files"),
    "architecture": (rewrite(general__architecture="qwen2"), "'qwen2'; 'llama' is supported"),
    "no architecture": (rewrite(general__architecture=None), "architecture` is None"),
    "experts": (rewrite(llama__expert_count=8), "mixture of experts"),
    "block count": (rewrite(llama__block_count=1 << 31), "block_count` is 2147483648, but .* is 2"),
    "no block count": (rewrite(llama__block_count=None), "block_count` is missing"),
    "block count as text": (rewrite(llama__block_count="2"), "block_count` is '2'"),
    "width": (rewrite(llama__embedding_length=128), "embedding_length` is 128, but .* is 96"),
    "heads": (rewrite(llama__attention__head_count=5), "do not divide"),
    "no heads": (rewrite(llama__attention__head_count=0), "head_count` is 0"),
    "twice the heads": (
        rewrite(llama__attention__head_count=8),
        "dimension_count` is 24, but the size of a head is 12",
    ),
    "key heads": (rewrite(llama__attention__head_count_kv=3), "do not divide"),
    "more key heads": (rewrite(llama__attention__head_count_kv=4), r"attn_k.*\(48, 96\).*\(96, 96\)"),
    "inner": (rewrite(llama__feed_forward_length=192), r"ffn_gate.*\(160, 96\).*\(192, 96\)"),
    "eps": (rewrite(llama__attention__layer_norm_rms_epsilon=float("nan")), "epsilon` is nan"),
    "theta": (rewrite(llama__rope__freq_base=-1.0), r"freq_base` is -1\.0"),
    "yarn": (rewrite(llama__rope__scaling__type="yarn"), "'yarn'; 'none' and 'linear'"),
    "bos": (rewrite(tokenizer__ggml__bos_token_id=70), "bos_token_id` is 70; 0 to 69"),
    "vocabulary": (rewrite(tokenizer__ggml__tokens=["a"] * 71), "has 71 tokens; the embedding has 70"),
    "dimensions": (tensor(Q, shape=(1,) * 5), f"`{Q}` has 5 dimensions"),
    "no dimension": (tensor(Q, shape=()), f"`{Q}` has 0 dimensions"),
    "shape": (tensor(Q, shape=(1 << 40, 1 << 40)), f"data of tensor `{Q}` ends at byte"),
    "shape of zero": (tensor(Q, shape=(0, 96)), rf"`{Q}` has shape \(0, 96\)"),
    "row": (tensor(Q, shape=(96, 95)), "a positive multiple of 32"),
    "transposed": (tensor("blk.0.ffn_up.weight", shape=(96, 160)), r"ffn_up.weight` has shape \(96, 160\)"),
    "type Q4_K": (tensor(Q, kind=12), f"`{Q}` has the type Q4_K; F32, F16, Q4_0, Q4_1, Q8_0, BF16 are supported"),
    "type 77": (tensor(Q, kind=77), "of number 77"),
    "a packed norm": (
        tensor("blk.1.ffn_norm.weight", kind=8),
        "ffn_norm.weight` has the type Q8_0; a vector needs F32",
    ),
    "twice": (tensor(Q, new_name="blk.1.attn_q.weight"), "name `blk.1.attn_q.weight` stands there twice"),
    "missing": (tensor("blk.1.ffn_norm.weight", drop=True), r"`blk.1.ffn_norm.weight` is missing; shape \(96,\)"),
    "no embedding": (tensor("token_embd.weight", drop=True), "`token_embd.weight` .* is missing"),
    "extra": (tensor(Q, new_name="blk.0.attn_qkv.weight"), "`blk.0.attn_q.weight` is missing"),
    "no place": (lambda f: f.tensors.append(("blk.0.attn_q_norm.weight", 0, (24,), bytes(96))), "no place in a Llama"),
    "offset": (offset(Q, 1 << 40), f"tensor `{Q}` ends at byte 10995"),
    "huge offset": (offset(Q, HUGE - 31), f"tensor `{Q}` ends at byte"),
    "unaligned": (offset(Q, 33), "no multiple of the alignment 32"),
    "overlap": (offset(Q, 0), f"tensors `token_embd.weight` and `{Q}` overlap|`{Q}` and `token_embd.weight` overlap"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES.keys())
def test_load_gguf_names_the_damage(tmp_path, monkeypatch, damage, message):
    """Each lie has an error that names the file and the field, before anything is built or allocated."""
    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", lambda *_: pytest.fail("a model was built"))
    forge = Tiny().forge()
    damage(forge)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(forge.bytes())
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match=message) as caught:
            load_gguf_model(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(path))


def test_load_gguf_duplicate_key(tmp_path):
    """Not to be had from a dict: the second of two equal entries."""
    path = tmp_path / "damaged.gguf"
    forge = Tiny().forge()
    forge.metadata["llama.block_counX"] = 2
    path.write_bytes(forge.bytes().replace(b"llama.block_counX", b"llama.block_count"))
    with pytest.raises(GGUFError, match=r"'llama.block_count' stands there twice"):
        load_gguf_model(path)


@pytest.mark.parametrize("kind", TYPES)
def test_load_gguf_not_finite(tmp_path, kind):
    """A scale that is infinite is no work of a quantiser."""
    path = tmp_path / "damaged.gguf"
    forge = Tiny(types={"ffn_down": kind}).forge()
    index = next(i for i, entry in enumerate(forge.tensors) if entry[0] == "blk.1.ffn_down.weight")
    name, code, shape, data = forge.tensors[index]
    bad = {"F32": struct.pack("<f", float("nan")), "BF16": b"\x80\x7f"}.get(kind, struct.pack("<e", float("inf")))
    row = BLOCK_TYPES[code].nbytes * (160 // BLOCK_TYPES[code].weights)
    forge.tensors[index] = (name, code, shape, data[: 90 * row] + bad + data[90 * row + len(bad) :])
    path.write_bytes(forge.bytes())
    with pytest.raises(GGUFError, match=r"`blk\.1\.ffn_down\.weight`: a (scale|value) is infinite"):
        load_gguf_model(path)


def test_load_gguf_truncated(tmp_path):
    """Cut at every byte of the header and at many of the data."""
    path = tmp_path / "cut.gguf"
    forge = Tiny(layers=1, width=64, heads=2, inner=64, vocabulary=64).forge()
    data, header = forge.bytes(), len(forge.header())
    for cut in (*range(header + 40), *range(header, len(data), 997), len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(GGUFError, match=r"cut\.gguf: at byte \d+: .*"):
            read_header(path)
    path.write_bytes(data)
    load_gguf_model(path)


def test_load_gguf_cut_while_it_is_read(tmp_path):
    path = tmp_path / "cut.gguf"
    Tiny().write(path)
    header = read_header(path)
    info = header.tensors["blk.1.ffn_down.weight"]
    path.write_bytes(path.read_bytes()[: info.start + 10])
    with TensorReader(header) as reader, pytest.raises(GGUFError, match=r"`blk\.1\.ffn_down\.weight`: the file ended"):
        list(reader.panels(info))


@pytest.mark.parametrize("seed", range(8))
def test_load_gguf_fuzz(tmp_path, seed):
    """Bytes and words of the header overwritten at random: a GGUFError, or what is still a Llama; nothing else."""
    generator = np.random.default_rng(seed)
    path = tmp_path / "fuzz.gguf"
    forge = Tiny(layers=1, width=64, heads=2, inner=64, vocabulary=64, types={"ffn": "Q8_0", "attn_v": "F16"}).forge()
    forge.metadata["tokenizer.ggml.tokens"] = [f"<{i}>" for i in range(64)]
    good, header = forge.bytes(), len(forge.header())
    refused = 0
    tracemalloc.start()
    for _ in range(120):
        data = bytearray(good)
        for _ in range(int(generator.integers(1, 4))):
            at = int(generator.integers(0, header))
            size = int(generator.choice([1, 4, 8]))
            wild = [
                generator.bytes(size),
                b"\xff" * size,
                bytes(size),
                b"\x00" * (size - 1) + b"\x7f",
                b"\x01" + bytes(size - 1),
            ]
            data[at : at + size] = wild[int(generator.integers(len(wild)))][: len(data) - at]
        path.write_bytes(data)
        try:
            llama_config(read_header(path))
            load_gguf_model(path)
        except GGUFError as error:
            refused += 1
            assert str(path) in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 40 and peak < 32 << 20


def test_load_gguf_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "nowhere.gguf")
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(100), b"GGUF"):
        (tmp_path / "file.gguf").write_bytes(content)
        with pytest.raises(GGUFError):
            load_gguf(tmp_path / "file.gguf")


def test_load_gguf_tokenizer_broken(tmp_path):
    path = tmp_path / "tiny.gguf"
    forge = Tiny().forge()
    forge.metadata |= {"tokenizer.ggml.model": "hieroglyphs", "tokenizer.ggml.tokens": ["a", "b"]}
    path.write_bytes(forge.bytes())
    with pytest.raises(GGUFError, match=r"tokenizer cannot be built.*hieroglyphs"):
        load_gguf_tokenizer(path)
    path.write_bytes(Tiny().forge().bytes())
    assert load_gguf_tokenizer(path) is None
