"""MeZO over a LoRA and P-RGE, against the matrices of their formulas in float64: over dense weights and over int4."""

from __future__ import annotations

import copy
import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from close import allowed, assert_no_worse
from invariants import descends, resumes, same_in_parts
from safetensors.torch import load_file
from test_cli import options, steps_of, zoact
from test_methods_dense import B, Net, evaluation, ids, plain_net, run, seeds_of
from test_methods_low_rank import base, factor
from tiny_model import make_model_dir, write_examples
from torch import Tensor, nn
from torch.func import functional_call

from zoact_kernels import methods, rng
from zoact_kernels.integrations.peft import export_lora
from zoact_kernels.layers import perturbed, zo_layers
from zoact_kernels.methods import ZeroOrder
from zoact_kernels.swap import ZOConfig, swap, unswap
from zoact_kernels.trainables import LoraA
from zoact_kernels.trainer import base_hash

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = ("dense", "int4")
LAYERS = {"up": (31, 23), "down": (23, 31)}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo-lora": ("mezo-lora", {}),
    "mezo-lora-3": ("mezo-lora", {"rank": 3, "alpha": 7.0, "queries": 2, "sides": "one-sided"}),
    "mezo-lora-adam": ("mezo-lora", {"rank": 1, "alpha": 1.0, "queries": 2, "optimizer": "adam"}),
    "p-rge": ("p-rge", {"queries": 2}),
    "p-rge-1": ("p-rge", {"rank": 5, "alpha": 3.0, "queries": 1}),
}
TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def swapped(format: str = "dense", dtype: torch.dtype = torch.float32, rank: int = 0) -> Net:
    net = plain_net(dtype)
    group = None if format == "dense" else 8
    swap(net, ZOConfig(format=format, group_size=group, rank=rank), where=["up", "down"], example=(ids(),))
    return net


def make(preset: str, net: nn.Module, **changes: Any) -> Any:
    method, arguments = PRESETS[preset]
    return methods.create(method, net, **{"targets": ["up", "down"], "floor_every": 0, **arguments, **changes})


