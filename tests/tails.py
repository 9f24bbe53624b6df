"""Small models whose last linears a tail trains, batches of every kind, a tail's numbers against W_eff written out."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from close import assert_no_worse
from torch import Tensor, nn

from zoact_kernels import rng
from zoact_kernels.layers import perturbed, zo_layers
from zoact_kernels.losses import Batch, group_losses, group_scores
from zoact_kernels.methods.tail import ZOActTail
from zoact_kernels.swap import ZOConfig, swap, unswap
from zoact_kernels.tail import opened
from zoact_kernels.trainables import Between

transformers = pytest.importorskip("transformers")

V, H, L = 61, 24, 3
SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 40, "num_hidden_layers": L, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KEPT = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
WORDS = (11, 5, 40)
Comparison = tuple[Tensor, Tensor, Tensor]
KINDS = ("llama", "tied", "gpt2", "gemma2", "granite", "phi", "head")


def plain(kind: str) -> nn.Module:
    t, grouped = transformers, SMALL | {"num_key_value_heads": 1}
    torch.manual_seed(0)
    if kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=V, n_positions=64, n_embd=H, n_layer=L, n_head=2))
    elif kind == "gemma2":  # norms behind the linears, a cap on the logits
        model = t.Gemma2ForCausalLM(t.Gemma2Config(**grouped, head_dim=12, final_logit_softcapping=2.0))
    elif kind == "phi":  # attention beside the MLP, not before it; a head with a bias
        model = t.PhiForCausalLM(t.PhiConfig(**SMALL, num_key_value_heads=1))
        nn.init.normal_(model.lm_head.bias)
    elif kind == "granite":  # a block's outputs and the logits are scaled
        model = t.GraniteForCausalLM(t.GraniteConfig(**grouped, residual_multiplier=0.25, logits_scaling=8.0))
    elif kind == "opt":  # biases, learned positions
        model = t.OPTForCausalLM(t.OPTConfig(**KEPT, ffn_dim=40, word_embed_proj_dim=H))
    elif kind == "neox":  # one linear for queries, keys and values
        model = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL))
    elif kind == "phi3":
        model = t.Phi3ForCausalLM(t.Phi3Config(**grouped))
    elif kind == "mixtral":  # experts that are no linears
        model = t.MixtralForCausalLM(t.MixtralConfig(**grouped, num_local_experts=2))
    elif kind == "grouped":
        model = t.LlamaForCausalLM(t.LlamaConfig(**SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}))
    elif kind == "bert":
        model = t.BertForSequenceClassification(t.BertConfig(**SMALL, num_labels=3))
    elif kind == "classifier":
        model = t.LlamaForSequenceClassification(t.LlamaConfig(**grouped, num_labels=3))
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(**grouped, tie_word_embeddings=kind == "tied"))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@functools.cache
def made(kind: str, where: str) -> nn.Module:
    model = plain(kind)
    if kind == "head":  # packed like the rest
        swap(model, ZOConfig(group_size=8, quantizer="minmax", rank=0), where="*")
        assert "lm_head" in zo_layers(model)
    elif where:
        swap(model, ZOConfig(group_size=8, quantizer="minmax", rank=0), where=where.split())
    else:
        swap(model, ZOConfig(group_size=8, quantizer="minmax", rank=0))
    return model


def fresh(kind: str = "llama", where: str = "") -> Any:
    return copy.deepcopy(made(kind, where))


def sequences(*lengths: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """ids [S, T] and their mask, two pads at least on the right; a length stands for its tokens."""
    ids, mask = torch.zeros(2, len(lengths), max(lengths) + 2, dtype=torch.int64)
    for own, real, n in zip(ids, mask, lengths, strict=True):
        own[:n] = torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(100 * seed + n))
        real[:n] = 1
    return ids, mask


def words(*lengths: int, seed: int = 1) -> Batch:
    """Classification by label words of one token each."""
    ids, mask = sequences(*(lengths or (7, 3, 5, 1)), seed=seed)
    rows = torch.arange(len(ids))
    return Batch(
        "classification", ids, mask, rows, mask.sum(1) - 1, torch.tensor([WORDS]).expand(len(ids), -1), rows % 3
    )


def phrases(*lengths: int, choices: int = 2, seed: int = 1) -> Batch:
    """Classification by label words of 1, 2, 1, 2 ... tokens, a sequence for every word."""
    return labelled("classification", [1 + s % 2 for s in range(len(lengths))], lengths, choices, seed)


def texts(*lengths: int, mean: bool = False, counts: tuple[int, ...] = (), seed: int = 1) -> Batch:
    """Completions of as many tokens as `counts` says, else half of a sequence: another number for every one."""
    found = labelled("completion", list(counts) or [n // 2 for n in lengths], lengths, 1, seed)
    return replace(found, mean=mean)


def labelled(kind: Any, counts: list[int], lengths: tuple[int, ...], choices: int, seed: int) -> Batch:
    ids, mask = sequences(*lengths, seed=seed)
    rows = torch.cat([torch.full((n,), s) for s, n in enumerate(counts)])
    places = torch.cat([torch.arange(t - n - 1, t - 1) for t, n in zip(lengths, counts, strict=True)])
    labels = None if kind == "completion" else torch.arange(len(lengths) // choices) % choices
    return Batch(kind, ids, mask, rows, places, ids[rows, places + 1], labels, choices)


BATCHES = {
    "words": words(7, 3, 5, 1, 11, 2, 7, 4),
    "phrases": phrases(7, 9, 5, 4, 11, 3, 8, 6, 5, 5, 3, 4, 9, 7, 6, 8),
    "even texts": texts(7, 9, 5, 4, 11, 3, 8, 6, counts=(2,) * 8),
    "texts": texts(7, 9, 5, 4, 11, 3, 8, 6),
    "mean texts": texts(7, 9, 5, 4, 11, 3, 8, 6, mean=True),
}


def method(model: nn.Module, **arguments: Any) -> ZOActTail:
    """An optimizer with bases and S that are random, and radii that are felt."""
    given = {"rank": 5, "outputs": 3, "queries": 4, "sigma": 0.25, "lr": 0.0, "floor_every": 0, "seed": 9} | arguments
    optimizer = ZOActTail(model, **given)
    generator = torch.Generator().manual_seed(6)
    for t in found(optimizer).values():
        t.layer.basis.copy_(torch.randn(t.layer.basis.shape, generator=generator) / t.layer.in_features**0.5)
        t.left.copy_(torch.linalg.qr(torch.randn(t.left.shape, generator=generator)).Q)
        t.value.copy_(torch.randn(t.value.shape, generator=generator) / 4)
        t.settle()
    return optimizer


def found(optimizer: ZOActTail) -> dict[str, Between]:
    return {name: t for name, t in optimizer.trainables.items() if isinstance(t, Between)}


def written_out(optimizer: ZOActTail, seed: int, sigma: float) -> nn.Module:
    """The model in float64 with W_eff = D(W) + U (S + sigma Z) A^T in ordinary layers, Z by the law."""
    dense = unswap(copy.deepcopy(optimizer.model)).double()
    for name, t in found(optimizer).items():
        assert t.layer.basis is not None
        z = torch.as_tensor(rng.noise(optimizer.noise, seed, int(t.param_id), *t.value.shape)).double()
        delta = t.left.double() @ (t.value.double() + sigma * z) @ t.layer.basis.double().T
        module: Any = dense.get_submodule(name)
        module.weight.data += delta if isinstance(module, nn.Linear) else delta.T
    return dense


def step(optimizer: ZOActTail, given: Batch) -> Any:
    return optimizer.step_on([functools.partial(group_losses, optimizer.model, given)], given.leading)


def as_good(actual: Tensor, optimizer: ZOActTail, given: Batch, seed: int, sigma: float, look: Any) -> Comparison:
    """(what a tail gave, float32's own worst, the truth) of one row group.

    Float32 gets three tries at every number (the weights summed, the side path padded, the side path alone), or a few
    lucky sums would ask for more than it can do.
    """
    written = written_out(optimizer, seed, sigma)
    truth = look(written, given)
    tries = [look(written.float(), given)]
    with perturbed(optimizer.model, torch.tensor([seed]), torch.tensor([[sigma]]), optimizer.noise):
        tries += [look(optimizer.model, given)]
        tries += [torch.cat([look(optimizer.model, alone(part)) for part in given.split(1)], dim=1)]
    plain = torch.stack(tries)
    worst = plain.gather(0, (plain - truth).abs().argmax(0)[None])[0]
    return actual.reshape(-1).float(), worst.reshape(-1).float(), truth.reshape(-1)


def alone(part: Batch) -> Batch:
    """One example without the pads that it needs none of."""
    longest = int(part.attention_mask.sum(1).max())
    return replace(part, input_ids=part.input_ids[:, :longest], attention_mask=part.attention_mask[:, :longest])


@torch.no_grad()
def hold(optimizer: ZOActTail, given: Batch) -> None:
    """All row groups of a step, and what a clean forward scores, against the models written out."""
    result = step(optimizer, given)
    shares = given.split(given.examples // optimizer.queries) if optimizer.spread else [given] * optimizer.queries
    assert result.losses.shape == (2 * optimizer.queries, shares[0].examples)
    signs = (1, -1) * optimizer.queries
    seeds = result.seeds.repeat_interleave(2).tolist()
    groups = zip(result.losses, seeds, signs, [s for s in shares for _ in (1, -1)], strict=True)
    found = [as_good(row, optimizer, s, seed, sign * optimizer.sigma, group_losses) for row, seed, sign, s in groups]
    assert_no_worse(*(torch.cat(parts) for parts in zip(*found, strict=True)), "groups")
    felt = (result.losses[0::2] - result.losses[1::2]).abs().max()
    assert float(felt) > 1e-2  # or a tail that is deaf would pass
    look = group_losses if given.kind == "completion" else group_scores
    with optimizer.forking():
        assert opened(optimizer.model) is optimizer.fork
        inside = look(optimizer.model, given)
    assert_no_worse(*as_good(inside, optimizer, given, 0, 0.0, look), "clean")
