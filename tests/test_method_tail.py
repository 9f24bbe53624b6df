"""ZOActTail: the update written out, bases of labels and answers, exact resumes and replays, refusals that say why."""

from __future__ import annotations

import copy
import functools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_no_worse
from tails import (
    BATCHES,
    found,
    fresh,
    hold,
    method,
    phrases,
    step,
    texts,
    words,
)
from test_trainer import Tiny, record
from torch import Tensor

from zoact_kernels import rng
from zoact_kernels.layers import zo_layers
from zoact_kernels.losses import Batch, group_losses
from zoact_kernels.methods import tail
from zoact_kernels.methods.tail import FELT, ZOActTail
from zoact_kernels.recipe import Recipe
from zoact_kernels.replay import replay
from zoact_kernels.runlog import RunLog
from zoact_kernels.swap import unswap
from zoact_kernels.trainer import base_hash

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(
    method="zo-act-tail", steps=7, batch_size=8, queries=4, snapshot_every=3, eval_every=4, floor_every=5,
    basis_batches=2, lr=0.05, sigma=0.05, seed=5, options={"rank": 6, "outputs": 2, "layers": 1, "tail_cache": 1 << 20},
)  # fmt: skip


def rounds(steps: int) -> list[Batch]:
    kinds = (words(7, 3, 5, 1, 11, 2, 7, 4), BATCHES["texts"], BATCHES["phrases"], words(9, 8, 7, 6, seed=2))
    return [kinds[i % len(kinds)] for i in range(steps)]


def values(optimizer: ZOActTail) -> dict[str, Tensor]:
    return {name: t.value.clone() for name, t in found(optimizer).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ("normal", "rademacher"))
@pytest.mark.parametrize("spread", (True, False))
def test_the_update_is_adam_on_the_mean_of_d_z(spread: bool, noise: str) -> None:
    lr, betas = 0.05, (0.8, 0.97)
    optimizer = method(fresh(), spread=spread, lr=lr, betas=betas, layers=2, noise=noise)
    begin = values(optimizer)
    results = [step(optimizer, given) for given in rounds(5)]
    for name, t in found(optimizer).items():
        written = []
        for dtype in (torch.float32, torch.float64):
            value, m, v = begin[name].to(dtype), 0.0, 0.0
            for i, result in enumerate(results):
                plus, minus = result.losses[0::2].to(dtype), result.losses[1::2].to(dtype)
                d = (plus - minus).mean(1) / (2 * 0.25)
                z = [torch.as_tensor(rng.noise(noise, int(s), int(t.param_id), *value.shape)) for s in result.seeds]
                g = (d[:, None, None] * torch.stack(z).to(dtype)).mean(0)
                m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
                value = value - lr * (m / (1 - betas[0] ** (i + 1))) / ((v / (1 - betas[1] ** (i + 1))).sqrt() + 1e-8)
            written.append(value)
        assert_no_worse(t.value, *written, name)
        assert float((t.value - begin[name]).abs().min()) > 0
        coeff = t.left.double() @ t.value.double()
        assert_no_worse(t.coeff.detach(), t.left @ t.value, coeff, "what a clean forward sees")
    optimizer.lr = 0.0
    hold(optimizer, BATCHES["words"])


def test_seeds_are_those_of_the_law() -> None:
    optimizer = method(fresh(), seed=-3)
    for i, given in enumerate(rounds(2)):
        assert step(optimizer, given).seeds.tolist() == [rng.seed_for(-3, i, q) for q in range(4)]


