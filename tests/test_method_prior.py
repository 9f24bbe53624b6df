"""MeZO-GV and MeZO-Greedy: what a pool ranks, and directions rebuilt from exactly the noises that were probed.

Every row group's weights and every update are written out in float64 from the words of the generator: over the dense
weights of `test_methods_dense.Net`, and over C of the INT4 layers of `test_methods.Toy`.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import test_methods as low
import test_methods_dense as dense
import torch
from close import assert_no_worse
from torch import Tensor
from torch.func import functional_call

from zoact_kernels import methods, rng
from zoact_kernels.layers import zo_layers
from zoact_kernels.methods import ZeroOrder

METHODS = ["mezo-gv", "mezo-gv-history", "mezo-greedy", "zo-act-gv", "zo-act-greedy"]
B = {True: dense.B, False: low.B}
DTYPES = (torch.float32, torch.float64)


def over_weights(method: str) -> bool:
    return methods.METHODS[method].dense


def make(method: str, **arguments: Any) -> ZeroOrder:
    model = dense.swapped() if over_weights(method) else low.toy()
    return methods.create(method, model, **({"optimizer": "sgd"} | arguments))


def inputs(method: str, seed: int = 0) -> Tensor:
    return dense.ids(seed) if over_weights(method) else low.data(seed=seed)[0]


def losses(method: str, y: Tensor, seed: int = 0) -> Tensor:
    """Of one group, example by example."""
    if over_weights(method):
        return torch.stack([row[-1].double().log_softmax(-1)[7].neg() for row in y])
    target = low.data(seed=seed)[1]
    return torch.stack([(row - t).double().square().sum() for row, t in zip(y, target, strict=True)])


def evaluation(optimizer: ZeroOrder, seed: int = 0, seen: list[Tensor] | None = None) -> methods.Evaluation:
    def evaluate(groups: int) -> Tensor:
        x = inputs(optimizer.name, seed)
        parts = optimizer.model(x.repeat(groups, *[1] * (x.dim() - 1))).chunk(groups)
        if seen is not None:
            seen.extend(parts)
        return torch.stack([losses(optimizer.name, y, seed) for y in parts])

    return evaluate


def run(optimizer: ZeroOrder, steps: int) -> list[methods.StepResult]:
    return [optimizer.step_on([evaluation(optimizer, optimizer.iteration)]) for _ in range(steps)]


def values(optimizer: ZeroOrder) -> dict[str, Tensor]:
    return {name: t.value.detach().clone() for name, t in optimizer.trainables.items()}


def noise(optimizer: ZeroOrder, seed: int) -> dict[str, Tensor]:
    """Z of every trainable, float64, in the shape of its value."""
    found = {}
    for name, value in values(optimizer).items():
        words = zlib.crc32((name if over_weights(optimizer.name) else f"{name}.weight").encode())
        shape = tuple(value.shape) if value.shape[1] > 1 else (1, value.shape[0])
        found[name] = rng.noise("normal", seed, words, *shape).double().view(value.shape)
    return found


def output(optimizer: ZeroOrder, at: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """What a plain net computes whose trainables have the values `at`."""
    x = inputs(optimizer.name)
    if over_weights(optimizer.name):
        theta = {n: at[n].view(w.shape).to(dtype) for n, w in dense.values(optimizer.model).items()}
        return functional_call(dense.plain_net(dtype), theta, x)
    net, layers = low.Toy().to(dtype), zo_layers(optimizer.model)
    theta = {f"{n}.weight": (a.dequantize().double() + at[n].double() @ a.basis.double().T).to(dtype)
             for n, a in layers.items()}  # fmt: skip
    return functional_call(net, theta | {"up.bias": layers["up"].bias.to(dtype)}, x.to(dtype))


def plus(at: dict[str, Tensor], scalars: list[float], noises: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: a.double() + sum(s * z[n] for s, z in zip(scalars, noises, strict=True)) for n, a in at.items()}


def mix(method: str, p: int) -> list[float]:
    """Weights of the ranked noises in v."""
    if "greedy" in method:
        return [1.0] + [0.0] * (p - 1)
    return [2 / p] * (p // 2) + [-2 / p] * (p // 2)


# --- probes and update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_step(method, p):
    """The pool sees theta + sigma Delta_k, the pair theta +- sigma v, and theta moves along d v: invariant 31."""
    sigma, lr = 0.05, 0.01
    optimizer = make(method, queries=p, sigma=sigma, lr=lr, seed=3)
    for t in range(2):
        seeds = [rng.seed_for(3, t, query) for query in range(p)]
        if method == "mezo-gv-history" and t:
            seeds[-1] = int(result.seeds[0])  # noqa: F821  (of the step before)
        theta, seen = values(optimizer), []
        result = optimizer.step_on([evaluation(optimizer, 0, seen)])
        assert not result.skipped and len(seen) == p + 2 and result.losses.shape == (p + 2, B[over_weights(method)])

        pool = [float(losses(method, y).mean()) for y in seen[:p]]
        ranked = sorted(range(p), key=lambda k: pool[k])
        assert result.seeds.tolist() == [seeds[k] for k in ranked]
        noises, scalars = [noise(optimizer, seeds[k]) for k in range(p)], mix(method, p)
        points = [plus(theta, [sigma], [z]) for z in noises]
        order = [noises[k] for k in ranked]
        points += [plus(theta, [sign * sigma * s for s in scalars], order) for sign in (1, -1)]
        for y, at in zip(seen, points, strict=True):
            assert_no_worse(y, output(optimizer, at, torch.float32), output(optimizer, at, torch.float64), method)

        told = torch.stack([losses(method, y) for y in [*(seen[k] for k in ranked), *seen[p:]]])
        assert torch.equal(result.losses, told)
        d = float((told[p] - told[p + 1]).mean()) / (2 * sigma)
        assert result.weights.tolist() == pytest.approx([d * s for s in scalars], rel=1e-6)
        assert result.signal == pytest.approx(2 * sigma * abs(d)) and math.isnan(result.floor)
        after = values(optimizer)
        for name, value in theta.items():
            paths = [value.to(e) - lr * sum(w.to(e) * z[name].to(e) for w, z in zip(result.weights, order, strict=True))
                     for e in DTYPES]  # fmt: skip
            assert_no_worse(after[name], *paths, name)
            v, moved = plus({name: 0 * value}, scalars, order)[name], (after[name] - value).double()
            cosine = float((v * moved).sum() / v.norm() / moved.norm())
            assert cosine * -math.copysign(1, d) > 1 - 1e-5, name


def test_the_ranking_is_no_more_than_a_sign_at_two():
    """Ranked the other way round, v is -v and d v is the same: the step is MeZO's along Z_1 - Z_2, bit for bit."""
    a, b = (make("mezo-gv", lr=0.01, seed=5) for _ in range(2))
    b._mix, b._pair = -b._mix, b._pair._replace(table=-b._pair.table)
    run(a, 3), run(b, 3)
    assert all(torch.equal(value, values(b)[name]) for name, value in values(a).items())


