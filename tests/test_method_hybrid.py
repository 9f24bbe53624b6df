"""Hi-ZFO against an independent float64 materialisation: which half sees noise, which a gradient, and where both go.

`Net` has blocks of equal shapes between a table and a head. The halves are written out by names; noise comes from the
generator's words, gradients from autograd over ordinary modules with the weights of the formulas.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from close import assert_no_worse
from test_method_blocks import B, Net, evaluation, ids, losses, plain_net
from torch import Tensor, nn
from torch.func import functional_call

from zoact_kernels import methods, rng
from zoact_kernels.dispatch import using
from zoact_kernels.layers import perturbed, zo_layers
from zoact_kernels.methods.hybrid import GAPS, choose
from zoact_kernels.swap import ZOConfig, swap

DTYPES = (torch.float32, torch.float64)
LINEARS = ("mix", "mlp.0", "mlp.2")
MEMBERS = ("norm.weight", "norm.bias", "mix.weight", "mix.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight")
BEHIND = ("norm.weight", "norm.bias", "head.weight")
PRESETS = {"hi-zfo": "int4", "hi-zfo over dense weights": "dense", "hi-zfo-dense": "dense"}


def swapped(format: str = "dense", rank: int = 0) -> Net:
    """Every linear swapped, a head of its own too; with bases where a rank is given."""
    net = plain_net(tied=False)
    group = None if format == "dense" else 8
    config = ZOConfig(format=format, group_size=group, rank=rank, layout="row", skip=())
    swap(net, config, where=["layers.*", "head"], example=(ids(),))
    for name, layer in zo_layers(net).items():
        if rank:
            layer.set_basis(rng.noise("normal", 3, zlib.crc32(name.encode()), layer.in_features, rank) / 4)
    return net


def make(preset: str, first: set[int] | None = None, **changes: Any) -> Any:
    method = preset.partition(" ")[0]
    net = swapped(PRESETS[preset], 0 if method == "hi-zfo-dense" else 2)
    given = {"floor_every": 0, "lr": 0.02, "first_lr": 0.03, "sigma": 0.02, "optimizer": "sgd", **changes}
    optimizer = methods.create(method, net, **given)
    if first is not None:
        optimizer.divide(first)
    return optimizer


def run(optimizer: Any, steps: int, parts: int = 1) -> list[methods.StepResult]:
    results = []
    for _ in range(steps):
        pieces = ids(optimizer.iteration).chunk(parts)
        results.append(optimizer.step_on([evaluation(optimizer.model, piece) for piece in pieces]))
    return results


def trained(optimizer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in optimizer.rule.coeffs.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """NaN equals NaN."""
    return a.keys() == b.keys() and all(torch.equal(a[key].nan_to_num(7e7), t.nan_to_num(7e7)) for key, t in b.items())


@pytest.fixture(autouse=True)
def specified() -> Iterator[None]:
    """The ops as they are specified: asked here is where a method puts noise and gradients, not how kernels round."""
    with using("reference", op="zo_linear"):
        yield


# --- the formulas, written out ----------------------------------------------------------------------------------------


class Plain:
    """What a model is made of: base weights, and what is trained of them, in a dtype of its own."""

    def __init__(self, optimizer: Any, dtype: torch.dtype) -> None:
        layers = zo_layers(optimizer.model)
        self.dtype, self.net = dtype, plain_net(dtype, tied=False)
        self.base = {}
        for name, _ in self.net.named_parameters():
            owner, _, key = name.rpartition(".")
            module = optimizer.model.get_submodule(owner)
            stored = module.dequantize() if owner in layers and key == "weight" else getattr(module, key)
            self.base[name] = stored.detach().clone().to(dtype)
        self.dense = optimizer.dense
        self.bases = {f"{name}.weight": layer.basis.to(dtype) for name, layer in layers.items() if layer.rank}
        self.theta = {
            name: (self.base[name] if self.dense else value).detach().clone().to(dtype)
            for name, value in trained(optimizer).items()
        }

    def weights(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        """W_eff of every parameter of the net."""
        if self.dense:
            return self.base | theta
        return self.base | {
            f"{name}.weight": self.base[f"{name}.weight"] + c @ self.bases[f"{name}.weight"].T
            for name, c in theta.items()
        }

    def moved(self, names: set[str], seed: int, sigma: float) -> dict[str, Tensor]:
        return {n: v + sigma * self.noise(n, seed) if n in names else v for n, v in self.theta.items()}

    def noise(self, name: str, seed: int) -> Tensor:
        shape = self.theta[name].shape
        rows = shape[0] if len(shape) > 1 else 1
        number = zlib.crc32((name if self.dense else f"{name}.weight").encode())
        return rng.noise("normal", seed, number, rows, math.prod(shape) // rows).view(shape).to(self.dtype)

    def losses(self, theta: dict[str, Tensor], x: Tensor) -> Tensor:
        return losses(lambda ids: functional_call(self.net, self.weights(theta), ids), x)

    def gradients(self, names: list[str], x: Tensor) -> dict[str, Tensor]:
        leaves = {n: v.clone().requires_grad_() for n, v in self.theta.items()}
        loss = self.losses(leaves, x).mean()
        return dict(zip(names, torch.autograd.grad(loss, [leaves[n] for n in names]), strict=True))


def halves(optimizer: Any, first: set[int]) -> tuple[set[str], set[str]]:
    """Names of Z and F for these blocks, without asking the method."""
    members = MEMBERS if optimizer.dense else LINEARS
    behind = BEHIND if optimizer.dense else ("head",)
    blocks = {i: {f"layers.{i}.{name}" for name in members} for i in range(3)}
    f = set().union(*(blocks[i] for i in first), behind if first else set())
    everything = set().union(*blocks.values(), behind, {"table.weight"} if optimizer.dense else set())
    f |= everything if first == {0, 1, 2} else set()
    return everything - f, f


def torch_rule(rule: str, tensors: list[nn.Parameter], lr: float, eps: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=lr) if rule == "sgd" else torch.optim.Adam(tensors, lr=lr, eps=eps)


FIRST = ({2}, {1, 2}, {0, 2})


@pytest.mark.parametrize("first", FIRST, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_noise_is_on_one_half_alone(preset: str, first: set[int]) -> None:
    """W_eff of every row group of the probes, blocks between those of the other half too."""
    optimizer = make(preset, first, queries=2)
    run(optimizer, 2)
    z, f = halves(optimizer, first)
    plain, truth = (Plain(optimizer, dtype) for dtype in DTYPES)
    assert plain.theta.keys() == z | f and set(optimizer.rule.zeroth.coeffs) == z
    optimizer._prepare()
    seeds, net = optimizer._seeds, optimizer.model
    with perturbed(net, seeds, optimizer._table, leading=(4 * B,)):
        y = net(ids().repeat(4, 1))
    for row, part in zip(optimizer._table, y.chunk(4), strict=True):
        index = int(row.abs().argmax())
        both = []
        for own in (plain, truth):
            moved = own.moved(z, int(seeds[index]), float(row[index]))
            both.append(functional_call(own.net, own.weights(moved), ids()))
        assert_no_worse(part, both[0], both[1])
        assert (part - net(ids())).abs().max() > 1e-2


@pytest.mark.parametrize("first", FIRST, ids=str)
@pytest.mark.parametrize("rules", [("adam", "sgd"), ("sgd", "adam")], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_both_halves_of_a_step(preset: str, rules: tuple[str, str], first: set[int]) -> None:
    """Losses are those of the other half's noise around theta, the gradient that of theta; then both move."""
    eps = 1e-3 if rules[1] == "adam" else 1e-8  # else what a gradient of rounding gets is its sign
    optimizer = make(preset, first, optimizer=rules[0], first_order=rules[1], eps=eps, seed=4)
    z, f = halves(optimizer, first)
    copies = [Plain(optimizer, dtype) for dtype in DTYPES]
    leaves = [{n: nn.Parameter(v) for n, v in own.theta.items()} for own in copies]
    stepped = [
        [torch_rule(rules[i], [own[n] for n in sorted(names)], (0.02, 0.03)[i], eps) for i, names in enumerate((z, f))]
        for own in leaves
    ]
    for step in range(4):
        before = trained(optimizer)
        (result,) = run(optimizer, 1)
        seed, seen = int(result.seeds), []
        for own, named, both in zip(copies, leaves, stepped, strict=True):
            own.theta = {n: p.detach() for n, p in named.items()}
            probes = [own.losses(own.moved(z, seed, radius), ids(step)) for radius in (0.02, -0.02)]
            seen.append(torch.stack(probes))
            gradients = own.gradients(sorted(f), ids(step))
            for n, p in named.items():
                p.grad = gradients[n] if n in f else result.weights.to(own.dtype) * own.noise(n, seed)
            for rule in both:
                rule.step()
        assert_no_worse(result.losses.float(), seen[0], seen[1], f"losses of step {step}")
        d = (result.losses[0] - result.losses[1]).mean() / 0.04
        assert result.weights.tolist() == [d.float().item()] and not result.skipped
        # All of a half at once, since a few numbers may be rounded luckily; each one has moved by far more
        for names in (z, f):
            ours = torch.cat([optimizer.rule.coeffs[n].detach().flatten() for n in sorted(names)])
            own, wanted = (torch.cat([named[n].detach().flatten() for n in sorted(names)]) for named in leaves)
            assert_no_worse(ours, own, wanted, f"after step {step}")
        assert not any(torch.equal(value, before[n]) for n, value in optimizer.rule.coeffs.items())