def test_nothing_else_moves() -> None:
    model = fresh()
    optimizer = method(model, lr=0.05)
    before, generator, state = base_hash(model), torch.get_rng_state(), random.getstate()
    bases = {name: (t.layer.basis.clone(), t.left.clone()) for name, t in found(optimizer).items()}
    optimizer.prepare(iter(rounds(2)), functools.partial(group_losses, model))
    for name, t in found(optimizer).items():
        assert not torch.equal(t.layer.basis, bases[name][0]) and not torch.equal(t.left, bases[name][1])
    bases = {name: (t.layer.basis.clone(), t.left.clone()) for name, t in found(optimizer).items()}
    for given in rounds(4):
        assert not step(optimizer, given).skipped
    for name, t in found(optimizer).items():
        assert torch.equal(t.layer.basis, bases[name][0]) and torch.equal(t.left, bases[name][1])
    assert base_hash(model) == before
    assert torch.equal(torch.get_rng_state(), generator) and random.getstate() == state
    assert [n for n, layer in zo_layers(model).items() if layer.coeff is not None] == list(optimizer.trainables)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_lost_losses_skip_the_step(value: float) -> None:
    optimizer, untouched = method(fresh(), lr=0.05), method(fresh(), lr=0.05)
    step(optimizer, BATCHES["words"])
    before = optimizer.state_dict()

    def poisoned(groups: int) -> Tensor:
        losses = group_losses(optimizer.model, BATCHES["words"], groups)
        losses[1, 5] = value  # one example of the third query, on its negative side
        return losses

    result = optimizer.step_on([poisoned], BATCHES["words"].leading)
    assert result.skipped and "group 5" in result.reason and math.isinf(value) == bool(result.losses[5, 1].isinf())
    after = optimizer.state_dict()
    assert int(after.pop("iteration")) == int(before.pop("iteration")) + 1
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)
    step(untouched, BATCHES["words"])
    untouched.iteration += 1
    assert torch.equal(step(optimizer, words(7, 3, 5, 4)).losses, step(untouched, words(7, 3, 5, 4)).losses)
    assert same(values(optimizer), values(untouched))


def test_activations_that_are_lost() -> None:
    """NaN inside the model, not put into its losses: copies that hold it are not equal to one another."""
    model = fresh()
    optimizer = method(model, lr=0.05)
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="whole model gives"):
        step(optimizer, BATCHES["words"])
    model.model.norm.weight.data[3] = 1.0
    step(optimizer, BATCHES["words"])
    found(optimizer)["model.layers.2.mlp.down_proj"].layer.basis[0, 0] = math.nan
    before = values(optimizer)
    assert step(optimizer, BATCHES["words"]).skipped and same(values(optimizer), before)


# --- resume, log, export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", (1, 3))
def test_resume_through_a_state_is_bitwise(stop: int) -> None:
    whole = method(fresh(), lr=0.05, layers=2)
    for given in rounds(5):
        step(whole, given)
    first = method(fresh(), lr=0.05, layers=2)
    for given in rounds(stop):
        step(first, given)
    state = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    second = ZOActTail(fresh(), rank=5, outputs=3, queries=4, sigma=0.25, lr=0.05, floor_every=0, layers=2)
    second.load_state_dict(state)
    assert not second.fork.cache.rows  # an empty cache
    for given in rounds(5)[stop:]:
        step(second, given)
    a, b = whole.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a)
    assert same(values(second), values(whole))
    for t in found(second).values():
        assert torch.equal(t.coeff, t.left @ t.value)
    for key in ("held/model.layers.2.mlp.down_proj/left", "coeff/model.layers.2.mlp.down_proj"):
        with pytest.raises(ValueError, match="left|down_proj"):
            second.load_state_dict({k: v for k, v in state.items() if k != key})


def test_replay_of_the_steps() -> None:
    optimizer, again = method(fresh(), lr=0.05), method(fresh(), lr=0.05)
    results = [step(optimizer, given) for given in rounds(4)]
    again.replay(results)
    assert same(values(optimizer), values(again))
    for a, b in zip(found(optimizer).values(), found(again).values(), strict=True):
        assert torch.equal(a.coeff, b.coeff) and bool(a.coeff.any())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def test_a_run_resumed_replayed_and_exported(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.fresh()
    before = base_hash(model)
    result = tiny.run(tmp_path / "whole", RECIPE, model)
    assert base_hash(model) == before and isinstance(result.optimizer, ZOActTail)
    whole = record(tmp_path / "whole")
    assert not any(row[-1] for row in whole["steps"])
    tiny.resumes(tmp_path, RECIPE, whole, (1, 4))
    with RunLog.open(tmp_path / "whole") as log:
        again = replay(log)
    assert again.identical and again.steps == 7
    assert isinstance(again.optimizer, ZOActTail)
    mine, theirs = found(result.optimizer), found(again.optimizer)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name].value, theirs[name].value) and bool(mine[name].value.any())
        assert torch.equal(mine[name].coeff, theirs[name].coeff)


