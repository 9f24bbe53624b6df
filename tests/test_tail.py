"""tail: label rows alone, behind the first trained linear, give the losses of the whole model, W_eff written out."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from close import assert_no_worse
from tails import (
    BATCHES,
    KINDS,
    H,
    L,
    V,
    as_good,
    fresh,
    hold,
    method,
    phrases,
    step,
    texts,
    words,
    written_out,
)
from torch import Tensor, nn

from zoact_kernels.fork import Fork
from zoact_kernels.layers import perturbed, zo_layers
from zoact_kernels.losses import Batch, evaluate, group_losses, group_scores
from zoact_kernels.methods.tail import ZOActTail
from zoact_kernels.tail import Tail, opened

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the same losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", (True, False))
@pytest.mark.parametrize("batch", BATCHES)
def test_every_group_is_the_whole_model_written_out(batch: str, spread: bool) -> None:
    hold(method(fresh(), spread=spread), BATCHES[batch])


@pytest.mark.parametrize("kind", KINDS)
def test_of_other_models(kind: str) -> None:
    hold(method(fresh(kind)), BATCHES["words"])
    hold(method(fresh(kind), spread=False, queries=3, noise="rademacher"), BATCHES["texts"])


@pytest.mark.parametrize(
    ("kind", "layers"), (("llama", 2), ("llama", 3), ("llama", 4), ("gemma2", 2), ("gpt2", 2), ("gpt2", 3))
)
def test_more_linears(kind: str, layers: int) -> None:
    optimizer = method(fresh(kind), layers=layers)
    names = {name.rpartition(".")[2] for name in optimizer.trainables}
    assert (
        names <= {"down_proj", "up_proj", "gate_proj", "o_proj", "c_fc", "c_proj"}
        and len(optimizer.trainables) == layers
    )
    hold(optimizer, BATCHES["words"])
    hold(method(fresh(kind), layers=layers, spread=False, queries=2), BATCHES["texts"])


@pytest.mark.parametrize("given", (words(1), words(7), texts(9, mean=True), phrases(5, 6), phrases(5, 6, 7, choices=3)))
def test_one_example(given: Batch) -> None:
    hold(method(fresh(), queries=1), given)
    hold(method(fresh(), queries=5, spread=False), given)


@pytest.mark.parametrize("batch", BATCHES)
def test_small_chunks_of_the_head(batch: str) -> None:
    """A row of logits at a time, behind a tail that has copies to keep apart."""
    optimizer, given = method(fresh(), lr=0.0), BATCHES[batch]
    wanted = step(optimizer, given).losses
    optimizer.iteration = 0
    small = optimizer.step_on([lambda g: group_losses(optimizer.model, given, g, chunk_bytes=1)], given.leading).losses
    # The head multiplies other numbers of rows at once: that much of float32, and no more
    assert_no_worse(small.float(), wanted.float(), wanted, "chunks")


def test_the_first_sequence_may_be_the_shortest() -> None:
    """A sequence of one token can't tell a tail from the whole model: it must not end the question."""
    hold(method(fresh()), words(1, 1, 1, 1))
    optimizer = method(fresh(), layers=5)  # attention is in the tail
    with pytest.raises(ValueError, match="not what the whole model gives"):
        step(optimizer, words(1, 1, 1, 1))
        step(optimizer, words(7, 3, 5, 4))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_activations_of_16_bits(dtype: torch.dtype) -> None:
    """No farther from float64 than the whole model is at the same dtype."""
    optimizer, given = method(fresh().to(dtype)), BATCHES["words"]
    with torch.no_grad():
        with optimizer.forking():
            mine = group_scores(optimizer.model, given)
        truth = group_scores(written_out(optimizer, 0, 0.0), given)
        whole = group_scores(optimizer.model, given)
    assert_no_worse(mine.to(dtype), whole.to(dtype), truth)
    assert torch.isfinite(step(optimizer, given).losses).all()


