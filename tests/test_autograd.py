"""Gradients of the two linear ops, against autograd through a float64 materialisation of W + sum sigma Z."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_no_worse
from test_ops import dense_args, linear_args
from torch import Tensor

from zoact_kernels import autograd, reference

Z = torch.ops.zoact
FORMATS = ["dense", "int8", "int4", "nf4", "fp4"]


def gradients(op: Any, args: dict[str, Any], leaves: list[str], cotangent: Tensor, dtype: Any, **more: Any) -> Any:
    """{leaf: gradient of <op(args), cotangent>}; the leaves in `dtype`, or as they are."""
    own = {n: args[n].detach().to(dtype or args[n].dtype, copy=True).requires_grad_() for n in leaves}
    y = op(**{**args, **own}, **more)
    return dict(zip(leaves, torch.autograd.grad((y * cotangent).sum(), list(own.values())), strict=True))


def compare(op: Any, slow: Any, args: dict[str, Any], leaves: list[str]) -> None:
    cotangent = torch.randn(*args["x"].shape[:-1], args["out_features"]).to(args["x"].dtype).float()  # as y's gradient
    got = gradients(op, args, leaves, cotangent, None)
    stored = [n for n in leaves if n != "weight"]  # the specification takes no W in float64: its gradient by hand
    plain, truth = (
        gradients(slow, args, stored, cotangent.to(dtype), dtype, compute=dtype)
        | {"weight": cotangent.to(dtype).T @ args["x"].to(dtype)}
        for dtype in (torch.float32, torch.float64)
    )
    for name in leaves:
        assert got[name].dtype == args[name].dtype and truth[name].abs().max() > 0, name
        assert_no_worse(got[name], plain[name].to(got[name].dtype), truth[name], name)


def dense(**changes: Any) -> dict[str, Any]:
    """Shapes that nothing divides; more rows than a panel takes would need 512, so tests make panels small."""
    return dense_args(**{"M": 9, "N": 37, "K": 51, "G": 3, "format": "dense", "bias": torch.randn(37), **changes})


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "PANEL", 7)


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("format", FORMATS)
def test_zo_dense_linear(format: str, noise: str) -> None:
    leaves = ["x", "bias", "sigmas"] + ["weight"] * (format == "dense")
    compare(Z.zo_dense_linear.default, reference.zo_dense_linear, dense(format=format, noise=noise), leaves)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "magnitude", "mask_value": torch.tensor([0.1]), "noise_scale": torch.rand(37, 51)},
        {"mask": "random", "mask_value": torch.tensor([0.3]), "mask_seed": torch.tensor([5])},
        {"noise_scale": torch.rand(37, 51)},
        {"row_offset": 11, "cols": 64},
        {"G": 1, "M": 1},
        {"weight": None, "format": "dense"},
        {"seeds": torch.tensor([8]), "sigmas": torch.randn(3, 1)},
    ],
    ids=["magnitude", "random", "noise_scale", "shard", "one row", "no weight", "one seed"],
)
def test_zo_dense_linear_features(changes: dict[str, Any]) -> None:
    args = dense(**changes)
    leaves = [n for n in ("x", "weight", "bias", "sigmas") if args[n] is not None]
    compare(Z.zo_dense_linear.default, reference.zo_dense_linear, args, leaves)


def test_zo_dense_linear_without_noise() -> None:
    args = dense(seeds=None, sigmas=None, param_id=None)
    compare(Z.zo_dense_linear.default, reference.zo_dense_linear, args, ["x", "weight", "bias"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zo_dense_linear_in_16_bits(dtype: torch.dtype) -> None:
    """x, W and their gradients in 16 bits, sums in fp32: as near as an fp32 gradient rounded once."""
    args = dense()
    args["x"], args["weight"] = args["x"].to(dtype), args["weight"].to(dtype)
    compare(Z.zo_dense_linear.default, reference.zo_dense_linear, args, ["x", "weight", "sigmas"])


def test_zo_dense_linear_keeps_no_noise() -> None:
    """What a forward keeps for its backward are the arguments alone, nothing of the size of Z."""
    args = dense()
    for name in ("x", "sigmas"):
        args[name] = args[name].clone().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Z.zo_dense_linear.default(**args)
    mine = {t.data_ptr() for t in args.values() if isinstance(t, Tensor)}
    assert kept and {t.data_ptr() for t in kept} <= mine


def test_no_gradient_to_frozen_weights_or_through_scales() -> None:
    args = dense(format="int8")
    args["x"].requires_grad_()
    y = Z.zo_dense_linear.default(**{**args, "noise_on": "scale"})
    with pytest.raises(ValueError, match="no gradient through noise on the scales"):
        y.sum().backward()
    packed = dense(layout="cpu")
    packed["weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="layout 'cpu' and has no gradient"):
        autograd._new_weight_gradient(packed["weight"], "dense", "cpu", 37, 51)


@pytest.mark.parametrize(
    "G, basis_per_group, use_projected", [(1, False, False), (2, False, False), (2, True, False), (2, False, True)]
)
@pytest.mark.parametrize("format", ["int4", "dense"])
def test_zo_linear(format: str, G: int, basis_per_group: bool, use_projected: bool) -> None:
    args = linear_args(M=8, G=G, sigmas=torch.randn(G, 2) * 0.1, format=format)
    K, N = 96, 33
    args["base_basis"], args["base_coeff"] = torch.randn(K, 2), torch.randn(N, 2)
    args["coeff_groups"] = torch.randn(G, N, 3)
    if basis_per_group:
        args["basis"] = torch.randn(G, K, 3) / 10
    if use_projected:
        args["projected"], args["basis"] = torch.randn(8, 3), None
    names = ["x", "bias", "base_basis", "base_coeff", "basis", "coeff", "coeff_groups", "projected"]
    names += ["weight"] * (format == "dense")
    compare(Z.zo_linear.default, reference.zo_linear, args, [n for n in names if args[n] is not None])


@pytest.mark.parametrize("op", ["zo_linear", "zo_dense_linear"])
def test_opcheck(op: str) -> None:
    args = linear_args(format="dense") if op == "zo_linear" else dense()
    for name in ("x", "weight", "bias", *(["sigmas"] if op == "zo_dense_linear" else ["coeff"])):
        args[name] = args[name].clone().requires_grad_()
    torch.library.opcheck(getattr(Z, op).default, (), args)