# --- the limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ("sgd", "adam", "adamw"))
@pytest.mark.parametrize("preset", PRESETS)
def test_all_first_order_is_torch_to_the_bit(preset: str, rule: str) -> None:
    optimizer = make(preset, budget=1.0, first_order=rule, weight_decay=0.1, schedule="linear", steps=5)
    optimizer.prepare([], lambda batch: batch)
    assert optimizer.rule.zeroth is None
    twin = make(preset)
    tensors = {name: t.leaf.requires_grad_() for name, t in twin.trainables.items()}
    bare = [p for name, p in tensors.items() if not twin.trainables[name].decays]
    rest = [p for name, p in tensors.items() if twin.trainables[name].decays]
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[rule]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": bare, "weight_decay": 0.0}]
    theirs = kind([group for group in groups if group["params"]], lr=0.03, foreach=False)
    for step in range(4):
        (result,) = run(optimizer, 1)
        for group in theirs.param_groups:
            group["lr"] = 0.03 * (1 - step / 5)
        loss = evaluation(twin.model, ids(step))(1)[0]
        theirs.zero_grad()
        loss.mean().backward()
        theirs.step()
        assert torch.equal(result.losses, loss.detach().double().expand(2, -1)) and not result.weights.any()
    ours = trained(optimizer)
    assert all(torch.equal(ours[name].view(p.shape), p) for name, p in tensors.items())
    assert any(not torch.equal(ours[name], value) for name, value in trained(make(preset)).items())


