"""fork: what is before the first perturbed block is computed once, and no loss, step or run can tell."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_no_worse
from test_cli import options, steps_of, zoact
from tiny_model import make_model_dir, write_examples
from torch import Tensor, nn

from zoact_kernels import fork as room
from zoact_kernels.basis import compute_basis
from zoact_kernels.fork import Cache, Fork, find_blocks
from zoact_kernels.layers import perturbed
from zoact_kernels.losses import Batch, evaluate, group_losses
from zoact_kernels.methods import ZeroOrder, create
from zoact_kernels.swap import ZOConfig, swap

transformers = pytest.importorskip("transformers")

V, L = 61, 4
SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": L, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATE = {
    "llama": "*layers.{}.*", "gemma2": "*layers.{}.*", "gpt2": "*h.{}.*", "bert": "*encoder.layer.{}.*",
    "llama-classifier": "*layers.{}.*",
}  # fmt: skip


def plain(kind: str) -> nn.Module:
    t, labels = transformers, {"num_labels": 3}
    torch.manual_seed(0)
    if kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=V, n_positions=64, n_embd=24, n_layer=L, n_head=2))
    elif kind == "bert":
        bert = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
        model = t.BertForSequenceClassification(t.BertConfig(**bert, **labels))
    elif kind == "gemma2":
        model = t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL, head_dim=12, final_logit_softcapping=2.0))
    elif kind == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**SMALL))
    else:
        model = t.LlamaForSequenceClassification(t.LlamaConfig(**SMALL, **labels))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@functools.cache
def made(kind: str, blocks: tuple[int, ...]) -> nn.Module:
    model = plain(kind)
    ranks = {LATE[kind].format(i): 2 for i in blocks}
    swap(model, ZOConfig(group_size=8, quantizer="minmax", rank=0, ranks=ranks), where=[LATE[kind].format("*")])
    for layer in model.modules():
        if getattr(layer, "rank", 0):
            layer.set_basis(torch.linalg.qr(torch.randn(layer.in_features, 2)).Q)
    return model


def late(kind: str = "llama", blocks: tuple[int, ...] = (2, 3)) -> Any:
    """A swapped model of which the last blocks are trained, or those that are named."""
    return copy.deepcopy(made(kind, blocks))


def sequences(*lengths: int, seed: int = 1, extra: int = 0) -> tuple[Tensor, Tensor]:
    """ids [S, T] and their mask, pads on the right; a sequence has the same tokens in whatever company."""
    longest = max(lengths) + extra
    ids, mask = torch.zeros(2, len(lengths), longest, dtype=torch.int64)
    for own, real, n in zip(ids, mask, lengths, strict=True):
        own[:n] = torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(100 * seed + n))
        real[:n] = 1
    return ids, mask


def batch(kind: str = "llama", *lengths: int, seed: int = 1, extra: int = 0, choices: int = 1) -> Batch:
    ids, mask = sequences(*(lengths or (7, 3, 5, 1)), seed=seed, extra=extra)
    rows = torch.arange(len(ids))
    if kind == "bert" or kind.endswith("classifier"):
        return Batch("sequence-classification", ids, mask, labels=rows % 3)
    if choices > 1:
        targets, labels = ids[rows, mask.sum(1) - 1], rows[::choices] % choices
        return Batch("classification", ids, mask, rows, mask.sum(1) - 1, targets, labels, choices)
    words = torch.tensor([[11, 5, 40]]).expand(len(ids), -1)
    return Batch("classification", ids, mask, rows, mask.sum(1) - 1, words, rows % 3)


def losses_of(model: nn.Module, given: Batch, groups: int, opened: Fork | None) -> Tensor:
    """[groups, B] of as many row groups with noise of their own."""
    sigmas = torch.linspace(-0.5, 0.5, groups)[:, None].contiguous()
    seeds, sizes = torch.tensor([17]), tuple(groups * size for size in given.leading)
    opening = opened.open() if opened else contextlib.nullcontext()
    with torch.no_grad(), opening, perturbed(model, seeds, sigmas, leading=sizes):
        return group_losses(model, given, groups)


def step(optimizer: ZeroOrder, given: Batch, micro: int = 0) -> Any:
    parts = given.split(micro) if micro else [given]
    sizes = tuple(sorted({size for part in parts for size in part.leading}))
    return optimizer.step_on([lambda g, p=part: group_losses(optimizer.model, p, g) for part in parts], sizes)


def as_good(cached: Tensor, model: nn.Module, given: Batch, groups: int) -> None:
    """A sequence alone runs other attention kernels than one among others, padded: law 2.3 instead of the same bits."""
    truth = losses_of(copy.deepcopy(model).double(), given, groups, None)
    assert_no_worse(cached.float(), losses_of(model, given, groups, None).float(), truth, "cached")


@contextlib.contextmanager
def rows_seen(model: nn.Module) -> Iterator[dict[int, list[int]]]:
    """Leading sizes that each block computes with, call by call: of its first norm, which a skipped block leaves."""
    seen: dict[int, list[int]] = {}
    _, blocks = find_blocks(model)
    handles = []
    for i, block in enumerate(blocks):
        norm = next(m for m in block.modules() if "Norm" in type(m).__name__)
        handles.append(norm.register_forward_pre_hook(lambda m, a, i=i: seen.setdefault(i, []).append(len(a[0]))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", (1, 2, 5))
@pytest.mark.parametrize("kind", LATE)
def test_losses_are_those_of_the_whole_forward(kind: str, groups: int) -> None:
    model = late(kind)
    fork = Fork(model)
    assert fork.first == 2 and len(fork.blocks) == L
    for given in (
        batch(kind),
        batch(kind, 6),
        batch(kind, 4, 4, 2, 4),
        batch(kind, 5, 2, extra=3),
    ):  # B = 1, B = T, pads
        whole = losses_of(model, given, groups, None)
        assert groups == 1 or not torch.equal(whole[0], whole[-1])
        for _ in range(2):  # computed, then as it was kept
            assert torch.equal(losses_of(model, given, groups, fork), whole)


def test_label_words_of_several_tokens() -> None:
    model = late()
    given = batch("llama", 3, 4, 2, 6, 5, 3, choices=3)
    assert torch.equal(losses_of(model, given, 3, Fork(model)), losses_of(model, given, 3, None))


def test_a_chunked_head_runs_after_the_fork() -> None:
    model, given = late(), batch("llama", 7, 3, 5)
    fork = Fork(model)
    with torch.no_grad(), fork.open(), rows_seen(model) as seen:
        handle = fork.handle
        with perturbed(model, torch.tensor([3]), torch.tensor([[0.5], [-0.5]])):
            chunked = group_losses(model, given, 2, chunk_bytes=8 * V)  # one label row at a time
        assert not handle.active
    assert seen[0] == [3] and seen[3] == [6]
    with torch.no_grad(), perturbed(model, torch.tensor([3]), torch.tensor([[0.5], [-0.5]])):
        assert torch.equal(chunked, group_losses(model, given, 2, chunk_bytes=8 * V))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dense_layers_before_the_fork(dtype: torch.dtype) -> None:
    """A BLAS may give a row other bits in a batch of another size: held to the tolerance of law 2.3 there."""
    model = plain("llama")
    swap(model, ZOConfig(format="dense", rank=2), where=["*layers.3.*"])
    given = batch("llama", 7, 3, 5)
    compute_basis(model, [{"input_ids": given.input_ids, "attention_mask": given.attention_mask}])
    truth = losses_of(copy.deepcopy(model).double(), given, 3, None)
    model.to(dtype)
    whole, forked = losses_of(model, given, 3, None), losses_of(model, given, 3, Fork(model))
    assert_no_worse(forked.float(), whole.float(), truth, "forked")


def test_blocks_before_the_fork_see_one_copy_and_no_perturbation() -> None:
    model, given = late(), batch("llama", 7, 3, 5)
    fork, active = Fork(model), {}
    for i, block in enumerate(fork.blocks):
        block.mlp.down_proj.register_forward_pre_hook(lambda m, a, i=i: active.update({i: m.perturbation.active}))
    with rows_seen(model) as seen:
        losses_of(model, given, 4, fork)
        assert seen == {0: [3], 1: [3], 2: [12], 3: [12]}
        assert active == {0: False, 1: False, 2: True, 3: True}
        losses_of(model, given, 4, fork)  # the same batch once more: kept
        assert seen == {0: [3], 1: [3], 2: [12, 12], 3: [12, 12]}
        losses_of(model, batch("llama", 7, 3, 4), 4, fork)
        assert seen[0] == [3, 3]
    assert not fork.handle.active


@pytest.mark.parametrize("arguments", ({}, {"mode": "sequential"}, {"queries": 3, "sides": "one-sided"}), ids=str)
def test_steps_are_those_of_the_whole_forward(arguments: dict[str, Any]) -> None:
    seen = []
    for given in ({"fork": False}, {"fork": True}, {}, {"prefix_cache": 1}, {"prefix_cache": 1 << 20}):
        optimizer = create("zo-act", late(), sigma=0.1, floor_every=2, **arguments, **given)
        assert (optimizer.fork is None) == (given == {"fork": False})
        results = [step(optimizer, batch("llama", 7, 3, 5, 2, seed=i % 2), micro) for i, micro in enumerate((0, 3, 2))]
        assert all(c.any() for c in optimizer.rule.coeffs.values())
        seen.append(([(r.losses, r.weights, r.floor) for r in results], list(optimizer.rule.coeffs.values())))
    for a, b in ((0, 1), (0, 2), (3, 4)):  # without a cache; and whatever a cache holds
        assert all(torch.equal(c, d) for c, d in zip(seen[a][1], seen[b][1], strict=True))
        for (losses, weights, floor), want in zip(seen[a][0], seen[b][0], strict=True):
            assert torch.equal(losses, want[0]) and torch.equal(weights, want[1]) and floor == want[2]
    assert (seen[0][0][0][0] - seen[4][0][0][0]).abs().max() < 1e-5 < seen[0][0][0][0].std()


def test_groups_of_a_sequential_step_share_the_prefix() -> None:
    model = late()
    optimizer = create("zo-act", model, mode="sequential", queries=3, floor_every=0)
    with rows_seen(model) as seen:
        step(optimizer, batch("llama", 7, 3, 5), micro=2)
    assert seen[0] == [2, 1] and seen[3] == [2] * 6 + [1] * 6


# --- the cache --------------------------------------------------------------------------------------------------------


def test_other_company_and_padding_find_the_same_rows() -> None:
    """A sequence is computed alone, so its rows don't tell who asked first, or how long the others were."""
    model = late()
    fork = Fork(model, cache_bytes=1 << 20)
    assert fork.cache is not None
    losses_of(model, batch("llama", 7, 3, 5), 2, fork)
    for given in (batch("llama", 5, 7), batch("llama", 3, 5, 3), batch("llama", 7, 3, extra=9)):
        with rows_seen(model) as seen:
            cached = losses_of(model, given, 3, fork)
        assert seen == {2: [3 * given.sequences], 3: [3 * given.sequences]}
        assert torch.equal(cached, losses_of(model, given, 3, Fork(model, cache_bytes=1 << 20)))
        as_good(cached, model, given, 3)
    assert (fork.cache.hits, fork.cache.misses) == (7, 3)
    given = batch("llama", 3, 7)
    with torch.no_grad(), fork.open(), rows_seen(model) as seen:
        told = evaluate(model, [given])
    assert seen == {2: [2], 3: [2]}
    want = [evaluate(other, [given]).losses for other in (model, copy.deepcopy(model).double())]
    assert_no_worse(told.losses.float(), want[0].float(), want[1])


