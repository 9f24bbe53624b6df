"""losses: equal to the naive [B, T, V] computation, on models whose heads differ, at a bounded number of head rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoact_kernels.losses import (
    Batch,
    _RunOnce,
    cross_entropy,
    evaluate,
    group_losses,
    group_scores,
    noise_floor,
    predict,
)

transformers = pytest.importorskip("transformers")

V = 61
SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _sharpen(model: nn.Module) -> nn.Module:
    """Random weights of 0.02 make flat logits; larger ones make every term of a loss count."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _llama(tied: bool = False) -> nn.Module:
    return _sharpen(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)))


def _gemma2() -> nn.Module:
    config = transformers.Gemma2Config(**SMALL, head_dim=12, final_logit_softcapping=2.0)
    return _sharpen(transformers.Gemma2ForCausalLM(config))


def _cohere() -> nn.Module:
    return _sharpen(transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.25)))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=V, n_positions=64, n_embd=24, n_layer=2, n_head=2)
    return _sharpen(transformers.GPT2LMHeadModel(config))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama, "llama-tied": lambda: _llama(True), "gemma2-softcap": _gemma2, "cohere-scale": _cohere,
    "gpt2": _gpt2,
}  # fmt: skip


def _tokens(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, V, (n,), generator=generator).tolist() for n in lengths]


def _pad(sequences: list[list[int]], extra: int = 0) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences)) + extra
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    return ids, mask


PROMPTS = _tokens(7, 3, 5, 1)
LABELS = torch.tensor([2, 0, 1, 2])


def _single(extra: int = 0) -> Batch:
    ids, mask = _pad(PROMPTS, extra)
    words = torch.tensor([[11, 5, 40]]).expand(4, -1)
    return Batch("classification", ids, mask, torch.arange(4), mask.sum(1) - 1, words, LABELS)


def _spread(pairs: list[tuple[list[int], list[int]]], **fields: Any) -> Batch:
    """Prompts with answers, a label at every token of an answer."""
    ids, mask = _pad([prompt + answer[:-1] for prompt, answer in pairs])
    rows = torch.tensor([s for s, (_, answer) in enumerate(pairs) for _ in answer])
    positions = torch.tensor([len(prompt) - 1 + k for prompt, answer in pairs for k in range(len(answer))])
    targets = torch.tensor([token for _, answer in pairs for token in answer])
    return Batch(
        input_ids=ids, attention_mask=mask, label_rows=rows, label_positions=positions, targets=targets, **fields
    )


def _several() -> Batch:
    words = ([11, 9], [5], [40, 8, 7])
    return _spread([(p, w) for p in PROMPTS for w in words], kind="classification", labels=LABELS, choices=3)


def _completion(mean: bool = False) -> Batch:
    return _spread(list(zip(PROMPTS, _tokens(4, 1, 6, 3), strict=True)), kind="completion", mean=mean)


BATCHES: dict[str, Callable[[], Batch]] = {
    "one-token": _single, "several-tokens": _several, "completion": _completion,
    "completion-mean": lambda: _completion(True),
}  # fmt: skip


@torch.no_grad()
def _naive(model: nn.Module, batch: Batch) -> Tensor:
    """Losses [B] in the model's dtype: full logits of each sequence alone and unpadded, everything spelled out."""
    sums = []
    for s, (ids, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        logits = model(ids[None, : int(mask.sum())]).logits[0]  # [T, V]
        mine = batch.label_rows == s
        here = logits[batch.label_positions[mine]]
        if batch.targets.dim() == 2:
            sums.append(here.gather(-1, batch.targets[mine])[0])
            continue
        values = here.log_softmax(-1).gather(-1, batch.targets[mine, None])[:, 0]
        sums.append(values.mean() if batch.mean or batch.kind == "classification" else values.sum())
    table = torch.stack(sums)
    if batch.kind == "completion":
        return -table
    return nn.functional.cross_entropy(table.view(batch.examples, -1), batch.labels, reduction="none")


def _assert_close(found: Tensor, model: nn.Module, batch: Batch) -> None:
    """No worse than twice the naive computation in fp32 (both against float64), with a floor of 4 ulp of the logits."""
    truth = _naive(copy.deepcopy(model).double(), batch)
    plain = (_naive(model, batch).double() - truth).abs().max()
    # Logits of these models stay below 16, whose fp32 ulp is 2^-20; a sum has as many terms as an answer has tokens.
    floor = 4 * 2.0**-20 * 6
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth, rtol=0, atol=max(2 * float(plain), floor))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", MODELS)
def test_group_losses(model: str, batch: str) -> None:
    net, rows = MODELS[model](), BATCHES[batch]()
    _assert_close(group_losses(net, rows)[0], net, rows)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", MODELS)