@pytest.mark.parametrize("p", [2, 4, 6])
def test_length_of_a_guided_direction(p):
    """E|v|^2 = 4/p Dim, within 4 standard errors: the radius is sqrt(2) larger than sigma at p = 2."""
    optimizer = make("mezo-gv", queries=p)
    z = rng.noise("normal", 1, 9, 400 * p, 64).double().view(400, p, 64)
    squared = torch.einsum("p,npd->nd", optimizer._mix, z).square().sum(1)
    assert abs(float(squared.mean()) - 4 / p * 64) < 4 * float(squared.std()) / 20


def test_a_larger_pool_points_downhill():
    """On a linear loss the guided v of p = 4 has a mean along -gradient; MeZO's direction has none (p = 2: a sign)."""
    optimizer = make("zo-act-gv", queries=4)
    generator = torch.Generator().manual_seed(2)
    slopes = torch.randn(4000, 4, generator=generator, dtype=torch.float64).sort(dim=1).values  # <gradient, Z_k>
    along = slopes @ optimizer._mix
    best = float((along**2).mean())  # of a Z that no pool has ranked, and as long: 4/p = 1
    assert float(along.mean()) < -1 and best > 1.5


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_other_ways_of_the_same_step(method):
    """Sequential, in micro-batches and through a closure: every bit the same."""
    results = []
    for way in ("stacked", "sequential", "parts", "closure"):
        optimizer = make(method, queries=4, lr=0.05, mode="sequential" if way == "sequential" else "stacked")
        steps = []
        for _ in range(2):
            whole = evaluation(optimizer, optimizer.iteration)
            if way == "parts":
                cut = [(0, 1), (1, B[over_weights(method)])]
                steps.append(optimizer.step_on([part(optimizer, optimizer.iteration, *ends) for ends in cut]))
            elif way == "closure":
                steps.append(optimizer.step(lambda whole=whole, groups=optimizer.groups: whole(groups).flatten()))
            else:
                steps.append(optimizer.step_on([whole]))
        results.append((steps, values(optimizer)))
    for steps, after in results[1:]:
        for a, b in zip(steps, results[0][0], strict=True):
            assert torch.equal(a.losses, b.losses) and torch.equal(a.weights, b.weights)
            assert torch.equal(a.seeds, b.seeds)
        assert all(torch.equal(w, results[0][1][name]) for name, w in after.items())


