"""Methods that take a model in parts, and the one that may refuse its step: against their formulas in float64.

`Net` has blocks of equal shapes between a table and its tied head. What a part is, perturbs and moves is written out
here by names, from the generator's words.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_no_worse
from invariants import same_in_parts
from torch import Tensor, nn
from torch.func import functional_call

from zoact_kernels import methods, rng, step_graph
from zoact_kernels.layers import perturbed, zo_layers
from zoact_kernels.methods import ZeroOrder
from zoact_kernels.methods.blocks import parts_of
from zoact_kernels.step_graph import StepGraph
from zoact_kernels.swap import ZOConfig, swap

B, T, V, H = 3, 4, 29, 12
DTYPES = (torch.float32, torch.float64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(H), nn.Linear(H, H)
        self.mlp = nn.Sequential(nn.Linear(H, 17), nn.Tanh(), nn.Linear(17, H, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.mlp(x)


class Net(nn.Module):
    """ids [B, T] -> logits [B, T, V]."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(V, H), nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(H), nn.Linear(H, V, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


OUTSIDE = ["table.weight", "norm.weight", "norm.bias"]
LINEARS = {"mix": ["mix.weight", "mix.bias"], "mlp.0": ["mlp.0.weight", "mlp.0.bias"], "mlp.2": ["mlp.2.weight"]}
NORM = ["norm.weight", "norm.bias"]
MEMBERS = {  # the norm goes with the first
    "block": [NORM + LINEARS["mix"] + LINEARS["mlp.0"] + LINEARS["mlp.2"]],
    "mlp-attn": [NORM + LINEARS["mix"], LINEARS["mlp.0"] + LINEARS["mlp.2"]],
    "linear": [NORM + LINEARS["mix"], LINEARS["mlp.0"], LINEARS["mlp.2"]],
}
PARTS = {
    level: [OUTSIDE, *([f"layers.{i}.{name}" for name in own] for i in range(3) for own in members)]
    for level, members in MEMBERS.items()
}
NAMES = [name for part in PARTS["block"] for name in part]


def plain_net(dtype: torch.dtype = torch.float32, tied: bool = True) -> Net:
    torch.manual_seed(5)
    net = Net(tied).eval().requires_grad_(False)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net.to(dtype)


def swapped(rank: int = 0, tied: bool = True) -> Net:
    """Every linear is swapped but for a tied head: with a head of its own, a row's bits depend on the row alone."""
    net = plain_net(tied=tied)
    where = ["layers.*"] if tied else ["layers.*", "head"]
    swap(net, ZOConfig(format="dense", rank=rank, layout="row", skip=()), where=where, example=(ids(),))
    for name, layer in zo_layers(net).items():
        if layer.rank:
            layer.set_basis(rng.noise("normal", 3, zlib.crc32(name.encode()), layer.in_features, rank))
    return net


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def values(net: nn.Module) -> dict[str, Tensor]:
    return {n: getattr(net.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]).clone() for n in NAMES}