def test_rows_beside_the_last_token_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept rows are laid on zeros; whatever else stood there, the losses would be the same bits."""
    for kind in ("llama", "bert"):
        model, given = late(kind), batch(kind, 7, 3, 5, extra=2)
        first = losses_of(model, given, 3, Fork(model, cache_bytes=1 << 20))
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_zeros", lambda x, *size, fill=Tensor.new_zeros: fill(x, *size) + 3.0)
            assert torch.equal(losses_of(model, given, 3, Fork(model, cache_bytes=1 << 20)), first)


def test_the_least_recently_used_leave_first() -> None:
    cache = Cache(3 * (8 + 4 * 10))
    rows = {bytes([i] * 8): torch.full((10,), float(i)) for i in range(5)}
    for key in list(rows)[:3]:
        cache.put(key, rows[key])
    assert cache.bytes == 144 and cache.get(bytes([0] * 8)) is rows[bytes([0] * 8)]
    cache.put(bytes([3] * 8), rows[bytes([3] * 8)])
    assert cache.get(bytes([1] * 8)) is None and cache.get(bytes([0] * 8)) is not None
    assert cache.bytes == 144 and (cache.hits, cache.misses) == (2, 1)
    cache.put(bytes(100), torch.zeros(1000))  # larger than all of it: nothing is kept, nothing fails
    assert cache.bytes == 0 and not cache.rows


def test_a_cache_too_small_for_a_batch_is_right() -> None:
    model, given = late(), batch("llama", 7, 3, 5, 2)
    for size in (1, 900):
        fork = Fork(model, cache_bytes=size)
        for _ in range(2):
            want = losses_of(model, given, 2, Fork(model, cache_bytes=1 << 20))
            assert torch.equal(losses_of(model, given, 2, fork), want)
            assert fork.cache is not None and fork.cache.bytes <= size
            losses_of(model, batch("llama", 4), 2, fork)


@pytest.mark.parametrize("cache", (0, 1 << 20))
@pytest.mark.parametrize("change", ("embedding", "codes", "norm", "another"))
def test_what_is_kept_goes_when_the_prefix_changes(change: str, cache: int) -> None:
    model, given = late(), batch("llama", 7, 3, 5)
    fork = Fork(model, cache_bytes=cache)
    before = losses_of(model, given, 2, fork)
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        if change == "embedding":
            model.model.embed_tokens.weight.mul_(1.5)
        elif change == "codes":
            layer.scale.mul_(1.5)
        elif change == "norm":
            model.model.layers[0].input_layernorm.weight.mul_(1.5)
        else:
            layer.scale = layer.scale * 1.5
    after = losses_of(model, given, 2, fork)
    assert not torch.equal(after, before) and torch.equal(
        after, losses_of(model, given, 2, Fork(model, cache_bytes=cache))
    )


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_where_nothing_can_be_shared() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0 is perturbed"):
        Fork(late(blocks=(0, 3)))
    assert create("zo-act", late(blocks=(0,))).fork is None
    with pytest.raises(ValueError, match="nothing that row groups could share"):
        _ = create("zo-act", late(blocks=(0,)), fork=True).fork
    with pytest.raises(ValueError, match="prefix_cache"):
        create("zo-act", late(), fork=False, prefix_cache=5)
    with pytest.raises(ValueError, match="prefix_cache"):
        create("zo-act", late(), prefix_cache=-1)
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        Fork(late(), first=4)


def test_embeddings_that_are_trained() -> None:
    model = plain("llama")
    swap(model, ZOConfig(format="dense", rank=0), where=["*layers.3.*"])
    with pytest.raises(ValueError, match=r"embed_tokens is perturbed"):
        _ = create("mezo", model, fork=True).fork
    assert create("mezo", model).fork is None


class Stack(nn.Module):
    """Blocks of linears, in the order that `run` says."""

    def __init__(self, run: Callable[[nn.ModuleList, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.last, self.run = nn.Linear(8, 8), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.blocks, self.last, x)


def in_order(blocks: nn.ModuleList, last: nn.Module, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return last(x)


def stack(run: Callable[[nn.ModuleList, nn.Module, Tensor], Tensor], *trained: str) -> Stack:
    model = Stack(run)
    ranks = dict.fromkeys(trained or ("blocks.2.*",), 1)
    swap(model, ZOConfig(format="dense", rank=0, ranks=ranks), example=(torch.randn(2, 8),))
    for layer in model.modules():
        if getattr(layer, "rank", 0):
            layer.set_basis(torch.randn(8, layer.rank), torch.randn(8, layer.rank))
    return model


def forked(model: Stack, x: Tensor, first: int | None = None) -> Tensor:
    with torch.no_grad(), Fork(model, first).open(), perturbed(model, torch.tensor([3]), torch.tensor([[0.1], [-0.1]])):
        return model(x)


def test_any_list_of_equal_blocks() -> None:
    model, x = stack(in_order, "blocks.2.*", "last"), torch.randn(3, 8)
    assert Fork(model).body is model and Fork(model).name == "blocks"
    with torch.no_grad(), perturbed(model, torch.tensor([3]), torch.tensor([[0.1], [-0.1]])):
        whole = model(x.repeat(2, 1))
    assert_no_worse(forked(model, x.repeat(2, 1)), whole, whole.double())
    assert_no_worse(forked(model, x.repeat(2, 1), first=0), whole, whole.double())
    with pytest.raises(ValueError, match="differ before the first block"):
        forked(model, torch.randn(6, 8))
    with pytest.raises(ValueError, match="5 sequences, which 2 row groups"):
        forked(model, torch.randn(5, 8))


@pytest.mark.parametrize(
    ("run", "message"),
    (
        (lambda b, last, x: b[2](b[0](b[1](x))), "block 1 where block 0"),
        (lambda b, last, x: b[2](b[0](x)), "block 2 where block 1"),
        (lambda b, last, x: last(b[1](b[0](x))), "does not call block 2"),
        (lambda b, last, x: b[2](b[1](b[0](x)))[: len(x)], "counts sequences itself"),
    ),
)
def test_models_that_run_their_blocks_otherwise(run: Any, message: str) -> None:
    model = stack(run) if "call" not in message else stack(in_order)
    model.run = run
    with pytest.raises(ValueError, match=message):
        forked(model, torch.randn(3, 8).repeat(2, 1))
    assert "forward" not in vars(model) and not any("forward" in vars(b) for b in model.blocks)


def test_a_perturbed_module_before_the_fork() -> None:
    model = stack(in_order, "blocks.2.*", "last")
    model.run = lambda blocks, last, x: in_order(blocks, last, last(x))
    with pytest.raises(ValueError, match="last is perturbed and runs before block 2"):
        forked(model, torch.randn(3, 8).repeat(2, 1))


def test_models_without_blocks() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    swap(net, ZOConfig(format="dense", rank=1), example=(torch.randn(2, 8),))
    with pytest.raises(ValueError, match="no list of equal blocks"):
        find_blocks(net)
    model = late()
    model.model.layers[1].compile()
    with pytest.raises(ValueError, match="compiled"):
        Fork(model)


def test_a_cache_goes_by_tokens_with_pads_on_the_right() -> None:
    model, given = late(), batch("llama", 7, 3, 5)
    fork = Fork(model, cache_bytes=1 << 20)
    left = replace(given, attention_mask=given.attention_mask.flip(1))
    with pytest.raises(ValueError, match="pads on the right"):
        losses_of(model, left, 2, fork)
    with torch.no_grad(), fork.open(), pytest.raises(ValueError, match="nothing else"):
        model(input_ids=given.input_ids, position_ids=torch.arange(7)[None] + 1)
    assert torch.equal(losses_of(model, left, 2, Fork(model)), losses_of(model, left, 2, None))  # no cache, no question


def test_tokens_one_by_one() -> None:
    """What came before a token is in the model's own cache, so equal tokens are not equal inputs."""
    model = late()
    for cache in (0, 1 << 20):
        told = []
        for opened in (contextlib.nullcontext(), Fork(model, cache_bytes=cache).open()):
            with torch.no_grad(), opened:
                past, logits = transformers.DynamicCache(config=model.config), []
                for _ in range(3):
                    logits.append(model(input_ids=torch.tensor([[7]]), past_key_values=past).logits)
            told.append(torch.cat(logits))
        assert torch.equal(*told) and not torch.equal(told[0][1], told[0][2])


