"""QZO: the scales of low-bit weights, against the formulas of arXiv 2505.13430 in float64."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch
from close import assert_no_worse
from invariants import descends, resumes
from test_methods_dense import B, Net, evaluation, ids, plain_net, run, seeds_of
from torch import Tensor
from torch.func import functional_call

from zoact_kernels import methods, rng
from zoact_kernels.layers import perturbed, zo_layers
from zoact_kernels.swap import ZOConfig, swap

FORMATS = {"int4": 8, "int8": 8, "nf4": 32}


def swapped(format: str) -> Net:
    net = plain_net()
    swap(net, ZOConfig(format=format, group_size=FORMATS[format], rank=0, layout="row"), where=["up", "down"],
         example=(ids(),))  # fmt: skip
    return net


def make(net: Net, **changes: Any) -> Any:
    return methods.create("qzo", net, **{"floor_every": 0, "sigma": 1e-3, "lr": 1e-3, **changes})


class Plain:
    """A layer's weight from its codes: D(W) = factor * scale spread over groups, the factor being q - zero."""

    def __init__(self, layer: Any) -> None:
        packed = layer.packed()
        self.span, self.K = packed.span, layer.in_features
        self.scale, whole = packed.scales().double(), packed.dequantize(torch.float64)
        spread = self.spread(self.scale)
        self.factor = torch.where(spread == 0, torch.zeros_like(whole), whole / spread)

    def spread(self, scale: Tensor) -> Tensor:
        return scale.repeat_interleave(self.span, dim=1)[:, : self.K]

    def weight(self, scale: Tensor) -> Tensor:
        return self.factor * self.spread(scale)


def noise(seed: int, name: str, shape: torch.Size) -> Tensor:
    return rng.noise("normal", seed, zlib.crc32(f"{name}.weight".encode()), *shape).double()


@pytest.mark.parametrize("format", FORMATS)
def test_every_step_probes_and_moves_the_scales(format):
    net = swapped(format)
    plains = {name: Plain(layer) for name, layer in zo_layers(net).items()}
    scales = {name: p.scale.clone() for name, p in plains.items()}
    rounded = {name: p.scale.float() for name, p in plains.items()}
    codes = {name: layer.packed().codes() for name, layer in zo_layers(net).items()}
    optimizer = make(net, queries=2, seed=2)
    for _ in range(3):
        seeds = seeds_of(optimizer)
        z = {name: [noise(s, name, scales[name].shape) for s in seeds] for name in scales}
        optimizer._prepare()
        with torch.no_grad(), perturbed(net, torch.tensor(seeds), optimizer._table):
            y = net(ids().repeat(4, 1)).chunk(4)
        for row, part in zip(optimizer._table.double(), y, strict=True):
            moved = {f"{name}.weight": plains[name].weight(s + sum(a * b for a, b in zip(row, z[name], strict=True)))
                     for name, s in scales.items()}  # fmt: skip
            truth = functional_call(plain_net(torch.float64), moved, ids())
            plain = functional_call(plain_net(), {n: w.float() for n, w in moved.items()}, ids())
            assert_no_worse(part, plain, truth)
        (result,) = run(optimizer, 1)
        for name in scales:
            for weight, noises in zip(result.weights.double(), z[name], strict=True):
                scales[name] = scales[name] - 1e-3 * weight * noises
                rounded[name] = rounded[name] - 1e-3 * float(weight) * noises.float()
            scales[name], rounded[name] = scales[name].clamp(min=1e-7), rounded[name].clamp(min=1e-7)
    for name, layer in zo_layers(net).items():
        assert_no_worse(layer.scale, rounded[name], scales[name], name)
        assert torch.equal(layer.packed().codes(), codes[name])
        assert_no_worse(layer.dequantize(), plains[name].weight(rounded[name].double()).float(),
                        plains[name].weight(scales[name]), name)  # fmt: skip
        assert not torch.equal(layer.scale.double(), plains[name].scale)


def test_differences_are_clipped_and_scales_have_a_floor():
    net = swapped("int4")
    optimizer = make(net, lr=1.0, floor=1e-3)
    result = optimizer.step_on([lambda groups: torch.stack((torch.full((B,), 9e5), torch.zeros(B))).double()])
    assert result.weights.tolist() == [100.0]
    for layer in zo_layers(net).values():
        assert float(layer.scale.min()) == pytest.approx(1e-3) and int((layer.scale < 2e-3).sum()) > 10
    net = swapped("int8")
    net.up.scale.data[0] = -net.up.scale[0]  # as a GGUF may have it
    zero = float(net.up.scale[1, 0])
    net.up.scale.data[1, 0] = 0.0
    optimizer = make(net, lr=0.0)
    run(optimizer, 1)
    assert float(net.up.scale[0].max()) < 0 and float(net.up.scale[1, 0]) == 0 < zero
    optimizer.lr = 1.0
    optimizer.step_on([lambda groups: torch.stack((torch.full((B,), 9e5), torch.zeros(B))).double()])
    assert float(net.up.scale[0].max()) <= -1e-7 and float(net.up.scale[2:].min()) >= 1e-7
    with pytest.raises(ValueError, match="floor is -1"):
        make(swapped("int4"), floor=-1.0)


@pytest.mark.parametrize("format", FORMATS)
def test_resume_and_replay_after_every_step(format):
    def weights(net: Any) -> dict[str, Tensor]:
        return {name: layer.dequantize() for name, layer in zo_layers(net).items()}

    resumes(lambda **changes: make(swapped(format), **{"seed": 9, **changes}), run, 4, look=weights)


def test_step_descends_and_flipped_ascends():
    def fresh() -> tuple[Any, methods.Evaluation]:
        net = swapped("int4")
        return make(net, lr=1e-4, queries=4), evaluation(net, ids())

    descends(fresh)


def test_probes_and_lost_losses_leave_no_trace():
    net = swapped("int4")
    optimizer = make(net, lr=0.0)
    before = {name: layer.dequantize() for name, layer in zo_layers(net).items()}
    run(optimizer, 2)
    optimizer.lr = 1.0
    assert optimizer.step_on([lambda groups: torch.full((groups, B), math.nan)]).skipped
    assert all(torch.equal(layer.dequantize(), before[name]) for name, layer in zo_layers(net).items())


def test_dense_weights_have_no_scales():
    net = plain_net()
    swap(net, ZOConfig(format="dense", rank=0), where=["up"], example=(ids(),))
    with pytest.raises(ValueError, match="up is dense and has no scales"):
        make(net)