def losses(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([row[-1].log_softmax(-1)[7].neg() for row in net(x)])


def evaluation(net: nn.Module, x: Tensor) -> methods.Evaluation:
    return lambda groups: losses(net, x.repeat(groups, 1)).view(groups, -1)


def run(optimizer: ZeroOrder, steps: int, parts: int = 1) -> list[methods.StepResult]:
    results = []
    for _ in range(steps):
        pieces = ids(optimizer.iteration).chunk(parts)
        results.append(optimizer.step_on([evaluation(optimizer.model, piece) for piece in pieces]))
    return results


def noise(seed: int, name: str, shape: torch.Size, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = shape[0] if len(shape) > 1 else 1
    return rng.noise("normal", seed, zlib.crc32(name.encode()), rows, math.prod(shape) // rows).view(shape).to(dtype)


def at(theta: dict[str, Tensor], x: Tensor) -> Tensor:
    """Losses [B] of a net with these values, in their dtype."""
    net = plain_net(next(iter(theta.values())).dtype)
    return losses(lambda ids: functional_call(net, theta, ids), x)


def probe(theta: dict[str, Tensor], part: list[str], seed: int, sigma: float, x: Tensor) -> Tensor:
    """Losses [2, B] of one query along one part, in the dtype of theta."""
    sides = []
    for radius in (sigma, -sigma):
        moved = {n: w + radius * noise(seed, n, w.shape, w.dtype) if n in part else w for n, w in theta.items()}
        sides.append(at(moved, x))
    return torch.stack(sides)


def part_of(optimizer: Any) -> list[str]:
    """Names of the part whose turn it is, by the order that the generator gives."""
    order = rng.noise("normal", optimizer.seed, zlib.crc32(b"order of the parts"), 1, 4)[0].argsort().tolist()
    return PARTS["block"][order[optimizer.iteration % 4]]


def torch_rule(rule: str, tensors: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if rule == "adam":
        return torch.optim.Adam(tensors, lr=lr)
    return torch.optim.SGD(tensors, lr=lr, momentum=0.9 if rule == "momentum" else 0.0)


METHODS: dict[str, dict[str, Any]] = {
    "mezo-bcd": {}, "zo-module-wise": {}, "zo-module-wise, together": {"coordinate": False},
    "zo-module-wise, two": {"queries": 2}, "zo-conservative": {},
}  # fmt: skip


def make(preset: str, net: nn.Module, **changes: Any) -> Any:
    return methods.create(preset.partition(",")[0], net, **{"floor_every": 0, **METHODS[preset], **changes})


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", PARTS)
def test_parts_by_names(level: str) -> None:
    trainables = list(methods.create("mezo", swapped()).trainables.values())
    stack, parts = parts_of(trainables, level)
    assert stack == "layers" and parts[0].block is None
    found = [sorted(t.name for t in part.trainables) for part in parts]
    assert found == [sorted(part) for part in PARTS[level]]
    assert [part.block for part in parts[1:]] == sorted([0, 1, 2] * len(MEMBERS[level]))


def test_what_parts_refuse() -> None:
    with pytest.raises(ValueError, match="level is 'layer'; it may be block, mlp-attn, linear"):
        make("zo-module-wise", swapped(), level="layer")
    with pytest.raises(ValueError, match="no numbered blocks"):
        make("mezo-bcd", nn.Linear(3, 3))
    with pytest.raises(ValueError, match="prefix_cache is 9"):
        make("mezo-bcd", swapped(), prefix_cache=9)
    net = swapped()
    net.layers[2].mlp = net.layers[0].mlp
    assert len(make("mezo-bcd", net).parts) == 4  # one tensor, one part
    net = plain_net()
    net.layers[2].mix.weight = net.layers[0].mix.weight  # but not one bias
    with pytest.raises(ValueError, match="block 2 of layers shares a module"):
        make("mezo-bcd", net)


def test_steps_that_differ_have_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "DEVICE", "cpu")
    for preset in ("mezo-bcd", "zo-module-wise"):
        with pytest.raises(ValueError, match="differ in more than numbers"):
            StepGraph(make(preset, swapped()), None)  # type: ignore[arg-type]


# --- one block at a time ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_groups_differ_in_the_part_whose_turn_it_is() -> None:
    net = swapped()
    theta, clean = values(net), net(ids())
    optimizer = make("mezo-bcd", net, sigma=0.05, queries=2)
    for step in range(5):
        optimizer.iteration = step
        optimizer._prepare()
        part, seeds = part_of(optimizer), optimizer._seeds
        with perturbed(net, seeds, optimizer._table, leading=(4 * B,)):
            y = net(ids().repeat(4, 1))
        for row, own in zip(optimizer._table.double(), y.chunk(4), strict=True):
            moved = {n: w.double() for n, w in theta.items()}
            for n in part:
                moved[n] += sum(s * noise(int(seed), n, theta[n].shape) for s, seed in zip(row, seeds, strict=True))
            truth = functional_call(plain_net(torch.float64), moved, ids())
            assert_no_worse(own, functional_call(plain_net(), {n: w.float() for n, w in moved.items()}, ids()), truth)
            assert (own - clean).abs().max() > 1e-2
    assert torch.equal(net(ids()), clean)


@pytest.mark.parametrize("rule", ("sgd", "momentum", "adam"))
def test_a_step_moves_one_block_with_a_rule_of_its_own(rule: str) -> None:
    """All others keep their bits, and each block has made as many steps as it had turns."""
    net = swapped()
    optimizer = make("mezo-bcd", net, sigma=1e-2, lr=0.05, optimizer=rule, seed=4)
    copies = {dtype: {n: nn.Parameter(w.to(dtype)) for n, w in values(net).items()} for dtype in DTYPES}
    rules = {
        (dtype, part[0]): torch_rule(rule, [copied[n] for n in part], 0.05)
        for dtype, copied in copies.items()
        for part in PARTS["block"]
    }
    for _ in range(7):
        part, before = part_of(optimizer), values(net)
        (result,) = run(optimizer, 1)
        after = values(net)
        assert {n for n in NAMES if not torch.equal(before[n], after[n])} == set(part)
        for dtype, copied in copies.items():
            for n in part:
                z = noise(int(result.seeds), n, before[n].shape, dtype)
                copied[n].grad = result.weights.to(dtype) * z
            rules[dtype, part[0]].step()
    assert [r.t for r in optimizer.rule.rules] != [2, 2, 2, 1] and sorted(r.t for r in optimizer.rule.rules) == [
        1,
        2,
        2,
        2,
    ]
    for n, w in values(net).items():
        assert_no_worse(w, *(copies[dtype][n].detach() for dtype in DTYPES), n)


def test_losses_of_a_turn() -> None:
    """Those of a net in which the part alone is moved; d is their difference."""
    net = swapped()
    optimizer = make("mezo-bcd", net, sigma=1e-2, lr=0.0)
    theta = {dtype: {n: w.to(dtype) for n, w in values(net).items()} for dtype in DTYPES}
    for step in range(4):
        part = part_of(optimizer)
        (result,) = run(optimizer, 1)
        plain, truth = (probe(theta[d], part, int(result.seeds), 1e-2, ids(step)) for d in DTYPES)
        assert_no_worse(result.losses.float(), plain, truth, f"step {step}")
        d = (result.losses[0] - result.losses[1]).mean() / (2 * optimizer.sigma)
        assert result.weights.tolist() == [d.float().item()]


def test_the_order_is_random_and_comes_again() -> None:
    seen = {}
    for seed in range(6):
        optimizer = make("mezo-bcd", swapped(), seed=seed)
        turns = []
        for optimizer.iteration in range(12):
            optimizer.refresh()
            turns += optimizer.rule.turn
        assert turns[:4] == turns[4:8] == turns[8:] and sorted(turns[:4]) == [0, 1, 2, 3]
        seen[seed] = turns[:4]
    assert len({tuple(order) for order in seen.values()}) > 3


@pytest.mark.parametrize("preset", ("mezo-bcd", "zo-module-wise"))
def test_groups_fork_at_the_block(preset: str) -> None:
    """What is before the block of a part sees B rows, and nothing of it shows in the result."""
    results = []
    for fork in (False, True):
        net, rows = swapped(), []
        optimizer = make(preset, net, lr=0.05, fork=fork, queries=2)
        net.layers[0].mix.register_forward_pre_hook(lambda m, x, seen=rows: seen.append(len(x[0])))
        results.append((run(optimizer, 4), values(net), rows))
        assert not any("forward" in vars(module) for module in net.modules())
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a.losses, b.losses) and torch.equal(a.weights, b.weights)
    assert all(torch.equal(results[1][1][n], w) for n, w in results[0][1].items())
    assert set(results[0][2]) == {4 * B} and set(results[1][2]) == {B, 4 * B}
    assert results[1][2].count(B) == 2 * (1 if preset == "mezo-bcd" else 4)  # turns of the parts behind the first block


def test_blocks_of_coefficients() -> None:
    """The same turns beside frozen weights: C of one block moves, and no base weight."""
    net = swapped(rank=2)
    optimizer = methods.create("zo-act-bcd", net, lr=0.1, floor_every=0)
    base = {name: layer.weight.clone() for name, layer in zo_layers(net).items()}
    assert [part.block for part in optimizer.parts] == [0, 1, 2]
    for _ in range(3):
        before = {name: c.detach().clone() for name, c in optimizer.rule.coeffs.items()}
        run(optimizer, 1)
        block = optimizer.parts[optimizer.rule.turn[0]].block
        moved = {name for name, c in optimizer.rule.coeffs.items() if not torch.equal(c, before[name])}
        assert moved == {name for name in before if name.startswith(f"layers.{block}.")}
    assert all(torch.equal(layer.weight, base[name]) for name, layer in zo_layers(net).items())


# --- module by module -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinate", (True, False))
@pytest.mark.parametrize("level", PARTS)
def test_modules_one_after_the_other(level: str, coordinate: bool) -> None:
    """Each along its own noise, at a theta in which those before it have moved, or not yet."""
    net = swapped()
    optimizer = make("zo-module-wise", net, level=level, coordinate=coordinate, sigma=1e-2, lr=0.05)
    start = {dtype: {n: w.to(dtype) for n, w in values(net).items()} for dtype in DTYPES}
    (result,) = run(optimizer, 1)
    seeds = [rng.seed_for(0, 0, query) for query in range(len(PARTS[level]))]
    assert result.seeds.tolist() == seeds
    sides = result.losses.view(len(seeds), 2, B)
    assert torch.equal(((sides[:, 0] - sides[:, 1]).mean(1) / (2 * optimizer.sigma)).float(), result.weights)
    found: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in DTYPES}
    for dtype, theta in start.items():
        now = dict(theta)
        for part, seed, d in zip(PARTS[level], seeds, result.weights.to(dtype), strict=True):
            found[dtype].append(probe(now if coordinate else theta, part, seed, 1e-2, ids(0)))
            for n in part:
                now[n] = now[n] - 0.05 * d * noise(seed, n, now[n].shape, dtype)
        start[dtype] = now
    plain, truth = (torch.cat(found[dtype]) for dtype in DTYPES)
    assert_no_worse(result.losses.float(), plain.float(), truth, "losses")
    for n, w in values(net).items():
        assert_no_worse(w, *(start[dtype][n] for dtype in DTYPES), n)


def test_modules_of_one_shape_share_no_noise() -> None:
    """Invariant 4, of the directions that a step has taken."""
    net = swapped()
    before = values(net)
    run(make("zo-module-wise", net, level="linear", lr=1e-2), 1)
    moved = [values(net)[n] - before[n] for n in NAMES if n.endswith("mlp.0.weight")]
    correlation = torch.corrcoef(torch.stack([m.flatten() for m in moved])) - torch.eye(3)
    assert correlation.abs().max() < 4 / math.sqrt(moved[0].numel())


@pytest.mark.parametrize("coordinate", (True, False))
@pytest.mark.parametrize("late", (0, 1, 3))
def test_lost_losses_of_one_module_undo_all(coordinate: bool, late: int) -> None:
    net = swapped()
    optimizer = make("zo-module-wise", net, coordinate=coordinate, lr=0.1, optimizer="adam")
    run(optimizer, 1)
    before, state, calls = values(net), optimizer.rule.state_dict(), iter(range(9))

    def poisoned(groups: int) -> Tensor:
        table = evaluation(net, ids())(groups)
        return table * math.nan if next(calls) == late else table

    result = optimizer.step_on([poisoned])
    assert result.skipped and "not finite" in result.reason
    assert all(torch.equal(w, before[n]) for n, w in values(net).items())
    assert all(torch.equal(t, state[key]) for key, t in optimizer.rule.state_dict().items())
    assert not run(optimizer, 1)[0].skipped and not torch.equal(values(net)["table.weight"], before["table.weight"])


# --- the best of three ------------------------------------------------------------------------------------------------


def scripted(pair: tuple[float, float], *clean: float) -> methods.Evaluation:
    """Losses of a step as told: +, -, then theta, theta - step, theta + step."""
    left = iter(clean)

    def evaluate(groups: int) -> Tensor:
        return torch.tensor(pair if groups == 2 else [next(left)], dtype=torch.float64)[:, None].expand(-1, B)

    return evaluate


@pytest.mark.parametrize(("clean", "sign"), (((3, 1, 2), 1), ((3, 2, 1), -1), ((1, 2, 3), 0), ((1, 1, 1), 0),
                                            ((3, math.nan, 2), -1), ((1, math.inf, math.nan), 0)))  # fmt: skip
@pytest.mark.parametrize("rule", ("sgd", "momentum", "adam"))
def test_the_best_of_three_points(rule: str, clean: tuple[float, ...], sign: int) -> None:
    """What was refused has left no trace in values, moments or counters; what was taken is one step of the rule."""
    net = swapped()
    optimizer = make("zo-conservative", net, lr=0.1, optimizer=rule, sigma=0.5)
    copies = {dtype: {n: nn.Parameter(w.to(dtype)) for n, w in values(net).items()} for dtype in DTYPES}
    rules = {dtype: torch_rule(rule, list(copied.values()), 0.1) for dtype, copied in copies.items()}
    for script, way in (((3, 1, 2), 1), (clean, sign), ((3, 2, 1), -1)):
        before, state = values(net), optimizer.rule.state_dict()
        result = optimizer.step_on([scripted((1.25, 1.0), *script)])
        assert result.skipped == (way == 0) and result.losses.shape == (5, B)
        if not way:
            assert result.reason
            assert all(torch.equal(w, before[n]) for n, w in values(net).items())
            assert all(torch.equal(t, state[key]) for key, t in optimizer.rule.state_dict().items())
            continue
        assert result.weights.tolist() == [way * 0.25]
        for dtype, copied in copies.items():
            for n, w in copied.items():
                w.grad = way * 0.25 * noise(int(result.seeds), n, w.shape, dtype)
            rules[dtype].step()
    for n, w in values(net).items():
        assert_no_worse(w, *(copies[dtype][n].detach() for dtype in DTYPES), n)


@pytest.mark.parametrize("rule", ("sgd", "adam"))
def test_the_points_are_where_they_should_be(rule: str) -> None:
    """Evaluated at theta, at the rule's step along d z and at its step along -d z, none of them perturbed."""
    seen: list[dict[str, Tensor]] = []
    net = swapped()
    optimizer = make("zo-conservative", net, lr=0.1, optimizer=rule, sigma=0.5)
    inner = scripted((1.25, 1.0), 3, 2, 2.5)

    def evaluate(groups: int) -> Tensor:
        if groups == 1:
            assert not optimizer.trainables["table.weight"].owner.perturbation.active
            seen.append(values(net))
        return inner(groups)

    result = optimizer.step_on([evaluate])
    assert all(torch.equal(w, values(swapped())[n]) for n, w in seen[0].items())
    for point, way in ((1, 1), (2, -1)):
        other = swapped()
        twin = methods.create("mezo", other, lr=0.1, optimizer=rule, sigma=0.5)
        twin.rule.update(result.seeds, way * result.weights, lr=0.1)
        assert all(torch.equal(w, seen[point][n]) for n, w in values(other).items())
    assert all(torch.equal(w, seen[1][n]) for n, w in values(net).items())


def test_no_step_makes_the_batch_worse() -> None:
    net, x = swapped(), ids()
    optimizer = make("zo-conservative", net, lr=0.3, sigma=1e-2)
    found, skipped = [float(losses(net, x).mean())], []
    for _ in range(10):
        skipped.append(optimizer.step_on([evaluation(net, x)]).skipped)
        found.append(float(losses(net, x).mean()))
    assert all(b <= a for a, b in itertools.pairwise(found)) and found[-1] < found[0]
    assert any(skipped)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ("sgd", "adam"))
