"""ZOActNode: losses and update written out, values by the chain rule, unbiased, exact resumes, clear refusals."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_no_worse
from tails import Batch, L, fresh, phrases, plain, step, texts, words
from test_method_tail import calibration, same
from test_trainer import Tiny, record
from torch import Tensor, nn

from zoact_kernels import rng
from zoact_kernels.layers import zo_layers
from zoact_kernels.losses import group_losses
from zoact_kernels.methods.node import MIXED, ZOActNode
from zoact_kernels.methods.tail import ZOActTail
from zoact_kernels.recipe import Recipe
from zoact_kernels.runlog import RunLog
from zoact_kernels.swap import ZOConfig, swap, unswap
from zoact_kernels.trainables import Coefficients, Nodes
from zoact_kernels.trainer import base_hash

NAMES: dict[str, dict[str, str]] = {
    "llama": {},
    "grouped": {},
    "gemma2": {},
    "gpt2": {},
    "phi": {},
    "opt": {},
    "neox": {},
    "down": {"layers": "down_proj"},
}
BATCHES = {
    "words": words(7, 3, 5, 1, 11, 2, 7, 4),
    "phrases": phrases(7, 9, 5, 4, 11, 3, 8, 6),
    "texts": texts(7, 9, 5, 4, 11, 3, 8, 6),
    "mean texts": texts(7, 9, 5, 4, 11, 3, 8, 6, mean=True),
}
SIGMA = 0.25


def method(kind: str = "llama", model: Any = None, filled: bool = True, **arguments: Any) -> ZOActNode:
    """An optimizer with bases and values that are random, and a radius that is felt."""
    given: dict[str, Any] = {
        "rank": 5, "outputs": 3, "queries": 3, "sigma": SIGMA, "lr": 0.05, "floor_every": 0, "seed": 9,
        "weight_decay": 0.0,
    }  # fmt: skip
    model = model if model is not None else fresh("llama" if kind == "down" else kind)
    optimizer = ZOActNode(model, **given | NAMES[kind] | arguments)
    generator = torch.Generator().manual_seed(6)
    for t in optimizer.trainables.values() if filled else ():
        assert isinstance(t, Nodes | Coefficients) and t.layer.basis is not None
        t.layer.basis.copy_(torch.randn(t.layer.basis.shape, generator=generator) / t.layer.in_features**0.5)
        if isinstance(t, Nodes):
            t.left.copy_(torch.linalg.qr(torch.randn(t.left.shape, generator=generator)).Q)
        t.value.detach().copy_(torch.randn(t.value.shape, generator=generator) / 4)
        t.settle()
    return optimizer


def values(optimizer: ZOActNode) -> dict[str, Tensor]:
    return {name: t.value.detach().clone() for name, t in optimizer.trainables.items()}


def written(optimizer: ZOActNode, dtype: torch.dtype, merged: bool = True) -> Any:
    """The model in ordinary layers with everything learned in their weights, or beside them."""
    model: Any = unswap(copy.deepcopy(optimizer.model)).to(dtype)
    for name, t in optimizer.trainables.items():
        assert isinstance(t, Nodes | Coefficients) and t.layer.basis is not None
        c = t.left.to(dtype) @ t.value.to(dtype) if isinstance(t, Nodes) else t.value.detach().to(dtype)
        delta, module = c @ t.layer.basis.to(dtype).T, model.get_submodule(name)
        if not merged:
            a = t.layer.basis.to(dtype)
            module.register_forward_hook(lambda m, args, out, a=a, c=c: out + (args[0] @ a) @ c.T)
            continue
        module.weight.data += delta if isinstance(module, nn.Linear) else delta.T
    return model


def by_hand(
    optimizer: ZOActNode, given: Batch, seeds: Tensor, dtype: torch.dtype, how: str = "merged"
) -> tuple[Tensor, dict[str, Tensor]]:
    """(losses [2 q, B], {name: value after a step of SGD}) from the formulas, each sequence alone.

    The gradient of the values is not written out but asked of autograd: that of sum_b <U g_b, what o_proj gives at row
    b> by their weight, attention's weights being no function of it. how: what is learned "merged" or "beside" ordinary
    layers; "swapped": the model as it is, for losses alone.
    """
    q = len(seeds)
    model = copy.deepcopy(optimizer.model) if how == "swapped" else written(optimizer, dtype, how == "merged")
    rows, places = given.label_rows.tolist(), given.label_positions.tolist()
    trained = {name: t for name, t in optimizer.trainables.items() if isinstance(t, Nodes)}
    noise = {
        name: [
            torch.as_tensor(rng.noise(optimizer.noise, int(s), int(t.param_id), len(rows), t.value.shape[0])).to(dtype)
            for s in seeds
        ]
        for name, t in trained.items()
    }
    inputs: dict[str, dict[int, Tensor]] = {name: {} for name in trained}
    outputs: dict[str, dict[int, Tensor]] = {name: {} for name in trained}
    state: dict[str, Any] = {}

    def hook(name: str, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        s, sign, query = state["s"], state["sign"], state["query"]
        out = out.clone()
        given, made = args[0].flatten(0, -2), out.flatten(0, -2)  # [T, ...]: OPT's MLP has no batch dimension
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            if row == s:
                count = inputs[name].get(i)
                seen = given[place].detach() / (2 * q)
                inputs[name][i] = seen if count is None else count + seen
                outputs[name][i] = made[place]
                if sign:
                    made[place] += sign * SIGMA * noise[name][query][i] @ trained[name].left.to(dtype).T
        return out

    handles = [model.get_submodule(name).register_forward_hook(functools.partial(hook, name)) for name in trained]

    def losses(sign: int, query: int) -> Tensor:
        found = []
        for s in range(given.sequences):
            state.update(s=s, sign=sign, query=query)
            length = int(given.attention_mask[s].sum())
            logits = model(given.input_ids[s : s + 1, :length]).logits[0]
            for i in (i for i, row in enumerate(rows) if row == s):
                line = logits[places[i]] if given.targets.dim() == 2 else logits[places[i]].log_softmax(-1)
                found.append(line[given.targets[i]])
        table = torch.stack(found)
        if given.targets.dim() == 2:
            return -table.log_softmax(-1).gather(-1, given.labels[:, None])[:, 0]  # type: ignore[index]
        sums = torch.stack([table[[i for i, r in enumerate(rows) if r == s]].sum() for s in range(given.sequences)])
        counts = torch.tensor([sum(r == s for r in rows) for s in range(given.sequences)])
        if given.kind == "completion":
            return -(sums / counts if given.mean else sums)
        scores = (sums / counts).view(-1, given.choices)
        return -scores.log_softmax(-1).gather(-1, given.labels[:, None])[:, 0]  # type: ignore[index]

    with torch.no_grad():
        table = torch.stack([losses(sign, query) for query in range(q) for sign in (1, -1)])
    if how == "swapped":
        return table, {}
    d = (table[0::2] - table[1::2]) / (2 * SIGMA)
    B = given.examples
    own = d[:, [row * B // given.sequences for row in rows]]
    gradients: dict[str, Tensor] = {}
    along = {name: (own[..., None] * torch.stack(noise[name])).mean(0) for name in trained}
    for name, t in trained.items():
        assert t.layer.basis is not None
        x = torch.stack([inputs[name][i] for i in range(len(rows))])
        gradients[name] = along[name].T @ (x @ t.layer.basis.to(dtype)) / B
    for name, t in optimizer.trainables.items():
        if isinstance(t, Coefficients):
            assert t.layer.basis is not None
            first = next(iter(trained))  # attention's own output, in module order
            weight = model.get_submodule(name).weight.requires_grad_(True)
            losses(0, 0)
            scalar = sum(
                (outputs[first][i] @ trained[first].left.to(dtype) @ along[first][i] for i in range(len(rows))),
                torch.zeros((), dtype=dtype),
            )
            (g,) = torch.autograd.grad(scalar, weight)
            gradients[name] = g @ t.layer.basis.to(dtype) / B
    for handle in handles:
        handle.remove()
    before = {name: t.value.detach().to(dtype) for name, t in optimizer.trainables.items()}
    return table, {name: value - optimizer.lr * gradients[name] for name, value in before.items()}


def worst(tries: list[Tensor], truth: Tensor) -> Tensor:
    """Of every number the try that is furthest off."""
    stack = torch.stack(tries)
    return stack.gather(0, (stack - truth).abs().argmax(0)[None])[0]


CASES = [(kind, given, "normal") for kind in NAMES for given in BATCHES] + [("llama", "words", "rademacher")]


@pytest.mark.parametrize(("kind", "given", "noise"), CASES)
def test_losses_and_step_are_those_written_out(kind: str, given: str, noise: str) -> None:
    batch = BATCHES[given]
    optimizer = method(kind, optimizer="sgd", noise=noise)
    before = copy.deepcopy(optimizer)
    result = step(optimizer, batch)
    truth, after = by_hand(before, batch, result.seeds, torch.float64)
    # Float32 gets three tries at every number, or a few lucky sums would ask for more than it can do
    tries = [by_hand(before, batch, result.seeds, torch.float32, how) for how in ("merged", "beside", "swapped")]
    assert_no_worse(result.losses.float(), worst([table for table, _ in tries], truth), truth, "losses")
    assert float((truth[0::2] - truth[1::2]).abs().min(dim=0).values.max()) > 1e-3  # every query is felt
    for name, t in optimizer.trainables.items():
        moved = t.value.detach() - values(before)[name]
        start = values(before)[name].double()
        assert_no_worse(
            t.value.detach(), worst([found[name] for _, found in tries if found], after[name]), after[name], name
        )
        assert float((after[name] - start).abs().max()) > 1e-4 and bool(moved.any())


def test_it_is_unbiased() -> None:
    """Mean estimate over seeds against autograd, in units of its own standard error; U whole, or values lose a part."""
    batch = words(7, 3, 5, 4, 11, 2)
    optimizer = method(outputs=24, sigma=1e-2, lr=0.0, optimizer="sgd", queries=4)
    model = written(optimizer, torch.float64)
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in optimizer.trainables}
    loss = group_losses(model, batch, grad=True).mean()
    truth: dict[str, Tensor] = {}
    for (name, t), g in zip(
        optimizer.trainables.items(), torch.autograd.grad(loss, list(weights.values())), strict=True
    ):
        assert isinstance(t, Nodes | Coefficients) and t.layer.basis is not None
        g = g @ t.layer.basis.double()
        truth[name] = t.left.double().T @ g if isinstance(t, Nodes) else g
    kept: list[dict[str, Tensor]] = []
    look = optimizer._gradients
    optimizer._gradients = lambda losses: kept.append(look(losses)) or kept[-1]  # type: ignore[method-assign,func-returns-value]
    for _ in range(300):
        step(optimizer, batch)
    for name, g in truth.items():
        seen = torch.stack([found[name].double() for found in kept])
        error = (seen.mean(0) - g).square().sum()
        allowed = seen.var(0).sum() / len(seen)
        assert float(error / allowed) < 2.5, name  # its mean is 1, of some 20 directions that matter: 4 deviations
        assert float(g.square().sum() / allowed) > 10, name  # or zeros would pass


def test_what_is_kept_outlives_bases_and_steps() -> None:
    """Or every step would compute the whole model again."""
    optimizer = method(filled=False)
    given = words(*range(1, 9))
    optimizer.prepare([given], functools.partial(group_losses, optimizer.model))
    for _ in range(3):
        step(optimizer, given)
    assert optimizer.fork.cache.misses == 8 and all(bool(t.value.any()) for t in optimizer.trainables.values())
    optimizer.model.model.layers[0].mlp.up_proj.weight.add_(0)  # as far as a version tells, other weights
    step(optimizer, given)
    assert optimizer.fork.cache.misses == 16


def test_prepare_gives_bases() -> None:
    optimizer = method(filled=False, rank=4)
    model = optimizer.model
    many = [words(*range(1, 25), seed=seed) for seed in (1, 2, 3)]
    clean = group_losses(model, many[0])
    with pytest.raises(RuntimeError, match="prepare"):
        step(optimizer, many[0])
    optimizer.prepare(iter(many), functools.partial(group_losses, model))
    assert torch.equal(group_losses(model, many[0]), clean)
    (t,) = (t for t in optimizer.trainables.values() if isinstance(t, Coefficients))
    mixtures = []
    for given in many:
        with optimizer.forking():
            group_losses(model, given)
        mixtures.append(optimizer.fork.mixed.flatten(0, 1).double())  # type: ignore[union-attr]
    rows = torch.cat(mixtures) @ t.layer.basis.double()  # type: ignore[union-attr]
    attended = calibration(model, model.model.layers[-1].self_attn.o_proj, many)
    share = attended.square().mean() / MIXED**2  # of what attention gives, in place of 1
    assert float((rows.T @ rows / len(rows) / share - torch.eye(4)).abs().max()) < 0.05
    before = values(optimizer)
    assert not step(optimizer, many[0]).skipped and not same(values(optimizer), before)


@torch.no_grad()
def louder(model: Any) -> Any:
    """The same function of tokens, but for rounding: hidden states times 64, values times 4, head's inputs by 16; what
    granite multiplies with, by 2."""
    model = copy.deepcopy(model)
    model.get_input_embeddings().weight *= 64
    for block in model.model.layers:
        block.self_attn.v_proj.weight *= 4
        block.self_attn.o_proj.weight *= 64 / 4
        block.mlp.down_proj.weight *= 64
    model.model.norm.weight /= 16
    model.lm_head.weight *= 16
    if hasattr(model, "logits_scaling"):
        model.logits_scaling *= 2
        model.lm_head.weight *= 2
        for block in model.model.layers:
            block.residual_multiplier *= 2
            block.self_attn.o_proj.weight /= 2
            block.mlp.down_proj.weight /= 2
    return model


@pytest.mark.parametrize("family", ("llama", "granite"))
@pytest.mark.parametrize("kind", (ZOActNode, ZOActTail))
def test_radius_and_rates_mean_the_same_in_a_louder_model(kind: Any, family: str) -> None:
    model = plain(family)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    many = [words(*range(1, 25), seed=seed) for seed in (1, 2, 3)]
    learned = []
    for one in (model, louder(model)):
        swap(one, ZOConfig(format="dense", rank=0))
        optimizer = kind(one, rank=5, outputs=3, queries=2, lr=0.3, sigma=0.1, floor_every=0)
        optimizer.prepare(iter(many), functools.partial(group_losses, one))
        losses = torch.stack([step(optimizer, given).losses for given in many])
        learned.append((losses, *values(optimizer).values()))
    assert all(bool(value.any()) for value in learned[0][1:])
    for quiet, loud in zip(*learned, strict=True):
        torch.testing.assert_close(loud, quiet, rtol=1e-3, atol=1e-3 * float(quiet.abs().max()))


@pytest.mark.parametrize("stop", (1, 3))
def test_resume_through_a_state_is_bitwise(stop: int) -> None:
    rounds = [BATCHES["words"], BATCHES["texts"], BATCHES["phrases"], words(9, 8, 7, 6, seed=2), BATCHES["words"]]
    whole, first = method(), method()
    for given in rounds:
        step(whole, given)
    for given in rounds[:stop]:
        step(first, given)
    state = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    second = method(filled=False)
    second.load_state_dict(state)
    for given in rounds[stop:]:
        step(second, given)
    a, b = whole.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a)
    assert same(values(whole), values(second))


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_lost_losses_skip_the_step(value: float) -> None:
    optimizer = method()
    step(optimizer, BATCHES["words"])
    before = optimizer.state_dict()

    def poisoned(groups: int) -> Tensor:
        losses = group_losses(optimizer.model, BATCHES["words"], groups)
        losses[3, 5] = value
        return losses

    result = optimizer.step_on([poisoned], BATCHES["words"].leading)
    assert result.skipped and "group 3" in result.reason
    after = optimizer.state_dict()
    assert int(after.pop("iteration")) == int(before.pop("iteration")) + 1
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


RECIPE = Recipe(
    method="zo-act-node", steps=7, batch_size=8, queries=2, snapshot_every=3, eval_every=4, floor_every=5,
    basis_batches=2, lr=0.05, sigma=0.05, seed=5, options={"rank": 6, "outputs": 2, "tail_cache": 1 << 20},
)  # fmt: skip


def test_a_run_resumed_is_the_run(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.fresh()
    before = base_hash(model)
    result = tiny.run(tmp_path / "whole", RECIPE, model)
    assert base_hash(model) == before and isinstance(result.optimizer, ZOActNode)
    whole = record(tmp_path / "whole")
    assert not any(row[-1] for row in whole["steps"])
    tiny.resumes(tmp_path, RECIPE, whole, (1, 4))
    with pytest.raises(ValueError, match="`micro_batch` is 4"):
        tiny.run(tmp_path / "small", replace(RECIPE, micro_batch=4))
    assert not RunLog.exists(tmp_path / "small")


def test_values_keep_what_attention_had_when_they_are_evaluated_clean() -> None:
    """Inside and outside of the tail the learned model is one model."""
    optimizer = method()
    for _ in range(3):
        step(optimizer, BATCHES["words"])
    whole = group_losses(written(optimizer, torch.float64), BATCHES["words"])
    plain = group_losses(written(optimizer, torch.float32), BATCHES["words"])
    with optimizer.forking():
        inside = group_losses(optimizer.model, BATCHES["words"])
    outside = group_losses(optimizer.model, BATCHES["words"])
    assert_no_worse(inside.float(), plain.float(), whole, "inside")
    assert_no_worse(outside.float(), plain.float(), whole, "outside")


@pytest.mark.parametrize(
    ("arguments", "text"),
    (
        ({"scaling": "std"}, "scaling 'plain'"),
        ({"mode": "sequential"}, "mode 'stacked'"),
        ({"spread": True}, "no spread"),
        ({"sides": "one-sided"}, "sides is 'one-sided'"),
        ({"optimizer": "momentum"}, "optimizer is 'momentum'"),
        ({"optimizer": "sumo"}, "optimizer is 'sumo'"),
        ({"layers": " , "}, "layers is ' , '"),
        ({"layers": "out_proj"}, "'out_proj'; the last block has"),
        ({"layers": "auto,down_proj"}, "'auto'; the last block has"),
        ({"values": "vproj"}, "'vproj'; the last block has"),
        ({"rank": 0}, "rank is 0"),
        ({"outputs": 0}, "outputs is 0"),
    ),
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ZOActNode(fresh(), **arguments)


@pytest.mark.parametrize("values", ("k_proj", "q_proj", "gate_proj"))
def test_values_that_are_none(values: str) -> None:
    optimizer = method(filled=False, values=values)
    with pytest.raises(ValueError, match="values"):
        optimizer.prepare([BATCHES["words"]], functools.partial(group_losses, optimizer.model))


def test_values_without_what_takes_them() -> None:
    """Their gradient comes from the noise on the linear that attention's output goes to."""
    optimizer = ZOActNode(fresh(), layers="down_proj", values="v_proj", rank=4, queries=1)
    with pytest.raises(ValueError, match="2 heads of 12.*takes 40 features.*or no values"):
        optimizer.prepare([BATCHES["words"]], functools.partial(group_losses, optimizer.model))


