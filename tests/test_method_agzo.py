"""AGZO against the formulas of its sheet in float64: what every row group sees, where a step goes, whose A it is."""

from __future__ import annotations

import contextlib
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_no_worse
from invariants import descends, resumes
from safetensors.torch import load_file
from test_cli import options, zoact
from test_methods_dense import B, Net, evaluation, ids, plain_net, run, seeds_of
from test_methods_low_rank import base, swapped
from tiny_model import make_model_dir, write_examples
from torch import Tensor, nn
from torch.func import functional_call

from zoact_kernels import methods, rng
from zoact_kernels.basis import power_basis
from zoact_kernels.layers import zo_layers
from zoact_kernels.methods import AGZO, ZOAct
from zoact_kernels.runlog import RunLog
from zoact_kernels.swap import ZOConfig, swap

FORMATS = ("dense", "int4")
PRESETS: dict[str, dict[str, Any]] = {
    "one-sided": {"queries": 2},
    "two-sided": {"sides": "two-sided", "rank": 2},
    "leave-one-out": {"sides": "leave-one-out", "queries": 3, "noise": "rademacher"},
}
Theta = dict[str, Tensor]


def make(preset: str, net: nn.Module, **changes: Any) -> AGZO:
    return methods.create("agzo", net, **{"floor_every": 0, "lr": 1e-3, **PRESETS[preset], **changes})


def noise(kind: str, seed: int, name: str, rows: int, cols: int) -> Tensor:
    return rng.noise(kind, seed, zlib.crc32(name.encode()), rows, cols).double()


def sheet_basis(h: Tensor, seed: int, leader: str, rank: int, iterations: int = 3) -> Tensor:
    """Q = qr(H^T Omega), three times Q = qr(H^T (H Q)), in the dtype of H [tokens, K]."""
    q = unique_q(h.T @ noise("normal", seed, f"{leader}.weight#A", len(h), rank).to(h))
    for _ in range(iterations):
        q = unique_q(h.T @ (h @ q))
    return q


def unique_q(w: Tensor) -> Tensor:
    q, r = torch.linalg.qr(w)
    return q * r.diagonal().sign()