def first_a(seed: int, name: str, K: int, R: int) -> Tensor:
    """A [K, R] as the sheet has it, +-1/sqrt(K) uniform, from the words of stream 5."""
    blocks = np.arange((K * R + 3) // 4, dtype=np.uint64)
    words = rng.words(seed, zlib.crc32(f"{name}.weight#A".encode()), 5, blocks).reshape(-1)[: K * R].reshape(K, R)
    u = ((words >> 9) + 0.5) / 2**23
    return torch.from_numpy(2 * u - 1) / math.sqrt(K)


class Pair:
    """B and A of a layer in float64 and, for the error of plain torch, in fp32."""

    def __init__(self, optimizer: Any, name: str) -> None:
        (self.N, self.K), self.name, self.R = LAYERS[name], name, optimizer.rank
        self.scale, self.both = optimizer.alpha / optimizer.rank, optimizer.both
        a = first_a(optimizer.seed, name, self.K, self.R)
        self.copies = {dt: [nn.Parameter(m.to(dt)) for m in (torch.zeros(self.N, self.R), a)] for dt in DTYPES}
        for dt, (_, copied) in self.copies.items():
            copied.data = a.float().to(dt)  # A is an fp32 number, exactly
        self.rules = {dt: TORCH[optimizer.rule_name](pair, lr=optimizer.lr) for dt, pair in self.copies.items()}

    def noises(self, seed: int) -> list[Tensor]:
        z = [factor(seed, f"{self.name}.weight", self.N, self.R), factor(seed, f"{self.name}.weight#A", self.K, self.R)]
        return z if self.both else [z[0], torch.zeros_like(z[1])]

    def delta(self, sigmas: Tensor, seeds: list[int], product: bool = True) -> Tensor:
        """scale (B + sum sigma Z_B) (A + sum sigma Z_A)^T; product: the noises' own, of order sigma^2, included."""
        b, a = (m.detach() for m in self.copies[torch.float64])
        zb, za = (sum(s * self.noises(seed)[i] for s, seed in zip(sigmas, seeds, strict=True)) for i in (0, 1))
        whole = (b + zb) @ (a + za).T
        return self.scale * (whole if product else whole - zb @ za.T)

    def move(self, weights: Tensor, seeds: list[int]) -> None:
        for dt, pair in self.copies.items():
            noises = [self.noises(seed) for seed in seeds]
            for i, m in enumerate(pair):
                m.grad = sum(w.to(dt) * z[i].to(dt) for w, z in zip(weights, noises, strict=True))
            self.rules[dt].step()


DTYPES = (torch.float32, torch.float64)


def views(net: Net, theta: dict[str, Tensor], deltas: dict[str, Tensor], y: Tensor, off: bool = False) -> None:
    """y is that of a net whose weights are theta + deltas; off: it is not, by far more than rounding."""
    moved = {n: w + deltas.get(n.removesuffix(".weight"), 0) for n, w in theta.items()}
    truth = functional_call(plain_net(torch.float64), moved, ids())
    plain = functional_call(plain_net(), {n: w.float() for n, w in moved.items()}, ids())
    if off:
        assert (y.double() - truth).abs().max() > 100 * allowed(plain, truth)[0]
    else:
        assert_no_worse(y, plain, truth)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_step_probes_and_moves_the_factors(preset, format):
    """Every row group sees both factors moved, the product of their noises too (invariant 36); so do B and A move."""
    net = swapped(format)
    theta, before = base(net), base_hash(net)
    optimizer = make(preset, net, sigma=0.05, lr=5e-3, seed=3)
    optimizer.rule_name = PRESETS[preset][1].get("optimizer", "sgd")
    pairs = {name: Pair(optimizer, name) for name in LAYERS}
    for step in range(3):
        seeds = seeds_of(optimizer)
        with torch.no_grad():
            for table in (optimizer._table, optimizer._table + 0.02):  # the second: several seeds in a group
                with perturbed(net, torch.tensor(seeds), table, leading=(optimizer.groups * B,)):
                    y = net(ids().repeat(optimizer.groups, 1))
                for row, part in zip(table.double(), y.chunk(optimizer.groups), strict=True):
                    views(net, theta, {name: pair.delta(row, seeds) for name, pair in pairs.items()}, part)
                    if optimizer.both and row.any():
                        views(net, theta, {name: p.delta(row, seeds, False) for name, p in pairs.items()}, part, True)
            clean = {name: pair.delta(torch.zeros(len(seeds)), seeds) for name, pair in pairs.items()}
            views(net, theta, clean, net(ids()))
            assert step == 0 or all(d.any() for d in clean.values())
        (result,) = run(optimizer, 1)
        assert not result.skipped and result.seeds.tolist() == seeds
        for pair in pairs.values():
            pair.move(result.weights, seeds)
    for name, pair in pairs.items():
        layer = zo_layers(net)[name]
        plain, truth = pair.copies.values()
        assert_no_worse(layer.coeff.detach(), plain[0].detach(), truth[0].detach(), name)
        first = first_a(3, name, pair.K, pair.R).float()
        if optimizer.both:
            a = optimizer.trainables[f"{name}#A"].value
            assert_no_worse(a, plain[1].detach(), truth[1].detach(), name)
            assert torch.equal(layer.basis, a * pair.scale) and not torch.equal(a, first)
        else:
            assert torch.equal(layer.basis, first * pair.scale)
    assert base_hash(net) == before


def test_factors_at_the_beginning():
    """A is uniform in +-1/sqrt(K), another one in each layer; B is 0, so the model is what it was."""
    net = swapped("int4")
    clean = net(ids())
    optimizer = make("mezo-lora", net, rank=20, seed=8)
    for name, (_, K) in LAYERS.items():
        a, layer = optimizer.trainables[f"{name}#A"].value, zo_layers(net)[name]
        assert torch.equal(a, first_a(8, name, K, 20).float()) and torch.equal(layer.basis, a * (16 / 20))
        assert not layer.coeff.any() and 0.95 < float(a.abs().max()) * math.sqrt(K) <= 1
        assert abs(float(a.mean())) * math.sqrt(K) < 4 / math.sqrt(3 * a.numel())
    one, other = (optimizer.trainables[f"{name}#A"].value[:23].flatten() for name in LAYERS)
    assert abs(float(torch.corrcoef(torch.stack((one, other)))[0, 1])) < 4 / math.sqrt(len(one))
    assert (net(ids()) - clean).abs().max() == 0
    assert not torch.equal(make("p-rge", swapped(), seed=9).trainables["up"].basis, first_a(8, "up", 23, 16).float())
    numbers = [int(t.param_id) for t in optimizer.trainables.values()]
    assert len(set(numbers)) == len(numbers) == 4


@pytest.mark.parametrize("format", FORMATS)
def test_one_query_of_p_rge_is_zo_act_on_a_random_basis(format):
    """Invariant 23: ZO-Act at C = 0 is a LoRA with a frozen A and B = 0; MeZO on B is SGD on its C, bit for bit."""
    one, other = swapped(format), swapped(format, rank=1)
    a = make("p-rge", one, queries=1, seed=2, lr=5e-3)
    for name, layer in zo_layers(other).items():
        layer.set_basis(zo_layers(one)[name].basis.clone())
    b = methods.create("zo-act", other, optimizer="sgd", sigma=1e-2, lr=5e-3, seed=2, floor_every=0)
    for left, right in zip(run(a, 4), run(b, 4), strict=True):
        assert torch.equal(left.losses, right.losses) and torch.equal(left.weights, right.weights)
    for name, layer in zo_layers(one).items():
        assert torch.equal(layer.coeff, zo_layers(other)[name].coeff) and layer.coeff.any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", PRESETS)
def test_resume_and_replay_after_every_step(preset, format):
    def fresh(**changes: Any) -> ZeroOrder:
        return make(preset, swapped(format), **{"lr": 5e-3, "seed": 9, **changes})

    resumes(fresh, run, 4, look=lambda net: {"y": net(ids())})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", PRESETS)
def test_sequential_and_micro_batches_are_the_same_step(preset, format):
    same_in_parts(lambda **changes: make(preset, swapped(format), lr=5e-3, **changes), run, 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_probes_leave_no_trace_and_lost_losses_skip(preset):
    net = swapped("int4")
    optimizer = make(preset, net, lr=5e-3, floor_every=1)
    run(optimizer, 1)
    before, y = optimizer.state_dict(), net(ids())
    assert optimizer.step_on([lambda groups: torch.full((groups, B), math.nan)]).skipped
    optimizer.lr = 0.0
    if PRESETS[preset][1].get("optimizer") != "adam":  # whose moments go on
        run(optimizer, 1)
    after = optimizer.state_dict()
    assert all(torch.equal(a, after[key]) for key, a in before.items() if key not in ("iteration", "floor", "rule/t"))
    assert torch.equal(net(ids()), y)


@pytest.mark.parametrize("preset", ["mezo-lora", "p-rge"])
def test_step_descends_and_flipped_ascends(preset):
    def fresh() -> tuple[ZeroOrder, methods.Evaluation]:
        net = swapped("int4")
        return make(preset, net, lr=3e-3, queries=4), evaluation(net, ids())

    descends(fresh, steps=30)


@pytest.mark.parametrize("preset", ["mezo-lora", "p-rge"])
def test_what_was_learned_before_stays(preset):
    """C of an earlier method goes into the base delta of a target; a state brings it along, into a model without it."""
    net = swapped("int4", rank=2)
    torch.manual_seed(1)
    c, a = torch.randn(31, 2), torch.linalg.qr(torch.randn(23, 2)).Q.contiguous()
    net.up.set_basis(a, c)
    before = net(ids()).detach()
    optimizer = make(preset, net, lr=5e-3)
    again = make(preset, net, lr=5e-3)  # twice, as a run does
    assert_no_worse(net.up.delta(), c @ a.T, c.double() @ a.double().T)
    assert net.up.base_basis.shape == (23, 2) and net.down.base_basis is None
    assert (net(ids()) - before).abs().max() < 1e-5
    with pytest.raises(RuntimeError, match="since"):
        run(optimizer, 1)
    run(again, 2)
    if again.both:  # another method over B alone perturbs no A
        other = swapped()
        pair = make(preset, other)
        run(methods.create("zo-act", other, floor_every=0), 1)
        with pytest.raises(RuntimeError, match="another basis or method since"):
            run(pair, 1)
    fresh = swapped("int4")
    other = make(preset, fresh, lr=5e-3, seed=5)
    other.load_state_dict(again.state_dict())
    assert torch.equal(fresh(ids()), net(ids())) and torch.equal(fresh.up.delta(), net.up.delta())
    run(make(preset, fresh, lr=5e-3), 1)  # what was learned so far is frozen, and a new pair begins
    assert fresh.up.base_basis.shape[1] == 2 + again.rank
    with pytest.raises(ValueError, match="up has learned coefficients"):
        make(preset, fresh, targets=["down"])


@pytest.mark.parametrize("preset", ["mezo-lora", "p-rge"])
def test_a_copy_is_on_its_own(preset):
    """A copied optimizer goes the way of the original, and neither moves nor perturbs it."""
    optimizer = make(preset, swapped(), lr=5e-3, floor_every=1)
    run(optimizer, 1)
    twin, state = copy.deepcopy(optimizer), optimizer.state_dict()
    steps = run(twin, 2)
    assert all(torch.equal(tensor, state[key]) for key, tensor in optimizer.state_dict().items())
    assert all(torch.equal(a.losses, b.losses) for a, b in zip(run(optimizer, 2), steps, strict=True))
    assert all(torch.equal(tensor, twin.state_dict()[key]) for key, tensor in optimizer.state_dict().items())


@pytest.mark.parametrize("preset", ["mezo-lora-3", "p-rge"])
@pytest.mark.parametrize("format", FORMATS)
def test_export_is_a_lora_of_peft(preset, format, tmp_path):
    """Equal logits over the same weights, and the base of the swapped model as it was."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=41, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    swap(model, ZOConfig(format=format, group_size=None if format == "dense" else 16, rank=0))
    plain, before = unswap(copy.deepcopy(model)), base_hash(model)
    method, arguments = PRESETS[preset]
    optimizer = methods.create(method, model, **{**arguments, "lr": 0.1})
    x = torch.arange(14).view(2, 7)
    for _ in range(3):
        optimizer.step_on([lambda groups: model(x.repeat(groups, 1)).logits[:, -1].float().logsumexp(-1)])
    assert {name.rpartition(".")[2].removesuffix("#A") for name in optimizer.trainables} == {"q_proj", "v_proj"}
    export_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path))
    with torch.no_grad():
        clean = plain(x).logits
        truth = loaded.double()(x).logits
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path))(x).logits
        assert_no_worse(model(x).logits, theirs, truth)
        assert (theirs - clean).abs().max() > 1e-2 and base_hash(model) == before
    assert all(layer.coeff.any() for name, layer in zo_layers(model).items() if layer.rank)
    assert sum(isinstance(t, LoraA) for t in optimizer.trainables.values()) == (4 if optimizer.both else 0)


@pytest.mark.parametrize("method", ["mezo-lora", "p-rge"])
def test_a_run_from_an_adapter(method, tmp_path):
    """A run that begins with an adapter of an earlier one: its resume, replay and export know what that had learned."""
    make_model_dir(tmp_path / "model", layers=1)
    files = {"model": str(tmp_path / "model"), "train": str(write_examples(tmp_path / "train.csv", 24))}
    one, whole, parted = (tmp_path / name for name in ("one", "whole", "parted"))
    given = {"method": method, "lr": 0.1, "eval": None}
    assert zoact(*options(files, one, **given, steps=2)) == 0
    given |= {"adapter": one / "adapter", "option": "rank=3"}
    assert zoact(*options(files, whole, **given, steps=4)) == 0
    assert zoact(*options(files, parted, **given, steps=1)) == 0
    assert zoact("finetune", "--resume", "--out", str(parted), "--steps", "4") == 0
    assert steps_of(whole) == steps_of(parted)
    assert zoact("replay", str(whole), "--adapter", str(tmp_path / "replayed")) == 0
    written = [load_file(path / "adapter_model.safetensors") for path in (one / "adapter", whole / "adapter")]
    rank = methods.arguments(method)["rank"]
    assert {t.shape[0] for key, t in written[1].items() if "lora_A" in key} == {rank + 3}
    for key, b in written[0].items():  # Q of what was imported stands before the new factors
        if "lora_B" in key:
            a, other = written[0][key.replace("_B", "_A")], written[1][key.replace("_B", "_A")]
            kept = written[1][key][:, :rank] @ other[:rank]
            assert_no_worse(kept, b @ a, b.double() @ a.double())
    for path in (parted / "adapter", tmp_path / "replayed"):
        for name, tensor in load_file(path / "adapter_model.safetensors").items():
            assert torch.equal(tensor, written[1][name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["q_proj"]}, "targets has 'q_proj', and no swapped layer is called so; give some of: down, up"),
        ({"targets": ["up", "dawn"]}, "targets has 'dawn'"),
        ({"targets": "up,dawn"}, "targets has 'dawn'"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ""}, "targets is empty"),
        ({"rank": 0}, "rank is 0; up with in_features=23 allows 1 to that"),
        ({"rank": 24}, "rank is 24"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"period": 2}, "has no argument 'period'"),
    ],
)
@pytest.mark.parametrize("preset", ["mezo-lora", "p-rge"])
def test_errors(preset, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(preset, swapped(), **arguments)


def test_targets_by_pattern_and_a_model_without_layers():
    assert list(make("p-rge", swapped(), targets=["u*"]).trainables) == ["up"]
    assert list(make("p-rge", swapped(), targets="down,up").trainables) == ["up", "down"]
    with pytest.raises(ValueError, match="no ZOLinear layer to train"):
        make("p-rge", plain_net())