def test_a_run_refuses_a_batch_that_queries_cannot_share(tiny: Tiny, tmp_path: Path) -> None:
    for options, text in (
        ({"batch_size": 10}, "queries can't share"),
        ({"micro_batch": 4}, "`micro_batch` is 4"),
        ({"mode": "sequential"}, "spread goes with"),
        ({"sides": "one-sided"}, "spread goes with"),
    ):
        with pytest.raises(ValueError, match=text):
            tiny.run(tmp_path / "run", replace(RECIPE, **options))
        if RunLog.exists(tmp_path / "run"):
            with RunLog.open(tmp_path / "run") as log:
                assert not log.done
            (tmp_path / "run").rename(tmp_path / f"refused-{len(list(tmp_path.iterdir()))}")


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_export_is_a_lora(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from zoact_kernels.integrations.peft import export_lora

    optimizer = method(fresh(kind), lr=0.05, layers=2)
    for given in rounds(3):
        step(optimizer, given)
    export_lora(optimizer.model, tmp_path, None)
    base = unswap(fresh(kind))
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    ids = BATCHES["words"].input_ids
    with torch.no_grad():
        mine, theirs, bare = optimizer.model(ids).logits, loaded(ids).logits, unswap(fresh(kind))(ids).logits
        truth = loaded.double()(ids).logits
    assert_no_worse(mine, theirs, truth, "logits")
    assert float((mine - bare).abs().max()) > 0.1


# --- prepare ----------------------------------------------------------------------------------------------------------


def calibration(model: Any, layer: Any, batches: list[Batch]) -> Tensor:
    """Rows [n, K] that the layer sees at label rows, float64, one sequence at a time."""
    rows: list[Tensor] = []
    held: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda m, args: held.append(args[0].double()))
    for given in batches:
        for s, p in zip(given.label_rows.tolist(), given.label_positions.tolist(), strict=True):
            length = int(given.attention_mask[s].sum())
            with torch.no_grad():
                model(given.input_ids[s : s + 1, :length])
            rows.append(held.pop()[0, p])
    handle.remove()
    return torch.stack(rows)


def head_rows(model: Any, batches: list[Batch]) -> Tensor:
    """Rows of the head of the answers, each less their mean, float64."""
    tokens = torch.cat([given.targets.flatten() for given in batches]).unique()
    rows = model.get_output_embeddings().weight.detach()[tokens].double()
    return rows - rows.mean(dim=0)


@torch.no_grad()
def logits_moved(model: Any, name: str, along: Tensor, batches: list[Batch]) -> float:
    """`_felt` by derivatives of the whole model, float64, one sequence at a time; the same noise."""
    model = unswap(copy.deepcopy(model)).double()
    tokens = torch.cat([given.targets.flatten() for given in batches]).unique()
    total, count = 0.0, 0
    for given in batches:
        added = moved = 0.0
        z = rng.noise("normal", 0, 0, len(given.label_rows), along.shape[1]).double()
        for s, p, shift in zip(given.label_rows.tolist(), given.label_positions.tolist(), z @ along.T, strict=True):
            ids = given.input_ids[s : s + 1, : int(given.attention_mask[s].sum())].expand(2, -1)

            def push(module: Any, args: Any, y: Tensor, p: int = p, shift: Tensor = shift) -> Tensor:
                y = y.clone()
                y[0, p] += 3e-3 * shift
                y[1, p] -= 3e-3 * shift
                return y

            handle = model.get_submodule(name).register_forward_hook(push)
            logits = model(ids).logits[:, p, tokens]
            handle.remove()
            change = (logits[0] - logits[1]) / 6e-3  # norms compute in float32, whatever the model
            moved += float((change - change.mean()).square().mean())
            added += float(shift.square().sum())
        total += len(z) * moved / added
        count += len(z)
    return math.sqrt(total / count)


