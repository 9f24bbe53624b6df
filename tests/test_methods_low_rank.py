"""Methods along random factors, against the matrices of their formulas in float64: over dense weights and over int4."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_no_worse
from invariants import descends, resumes, same_in_parts
from test_methods_dense import NAMES, B, Net, evaluation, ids, noise, plain_net, run, seeds_of
from torch import Tensor, nn
from torch.func import functional_call

from zoact_kernels import methods, rng
from zoact_kernels.basis import recompress
from zoact_kernels.layers import perturbed, zo_layers
from zoact_kernels.methods import ZeroOrder
from zoact_kernels.swap import ZOConfig, swap
from zoact_kernels.trainables import Core, LowRank

FORMATS = ("dense", "int4")


def swapped(format: str = "dense", dtype: torch.dtype = torch.float32) -> Net:
    net = plain_net(dtype)
    group = None if format == "dense" else 8
    swap(net, ZOConfig(format=format, group_size=group, rank=0), where=["up", "down"], example=(ids(),))
    return net


def base(net: Net) -> dict[str, Tensor]:
    """The parameters in float64 as they are before anything is trained, low-bit ones decoded."""
    layers = {f"{name}.weight": layer for name, layer in zo_layers(net).items()}
    found = {}
    for name in NAMES:
        owner, _, key = name.rpartition(".")
        stored = layers[name].dequantize() if name in layers else getattr(net.get_submodule(owner), key)
        found[name] = stored.detach().double()
    return found


def factor(seed: int, name: str, rows: int, cols: int) -> Tensor:
    return rng.noise("normal", seed, zlib.crc32(name.encode()), rows, cols).double()


def lozo(optimizer: Any, theta: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """U V^T for matrices, V from the slow seed under `name#V`; dense normals for vectors."""
    slow, deltas = rng.seed_for(optimizer.seed, optimizer.iteration // optimizer.period), {}
    for name, w in theta.items():
        if w.dim() < 2:
            deltas[name] = noise("normal", seed, name, tuple(w.shape))
            continue
        N, K = w.shape
        deltas[name] = factor(seed, name, N, optimizer.rank) @ factor(slow, f"{name}#V", K, optimizer.rank).T
    return deltas


def orthonormal(seed: int, name: str, rows: int, cols: int) -> Tensor:
    q, r = torch.linalg.qr(factor(seed, name, rows, cols))
    return q * r.diagonal().sign()


def subzero(optimizer: Any, theta: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """sqrt(N K) / R U Z V^T for matrices, U and V the Q of normal matrices; dense normals for vectors."""
    slow, deltas = rng.seed_for(optimizer.seed, optimizer.iteration // optimizer.period), {}
    for name, w in theta.items():
        if w.dim() < 2:
            deltas[name] = noise("normal", seed, name, tuple(w.shape))
            continue
        (N, K), R = w.shape, optimizer.rank
        u, v = orthonormal(slow, f"{name}#U", N, R), orthonormal(slow, f"{name}#V", K, R)
        deltas[name] = math.sqrt(N * K) / R * u @ factor(seed, name, R, R) @ v.T
    return deltas


Delta = Callable[[Any, dict[str, Tensor], int], dict[str, Tensor]]
PRESETS: dict[str, tuple[str, Delta, dict[str, Any]]] = {
    "lozo": ("lozo", lozo, {"period": 2, "queries": 2}),
    "subzero": ("subzero", subzero, {"period": 2, "rank": 4, "queries": 2}),
    "subzero-one-sided": ("subzero", subzero, {"period": 4, "sides": "one-sided", "noise": "normal"}),
    "lozo-paper": ("lozo", lozo, {"period": 3, "rank": 3, "over_rank": True, "sides": "one-sided"}),
}


def make(preset: str, net: nn.Module, **changes: Any) -> tuple[Any, Delta]:
    method, delta, arguments = PRESETS[preset]
    return methods.create(method, net, **{"floor_every": 0, **arguments, **changes}), delta


def assert_groups_see(optimizer: Any, net: Net, theta: dict[str, Tensor], deltas: list[dict[str, Tensor]]) -> None:
    """Every row group of a forward equals a net at theta + sum_s sigmas[g, s] Delta_s, the clean one a net at theta."""

    def compare(y: Tensor, moved: dict[str, Tensor]) -> None:
        truth = functional_call(plain_net(torch.float64), moved, ids())
        plain = functional_call(plain_net(), {n: w.float() for n, w in moved.items()}, ids())
        assert_no_worse(y, plain, truth)

    table, seeds = optimizer._table, torch.tensor(seeds_of(optimizer))
    with torch.no_grad():
        with perturbed(net, seeds, table, optimizer.noise, leading=(optimizer.groups * B,)):
            y = net(ids().repeat(optimizer.groups, 1))
        for row, part in zip(table.double(), y.chunk(optimizer.groups), strict=True):
            compare(part, {n: w + sum(s * d[n] for s, d in zip(row, deltas, strict=True)) for n, w in theta.items()})
        compare(net(ids()), theta)
        assert (y.chunk(optimizer.groups)[-1] - net(ids())).abs().max() > 1e-3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_step_probes_and_moves_the_same_matrices(preset, format):
    """Over two renewals of V: every row group before the step, theta after it, refresh steps too (invariant 27)."""
    net = swapped(format)
    theta = base(net)
    first, rounded = dict(theta), {name: w.float() for name, w in theta.items()}  # rounded: the same in fp32
    optimizer, delta = make(preset, net, sigma=0.02, lr=5e-3, seed=3)
    gain = 1 / optimizer.rank if getattr(optimizer, "over_rank", False) else 1.0
    for _ in range(6):
        deltas = [delta(optimizer, theta, seed) for seed in seeds_of(optimizer)]
        optimizer._prepare()
        assert_groups_see(optimizer, net, theta, deltas)
        (result,) = run(optimizer, 1)
        assert not result.skipped
        for weight, d in zip(result.weights.double(), deltas, strict=True):
            for name, w in theta.items():
                factor = 5e-3 * float(weight) * (gain if w.dim() == 2 else 1.0)
                theta[name], rounded[name] = w - factor * d[name], rounded[name] - factor * d[name].float()
    for trainable in optimizer.trainables.values():
        name, whole = trainable.parameter, trainable.whole()
        assert (theta[name] - first[name]).abs().max() > 1e-3
        if whole is not None:
            assert_no_worse(whole, rounded[name], theta[name], name)
    if format == "int4":
        for layer_name, layer in zo_layers(net).items():
            name = f"{layer_name}.weight"
            assert torch.equal(layer.dequantize(), first[name].float()), "the base moved"
            assert_no_worse(layer.delta(), rounded[name] - first[name].float(), theta[name] - first[name], name)


def test_momentum_follows_v():
    """S <- beta S + (1 - beta) d U, W <- W - lr S V^T / R, S <- S (V_old^T V_new) / K at a renewal, written out."""
    net, R, lr = swapped(), 2, 5e-3
    theta = base(net)
    rounded = {name: w.float() for name, w in theta.items()}
    optimizer = methods.create("lozo-m", net, period=2, lr=lr, seed=3, floor_every=0)
    assert optimizer.over_rank and optimizer.rank == R
    S: dict[str, Tensor] = {n: torch.zeros(w.shape[0], R if w.dim() == 2 else 1).double() for n, w in theta.items()}
    for step in range(5):
        V = {n: [factor(rng.seed_for(3, epoch), f"{n}#V", w.shape[1], R) for epoch in (step // 2 - 1, step // 2) if
                 epoch >= 0] for n, w in theta.items() if w.dim() == 2}  # fmt: skip
        (seed,) = seeds_of(optimizer)
        (result,) = run(optimizer, 1)
        d = float(result.weights)
        for name, w in theta.items():
            if w.dim() == 2 and step % 2 == 0 and step:
                S[name] = S[name] @ V[name][0].T @ V[name][1] / w.shape[1]
            u = factor(seed, name, w.shape[0], S[name].shape[1])
            S[name] = 0.9 * S[name] + 0.1 * d * u
            step_of = lr * (S[name] @ V[name][-1].T / R if w.dim() == 2 else S[name][:, 0])
            theta[name], rounded[name] = w - step_of, rounded[name] - step_of.float()
    for trainable in optimizer.trainables.values():
        name = trainable.parameter
        assert_no_worse(trainable.whole(), rounded[name], theta[name], name)


def test_turning_a_factor_is_nearly_least_squares():
    """S (V_old^T V_new) / K against the least squares solution of S_new V_new^T = S V_old^T: equal to O(1/sqrt(K))."""
    K = 4096
    net = nn.Sequential(nn.Linear(K, 3, bias=False))
    swap(net, ZOConfig(format="dense", rank=0), example=(torch.zeros(2, K),))
    trainable = LowRank.of_layer("0", net[0], 4, 4)
    trainable.renew(torch.tensor([1]))
    old = trainable.basis.double()
    turn, _ = trainable.renew(torch.tensor([2]))
    new = trainable.basis.double()
    exact = torch.linalg.lstsq(new, old).solution.T  # [R_old, R_new]
    assert (turn - exact).norm() < 4 * exact.norm() * math.sqrt(4 / K)
    assert turn.norm() < 0.5 and (turn.norm() * K - exact.norm()).abs() > 1  # without 1/K it is another thing


@pytest.mark.parametrize("over_rank", [False, True])
def test_mean_step(over_rank):
    """On a linear loss <G, W> the mean step is lr R G, with 1/R it is lr G, within 4 standard errors."""
    torch.manual_seed(0)
    N, K, R, blocks, steps = 5, 6, 2, 16, 25
    G = torch.randn(N, K).double()
    net = nn.Sequential(nn.Linear(K, N, bias=False))
    swap(net, ZOConfig(format="dense", rank=0, layout="row"), example=(torch.zeros(2, K),))
    optimizer = methods.create(
        "lozo", net, rank=R, period=1, queries=16, lr=1.0, over_rank=over_rank, sigma=1e-2, floor_every=0, seed=1
    )
    x, means = torch.eye(K), []
    (trainable,) = optimizer.trainables.values()

    def value(groups: int) -> Tensor:
        y = net(x.repeat(groups, 1)).double().view(groups, K, N)
        return (y * G.T).sum((1, 2), keepdim=True)[:, :, 0]

    for _ in range(blocks):
        with torch.no_grad():
            trainable.value.zero_()
            net[0].weight.zero_()
        for _ in range(steps):
            optimizer.step_on([value])
        means.append(-trainable.whole().double() / steps)
    found = torch.stack(means)
    deviation = (found.mean(0) - G * (1 if over_rank else R)).abs() / (found.std(0) / math.sqrt(blocks))
    assert float(deviation.max()) < 5 and float(deviation.square().mean()) < 2
    assert float((G.abs() / (found.std(0) / math.sqrt(blocks))).max()) > 6  # R and 1 are told apart


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", [*PRESETS, "lozo-m"])
def test_resume_and_replay_after_every_step(preset, format):
    """Bitwise, on both sides of a renewal of V."""
    method, _, arguments = {**PRESETS, "lozo-m": ("lozo-m", lozo, {"period": 2})}[preset]

    def fresh(**changes: Any) -> ZeroOrder:
        given = {"floor_every": 0, "lr": 5e-3, "seed": 9, **arguments, **changes}
        return methods.create(method, swapped(format), **given)

    resumes(fresh, run, 5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", PRESETS)
def test_step_descends_and_flipped_ascends(preset, format):
    def fresh() -> tuple[ZeroOrder, methods.Evaluation]:
        net = swapped(format)
        return make(preset, net, lr=5e-4 if "subzero" in preset else 2e-4, queries=4)[0], evaluation(net, ids())

    descends(fresh)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", PRESETS)
def test_sequential_and_micro_batches_are_the_same_step(preset, format):
    optimizer = same_in_parts(lambda **changes: make(preset, swapped(format), lr=5e-3, **changes)[0], run, 3)
    with pytest.raises(RuntimeError, match="make the optimizer after"):  # of a copy
        run(copy.deepcopy(optimizer), 1)


@pytest.mark.parametrize("format", FORMATS)
def test_lost_losses_skip(format):
    net = swapped(format)
    optimizer, _ = make("lozo", net, lr=5e-3)
    run(optimizer, 1)
    before = optimizer.state_dict()
    assert optimizer.step_on([lambda groups: torch.full((groups, B), math.nan)]).skipped
    after = optimizer.state_dict()
    assert all(torch.equal(a, after[key]) for key, a in before.items() if key not in ("iteration", "floor"))


def test_directions_of_subzero_are_as_long_as_dense_ones():
    """U^T U = V^T V = I to fp32; the mean of |Delta|^2 over draws of Z is N K within 1 %; the signs of U are fixed."""
    net = swapped()
    optimizer = methods.create("subzero", net, rank=6, seed=5, floor_every=0)
    optimizer._prepare()
    for trainable in optimizer.trainables.values():
        if not isinstance(trainable, Core):
            continue
        N, K = trainable.coeff.shape[0], trainable.basis.shape[0]
        for q, tag in ((trainable.left, "U"), (trainable.basis, "V")):
            assert_no_worse(q.T @ q, torch.eye(6), torch.eye(6).double())
            truth = orthonormal(rng.seed_for(5, 0), f"{trainable.parameter}#{tag}", len(q), 6)
            assert_no_worse(q, truth.float(), truth)
        z = rng.noise("normal", 1, 7, 3000 * 6, 6).view(3000, 6, 6)
        squares = (trainable.scale * trainable.left @ z @ trainable.basis.T).square().sum((1, 2))
        assert float(squares.mean()) == pytest.approx(N * K, rel=0.01)  # a standard deviation is 0.43 %


def test_recompression_keeps_what_it_can_and_tells_the_rest():
    torch.manual_seed(1)
    a, c = torch.randn(40, 6), torch.randn(30, 6)
    basis, coeff, error = recompress(a, c, 9)
    assert basis.shape == (40, 9) and error < 1e-6
    assert_no_worse(coeff @ basis.T, c @ a.T, c.double() @ a.double().T)
    basis, coeff, error = recompress(a, c, 3)
    u, s, v = torch.linalg.svd((c @ a.T).double())
    best = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    assert_no_worse(coeff @ basis.T, best.float(), best)
    assert error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-5)
    assert_no_worse(basis.T @ basis, torch.eye(3), torch.eye(3).double())
    assert recompress(a * 0, c, 3)[2] == 0.0
    net = swapped("int4")
    optimizer = methods.create("lozo", net, period=1, delta_rank=2, lr=5e-3, floor_every=0)
    notes = [result.note for result in run(optimizer, 4)]
    assert not notes[0] and "re-compressed to rank 2, relative error up to" in notes[3]


def test_a_delta_learned_before_is_kept():
    """Coefficients of an earlier method go into W, or into the delta of a frozen one."""
    for format in FORMATS:
        net, fresh = plain_net(), plain_net()
        for each in (net, fresh):
            config = ZOConfig(format=format, group_size=None if format == "dense" else 8, rank=1)
            swap(each, config, where=["up"], example=(ids(),))
        a, c = torch.randn(23, 3), torch.randn(31, 3)
        net.up.set_basis(a, c)
        clean = net.up.dequantize()
        methods.create("lozo", net)
        optimizer = methods.create("lozo", net, delta_rank=2)  # twice, as a run does
        assert format == "dense" or net.up.base_basis.shape == (23, 3)
        learned = net.up.dequantize() + net.up.delta()
        methods.create("lozo", fresh, delta_rank=2).load_state_dict(optimizer.state_dict())  # a resumed run
        assert torch.equal(fresh.up.dequantize() + fresh.up.delta(), learned)
        assert_no_worse(learned, clean + c @ a.T, clean.double() + c.double() @ a.double().T)


def test_sixteen_bit_weights_are_written_once_a_period():
    """What 20 steps add, each far below an ulp of W, is there after the fold: rounded once, without bias."""
    net = swapped(dtype=torch.bfloat16)
    optimizer, _ = make("lozo", net, period=20, lr=1.0, queries=1)
    before, small = net.up.weight.clone(), 2.0**-17
    wanted = torch.zeros(31, 23).double()
    for step in range(21):
        deltas = lozo(optimizer, base(net), step)
        optimizer._prepare()
        if step == 20:
            break
        assert torch.equal(net.up.weight, before)
        optimizer.rule.update(torch.tensor([step]), torch.tensor([small]), lr=1.0)
        optimizer.iteration += 1
        wanted -= small * deltas["up.weight"]
    moved = net.up.weight.double() - before.double()
    ulp = 2.0 ** (before.double().abs().log2().floor() - 7)
    assert ((moved - wanted).abs() <= 2 * ulp).all() and (moved != 0).any()
    assert float((moved * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 4, "delta_rank": 3}, "delta_rank 3"),
        ({"period": 0}, "period is 0"),
        ({"weight_decay": 0.1}, "can't decay"),
        ({"optimizer": "adam"}, "with lozo it may be sgd, sign, momentum, ema"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        methods.create("lozo", swapped(), **arguments)


def test_a_rank_larger_than_a_layer():
    """SubZero takes what there is, for LOZO it is an error: its U V^T would be another distribution."""
    net = swapped()
    optimizer = methods.create("subzero", net, rank=25, delta_rank=25, floor_every=0)
    ranks = {name: t.value.shape[0] for name, t in optimizer.trainables.items() if isinstance(t, Core)}
    assert ranks == {"table.weight": 23, "up": 23, "side.weight": 25, "down": 23}
    assert not run(optimizer, 1)[0].skipped
    with pytest.raises(ValueError, match="rank is 25; up.weight is 31 x 23"):
        methods.create("lozo", swapped(), rank=25, delta_rank=25)
