"""Structures of a perturbation: a layer feels the direction written down, and its estimates have the mean it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoact_kernels import rng
from zoact_kernels.directions import DIRECTIONS, delta
from zoact_kernels.formats import quantize
from zoact_kernels.layers import ZOLinear, perturbed

N, K, R = 5, 7, 2
SAMPLES = 1500


def basis() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(K, R, generator=generator, dtype=torch.float64)).Q


def test_delta_is_what_a_layer_feels():
    a = basis().float().contiguous()
    layer = ZOLinear.from_packed(quantize(torch.randn(N, K), "dense"), rank=R, name="layer")
    layer.set_basis(a, torch.randn(N, R))
    x, seed, sigma = torch.randn(1, K).repeat(2, 1), 17, 0.5
    with torch.no_grad(), perturbed(layer, torch.tensor([seed]), torch.tensor([[0.0], [sigma]])):
        clean, moved = layer(x).double()
    wanted = x[0].double() @ delta("right-basis", seed, int(layer.param_id), N, K, basis=a).T
    torch.testing.assert_close((moved - clean) / sigma, wanted, rtol=1e-5, atol=1e-5)


def test_delta_dense():
    assert torch.equal(delta("dense", 3, 4, N, K), rng.noise("normal", 3, 4, N, K).double())
    signs = delta("dense", 3, 4, N, K, noise="rademacher")
    assert torch.equal(signs.abs(), torch.ones(N, K).double()) and 0 < int((signs > 0).sum()) < N * K


@pytest.mark.parametrize(("name", "noise"), [("right-basis", "normal"), ("dense", "normal"), ("dense", "rademacher")])
def test_delta_estimates(name, noise):
    """Mean, mean squared error and cosine of <grad, Delta> Delta (methods 2.6), within 4 standard errors."""
    a = basis()
    gradient = torch.randn(N, K, dtype=torch.float64)
    deltas = torch.stack([delta(name, seed, 9, N, K, basis=a, noise=noise) for seed in range(SAMPLES)])
    found = (deltas * gradient).sum((1, 2), keepdim=True) * deltas
    rows, cols = DIRECTIONS[name].shape(N, K, R)
    dim = rows * cols
    seen = gradient @ a @ a.T if name == "right-basis" else gradient

    def agrees(samples: Tensor, wanted: Tensor | float) -> bool:
        return bool(((samples.mean(0) - wanted).abs() < 4 * samples.std(0) / math.sqrt(SAMPLES)).all())

    assert agrees(found, seen)
    factor = dim + 1 if noise == "normal" else dim - 1
    lost = float((gradient - seen).square().sum())
    assert agrees((found - gradient).square().sum((1, 2)), factor * float(seen.square().sum()) + lost)
    if noise == "normal":
        cosine = (found * gradient).sum((1, 2)).abs() / found.norm(dim=(1, 2)) / gradient.norm()
        beta = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)
        assert agrees(cosine, beta * float(seen.norm() / gradient.norm()))


def test_delta_errors():
    with pytest.raises(ValueError, match="known are right-basis, dense"):
        delta("left-basis", 0, 0, N, K)
    with pytest.raises(ValueError, match=r"basis is None; .* needs \(7, rank\)"):
        delta("right-basis", 0, 0, N, K)
    with pytest.raises(ValueError, match=r"basis is \(5, 2\)"):
        delta("right-basis", 0, 0, N, K, basis=torch.zeros(5, 2))