MANY = [words(*range(1, 25), seed=seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("kind", ("llama", "tied", "gpt2", "phi", "gemma2", "granite"))
@pytest.mark.parametrize("batches", (MANY, [texts(7, 9, 5, 4, 11, 3, 8, 6), texts(13, 12, 10, 14)]))
def test_prepare(kind: str, batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "NUDGE", 1 / 256)
    model = fresh(kind)
    optimizer = ZOActTail(model, rank=5, outputs=4, queries=2)
    optimizer.prepare(iter(batches), functools.partial(group_losses, model))
    (t,) = found(optimizer).values()
    rows = calibration(model, t.layer, batches)
    a = t.layer.basis.double()
    gram = a.T @ rows.T @ rows @ a / len(rows)
    whitened(gram, rows, 5)
    wanted = head_rows(model, batches)
    rank = min(4, int(torch.linalg.matrix_rank(wanted)))
    assert not t.left[:, rank:].any()  # fewer directions than outputs: nothing, not noise
    told_apart(t.left[:, :rank].double(), wanted, model, t.name, batches)


def told_apart(u: Tensor, wanted: Tensor, model: Any, name: str, batches: list[Batch]) -> None:
    """U spans the top directions of `wanted`, and a step of 1 along it in the linear moves logits by FELT."""
    top = torch.linalg.svd(wanted, full_matrices=False).Vh
    unit, own = torch.eye(u.shape[1], dtype=torch.float64), u.norm() / u.shape[1] ** 0.5
    assert_no_worse((u.T @ u / own**2).float(), unit.float(), unit, "U^T U")
    caught = (top[: u.shape[1]] @ u / own).square().sum(1)  # of each top direction, by the span of U
    assert float((1 - caught).abs().max()) < 1e-5
    assert logits_moved(model, name, u / own, batches) * own == pytest.approx(
        FELT, rel=1e-3
    )  # the error falls by NUDGE^2, 2 % at 1 / 16


def whitened(gram: Tensor, rows: Tensor, rank: int) -> None:
    """A^T H^T H A / n = I, as far as a float32 A and float32 activations can."""
    eigenvalues = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)
    # Rounding of the rows, of 2^-24 times a few sums, is divided by the smallest standard deviation that is kept
    allowed = 256 * 2.0**-24 * float(eigenvalues[0] / eigenvalues[rank - 1])
    unit = torch.eye(rank, dtype=torch.float64)
    assert float((gram - unit).abs().max()) < allowed < 0.05


def test_prepare_of_more_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "NUDGE", 1 / 256)
    model = fresh()
    optimizer = ZOActTail(model, rank=5, outputs=2, queries=2, layers=3)
    optimizer.prepare(iter(MANY), functools.partial(group_losses, model))
    wanted = head_rows(model, MANY)
    down = zo_layers(model)["model.layers.2.mlp.down_proj"].dequantize(torch.float64)
    for name, t in found(optimizer).items():
        rows, a = calibration(model, t.layer, MANY), t.layer.basis.double()
        whitened(a.T @ rows.T @ rows @ a / len(rows), rows, 5)
        through = wanted if "down" in name else wanted @ down  # what of its output the losses can tell apart
        told_apart(t.left.double(), through, model, name, MANY)
    hold(method(model, layers=3), BATCHES["words"])


def test_prepare_with_fewer_rows_than_directions() -> None:
    """Two label rows have two directions: the other columns of A are nothing, and their S moves nothing."""
    model = fresh()
    optimizer = ZOActTail(model, rank=7, outputs=24, queries=1)
    optimizer.prepare([words(3, 9)], functools.partial(group_losses, model))
    (t,) = found(optimizer).values()
    assert t.layer.basis[:, :2].any(0).all() and not t.layer.basis[:, 2:].any()
    assert t.left[:, :2].any(0).all() and not t.left[:, 2:].any()  # three words less their mean
    assert torch.isfinite(t.layer.basis).all() and torch.isfinite(t.left).all()
    assert not step(optimizer, words(3, 9)).skipped


def test_prepare_gives_the_same_bits_twice_and_changes_no_loss() -> None:
    model, other = fresh(), fresh()
    clean = group_losses(model, BATCHES["words"])
    a, b = ZOActTail(model, rank=5, outputs=2, queries=2), ZOActTail(other, rank=5, outputs=2, queries=2)
    for optimizer in (a, b):
        optimizer.prepare(iter(MANY), functools.partial(group_losses, optimizer.model))
    for one, two in zip(found(a).values(), found(b).values(), strict=True):
        assert torch.equal(one.layer.basis, two.layer.basis) and torch.equal(one.left, two.left)
    assert torch.equal(group_losses(model, BATCHES["words"]), clean)  # S = 0