def inputs_of(theta: Theta, x: Tensor) -> Theta:
    """What the three linears of `Net` are fed by a clean forward at theta, rows [B T, K]."""
    dtype, seen = theta["up.weight"].dtype, {}
    net = plain_net(dtype)
    for name in ("up", "side", "down"):

        def keep(module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            seen[f"{name}.weight"] = args[0].flatten(0, 1)

        net.get_submodule(name).register_forward_pre_hook(keep)
    functional_call(net, theta, x)
    return seen


def directions(optimizer: AGZO, theta: Theta, x: Tensor) -> list[Theta]:
    """Delta of every seed: Z A^T of the linears, dense noise of the rest; in the dtype of theta."""
    seeds, kind, found = seeds_of(optimizer), optimizer.noise, []
    bases = {
        name: sheet_basis(h, seeds[0], name.removesuffix(".weight"), optimizer.rank)
        for name, h in inputs_of(theta, x).items()
    }
    for seed in seeds:
        delta = {}
        for name, w in theta.items():
            if name in bases:
                delta[name] = noise(kind, seed, name, len(w), optimizer.rank).to(w) @ bases[name].T
            else:
                delta[name] = noise(kind, seed, name, w.shape[0] if w.dim() > 1 else 1, w.shape[-1]).view(w.shape).to(w)
        found.append(delta)
    return found


def trained(optimizer: AGZO, net: Net) -> Theta:
    """theta as it is now: written weights, and low-bit ones with their deltas."""
    layers = {f"{name}.weight": layer for name, layer in zo_layers(net).items()}
    found = {}
    for t in optimizer.trainables.values():
        whole = t.whole()
        found[t.parameter] = layers[t.parameter].dequantize() + layers[t.parameter].delta() if whole is None else whole
    return found


# --- probe and update -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", methods.MODES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_step_probes_and_moves_the_same_matrices(preset, mode, format):
    """Every row group of six steps, and theta after them; deltas are compressed twice, without loss at this rank."""
    net = swapped(format)
    theta = base(net)
    first, rounded = dict(theta), {name: w.float() for name, w in theta.items()}  # rounded: the same in fp32
    optimizer = make(preset, net, mode=mode, sigma=0.02, lr=2e-4, seed=3, window=2, delta_rank=12)
    table = optimizer._table.double()
    assert not table[0].any() and len(table) == {"one-sided": 3, "two-sided": 3, "leave-one-out": 4}[preset]
    for _ in range(6):
        x, outputs = ids(optimizer.iteration), []

        def evaluate(groups: int, x: Tensor = x, outputs: list[Tensor] = outputs) -> Tensor:
            outputs.append(net(x.repeat(groups, 1)))
            return torch.stack([row[-1].double().log_softmax(-1)[7].neg() for row in outputs[-1]]).view(groups, -1)

        deltas, plain_deltas = (directions(optimizer, now, x) for now in (theta, rounded))
        result = optimizer.step_on([evaluate])
        assert not result.skipped and not result.note
        seen = torch.cat(outputs).chunk(len(table))
        for row, y in zip(table, seen, strict=True):

            def moved(theta: Theta, deltas: list[Theta], row: Tensor = row) -> Theta:
                parts = {n: [float(s) * d[n] for s, d in zip(row, deltas, strict=True)] for n in theta}
                return {n: w + sum(parts[n]) for n, w in theta.items()}

            truth = functional_call(plain_net(torch.float64), moved(theta, deltas), x)
            plain = functional_call(plain_net(), moved(rounded, plain_deltas), x)
            assert_no_worse(y, plain, truth, f"group at {row.tolist()}")
            assert not row.any() or (y - seen[0]).abs().max() > 1e-3  # it is felt
        for s, weight in enumerate(result.weights.double()):
            for n in theta:
                theta[n] = theta[n] - 2e-4 * float(weight) * deltas[s][n]
                rounded[n] = rounded[n] - 2e-4 * float(weight) * plain_deltas[s][n]
    for name, w in trained(optimizer, net).items():
        assert (theta[name] - first[name]).abs().max() > 1e-4
        assert_no_worse(w, rounded[name], theta[name], name)
    if format == "int4":
        for name, layer in zo_layers(net).items():
            assert torch.equal(layer.dequantize(), first[f"{name}.weight"].float()), "the base moved"


class Tower(nn.Module):
    """Swapped linears alone, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(23, 31, bias=False), nn.Linear(31, 31, bias=False), nn.Linear(31, 7)
        self.down.bias = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        return self.down(torch.tanh(self.mid(h)) + self.mid(h))


def tower(rank: int = 0) -> Tower:
    torch.manual_seed(2)
    net = Tower().eval().requires_grad_(False)
    swap(net, ZOConfig(format="dense", rank=rank, layout="row"), example=(torch.zeros(2, 23),))
    return net


@pytest.mark.parametrize("rank", [1, 3])
def test_two_sided_is_zo_act_with_a_fresh_basis(rank):
    """ZO-Act, q = 1, SGD, A taken from each step's clean forward, C folded into W after it: the same losses and
    weights, bit for bit, and the same W (invariant 22)."""
    ours, theirs = tower(), tower(rank)
    agzo = methods.create("agzo", ours, sides="two-sided", rank=rank, sigma=1e-2, lr=1e-2, floor_every=0)
    layers = zo_layers(theirs)
    for step in range(4):
        x = torch.randn(B, 5, 23, generator=torch.Generator().manual_seed(step))

        def evaluate(net: nn.Module, x: Tensor = x) -> methods.Evaluation:
            return lambda groups: net(x.repeat(groups, 1, 1)).double().square().sum((1, 2)).view(groups, -1)

        seen: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, layer in layers.items():
                layer.set_basis(torch.zeros(layer.in_features, rank))

                def first_input(module: nn.Module, args: tuple[Tensor], name: str = name, seen: Theta = seen) -> None:
                    seen.setdefault(name, args[0].flatten(0, 1))

                stack.callback(layer.register_forward_pre_hook(first_input).remove)
            theirs(x)
        seed = rng.seed_for(0, step)
        for name, layer in layers.items():
            start = noise("normal", seed, f"{name}.weight#A", 5 * B, rank).float()
            layer.set_basis(power_basis(seen[name], start, 3))
        zo_act = ZOAct(theirs, optimizer="sgd", sigma=1e-2, lr=1e-2, floor_every=0)
        zo_act.iteration = step
        a, b = agzo.step_on([evaluate(ours)]), zo_act.step_on([evaluate(theirs)])
        assert a.losses.shape == (2, B) and torch.equal(a.losses, b.losses) and torch.equal(a.weights, b.weights)
        for name, layer in zo_layers(ours).items():
            other = layers[name]
            w, c, basis = (t.detach().double() for t in (other.weight, other.coeff, other.basis))
            assert_no_worse(layer.weight, other.weight + other.coeff.detach() @ other.basis.T, w + c @ basis.T, name)
            other.weight.copy_(layer.weight)  # C is folded, in the bits of ours


@pytest.mark.parametrize("format", FORMATS)
def test_step_descends_and_flipped_ascends(format):
    def fresh() -> tuple[AGZO, methods.Evaluation]:
        net = swapped(format)
        return make("one-sided", net, lr=1e-3, queries=4), evaluation(net, ids())

    descends(fresh)


# --- where a step goes ------------------------------------------------------------------------------------------------


def test_compression_tells_what_it_loses():
    """The note has the relative error of the worst layer; a delta's columns are exact until then."""
    net = swapped("int4")
    optimizer = make("two-sided", net, rank=1, window=3, delta_rank=2, lr=1e-3)
    layers, told = zo_layers(net), []
    for step in range(8):
        before = {name: layer.delta().double() for name, layer in layers.items()}
        optimizer.refresh()  # what a step begins with, at once: it does nothing twice
        lost = [
            float((layer.delta().double() - before[name]).norm() / before[name].norm()) if step else 0.0
            for name, layer in layers.items()
        ]
        note = run(optimizer, 1)[0].note
        told.append(bool(note))
        assert (max(lost) > 1e-3) == bool(note) == (step in (3, 6))
        if note:
            assert note == f"deltas re-compressed to rank 2, relative error up to {max(lost):.1e}"
    assert {layer.base_basis.shape[1] for layer in layers.values()} == {5}


def test_sixteen_bit_weights_are_rounded_stochastically():
    """Steps far below an ulp of W arrive in the mean; to nearest, none would."""
    net = swapped(dtype=torch.bfloat16)
    optimizer = make("one-sided", net, queries=1)
    trainable = optimizer.trainables["up"]
    before, size, wanted = net.up.weight.clone(), 2.0**-14, torch.zeros(31, 23).double()
    basis = torch.linalg.qr(torch.randn(23, 1)).Q
    trainable.point(basis)
    for step in range(40):
        optimizer.rule.update(torch.tensor([step]), torch.tensor([size]), lr=1.0)
        wanted -= size * noise("normal", step, "up.weight", 31, 1) @ basis.double().T
    moved = net.up.weight.double() - before.double()
    assert net.up.weight.dtype == torch.bfloat16 and (moved == 0).any() and (moved != 0).any()
    assert float((moved * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", PRESETS)
def test_resume_after_every_step(preset, format):
    """Bitwise, across two windows, by evaluating: a replay is declined."""

    def fresh(**changes: Any) -> AGZO:
        return make(preset, swapped(format), **{"seed": 9, "window": 2, "delta_rank": 3, **changes})

    resumes(fresh, run, 5, replays=False)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", PRESETS)
def test_sequential_is_the_same_step(preset, format):
    """And steps on which the rounding floor is measured are the same as others."""
    results = []
    for changes in ({}, {"mode": "sequential"}, {"floor_every": 1}):
        optimizer = make(preset, swapped(format), window=2, delta_rank=3, **changes)
        results.append((run(optimizer, 3), optimizer.state_dict()))
    for steps, state in results[1:]:
        for a, b in zip(steps, results[0][0], strict=True):
            assert torch.equal(a.losses, b.losses) and torch.equal(a.weights, b.weights)
        assert all(torch.equal(tensor, results[0][1][key]) for key, tensor in state.items() if key != "floor")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("where", ["loss", "clean loss", "activations"])
def test_lost_losses_skip(where, format):
    """NaN in a loss, in that of the group which is there for A alone, or in what A is made of: no bit changes."""
    net = swapped(format)
    optimizer = make("two-sided", net, lr=5e-3)
    run(optimizer, 1)
    before = trained(optimizer, net)
    poison = lambda module, x, y: torch.full_like(y, math.nan)  # noqa: E731
    hook = net.up.register_forward_hook(poison) if where == "activations" else None

    def evaluate(groups: int) -> Tensor:
        found = evaluation(net, ids())(groups).detach()
        found[0 if where == "clean loss" else -1, 1] = math.nan
        return found

    result = optimizer.step_on([evaluation(net, ids()) if hook else evaluate])
    assert result.skipped and "not finite" in result.reason
    assert all(torch.equal(w, before[name]) for name, w in trained(optimizer, net).items())
    if hook:
        hook.remove()
    assert not run(optimizer, 1)[0].skipped


# --- what it declines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 4, "delta_rank": 3}, "delta_rank 3"),
        ({"iterations": -1}, "iterations -1"),
        ({"window": 0}, "period is 0"),
        ({"optimizer": "adam"}, "'adam' with weight_decay 0.0; with agzo it may be sgd, sign without"),
        ({"weight_decay": 0.1}, "'sgd' with weight_decay 0.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        methods.create("agzo", swapped(), **arguments)


def test_a_delta_learned_before_is_kept():
    """Coefficients of an earlier method go into W, or into the delta of a frozen one, whose columns a resume brings."""
    for format in FORMATS:
        net, fresh = swapped(format), swapped(format)
        a, c = torch.randn(23, 3), torch.randn(31, 3)
        net.up.set_basis(a, c)
        clean = net.up.dequantize()
        for _ in range(2):  # twice, as a run does
            optimizer = methods.create("agzo", net, delta_rank=2, window=4)
        learned = net.up.dequantize() + net.up.delta()
        assert_no_worse(learned, clean + c @ a.T, clean.double() + c.double() @ a.double().T)
        assert format == "dense" or net.up.base_basis.shape == (23, 4 + 3)
        resumed = methods.create("agzo", fresh, delta_rank=2, window=4)
        resumed.load_state_dict(optimizer.state_dict())
        assert torch.equal(fresh.up.dequantize() + fresh.up.delta(), learned)
        assert torch.equal(run(resumed, 1)[0].losses, run(optimizer, 1)[0].losses)


# --- runs and what they leave -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
def test_a_run(dense: bool, tmp_path: Path) -> None:
    """From the command line, resumed and exported: the adapter or (dense) the weights are what was trained."""
    make_model_dir(tmp_path / "model", layers=1)
    given = options({"model": str(tmp_path / "model"), "train": str(write_examples(tmp_path / "train.csv", 24)),
                     "eval": str(write_examples(tmp_path / "eval.csv", 8, 24))}, tmp_path / "run", method="agzo",
                    lr=1e-4, steps=3)  # fmt: skip
    given += ["--option", "window=2", "--option", "delta_rank=1", *(["--dense"] if dense else [])]
    assert zoact(*given) == 0
    assert zoact("finetune", "--resume", "--out", str(tmp_path / "run"), "--steps", "5") == 0
    assert zoact("export", str(tmp_path / "run"), "--out", str(tmp_path / "exported")) == 0
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    assert names == {"trained.safetensors"} | (set() if dense else {"adapter_model.safetensors", "adapter_config.json"})
    for name in names:
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "run/adapter" / name).read_bytes()
    found = load_file(tmp_path / "exported/trained.safetensors")
    first = load_file(tmp_path / "model/model.safetensors")
    if dense:
        assert found.keys() == first.keys() and all(not torch.equal(w, first[name]) for name, w in found.items())
        return
    assert "lm_head.weight" in found and not any("_proj.weight" in name for name in found)
    with RunLog.open(tmp_path / "run") as log:
        state = log.load(log.snapshots()[-1])
    adapter = load_file(tmp_path / "exported/adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, c = (state[f"held/{name}/{key}"] for key in ("base_basis", "base_coeff"))
    assert a.shape == (48, 3) and adapter[f"base_model.model.{name}.lora_A.weight"].shape == (2, 48)  # one to spare
    exported = [adapter[f"base_model.model.{name}.lora_{key}.weight"] for key in "BA"]
    assert_no_worse(exported[0] @ exported[1], c @ a.T, c.double() @ a.double().T)
    assert zoact("replay", str(tmp_path / "run")) == 2
