"""Structures of a perturbation: layers feel the direction written down, and its estimates have the moments it says.

Moments (methods 2.1, 2.6). Delta is L z for a linear L of the noise z, Dim of its coordinates. Whatever L is,
E[<grad, Delta> Delta] = L L^T grad, the table's last column. Where L^T L = c^2, as everywhere but over several lazy
columns and scales,

    E |<grad, Delta> Delta - grad|^2 = (c^2 (Dim + 2) - 2) <grad, L L^T grad> + |grad|^2       (Dim for Dim + 2: signs)
    E |cos| = beta sqrt(<grad, L L^T grad>) / (c |grad|),   beta = Gamma(Dim/2) / (sqrt(pi) Gamma((Dim + 1)/2))
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import test_methods_dense as nets
import torch
from close import assert_no_worse
from torch import Tensor

from zoact_kernels import methods, rng
from zoact_kernels.directions import DIRECTIONS, delta, lazy_factor, mean_estimate, multi_seed
from zoact_kernels.layers import ZOLinear, perturbed
from zoact_kernels.quantize import quantize

N, K, R = 5, 7, 2
SAMPLES = 1500


def orthonormal(size: int, seed: int = 5, rank: int = R) -> Tensor:
    return lazy_factor(seed, 0, size, rank, orthonormal=True)


def matrix(seed: int) -> Tensor:
    return rng.noise("normal", seed, 1, N, K).double()


MASK = (matrix(3).abs() < 0.8).double()
GIVEN: dict[str, dict[str, Any]] = {
    "dense": {},
    "masked": {"mask": MASK},
    "right-basis": {"basis": orthonormal(K)},
    "uv": {"basis": lazy_factor(7, 1, K, 1)},
    "uzv": {"basis": orthonormal(K), "left": orthonormal(N, 6)},
    "scale": {"codes": matrix(4).mul(3).round(), "group_size": 3},
}
# (structure, noise, Dim, c): c is None where L^T L is no multiple of the identity
MOMENTS = [
    ("dense", "normal", N * K, 1.0),
    ("dense", "rademacher", N * K, 1.0),
    ("masked", "normal", int(MASK.sum()), 1.0),
    ("right-basis", "normal", N * R, 1.0),
    ("uv", "normal", N, float(GIVEN["uv"]["basis"].norm())),
    ("uzv", "normal", R * R, math.sqrt(N * K) / R),
    ("scale", "normal", N * 3, None),
]


def agrees(samples: Tensor, wanted: Tensor | float) -> bool:
    """The mean of independent samples [n, ...] is `wanted`, every entry within 4 standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    return bool(((samples.mean(0) - wanted).abs() <= 4 * error + 1e-12).all())


# --- what it says is what a layer feels -------------------------------------------------------------------------------


def check(layer: ZOLinear, seeds: list[int], radii: list[float], change: Tensor, bias: Tensor | None) -> None:
    """The second row group sees D(W) + C A^T + change and `bias`, both float64."""
    x = rng.noise("normal", 1, 2, 13, layer.in_features)
    with torch.no_grad(), perturbed(layer, torch.tensor(seeds), torch.tensor([[0.0] * len(seeds), radii])):
        moved = layer(x.repeat(2, 1)).chunk(2)[1]
    w = layer.dequantize().double() + change
    if layer.coeff is not None:
        w += layer.coeff.detach().double() @ layer.basis.double().T
    plain, truth = (torch.nn.functional.linear(x.to(d), w.to(d), None if bias is None else bias.to(d))
                    for d in (torch.float32, torch.float64))  # fmt: skip
    assert_no_worse(moved, plain, truth)
    assert (x.double() @ change.T).abs().amax(1).min() > 1e-2  # far more than rounding


def test_a_layer_feels_a_right_basis():
    layer = ZOLinear.from_packed(quantize(torch.randn(N, K), "dense"), rank=R, name="layer")
    a = orthonormal(K).float().contiguous()
    layer.set_basis(a, torch.randn(N, R))
    change = multi_seed("right-basis", [17, 4], [0.5, -2.0], int(layer.param_id), N, K, basis=a)
    check(layer, [17, 4], [0.5, -2.0], change, None)


@pytest.mark.parametrize("method", ["mezo", "sparse-mezo", "lozo", "subzero"])
def test_a_layer_feels_what_its_method_says(method):
    """`up` of a net is perturbed along the table's row, made of the names' own noise."""
    net = nets.swapped()
    optimizer = methods.create(method, net, seed=2, lr=0.0)
    nets.run(optimizer, 1)
    ids = {key: zlib.crc32(f"up.{key}".encode()) for key in ("weight", "weight#V", "weight#U", "bias")}
    slow, weight, rank = rng.seed_for(2, 0), net.up.weight.double(), 8
    rows, cols = weight.shape
    structures: dict[str, tuple[str, dict[str, Any]]] = {
        "mezo": ("dense", {}),
        "sparse-mezo": ("masked", {"mask": (weight.abs() <= weight.abs().quantile(0.25)).double()}),
        "lozo": ("uv", {"basis": lazy_factor(slow, ids["weight#V"], cols, 2)}),
        "subzero": ("uzv", {
            "basis": lazy_factor(slow, ids["weight#V"], cols, rank, orthonormal=True),
            "left": lazy_factor(slow, ids["weight#U"], rows, rank, orthonormal=True),
        }),
    }  # fmt: skip
    structure, given = structures[method]
    seeds, radii = [9, 8], [0.5, -0.25]
    mask = {"mask": (net.up.bias.abs() <= net.up.bias.abs().quantile(0.25)).double()[None]} if "mask" in given else {}
    bias = multi_seed("masked" if mask else "dense", seeds, radii, ids["bias"], 1, rows, **mask)[0]
    change = multi_seed(structure, seeds, radii, ids["weight"], rows, cols, **given)
    check(net.up, seeds, radii, change, net.up.bias.double() + bias)


