"""The Triton zo_dense_linear against reference.py, and what more it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    DENSE,
    DENSE_SOAK,
    DTYPES,
    Case,
    activations,
    check_grid,
    cover,
    dense_arguments,
    stored,
    weight_arguments,
)
from close import assert_no_worse
from test_zo_dense_linear import OPTIONAL, expected
from torch import Tensor

from zoact_kernels import ops, rng


def run(**arguments: Any) -> Tensor:
    with ops.using("triton"):
        return ops.zo_dense_linear(**dict.fromkeys(OPTIONAL) | arguments)


def example(M: int, N: int, K: int, weight: str = "int4-g32", G: int = 1, S: int = 2) -> dict[str, Any]:
    return dict(
        x=activations(M, K, torch.float32),
        **weight_arguments(stored(weight, N, K)),
        out_features=N,
        bias=torch.randn(N),
        seeds=torch.randint(-(2**63), 2**63 - 1, (S,)),
        sigmas=torch.randn(G, S),
        param_id=torch.tensor([77]),
        groups=G,
    )


def check(case: Case) -> None:
    torch.manual_seed(0)
    arguments = dense_arguments(case)
    assert_no_worse(run(**arguments), expected(**arguments), expected(**arguments, compute=torch.float64))


@pytest.mark.parametrize("case", cover(DENSE), ids=str)
def test_zo_dense_linear(case: Case) -> None:
    check(case)


@pytest.mark.soak
@pytest.mark.parametrize("weight", DENSE["weight"])
def test_zo_dense_linear_grid(weight: str) -> None:
    check_grid(check, {**DENSE, "weight": (weight,)}, DENSE_SOAK)


@pytest.mark.parametrize("weight", ["int4-g32", "nf4-g64-flat", "dense-f32"])
def test_zo_dense_linear_row_does_not_depend_on_others(weight: str) -> None:
    """Within a tile, and not on the other groups either."""
    arguments = example(12, 40, 100, weight, G=3)
    y = run(**arguments)
    for g in range(3):
        alone = dict(x=arguments["x"][4 * g : 4 * g + 4], sigmas=arguments["sigmas"][g : g + 1], groups=1)
        assert torch.equal(run(**arguments | alone), y[4 * g : 4 * g + 4]), f"group {g}"
    arguments |= dict(groups=1, sigmas=arguments["sigmas"][:1])
    y = run(**arguments)
    for count in (1, 5, 11):
        assert torch.equal(run(**arguments | dict(x=arguments["x"][:count])), y[:count]), f"M = {count}"


def test_zo_dense_linear_clean_group_is_clean() -> None:
    arguments = example(9, 40, 100, G=3)
    arguments["sigmas"][0] = 0
    clean = {k: v for k, v in arguments.items() if k not in ("seeds", "sigmas", "param_id")}
    assert torch.equal(run(**arguments)[:3], run(**clean | dict(x=arguments["x"][:3], groups=1)))


@pytest.mark.parametrize("noise", rng.KINDS)
def test_zo_dense_linear_direction_is_felt(noise: str) -> None:
    sigma = 1e-3
    x = activations(4, 100, torch.float32)
    arguments = example(8, 40, 100, G=2, S=1)
    arguments |= dict(x=torch.cat([x, x]), sigmas=torch.tensor([[sigma], [-sigma]]), noise=noise, bias=None)

    def quotient(y: Tensor) -> Tensor:
        return (y[:4] - y[4:]) / (2 * sigma)

    z = rng.noise(noise, arguments["seeds"][0], arguments["param_id"], 40, 100)
    truth = x.double() @ z.double().T
    assert_no_worse(quotient(run(**arguments)), quotient(expected(**arguments)), truth, "(y+ - y-) / 2 sigma")


def test_zo_dense_linear_far_addresses() -> None:
    arguments = example(3, 20, 66) | dict(row_offset=2**33, cols=67)
    assert_no_worse(run(**arguments), expected(**arguments), expected(**arguments, compute=torch.float64))


SCALED = ("int4-g32", "int4-g64-sym", "int4-g40-bf16", "int4-row-f32", "int8-g32", "nf4-g64-nested", "fp4-g96")


@pytest.mark.parametrize(
    ("weight", "noise", "dtype", "M", "N", "K"),
    [
        (weight, rng.KINDS[i % 2], list(DTYPES.values())[i % 3], *((2, 33, 100), (18, 5, 257))[i // 2 % 2])
        for i, weight in enumerate(SCALED)
    ],
)
def test_zo_dense_linear_noise_on_scales(weight: str, noise: str, dtype: torch.dtype, M: int, N: int, K: int) -> None:
    arguments = example(M, N, K, weight, G=2) | dict(noise=noise, noise_on="scale", row_offset=5)
    arguments["x"] = arguments["x"].to(dtype)
    if (scale := arguments["scale"]) is not None and scale.dtype != torch.uint8:
        scale[N // 2, 0] = 0  # a group without a zero point
    assert_no_worse(run(**arguments), expected(**arguments), expected(**arguments, compute=torch.float64))
    shard = {k: v[1:] if k in ("weight", "scale", "offset", "bias") and v is not None else v
             for k, v in arguments.items()} | dict(row_offset=6, out_features=N - 1)  # fmt: skip
    assert torch.equal(run(**shard), run(**arguments)[:, 1:])


def test_zo_dense_linear_refuses_some_noise_on_the_scales() -> None:
    for arguments in (
        example(3, 20, 64) | dict(noise_scale=torch.ones(20, 64)),
        example(3, 20, 100, "nf4-g64-flat"),
    ):
        with pytest.raises(RuntimeError, match="noise on the scales goes without"):
            run(**arguments, noise_on="scale", cols=2)