def test_group_losses_chunked(model: str, batch: str) -> None:
    """However few rows the head is given at a time, the losses agree, the body runs once, and nothing stays behind."""
    net, rows = MODELS[model](), BATCHES[batch]()
    groups, n = 3, len(rows.targets)
    whole = group_losses(net, rows, groups)
    body, names = net.base_model, list(net.state_dict())
    calls: list[int] = []
    seen: list[tuple[int, ...]] = []
    body.register_forward_pre_hook(lambda module, args: calls.append(1))
    net.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    for at_once in (1, 2, n):
        calls.clear()
        seen.clear()
        found = group_losses(net, rows, groups, chunk_bytes=4 * V * groups * at_once + 3)
        torch.testing.assert_close(found, whole, rtol=0, atol=2e-5)
        assert len(calls) == 1
        assert sum(shape[1] for shape in seen) == n and max(shape[1] for shape in seen) <= at_once
        assert all(shape[0] == groups and shape[2] == V for shape in seen)
    assert net.base_model is body and list(net.state_dict()) == names
    assert not net.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("batch", BATCHES)
def test_group_losses_head_rows(batch: str) -> None:
    """Only label positions reach the head, never [B, T, V]."""
    net, rows = _llama(), BATCHES[batch]()
    seen: list[int] = []
    net.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    group_losses(net, rows, 2)
    assert seen == [2 * len(rows.targets) * V]
    assert len(rows.targets) < rows.input_ids.numel()


class _Shifted(nn.Module):
    """A head whose logits are multiplied in row group g by 1 + g / 8, as a perturbed layer would differ by group."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self.groups, self.factor = linear, 1, 0

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == self.groups  # groups lead, so a swapped head knows whose row is whose
        factors = 1 + (torch.arange(self.groups) + self.factor) / 8
        return self.linear(x) * factors.view(-1, 1, 1)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("batch", BATCHES)
def test_group_losses_stacked(batch: str, chunk_bytes: int) -> None:
    """Stacked groups are the groups one by one: each sequence meets its own group's model, in body and head."""
    net, rows, groups = _llama(), BATCHES[batch](), 3
    head = net.lm_head = _Shifted(net.lm_head)
    layer = net.model.layers[1].mlp

    def by_group(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].unflatten(0, (head.groups, -1))
        return ((x * (1 + (torch.arange(head.groups) + head.factor).view(-1, 1, 1, 1) / 4)).flatten(0, 1),)

    layer.register_forward_pre_hook(by_group)
    head.groups = groups
    stacked = group_losses(net, rows, groups, chunk_bytes=chunk_bytes)
    assert stacked.shape == (groups, 4) and stacked.dtype == torch.float64
    head.groups = 1
    for head.factor in range(groups):
        alone = group_losses(net, rows, chunk_bytes=chunk_bytes)[0]
        torch.testing.assert_close(stacked[head.factor], alone, rtol=0, atol=2e-5)
    assert (stacked[0] - stacked[1]).abs().min() > 1e-4  # the groups do differ