@pytest.mark.parametrize(
    ("kind", "layers", "values"),
    (
        ("llama", "o_proj down_proj", "v_proj"),
        ("phi", "self_attn.dense fc2", "v_proj"),
        ("opt", "out_proj fc2", "v_proj"),
        ("gpt2", "attn.c_proj mlp.c_proj", ""),
        ("neox", "attention.dense dense_4h_to_h", ""),
        ("phi3", "o_proj down_proj", ""),
        ("mixtral", "o_proj", "v_proj"),
    ),
)
def test_names_of_families(kind: str, layers: str, values: str) -> None:
    """Found without being told, in a model that then takes a step."""
    optimizer = ZOActNode(fresh(kind), rank=4, outputs=3)
    assert (optimizer.names, optimizer.values) == (layers.split(), values)
    optimizer.prepare([BATCHES["words"]], functools.partial(group_losses, optimizer.model))
    assert not step(optimizer, BATCHES["words"]).skipped
    trained = {name.rpartition(f".{L - 1}.")[2] for name in optimizer.trainables}
    assert all(any(name.endswith(one) for name in trained) for one in [*layers.split(), values])


def test_a_last_block_of_other_names() -> None:
    model = fresh()
    for block in model.model.layers:
        block.self_attn.o_pro, block.mlp.down = block.self_attn.o_proj, block.mlp.down_proj
        del block.self_attn.o_proj, block.mlp.down_proj
    with pytest.raises(ValueError, match="layers is 'auto', which knows o_proj.*linears q_proj, k_proj.*o_pro"):
        ZOActNode(model)


def test_a_refused_name_leaves_the_model_as_it_was() -> None:
    model = fresh()
    layer = zo_layers(model)["model.layers.0.mlp.up_proj"]
    layer.set_basis(torch.eye(layer.in_features, 2))
    with pytest.raises(ValueError, match="out_proj"):
        ZOActNode(model, layers="out_proj")
    assert layer.rank == 2 and torch.equal(layer.basis, torch.eye(layer.in_features, 2))
