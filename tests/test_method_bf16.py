"""Every method with activations in bf16: what row groups see, where weights in bf16 go, whole runs and their resume.

What is trained beside the weights stays fp32; weights that are trained themselves are bf16, rounded stochastically.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_method_lora as lora
import test_methods_dense as dense
import test_methods_low_rank as low_rank
import test_methods_scales as scales
import torch
from close import assert_no_worse
from test_cli import options, steps_of, zoact
from test_methods_dense import Net, ids, plain_net, run, seeds_of
from tiny_model import make_model_dir, write_examples
from torch import Tensor
from torch.func import functional_call

from zoact_kernels import methods
from zoact_kernels.layers import perturbed, zo_layers
from zoact_kernels.runlog import RunLog
from zoact_kernels.swap import ZOConfig, swap

BF16 = torch.bfloat16
REFUSED = ("zo-momentum", "zo-adam", "lozo-m")  # moments of 16-bit parameters would lose small updates

# A preset, a net in bf16 with an optimizer on it, and theta -> [Delta of each seed], all by name and in float64.
Deltas = Callable[[dict[str, Tensor]], list[dict[str, Tensor]]]
Case = tuple[Net, Any, Deltas]


def of_dense(preset: str) -> Case:
    net = dense.swapped(BF16)
    optimizer, delta = dense.make(preset, net, sigma=0.05, lr=0.02, seed=3)
    return net, optimizer, lambda theta: [delta(optimizer, theta, seed) for seed in seeds_of(optimizer)]


def of_low_rank(preset: str, format: str) -> Case:
    net = low_rank.swapped(format, BF16)
    optimizer, delta = low_rank.make(preset, net, sigma=0.05, lr=0.02, seed=3)
    return net, optimizer, lambda theta: [delta(optimizer, theta, seed) for seed in seeds_of(optimizer)]


def of_zo_act(format: str) -> Case:
    net = plain_net(BF16)
    swap(net, ZOConfig(format=format, group_size=None if format == "dense" else 8, rank=2), where=["up", "down"],
         example=(ids(),))  # fmt: skip
    for layer in zo_layers(net).values():
        layer.set_basis(torch.linalg.qr(torch.randn(layer.in_features, 2)).Q.contiguous())
    optimizer = methods.create("zo-act", net, sigma=0.05, lr=0.02, queries=2, seed=3, floor_every=0)

    def deltas(theta: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        bases = {f"{name}.weight": layer.basis.double() for name, layer in zo_layers(net).items()}
        sizes = {name: (theta[name].shape[0], 2) for name in bases}
        return [{n: low_rank.factor(s, n, *sizes[n]) @ bases[n].T for n in bases} for s in seeds_of(optimizer)]

    return net, optimizer, deltas


def of_scales() -> Case:
    net = plain_net(BF16)
    swap(net, ZOConfig(format="int4", group_size=8, rank=0, layout="row"), where=["up", "down"], example=(ids(),))
    plains = {name: scales.Plain(layer) for name, layer in zo_layers(net).items()}
    optimizer = scales.make(net, queries=2, seed=3)

    def deltas(theta: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return [
            {f"{n}.weight": p.weight(scales.noise(seed, n, p.scale.shape)) for n, p in plains.items()}
            for seed in seeds_of(optimizer)
        ]

    return net, optimizer, deltas


CASES: dict[str, Callable[[], Case]] = {
    **{p: (lambda p=p: of_dense(p)) for p in dense.PRESETS if dense.PRESETS[p][0] not in REFUSED},
    **{f"{p}-{f}": (lambda p=p, f=f: of_low_rank(p, f)) for p in low_rank.PRESETS for f in low_rank.FORMATS},
    **{f"zo-act-{f}": (lambda f=f: of_zo_act(f)) for f in low_rank.FORMATS},
    "qzo": of_scales,
}


def built(case: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    swapped = dense.swapped  # the magnitudes of such a net make the mask of a preset
    monkeypatch.setattr(dense, "swapped", lambda dtype=BF16: swapped(dtype))
    return CASES[case]()


def assert_views(y: Tensor, moved: dict[str, Tensor]) -> None:
    """As good as torch in bf16 with weights that were moved first and rounded then."""
    truth = functional_call(plain_net(torch.float64), moved, ids())
    plain = functional_call(plain_net(BF16), {n: w.to(BF16) for n, w in moved.items()}, ids())
    assert_no_worse(y, plain, truth)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_row_group_sees_its_weights(case, monkeypatch):
    net, optimizer, deltas = built(case, monkeypatch)
    optimizer._prepare()
    theta = low_rank.base(net)
    found = deltas(theta)
    with perturbed(net, torch.tensor(seeds_of(optimizer)), optimizer._table, optimizer.noise):
        y = net(ids().repeat(optimizer.groups, 1))
    assert y.dtype == BF16
    for row, part in zip(optimizer._table.double(), y.chunk(optimizer.groups), strict=True):
        moved = dict(theta)
        for s, delta in zip(row, found, strict=True):
            moved |= {name: moved[name] + s * d for name, d in delta.items()}
        assert_views(part, moved)
    assert not torch.equal(y.chunk(optimizer.groups)[0], y.chunk(optimizer.groups)[1])


@pytest.mark.parametrize("preset", ["mezo-lora", "p-rge"])
@pytest.mark.parametrize("format", lora.FORMATS)
@torch.no_grad()
def test_every_row_group_sees_its_factors(preset, format):
    net = lora.swapped(format, BF16)
    optimizer = lora.make(preset, net, sigma=0.05, seed=3)
    optimizer.rule_name = "sgd"
    theta, seeds = low_rank.base(net), seeds_of(optimizer)
    pairs = {f"{name}.weight": lora.Pair(optimizer, name) for name in lora.LAYERS}
    with perturbed(net, torch.tensor(seeds), optimizer._table):
        y = net(ids().repeat(optimizer.groups, 1))
    for row, part in zip(optimizer._table.double(), y.chunk(optimizer.groups), strict=True):
        assert_views(part, theta | {name: theta[name] + pair.delta(row, seeds) for name, pair in pairs.items()})
    assert all(t.value.dtype == torch.float32 for t in optimizer.trainables.values())


@pytest.mark.parametrize("case", [case for case in CASES if case in dense.PRESETS])
def test_weights_in_bf16_go_where_the_noise_says(case, monkeypatch):
    """Each step is rounded once, up or down: nothing is further off than a unit in the last place."""
    net, optimizer, deltas = built(case, monkeypatch)
    before = low_rank.base(net)
    for _ in range(3):
        optimizer._prepare()
        found, was = deltas(low_rank.base(net)), low_rank.base(net)
        (result,) = run(optimizer, 1)
        assert not result.skipped
        for name, w in low_rank.base(net).items():
            scalars = (result.weights.sign() / len(found) if case == "zo-sign" else result.weights).double()
            wanted = was[name] - 0.02 * sum(s * d[name] for s, d in zip(scalars, found, strict=True))
            spacing = torch.maximum(w.abs(), wanted.abs()).clamp(min=2.0**-100).log2().floor().exp2() * 2.0**-7
            assert ((w - wanted).abs() <= spacing * (1 + 2.0**-10)).all(), name  # fp32 before it is rounded
    for name, w in low_rank.base(net).items():
        assert not torch.equal(w, before[name]) and optimizer.trainables[name].value.dtype == BF16


@pytest.mark.parametrize("method", REFUSED)
def test_moments_of_bf16_weights_are_refused(method):
    with pytest.raises(ValueError, match="16 bits lose small updates"):
        methods.create(method, dense.swapped(BF16))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    make_model_dir(folder / "model", layers=2)  # a tail has blocks before it
    return {"model": str(folder / "model"), "train": str(write_examples(folder / "train.csv", 64))}


@pytest.mark.parametrize("method", [name for name in methods.METHODS if name not in REFUSED])
def test_a_run(method, files, tmp_path: Path, capsys):
    """From the command line: every step finite, something moved, the base not, and a resume of the same bits."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    given = {"method": method, "lr": None, "dtype": "bfloat16", "eval": None}
    if method in ("zo-act-tail", "zo-act-node"):
        given |= {"batch-size": 64, "schedule": "constant"}  # an example for every query
    more = ["--dense"] if methods.METHODS[method].dense else []
    assert zoact(*options(files, whole, **given, steps=3), *more) == 0
    assert "unchanged" in capsys.readouterr().out
    assert zoact(*options(files, parted, **given, steps=1), *more) == 0
    assert zoact("finetune", "--resume", "--out", str(parted), "--steps", "3") == 0
    assert steps_of(whole) == steps_of(parted)
    with RunLog.open(whole) as log, RunLog.open(parted) as other:
        stays = method == "zo-conservative"  # where neither side is better
        assert all((stays or not row.skipped) and math.isfinite(float(row.losses.sum())) for row in log.steps())
        first, last, again = (
            log.load(log.snapshots()[0]),
            log.load(log.snapshots()[-1]),
            other.load(other.snapshots()[-1]),
        )
    assert all(torch.equal(last[key], again[key]) or key == "floor" for key in last) and last.keys() == again.keys()
    moved = [key for key in first if key.startswith("coeff/") and not torch.equal(first[key], last[key])]
    assert moved and all(torch.isfinite(last[key]).all() for key in moved)