def test_a_batch_that_holds_a_sequence_twice() -> None:
    given = words(7, 7, 3, 3)
    result = step(method(fresh(), spread=False), given)
    assert torch.equal(result.losses[:, 0].isfinite(), torch.ones(8, dtype=torch.bool))
    hold(method(fresh()), given)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_a_hit_is_a_miss_bit_for_bit(batch: str) -> None:
    optimizer, given = method(fresh()), BATCHES[batch]
    first = step(optimizer, given).losses
    cache = optimizer.fork.cache
    misses = cache.misses
    assert misses and cache.bytes <= cache.limit
    optimizer.iteration = 0
    again = step(optimizer, given).losses
    assert torch.equal(first, again) and cache.misses == misses
    optimizer.iteration = 0
    optimizer.fork.forget()
    assert not cache.bytes
    assert torch.equal(first, step(optimizer, given).losses)
    # and whatever asked first
    other = method(fresh())
    step(other, texts(11, 8, 5, 4, seed=3))
    step(other, words(11, 2, 4, 6, seed=2))
    step(other, given.split(4)[1])
    other.iteration = 0
    assert torch.equal(first, step(other, given).losses)


CHANGES = {
    "table": lambda model: model.model.embed_tokens.weight.mul_(1.5),
    "scale": lambda model: model.model.layers[0].mlp.down_proj.scale.mul_(1.5),
    "norm replaced": lambda model: setattr(model.model.norm, "weight", nn.Parameter(1.5 * model.model.norm.weight)),
    "W of the trained linear": lambda model: model.model.layers[-1].mlp.down_proj.scale.mul_(1.5),
    "head": lambda model: model.lm_head.weight.mul_(1.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_weights_that_change_are_seen(change: Any) -> None:
    model, other, given = fresh(), fresh(), BATCHES["words"]
    optimizer = method(model)
    first = step(optimizer, given).losses
    change(model)
    change(other)
    optimizer.iteration = 0
    second = step(optimizer, given).losses
    assert torch.equal(second, step(method(other), given).losses) and not torch.equal(second, first)


def test_steps_of_its_own_forget_nothing() -> None:
    optimizer, given = method(fresh(), lr=0.05), BATCHES["words"]
    step(optimizer, given)
    misses = optimizer.fork.cache.misses
    step(optimizer, given)
    assert optimizer.fork.cache.misses == misses


def mixing(model: Any) -> Any:
    """Something between the modules that tells how many sequences there are."""
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * (1 + 1e-5 * (len(output) - 1)))
    return model


@pytest.mark.parametrize(
    ("made", "together"),
    (
        (fresh, True),
        (functools.partial(fresh, "gemma2"), True),
        (functools.partial(fresh, "llama", "*mlp.down_proj"), False),  # the others are torch's
        (lambda: mixing(fresh()), False),
    ),
    ids=("llama", "gemma2", "down_proj alone", "mixing"),
)
@pytest.mark.parametrize("asked", (2, 7, 13))
def test_what_is_kept_does_not_depend_on_company(made: Any, together: bool, asked: int) -> None:
    """Whatever length the question of company was asked for, a row has the bits that it has alone."""
    for length in (1, 3, 8, 17):
        many = words(*[length] * 11)
        ids = many.input_ids.clone()
        ids[:, :length] = torch.randint(3, V, (11, length), generator=torch.Generator().manual_seed(length))
        many = replace(many, input_ids=ids)
        for company in (2, 3, 5, 11):
            optimizers = [method(made(), spread=False, queries=1) for _ in range(2)]
            for optimizer in optimizers:
                step(optimizer, words(asked))
            joined, alone = optimizers
            step(joined, many._part(0, company))
            assert joined.fork._alone is not together
            for i in range(company):
                step(alone, many._part(i, i + 1))
            mine, theirs = (optimizer.fork.cache.rows for optimizer in optimizers)
            assert mine and mine.keys() <= theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("size", (0, 1, 700, 2000))
def test_a_cache_that_is_too_small(size: int) -> None:
    optimizer, wanted = method(fresh(), tail_cache=size), method(fresh())
    for given in (BATCHES["words"], BATCHES["phrases"], BATCHES["words"]):
        assert torch.equal(step(optimizer, given).losses, step(wanted, given).losses)
        assert optimizer.fork.cache.bytes <= size < wanted.fork.cache.bytes


def test_the_least_recently_used_leave_first() -> None:
    optimizer = method(fresh(), queries=1)
    step(optimizer, words(3))
    one = optimizer.fork.cache.bytes
    optimizer = method(fresh(), queries=1, tail_cache=2 * one + one // 2)
    for n in (3, 4, 3, 5):  # 4 leaves
        step(optimizer, words(n))
    misses = optimizer.fork.cache.misses
    assert misses == 3
    step(optimizer, words(3))
    assert optimizer.fork.cache.misses == misses
    step(optimizer, words(4))
    assert optimizer.fork.cache.misses == misses + 1


def test_a_bad_size_of_the_cache() -> None:
    with pytest.raises(ValueError, match="-1"):
        step(method(fresh(), tail_cache=-1), words(3, 4, 5, 6))


def test_only_the_label_rows_run() -> None:
    """Behind the kept rows the last block sees G n rows of one token, and nothing before it computes."""
    optimizer, given = method(fresh()), BATCHES["words"]
    step(optimizer, given)
    seen: dict[str, list[tuple[int, ...]]] = {}
    layers = zo_layers(optimizer.model)

    def see(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(tuple(args[0].shape))

    own = layers["model.layers.2.mlp.down_proj"]
    probe = own.probe
    shapes = []
    own.probe = lambda layer, x, *rest: (shapes.append(tuple(x.shape)), probe(layer, x, *rest))[1]
    head = optimizer.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(functools.partial(see, "head"))
    step(optimizer, given)
    handle.remove()
    own.probe = probe
    assert shapes == [(16, 1, 40)]  # 2 copies of 8 label rows


# --- neighbours -------------------------------------------------------------------------------------------------------


def test_nothing_of_a_tail_stays() -> None:
    model, given = fresh(), BATCHES["words"]
    optimizer = method(model)
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    names, outside = list(model.state_dict()), group_losses(model, given)
    with optimizer.forking():
        assert "forward" in vars(model.model) and list(model.state_dict()) == names
        with torch.no_grad():  # no label rows, no tail
            inside, ids = model(given.input_ids, given.attention_mask).logits, given.input_ids
    with torch.no_grad():
        assert torch.equal(inside, model(ids, given.attention_mask).logits)
    step(optimizer, given)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before and opened(model) is None
    assert torch.equal(outside, group_losses(model, given))


def test_after_an_error_nothing_stays() -> None:
    model = fresh()
    optimizer, before = method(model), {name: set(vars(m)) for name, m in model.named_modules()}
    wanted = step(method(fresh()), BATCHES["words"]).losses
    handle = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(optimizer, BATCHES["words"])
    handle.remove()
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before and opened(model) is None
    assert not optimizer.fork.handle.active
    optimizer.iteration = 0
    assert torch.equal(step(optimizer, BATCHES["words"]).losses, wanted)


def test_a_second_tail_and_a_fork() -> None:
    model, given = fresh(), BATCHES["words"]
    optimizer = method(model)
    wanted = step(optimizer, given).losses
    second, fork = Tail(model, 1 << 20), Fork(model)
    assert fork.first == L - 1
    sigmas = torch.tensor([[0.25], [-0.25]])
    sizes = tuple(2 * size for size in given.leading)
    got = []
    for opening in (optimizer.fork, second, fork):
        with torch.no_grad(), opening.open(), perturbed(model, torch.tensor([17]), sigmas, leading=sizes):
            got.append(group_losses(model, given, 2))
    assert torch.equal(got[0], got[1])
    with torch.no_grad():
        for losses in got:
            pairs = [
                as_good(f, optimizer, given, 17, s, group_losses) for f, s in zip(losses, (0.25, -0.25), strict=True)
            ]
            assert_no_worse(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))
    optimizer.iteration = 0
    assert torch.equal(step(optimizer, given).losses, wanted)


def test_an_open_tail_is_of_its_own_model() -> None:
    mine, other = fresh(), fresh()
    wanted = group_losses(other, BATCHES["words"])
    with method(mine).forking():
        assert opened(other) is None
        assert torch.equal(group_losses(other, BATCHES["words"]), wanted)


def test_evaluation() -> None:
    optimizer = method(fresh())
    given = [BATCHES["words"], words(9, 8, seed=4)]
    outside = evaluate(optimizer.model, given)
    with optimizer.forking():
        inside = evaluate(optimizer.model, given)
    assert torch.equal(inside.correct, outside.correct)
    assert_no_worse(inside.losses.float(), outside.losses.float(), outside.losses)


def test_other_label_words_of_the_same_model() -> None:
    """Rows of the head are kept by word, not by their number."""
    optimizer, given = method(fresh()), BATCHES["words"]
    hold(optimizer, given)
    optimizer.iteration = 0
    hold(optimizer, replace(given, targets=torch.tensor([[12, 13, 50]]).expand(8, -1)))
    optimizer.iteration = 0
    hold(optimizer, replace(given, targets=torch.tensor([[12, 50], [5, 9]]).repeat(4, 1), labels=given.labels % 2))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_trained_outside_the_last_block() -> None:
    model = fresh()
    layer = zo_layers(model)["model.layers.1.mlp.up_proj"]
    optimizer = method(model)
    layer.set_basis(torch.randn(H, 2))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj is trained"):
        step(optimizer, BATCHES["words"])


@pytest.mark.parametrize("layers", (5, 6, 7))
def test_attention_in_the_tail(layers: int) -> None:
    with pytest.raises(ValueError, match="mixes tokens"):
        step(method(fresh(), layers=layers), BATCHES["words"])


def test_too_many_layers() -> None:
    with pytest.raises(ValueError, match="layers is 8; the last block of the model has 7"):
        ZOActTail(fresh(), layers=8)


class Smear(nn.Module):
    """Every token gets something of those before it, behind the MLP's last linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        return output + 0.1 * output.cumsum(1)


def test_a_block_that_mixes_tokens_behind_its_linears() -> None:
    model = fresh()
    for block in model.model.layers:
        block.mlp = Smear(block.mlp)
    with pytest.raises(ValueError, match="mixes tokens"):
        step(method(model), BATCHES["words"])


def test_attention_that_is_no_linear() -> None:
    """GPT-2's Conv1D, not swapped, can't be given what was kept."""
    with pytest.raises(ValueError, match="not what the whole model gives"):
        step(method(fresh("gpt2", "*mlp.c_proj")), BATCHES["words"])
    hold(method(fresh("gpt2", "*mlp.c_proj *attn.c_proj")), BATCHES["words"])


def test_linears_that_are_not_swapped_are_kept_all_the_same() -> None:
    hold(method(fresh("llama", "*mlp.down_proj")), BATCHES["words"])


def test_compiled_blocks() -> None:
    model = fresh()
    model.model.layers[1].compile()
    with pytest.raises(ValueError, match="compiled"):
        step(method(model), BATCHES["words"])


def test_pads_on_the_left() -> None:
    given = words(7, 3, 5, 4)
    left = replace(given, attention_mask=given.attention_mask.flip(1), input_ids=given.input_ids.flip(1))
    optimizer = method(fresh())
    with pytest.raises(ValueError, match="pads on the right"):
        step(optimizer, left)
    assert opened(optimizer.model) is None
    hole = given.attention_mask.clone()
    hole[0, 3] = 0
    with pytest.raises(ValueError, match="pads on the right"):
        step(optimizer, replace(given, attention_mask=hole))


def test_copies_that_differ() -> None:
    model = fresh()
    optimizer, given = method(model, spread=False), BATCHES["words"]
    twice = replace(given, input_ids=torch.cat([given.input_ids, given.input_ids.flip(0)]))
    twice = replace(twice, attention_mask=torch.cat([given.attention_mask] * 2), label_rows=torch.arange(16))
    twice = replace(twice, label_positions=given.label_positions.repeat(2), targets=given.targets[:1].expand(16, -1))
    sigmas = torch.tensor([[0.25], [-0.25]])
    with optimizer.forking(), perturbed(model, torch.tensor([17]), sigmas), pytest.raises(ValueError, match="copies"):
        group_losses(model, replace(twice, labels=given.labels.repeat(2)))