def test_it_learns() -> None:
    """After `prepare` the label words of a batch are told apart in a few steps; a reversed step does the opposite."""
    given = words(*range(2, 26))
    losses = []
    for sign in (1, -1):
        model = fresh()
        optimizer = ZOActTail(model, rank=24, outputs=2, queries=8, lr=0.2, floor_every=0)
        optimizer.prepare([given], functools.partial(group_losses, model))
        before = float(group_losses(model, given).mean())
        optimizer.lr *= sign
        for _ in range(40):
            step(optimizer, given)
        losses.append(float(group_losses(model, given).mean()) / before)
    assert losses[0] < 0.8 and losses[1] > 1.2


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    (
        ({"layers": 0}, "layers is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"outputs": -1}, "outputs is -1"),
        ({"sides": "one-sided"}, "spread goes with two-sided"),
        ({"sides": "leave-one-out"}, "spread goes with two-sided"),
        ({"mode": "sequential"}, "spread goes with two-sided"),
    ),
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ZOActTail(fresh(), **arguments)


def test_a_model_without_blocks() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with pytest.raises(ValueError):
        ZOActTail(model)


@pytest.mark.parametrize("queries", (3, 5, 16))
@pytest.mark.parametrize("given", (words(7, 3, 5, 1, 11, 2, 7, 4), texts(7, 9, 5, 4, 11, 3, 8, 6)))
def test_a_batch_that_queries_cannot_share(given: Batch, queries: int) -> None:
    optimizer = method(fresh(), queries=queries, lr=0.05)
    before = values(optimizer)
    with pytest.raises(ValueError, match=f"{queries} queries can't share"):
        step(optimizer, given)
    assert same(values(optimizer), before) and not optimizer.fork.handle.active


def test_examples_are_shared_not_sequences() -> None:
    """3 examples of 2 words each are 6 sequences, which 2 queries could cut in the middle of one."""
    with pytest.raises(ValueError, match="2 queries can't share"):
        step(method(fresh(), queries=2), phrases(7, 9, 5, 4, 11, 3))


def test_micro_batches() -> None:
    """Parts would deal out other examples than the whole does, and parts must not show."""
    optimizer, given = method(fresh()), BATCHES["words"]
    parts = given.split(4)
    with pytest.raises(ValueError, match="2 micro-batches"):
        optimizer.step_on([functools.partial(group_losses, optimizer.model, part) for part in parts], parts[0].leading)
    optimizer, whole = method(fresh(), spread=False), method(fresh(), spread=False)
    result = optimizer.step_on([functools.partial(group_losses, optimizer.model, p) for p in parts], parts[0].leading)
    wanted = step(whole, given).losses
    assert_no_worse(result.losses.float(), wanted.float(), wanted)


@pytest.mark.parametrize("kind", ("bert", "classifier"))
def test_classifiers_have_no_label_rows(kind: str) -> None:
    model = fresh(kind)
    mask = words(7, 3, 5, 4)
    given = Batch("sequence-classification", mask.input_ids, mask.attention_mask, labels=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"label|output embeddings|language model"):
        optimizer = ZOActTail(model, rank=3, outputs=2, queries=2)
        optimizer.prepare([given], functools.partial(group_losses, model))


def test_without_prepare_nothing_could_be_learned() -> None:
    """Bases of zeros move nothing: a step must not pass for one."""
    optimizer = ZOActTail(fresh(), rank=3, outputs=2, queries=4)
    with pytest.raises((ValueError, RuntimeError), match="prepare"):
        step(optimizer, BATCHES["words"])


@pytest.mark.parametrize("changes", ({"fork": False}, {"prefix_cache": 1 << 20}))
def test_what_is_of_a_fork_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tail in place of a fork"):
        method(fresh(), **changes)


def test_learned_coefficients_are_not_dropped():
    """An adapter to go on from has C that this method's bases can't hold: refused, nothing changed."""
    model = fresh()
    layer = next(iter(zo_layers(model).values()))
    layer.set_basis(torch.eye(layer.in_features, 2), torch.ones(layer.out_features, 2))
    with pytest.raises(ValueError, match="has learned coefficients, which zo-act-tail would drop"):
        method(model)
    assert layer.coeff is not None and bool((layer.coeff == 1).all())
