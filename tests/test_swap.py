"""swap, unswap, merge, on models of several kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zoact_kernels.layers import ZOLinear
from zoact_kernels.swap import ZOConfig, merge, perturbation_of, perturbed, swap, unswap, zo_layers


class Mlp(nn.Module):
    def __init__(self, K=24):
        super().__init__()
        self.up, self.down = nn.Linear(K, 40), nn.Linear(40, K, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Functional(nn.Module):
    """Uses one linear layer's weight without calling it."""

    def __init__(self):
        super().__init__()
        self.called, self.used = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.used.weight)


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.turned = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.turned(self.fine(x).transpose(0, 1)).transpose(0, 1)


class Experts(nn.Module):
    """Sends each token to one of two experts by its sign: rows are regrouped."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        flat = x.reshape(-1, 8)
        to = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            out[to == i] = expert(flat[to == i])
        return out.view_as(x)


def llama(layers=2, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_bases(model, seed=0):
    torch.manual_seed(seed)
    for layer in zo_layers(model).values():
        layer.set_basis(torch.linalg.qr(torch.randn(layer.in_features, layer.rank))[0].contiguous())
        nn.init.normal_(layer.coeff, std=0.1)
    return model


@torch.no_grad()
def test_a_dense_swap_computes_the_same_and_unswap_gives_the_very_weights_back():
    model = Mlp()
    kept = copy.deepcopy(model)
    x = torch.randn(4, 24)
    report = swap(model, ZOConfig(format="dense", rank=0))
    assert [s.name for s in report.swapped] == ["up", "down"] and not report.skipped
    assert isinstance(model.up, ZOLinear)
    assert (model(x) - kept(x)).abs().max() < 1e-5
    unswap(model)
    assert type(model.up) is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept.parameters(), strict=True))


@torch.no_grad()
def test_merge_folds_what_was_learned():
    model = Mlp()
    swap(model, ZOConfig(format="int4", group_size=8, rank=2))
    with_bases(model)
    x = torch.randn(5, 24)
    y = model(x)
    plain = unswap(copy.deepcopy(model))
    merge(model)
    assert type(model.down) is nn.Linear and model.down.bias is None
    assert (model(x) - y).abs().max() < 1e-5
    assert (plain(x) - y).abs().max() > 1e-3


def test_where_ranks_and_skips_are_reported():
    model = llama()
    report = swap(
        model,
        ZOConfig(rank=2, group_size=16, ranks={"*.mlp.*": 3, "*.o_proj": 0}),
        where=lambda name, module: "layers.0" in name,
    )
    layers = zo_layers(model)
    assert len(layers) == 7 and all("layers.0" in name for name in layers)
    assert layers["model.layers.0.mlp.up_proj"].rank == 3
    assert layers["model.layers.0.self_attn.o_proj"].rank == 0
    assert layers["model.layers.0.self_attn.q_proj"].rank == 2
    assert "lm_head" in report.skipped and "`where`" in report.skipped["model.layers.1.mlp.up_proj"]
    assert "lm_head" in str(report)
    again = swap(model, ZOConfig(rank=1, group_size=16), where="model.layers.1.*")
    assert len(again.swapped) == 7 and len(zo_layers(model)) == 14
    assert perturbation_of(model) is zo_layers(model)["model.layers.1.mlp.up_proj"].perturbation


def test_layers_that_must_be_left_alone_are_found_by_a_dry_run():
    model = Functional()
    report = swap(model, ZOConfig(format="int8", group_size=8), example=(torch.randn(3, 5, 8),))
    assert [s.name for s in report.swapped] == ["called"] and "not called" in report.skipped["used"]
    model = SequenceFirst()
    report = swap(model, ZOConfig(format="int8", group_size=8), example={"x": torch.randn(3, 5, 8)})
    assert [s.name for s in report.swapped] == ["fine"] and "regroups rows" in report.skipped["turned"]
    model = Experts()
    report = swap(model, ZOConfig(format="int8", group_size=8), example=torch.randn(3, 5, 8))
    assert [s.name for s in report.swapped] == ["gate"] and len(report.skipped) == 2
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(ValueError, match="no layer to swap.*without calling it"):
        swap(attention)


def test_a_regrouping_model_that_got_no_dry_run_raises_when_perturbed():
    model = SequenceFirst()
    swap(model, ZOConfig(format="int8", group_size=8, rank=1))
    with_bases(model)
    seeds, sigmas = torch.tensor([1]), torch.tensor([[0.1], [-0.1]])
    with pytest.raises(ValueError, match="'turned' got x"), perturbed(model, seeds, sigmas, leading=(6, 30)):
        model(torch.randn(6, 5, 8))


def test_bad_configurations_change_nothing():
    for config, message in (
        (dict(format="int3"), "`format` is 'int3'"),
        (dict(quantizer="best"), "`quantizer` is 'best'"),
        (dict(rank=-1), "`rank` is -1"),
        (dict(ranks={"*": 1.5}), "is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ZOConfig(**config)
    model = Mlp()
    with pytest.raises(ValueError, match="`rank` is 25, but layer 'up' has in_features=24"):
        swap(model, ZOConfig(rank=25))
    assert not zo_layers(model)
    with pytest.raises(ValueError, match="no linear layer"):
        swap(nn.Sequential(nn.ReLU()))
    with torch.no_grad():
        model.down.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="layer 'down'"):
        swap(model)


def test_a_shared_module_is_swapped_wherever_it_stands():
    linear = nn.Linear(8, 8)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    swap(model, ZOConfig(format="dense", rank=0))
    assert model[0] is model[2] and isinstance(model[0], ZOLinear)


@torch.no_grad()
def test_groups_of_a_whole_model_do_not_mix():
    model = llama()
    swap(model, ZOConfig(rank=2, group_size=16))
    with_bases(model)
    ids = torch.randint(0, 97, (2, 5))
    seeds, sigmas = torch.tensor([3]), torch.tensor([[0.05], [-0.05], [0.0]])
    clean = model(ids).logits
    with perturbed(model, seeds, sigmas, leading=(6, 30)):
        stacked = model(ids.repeat(3, 1)).logits
    for g in range(3):
        with perturbed(model, seeds, sigmas[g : g + 1]):
            alone = model(ids).logits
        assert (stacked[2 * g : 2 * g + 2] - alone).abs().max() < 1e-5
    assert (stacked[4:] - clean).abs().max() < 1e-5
    assert (stacked[:2] - clean).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 2])
def test_generate_works(rank):
    model = llama()
    want = copy.deepcopy(model).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    swap(model, ZOConfig(format="dense", rank=rank))
    got = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)


@torch.no_grad()
def test_conv1d_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=1, n_head=2)).eval()
    kept = copy.deepcopy(model)
    ids = torch.randint(0, 61, (2, 7))
    report = swap(model, ZOConfig(format="dense", rank=1))
    assert {s.kind for s in report.swapped} == {"Conv1D"} and len(report.swapped) == 4
    assert (model(ids).logits - kept(ids).logits).abs().max() < 1e-5
    unswap(model)
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, kept.transformer.h[0].attn.c_attn.weight)


@torch.no_grad()
def test_an_encoder_and_its_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(config).eval()
    kept = copy.deepcopy(model)
    ids = torch.randint(0, 50, (2, 6))
    swap(model, ZOConfig(format="dense", rank=0))
    assert isinstance(model.classifier, ZOLinear)
    assert (model(ids).logits - kept(ids).logits).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("nested", [False, True])
def test_linear4bit_is_taken_over_and_given_back_byte_for_byte(nested):
    bnb = pytest.importorskip("bitsandbytes")

    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, compress_statistics=nested, quant_type="nf4"), nn.Linear(32, 8))
    model = model.to("cpu")
    x, codes = torch.randn(3, 64), model[0].weight.data.clone()
    want = model(x)
    report = swap(model, ZOConfig(format="int8", group_size=32, rank=1))
    assert [(s.kind, s.format) for s in report.swapped] == [("Linear4bit", "nf4"), ("Linear", "int8")]
    dense = bnb.functional.dequantize_4bit(codes, model_state(model, x, want))
    assert torch.equal(model[0].dequantize(torch.float32), dense.float())
    unswap(model)
    assert isinstance(model[0], bnb.nn.Linear4bit) and torch.equal(model[0].weight.data, codes)


def model_state(model, x, want):
    """The quantisation state that bitsandbytes itself would use: that of the layer given back."""
    twin = unswap(copy.deepcopy(model))
    assert (twin(x) - want).abs().max() < 0.05 * want.abs().max()  # the second layer is int8 by now
    return twin[0].weight.quant_state