def test_nothing_of_a_fork_stays() -> None:
    model, given = late(), batch()
    names = set(vars(model.model.layers[0]))
    fork = Fork(model)
    with fork.open():
        assert "forward" in vars(model.model)
        assert list(model.state_dict()) == list(late().state_dict())
    assert set(vars(model.model.layers[0])) == names and "forward" not in vars(model.model)
    assert room.versions(fork._prefix)
    own = model.model.layers[2].forward
    model.model.layers[2].forward = lambda *a, **k: own(*a, **k)  # as offloading hooks do
    mine = model.model.layers[2].forward
    assert torch.equal(losses_of(model, given, 2, fork), losses_of(model, given, 2, None))
    assert model.model.layers[2].forward is mine


def test_a_run_with_a_cache_resumes_bit_for_bit(tmp_path: Path) -> None:
    """A resumed run begins with an empty cache, the other one does not; sequences come again in other batches."""
    make_model_dir(tmp_path / "model", layers=3)
    files = {
        "model": str(tmp_path / "model"), "train": str(write_examples(tmp_path / "train.csv", 12)),
        "eval": str(write_examples(tmp_path / "eval.csv", 6, 12)),
    }  # fmt: skip
    more = {"target": "*layers.2.*", "prefix-cache": 1 << 20, "micro-batch": 3, "eval-every": 3, "mode": "sequential"}
    for out, first in (("whole", 8), ("parted", 5)):
        assert zoact(*options(files, tmp_path / out, **{**more, "steps": first})) == 0
    assert zoact("finetune", "--resume", "--out", str(tmp_path / "parted"), "--steps", "8") == 0
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "parted")
    assert zoact("replay", str(tmp_path / "whole")) == 0
    without = {**more, "prefix-cache": None, "steps": 2}
    for out, option in (("forked", []), ("unforked", ["--no-fork"])):
        assert zoact(*options(files, tmp_path / out, **without), *option) == 0
    assert steps_of(tmp_path / "forked") == steps_of(tmp_path / "unforked")