def test_a_layer_feels_its_scales():
    net = nets.plain_net()
    nets.swap(net, nets.ZOConfig(format="int4", group_size=8, rank=0), where=["up"], example=(nets.ids(),))
    methods.create("qzo", net)
    packed = net.up.packed()
    codes = packed.dequantize(torch.float32).double() / packed.scales().double().repeat_interleave(8, dim=1)[:, :23]
    change = delta("scale", 9, int(net.up.param_id), 31, 23, codes=codes, group_size=8)
    check(net.up, [9], [0.5], 0.5 * change, net.up.bias.double())


def test_delta_dense():
    assert torch.equal(delta("dense", 3, 4, N, K), rng.noise("normal", 3, 4, N, K).double())
    signs = delta("dense", 3, 4, N, K, noise="rademacher")
    assert torch.equal(signs.abs(), torch.ones(N, K).double()) and 0 < int((signs > 0).sum()) < N * K


# --- moments ----------------------------------------------------------------------------------------------------------


def test_every_structure_has_its_moments():
    assert {row[0] for row in MOMENTS} == GIVEN.keys() == DIRECTIONS.keys()
    for name, _, dim, c in MOMENTS:
        rows, cols = DIRECTIONS[name].shape(N, K, *GIVEN[name].values())
        assert name == "masked" or dim == rows * cols
        trace = sum(float(mean_estimate(name, e.view(N, K), **GIVEN[name]).flatten() @ e)
                    for e in torch.eye(N * K, dtype=torch.float64))  # fmt: skip
        assert c is None or trace == pytest.approx(c**2 * dim)  # E |Delta|^2


@pytest.mark.parametrize(("name", "noise", "dim", "c"), MOMENTS)
def test_estimates(name, noise, dim, c):
    """Mean, mean squared error and cosine of <grad, Delta> Delta: invariants 12 and 14."""
    gradient, given = matrix(2), GIVEN[name]
    deltas = torch.stack([delta(name, seed, 9, N, K, noise=noise, **given) for seed in range(SAMPLES)])
    found = (deltas * gradient).sum((1, 2), keepdim=True) * deltas
    mean = mean_estimate(name, gradient, **given)
    assert agrees(found, mean)
    if c is None:
        return
    seen, whole = float((gradient * mean).sum()), float(gradient.square().sum())
    factor = c**2 * (dim + 2 if noise == "normal" else dim) - 2
    assert agrees((found - gradient).square().sum((1, 2)), factor * seen + whole)
    if noise == "normal":
        cosine = (deltas * gradient).sum((1, 2)).abs() / deltas.norm(dim=(1, 2)) / math.sqrt(whole)
        beta = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)
        assert agrees(cosine, beta * math.sqrt(seen / whole) / c)


def test_estimates_over_all_factors():
    """Where the factors are drawn too, `uv` has mean R grad and `uzv` has mean grad (invariants 28, 29)."""
    gradient = matrix(2)
    vs, us = (rng.noise("normal", 1, i, SAMPLES * size, R).double().view(-1, size, R) for i, size in enumerate((K, N)))
    assert agrees(torch.stack([mean_estimate("uv", gradient, basis=v) for v in vs]), R * gradient)
    vs, us = torch.linalg.qr(vs).Q, torch.linalg.qr(us).Q
    means = [mean_estimate("uzv", gradient, basis=v, left=u) for v, u in zip(vs, us, strict=True)]
    assert agrees(torch.stack(means), gradient)


def test_lazy_factor():
    q = lazy_factor(3, 4, 11, 4, orthonormal=True)
    torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-14)
    raw = lazy_factor(3, 4, 11, 4)
    assert torch.equal(raw.float(), rng.noise("normal", 3, 4, 11, 4))
    turn = q.T @ raw
    assert bool((turn.diagonal() > 0).all()) and float(turn.tril(-1).abs().max()) < 1e-13


@pytest.mark.parametrize(
    ("direction", "given", "message"),
    [
        ("left-basis", {}, "known are dense, masked, uv, right-basis, uzv, scale"),
        ("right-basis", {}, r"basis is None; .* needs \(7, rank\)"),
        ("right-basis", {"basis": torch.zeros(5, 2)}, r"basis is \(5, 2\)"),
        ("uzv", {"basis": torch.zeros(7, 2)}, r"left is None; .* needs \(5, rank\)"),
        ("masked", {"mask": torch.zeros(7, 5)}, r"mask is \(7, 5\); .* needs \(5, 7\)"),
        ("dense", {"basis": torch.zeros(7, 2)}, "basis is given; direction 'dense' takes nothing"),
        ("scale", {"codes": torch.zeros(5, 7), "group_size": 0}, "group_size is 0"),
    ],
)
def test_errors(direction, given, message):
    with pytest.raises(ValueError, match=message):
        delta(direction, 0, 0, N, K, **given)
    with pytest.raises(ValueError, match=message):
        mean_estimate(direction, torch.zeros(N, K), **given)