@pytest.mark.parametrize("preset", METHODS)
def test_resume_and_replay(preset: str, rule: str) -> None:
    """A snapshot after any step, and the log alone, give the bits of the uninterrupted run (37, 39)."""
    net = swapped()
    optimizer = make(preset, net, lr=0.1, optimizer=rule)
    first, log = optimizer.state_dict(), run(optimizer, 2)
    middle = optimizer.state_dict()
    log += run(optimizer, 1)
    for state, rows in ((middle, []), (first, log), (middle, log[2:])):
        other = swapped()
        again = make(preset, other, lr=0.1, optimizer=rule)
        again.load_state_dict(state)
        again.replay(rows)
        if not rows:
            run(again, 1)
        got, want = again.state_dict(), optimizer.state_dict()
        assert all(torch.equal(got[key], t) for key, t in want.items() if key != "floor") and got.keys() == want.keys()
        assert all(torch.equal(w, values(net)[n]) for n, w in values(other).items())


@pytest.mark.parametrize("preset", METHODS)
def test_sequential_and_micro_batches_are_the_same_step(preset: str) -> None:
    same_in_parts(lambda **changes: make(preset, swapped(tied=False), lr=0.05, **changes), run, 2, look=values)


@pytest.mark.parametrize("preset", METHODS)
def test_a_closure_over_stacked_inputs(preset: str) -> None:
    results = []
    for stacked in (True, False):
        net = swapped()
        optimizer = make(preset, net, lr=0.05)
        inputs = optimizer.stack({"ids": ids()})
        for _ in range(2):
            if stacked:
                results.append(optimizer.step(lambda o=optimizer, x=inputs: losses(o.model, x["ids"])))
            else:
                results.append(optimizer.step_on([evaluation(net, ids())]))
    assert all(torch.equal(a.losses, b.losses) for a, b in zip(results[:2], results[2:], strict=True))


@pytest.mark.parametrize("preset", METHODS)
def test_nothing_stays_in_the_model(preset: str) -> None:
    """Another method on the same model finds all of it again, and a step draws from no generator but ours."""
    net = swapped()
    clean, state = net(ids()), torch.get_rng_state()
    run(make(preset, net, lr=0.0), 2)
    assert torch.equal(net(ids()), clean) and torch.equal(torch.get_rng_state(), state)
    run(methods.create("mezo", net, lr=0.1, floor_every=0), 1)
    assert all(not torch.equal(w, values(swapped())[n]) for n, w in values(net).items())