def part(optimizer: ZeroOrder, seed: int, first: int, last: int) -> methods.Evaluation:
    def evaluate(groups: int) -> Tensor:
        x = inputs(optimizer.name, seed)[first:last]
        rows = optimizer.model(x.repeat(groups, *[1] * (x.dim() - 1))).chunk(groups)
        whole = torch.zeros(B[over_weights(optimizer.name)], *rows[0].shape[1:])
        return torch.stack(
            [losses(optimizer.name, whole.index_copy(0, torch.arange(first, last), y), seed)[first:last] for y in rows]
        )

    return evaluate


@pytest.mark.parametrize("method", METHODS)
def test_resume_and_replay_after_every_step(method):
    """The best seed of the past is in the state, and in the log: the first of a step's seeds."""
    arguments: dict[str, Any] = {"lr": 0.05, "seed": 9}
    straight = make(method, **arguments)
    states, log = [straight.state_dict()], []
    for t in range(5):
        lost = [lambda groups: torch.full((groups, B[over_weights(method)]), math.nan)]
        log.append(straight.step_on(lost) if t == 2 else run(straight, 1)[0])
        states.append(straight.state_dict())
    assert [row.skipped for row in log] == [False, False, True, False, False]
    for after in range(6):
        for way in ("state", "log"):
            resumed = make(method, **{**arguments, "seed": 0 if way == "state" else 9})
            if way == "state":
                resumed.load_state_dict(states[after])
            else:
                resumed.replay(log[:after])
            for row in log[after:]:
                again = run(resumed, 1)[0]
                if row.skipped:
                    break
                assert torch.equal(again.seeds, row.seeds) and torch.equal(again.losses, row.losses)
            else:
                assert all(torch.equal(a, states[5][key]) for key, a in resumed.state_dict().items() if key != "floor")


def test_history_keeps_the_best_seed():
    optimizer = make("mezo-gv-history", queries=4, lr=0.05, seed=7)
    best = None
    for t in range(5):
        (result,) = run(optimizer, 1) if t != 2 else [
            optimizer.step_on([lambda groups: torch.full((groups, dense.B), math.nan)])]  # fmt: skip
        new = [rng.seed_for(7, t, query) for query in range(4)]
        pool = new if best is None else [*new[:3], best]
        assert sorted(result.seeds.tolist()) == sorted(pool)
        means = result.losses[:4].mean(1)
        if not result.skipped:
            assert float(means[0]) == float(means.min())
            best = int(result.seeds[0])
    assert int(optimizer.own_state()["best"]) == best and "method/best" in optimizer.state_dict()


@pytest.mark.parametrize("where", ["pool", "pair"])
@pytest.mark.parametrize("method", METHODS)
def test_lost_losses_skip(method, where):
    optimizer = make(method, lr=0.1)
    run(optimizer, 1)
    before, own, calls = values(optimizer), optimizer.own_state(), 0
    own = {key: tensor.clone() for key, tensor in own.items()}

    def poisoned(groups: int) -> Tensor:
        nonlocal calls
        calls += 1
        table = evaluation(optimizer)(groups)
        if calls == (1 if where == "pool" else 2):
            table[0, 1] = math.nan
        return table

    result = optimizer.step_on([poisoned])
    assert calls == 2 and result.skipped and "not finite" in result.reason
    assert all(torch.equal(w, before[name]) for name, w in values(optimizer).items())
    assert all(torch.equal(tensor, own[key]) for key, tensor in optimizer.own_state().items())
    assert not run(optimizer, 1)[0].skipped


@pytest.mark.parametrize("method", METHODS)
def test_steps_descend_and_flipped_ascend(method):
    for sign in (1, -1):
        optimizer = make(method, queries=4, lr=5e-4 if over_weights(method) else 1e-2)
        optimizer.lr *= sign
        before = float(losses(method, optimizer.model(inputs(method))).mean().detach())
        for _ in range(20):
            optimizer.step_on([evaluation(optimizer)])
        after = float(losses(method, optimizer.model(inputs(method))).mean().detach())
        assert after < 0.9 * before if sign > 0 else after > 1.1 * before


def test_probes_leave_no_trace():
    for method in METHODS:
        optimizer = make(method, lr=0.0)
        before, state = values(optimizer), torch.get_rng_state()
        run(optimizer, 2)
        assert all(torch.equal(w, before[name]) for name, w in values(optimizer).items())
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": 3}, "queries is 3; a pool has an even number"),
        ({"queries": 0}, "queries is 0; a pool"),
        ({"sides": "one-sided"}, "sides is 'one-sided'; here it may be two-sided"),
        ({"scaling": "std"}, "scaling is 'std'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make("zo-act-gv", **arguments)
    with pytest.raises(ValueError, match="up is int4, frozen"):
        net = dense.plain_net()
        dense.swap(net, dense.ZOConfig(format="int4", group_size=8, rank=0), where=["up"], example=(dense.ids(),))
        methods.create("mezo-gv", net)