@pytest.mark.parametrize("batch", BATCHES)
def test_group_losses_padding(batch: str) -> None:
    """What stands in the pads, and how many there are, changes nothing."""
    net, rows = _llama(), BATCHES[batch]()
    wide = nn.functional.pad(rows.input_ids, (0, 5)), nn.functional.pad(rows.attention_mask, (0, 5))
    ids = torch.where(wide[1] == 1, wide[0], torch.randint(V, wide[0].shape))
    other = group_losses(net, replace(rows, input_ids=ids, attention_mask=wide[1]))
    torch.testing.assert_close(other, group_losses(net, rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_batch_split(batch: str) -> None:
    """Micro-batches give the losses of their examples."""
    net, rows = _llama(), BATCHES[batch]()
    parts = rows.split(3)
    assert [part.examples for part in parts] == [3, 1]
    assert sum(part.tokens for part in parts) == rows.tokens
    found = torch.cat([group_losses(net, part, 2) for part in parts], dim=1)
    torch.testing.assert_close(found, group_losses(net, rows, 2), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="`examples` of a micro-batch is 0"):
        rows.split(0)


def test_batch_rows() -> None:
    assert _several().rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert _several().sequences == 12 and _several().examples == 4
    assert _single().to("cpu").rows.tolist() == [0, 1, 2, 3]


def test_cross_entropy_moves_with_the_last_bit() -> None:
    """fp64 from the scores on: one fp32 ulp in one logit, 6e-8 here, moves a loss whose own fp32 ulp is 1e-6."""
    one, two = torch.tensor([[12.0, 0.5]]), torch.tensor([[12.0, 0.5 + 2.0**-24]])
    losses = [float(cross_entropy(scores.double(), torch.tensor([1]))) for scores in (one, two)]
    assert losses[0] - losses[1] == pytest.approx(2.0**-24, rel=1e-4)


def test_run_once() -> None:
    """The stand-in for a body runs it once, and keeps one token of its output alive, not all of it."""
    body = _llama().model
    once, ids = _RunOnce(body), torch.tensor(_tokens(9, 9))
    assert once.config is body.config
    first, second = once(input_ids=ids).last_hidden_state, once(input_ids=ids).last_hidden_state
    assert first.shape == (2, 9, 24) and second.shape == (1, 1, 24)
    assert second.untyped_storage().nbytes() == 24 * 4
    assert once(input_ids=ids).last_hidden_state is second


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_group_losses_nan(chunk_bytes: int) -> None:
    """NaN in one example stays NaN there and nowhere else; inf does not become a number."""
    net, rows = _llama(), _completion()
    net.model.embed_tokens.weight.data[PROMPTS[2][0]] = math.nan
    touched = [PROMPTS[2][0] in ids.tolist() for ids in rows.input_ids]
    found = group_losses(net, rows, 2, chunk_bytes=chunk_bytes)
    assert torch.isnan(found).tolist() == [touched, touched] and not all(touched)
    net, unused = _llama(), 3
    assert unused not in rows.targets
    net.lm_head.weight.data[unused] = math.nan  # a token nobody asks for is still in every softmax
    assert torch.isnan(group_losses(net, rows, chunk_bytes=chunk_bytes)).all()
    net.lm_head.weight.data[unused] = math.inf
    assert not torch.isfinite(group_losses(net, rows, chunk_bytes=chunk_bytes)).any()


def test_group_losses_grad() -> None:
    """On request the graph stays on, chunked or not, and the gradient is the naive one; else there is none."""
    net, rows = _llama(), _completion()
    assert not group_losses(net, rows).requires_grad
    grads = []
    for chunk_bytes in (1, 1 << 20):
        net.zero_grad()
        group_losses(net, rows, chunk_bytes=chunk_bytes, grad=True).sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    net.zero_grad()
    logits = net(rows.input_ids, attention_mask=rows.attention_mask).logits
    here = logits[rows.label_rows, rows.label_positions].log_softmax(-1)
    (-here.gather(-1, rows.targets[:, None]).sum()).backward()
    for found, other, p in zip(*grads, net.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other, p.grad, rtol=1e-4, atol=1e-4)


def test_group_losses_bf16_head() -> None:
    """Whatever the model computes in, losses come back in float64."""
    found = group_losses(_llama().bfloat16(), _completion())
    assert found.dtype == torch.float64 and torch.isfinite(found).all()


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_group_losses_peft(chunk_bytes: int) -> None:
    """Inside a peft wrapper, with adapters in the body and a head that peft has replaced."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    net = peft.get_peft_model(_llama(), config)
    with pytest.raises(ValueError, match="training mode"):
        group_losses(net, _single())
    net.eval()
    for rows in (_single(), _several(), _completion()):
        _assert_close(group_losses(net, rows, chunk_bytes=chunk_bytes)[0], net, rows)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_group_losses_compiled_body(chunk_bytes: int) -> None:
    """A compiled body is replaced and put back like any other (the eager back end: only the wrapping matters here)."""
    net, rows = _llama(), _completion()
    plain = group_losses(net, rows, 2)
    net.model.compile(backend="eager")
    torch.testing.assert_close(group_losses(net, rows, 2, chunk_bytes=chunk_bytes), plain, rtol=0, atol=2e-5)


def test_evaluate() -> None:
    net, rows = _llama(), _single()
    found = evaluate(net, rows.split(3))
    best, scores = predict(net, rows)
    torch.testing.assert_close(found.losses, group_losses(net, rows)[0], rtol=0, atol=2e-5)
    assert found.correct is not None and torch.equal(found.correct, best == LABELS)
    assert found.loss == pytest.approx(float(found.losses.mean())) and found.accuracy in (0, 0.25, 0.5, 0.75, 1)
    assert scores.shape == (4, 3) and torch.equal(scores, group_scores(net, rows)[0])
    spoken = evaluate(net, [_completion()])
    assert spoken.correct is None and spoken.accuracy is None
    with pytest.raises(ValueError, match="`batches` is empty"):
        evaluate(net, [])
    with pytest.raises(ValueError, match="has no classes"):
        predict(net, _completion())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_group_losses_sequence_classification(kind: str) -> None:
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, num_labels=3
        )
        net = _sharpen(transformers.BertForSequenceClassification(config))
    else:
        net = _sharpen(transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, num_labels=3)))
    ids, mask = _pad(PROMPTS)
    rows = Batch("sequence-classification", ids, mask, labels=LABELS)
    with torch.no_grad():
        truth = nn.functional.cross_entropy(net(ids, attention_mask=mask).logits, LABELS, reduction="none")
    found = group_losses(net, rows, 2)
    torch.testing.assert_close(found, truth.double().expand(2, -1), rtol=0, atol=2e-5)
    parts = torch.cat([group_losses(net, part) for part in rows.split(3)], dim=1)
    torch.testing.assert_close(parts[0], found[0], rtol=0, atol=2e-5)


def test_group_losses_refuses() -> None:
    net, rows = _llama(), _single()
    with pytest.raises(ValueError, match="`groups` is 0"):
        group_losses(net, rows, 0)
    with pytest.raises(ValueError, match="training mode"):
        group_losses(_llama().train(), rows)
    with pytest.raises(ValueError, match="no Hugging Face language model"):
        group_losses(nn.Linear(3, 3).eval(), rows)
    with pytest.raises(ValueError, match="no Hugging Face classifier"):
        group_losses(nn.Linear(3, 3).eval(), replace(rows, kind="sequence-classification"))
    small = {
        f"{side}_{size}": 1 for side in ("encoder", "decoder") for size in ("layers", "ffn_dim", "attention_heads")
    }
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=V, d_model=16, **small))
    with pytest.raises(ValueError, match="encoder-decoder"):
        group_losses(bart.eval(), rows)


def test_group_losses_refuses_heads_it_cannot_feed() -> None:
    rows = _completion()
    compiled = _llama()
    compiled.compile(backend="eager")
    for net in (compiled, torch.compile(_llama(), backend="eager")):
        with pytest.raises(ValueError, match="compiled together with its head"):
            group_losses(net.eval(), rows)
    functional, unused = _llama(), nn.Linear(24, V)
    functional.get_output_embeddings = lambda: unused
    with pytest.raises(ValueError, match="does not call the module"):
        group_losses(functional, rows)
    flat = _llama()
    flat.model.register_forward_hook(
        lambda module, args, out: out.__class__(last_hidden_state=out.last_hidden_state.transpose(0, 1))
    )
    with pytest.raises(ValueError, match="hidden states that start with"):
        group_losses(flat, rows)
    bodiless = _llama()
    bodiless.base_model_prefix = "elsewhere"
    assert torch.isfinite(group_losses(bodiless, rows)).all()  # one chunk needs no body
    with pytest.raises(ValueError, match="no body apart from its head"):
        group_losses(bodiless, rows, chunk_bytes=1)


def test_group_losses_cleans_up_after_errors() -> None:
    """A forward that fails in the middle leaves no hook and no stand-in behind."""
    net, rows = _llama(), _completion()
    body = net.model
    calls: list[int] = []

    def fail(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory, say")

    handle = net.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="say"):
        group_losses(net, rows, chunk_bytes=1)
    handle.remove()
    assert net.model is body and not net.lm_head._forward_pre_hooks


def test_noise_floor() -> None:
    losses = torch.tensor([[0.5, 1.0, 2.0, 3.0], [0.5, 1.0, 2.0, 3.0]], dtype=torch.float64)
    floor = noise_floor(losses)
    assert 1e-7 < floor < 1e-5
    assert noise_floor(losses.repeat(1, 4)) == pytest.approx(floor / 2)  # independent examples average out
    assert noise_floor(losses[0]) == pytest.approx(floor)
    assert noise_floor(losses * 0) == 0  # a certain answer has no gradient to carry an error
    assert noise_floor(losses, torch.bfloat16) == pytest.approx(floor * 2**16 / 8)
    assert math.isnan(noise_floor(losses * math.nan))