@pytest.mark.parametrize("preset", PRESETS)
def test_none_first_order_is_the_other_method_to_the_bit(preset: str) -> None:
    optimizer = make(preset, budget=0.0, optimizer="momentum", queries=2)
    optimizer.prepare([], lambda batch: batch)
    method = "mezo" if optimizer.dense else "zo-act"
    twin = methods.create(
        method, make(preset).model, floor_every=0, lr=0.02, sigma=0.02, optimizer="momentum", queries=2
    )
    for a, b in zip(run(optimizer, 4), run(twin, 4), strict=True):
        assert torch.equal(a.losses, b.losses) and torch.equal(a.weights, b.weights)
    assert same(trained(optimizer), trained(twin))


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_by(optimizer: Any) -> list[int]:
    """Bytes of activations that the graph of one step keeps, each storage once; weights and C are not counted."""
    held = {t.untyped_storage().data_ptr() for t in (*optimizer.model.parameters(), *optimizer.model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(optimizer, 1)
    return sorted(kept.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_graph_is_that_of_the_suffix(preset: str) -> None:
    """Each block more keeps as much again; nothing is kept without one, nor by the probes, however many."""
    saved = {count: sum(saved_by(make(preset, set(range(3 - count, 3))))) for count in range(4)}
    block = saved[2] - saved[1]
    assert saved[0] == 0 < block and saved[1] < 2.5 * block
    assert abs(saved[3] - saved[2] - block) <= B * 4 * 8  # the ids that a table keeps for its gradient
    assert sum(saved_by(make(preset, {2}, queries=4))) == saved[1]
    assert sum(saved_by(make(preset, {1}))) == pytest.approx(saved[2], rel=0.1)  # the graph begins at the first of F


def test_the_profile_keeps_one_block_at_a_time() -> None:
    """Beside the hidden states between blocks, whatever is kept until the backward comes by is one block's."""
    optimizer = make("hi-zfo-dense")
    alive = {"now": 0, "most": 0}

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive["now"] += tensor.nbytes
            alive["most"] = max(alive["most"], alive["now"])

        def __del__(self) -> None:
            alive["now"] -= self.tensor.nbytes

    def most(step: Callable[[], Any]) -> int:
        alive.update(now=0, most=0)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            step()
        return alive["most"]

    whole = most(lambda: run(make("hi-zfo-dense", {0, 1, 2}), 1))
    profile = most(lambda: optimizer.prepare([ids()], lambda x: evaluation(optimizer.model, x)(1)))
    assert 0 < profile < whole / 2
    assert all(p.grad is None and not p.requires_grad for p in optimizer.model.parameters())


# --- the profile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ("sgd", "adam", "sumo"))
@pytest.mark.parametrize("preset", PRESETS)
def test_the_importance_of_a_block(preset: str, rule: str) -> None:
    """sum |g * Delta|, Delta the first step of the rule at lr 1."""
    optimizer = make(preset, budget=0.5, first_order=rule, sumo_rank=2, eps=1e-3)
    own, scores = Plain(optimizer, torch.float64), []
    for block in range(3):
        names = [f"layers.{block}.{name}" for name in (MEMBERS if optimizer.dense else LINEARS)]
        total = torch.zeros((), dtype=torch.float64)
        for g in own.gradients(names, ids()).values():
            delta = g
            if rule == "adam" or (rule == "sumo" and g.dim() == 1):
                delta = g / (g.abs() + 1e-3)
            elif rule == "sumo":
                x, _, y = torch.linalg.svd(g, full_matrices=False)
                delta = x[:, :2] @ y[:2]
            total += (g * delta).abs().sum()
        scores.append(total)
    found = torch.stack(scores)
    before = trained(optimizer)
    optimizer.prepare([ids()], lambda x: evaluation(optimizer.model, x)(1))
    assert optimizer.importance.tolist() == pytest.approx(found.tolist(), rel=1e-5)
    worth = dict(enumerate(found.tolist()))
    module = optimizer.model.layers[0]
    through = sum(layer.in_features * layer.out_features for layer in zo_layers(module).values())
    size = sum(t.value.numel() for t in optimizer.blocks[0])
    wanted = choose(worth, dict.fromkeys(range(3), size), [through] * 3, 0.5)
    assert optimizer.first_blocks == wanted and same(trained(optimizer), before)
    (result,) = run(optimizer, 1)
    assert result.note.startswith(f"first-order: block{'s' * (len(wanted) > 1)} {', '.join(map(str, wanted))} with ")


def test_the_choice_of_blocks() -> None:
    """Against all sets within the budget; a suffix unless a set with gaps is worth GAPS times as much."""
    noise = rng.noise("normal", 1, 2, 40, 6).abs().square()
    kinds = set()
    for row, own, budget in itertools.product(noise, (1, 5, 7), (0.1, 0.3, 0.5, 0.8, 1.0)):
        importance, through = dict(enumerate(row.tolist())), [5] * 6
        room = budget * (30 + 6 * own)

        def cost(blocks: tuple[int, ...], own: int = own) -> int:
            return 5 * (6 - blocks[0]) + own * len(blocks)

        def worth(blocks: tuple[int, ...], importance: dict[int, float] = importance) -> float:
            return sum(importance[block] for block in blocks)

        sets = [s for n in range(1, 7) for s in itertools.combinations(range(6), n) if cost(s) <= room]
        suffixes = [s for s in sets if s == tuple(range(s[0], 6))] or [(5,)]
        best, suffix = max(sets, key=worth, default=(5,)), max(suffixes, key=len)
        wanted = best if worth(best) > GAPS * worth(suffix) else suffix
        found = choose(importance, dict.fromkeys(range(6), own), through, budget)
        assert found == list(wanted), (importance, own, budget)
        kinds.add((len(wanted), wanted == suffix))
    assert {(6, True), (1, True)} < kinds and any(not is_suffix for _, is_suffix in kinds)
    flat = dict.fromkeys(range(6), 1.0)
    assert choose(flat, dict.fromkeys(range(6), 5), [5] * 6, 0.5) == [3, 4, 5]
    some = {1: 1.0, 3: 1.0}  # the others have nothing to train, but a gradient passes them
    assert choose(some, {1: 5, 3: 5}, [5] * 6, 0.5) == [3] and choose(some, {1: 5, 3: 5}, [5] * 6, 1.0) == [1, 3]
