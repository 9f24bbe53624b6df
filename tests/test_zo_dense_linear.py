"""The compiled zo_dense_linear against reference.py, on every instruction set, and what more it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    DENSE,
    DENSE_SOAK,
    Case,
    activations,
    alike_isas,
    check_grid,
    cover,
    dense_arguments,
    layouts,
    stored,
    weight_arguments,
)
from close import assert_no_worse
from torch import Tensor

from zoact_kernels import native, ops, reference, rng
from zoact_kernels.formats import PackedWeight

pytestmark = pytest.mark.skipif(native.module() is None, reason=native.why_missing() or "compiled")
ISAS = native.isas()
PATHS = ("int4-g32", "int4-g64-sym", "int8-row", "nf4-g64-nested", "dense-f32", "dense-bf16")
WEIGHT = ("weight", "scale", "offset", "nested", "format", "layout", "group_size")
OPTIONAL = (
    "weight",
    "scale",
    "offset",
    "nested",
    "bias",
    "seeds",
    "sigmas",
    "param_id",
    "noise_scale",
    "mask_value",
    "mask_seed",
)  # fmt: skip  the schema has no defaults for these


def run(isa: str, **arguments: Any) -> Tensor:
    with ops.using("cpu", isa=isa):
        return ops.zo_dense_linear(**dict.fromkeys(OPTIONAL) | arguments)


def expected(**arguments: Any) -> Tensor:
    """The reference, in fp32, or as the truth with compute=torch.float64."""
    return reference.zo_dense_linear(**dict.fromkeys(OPTIONAL) | arguments)


def example(
    M: int, N: int, K: int, weight: str = "int4-g32", G: int = 1, S: int = 2, sigma: float = 1.0
) -> dict[str, Any]:
    packed = layouts(stored(weight, N, K))[-1]
    return dict(
        x=activations(M, K, torch.float32),
        **weight_arguments(packed),
        out_features=N,
        bias=torch.randn(N),
        seeds=torch.randint(-(2**63), 2**63 - 1, (S,)),
        sigmas=torch.randn(G, S) * sigma,
        param_id=torch.tensor([77]),
        groups=G,
    )


def stored_of(arguments: dict[str, Any]) -> PackedWeight | None:
    if arguments["weight"] is None:
        return None
    shape = dict(out_features=arguments["out_features"], in_features=arguments["x"].shape[-1])
    return PackedWeight(**{name: arguments[name] for name in WEIGHT}, **shape)


def check(case: Case) -> None:
    torch.manual_seed(0)
    arguments = dense_arguments(case)
    truth, plain = expected(**arguments, compute=torch.float64), expected(**arguments)
    bits: dict[str, Tensor] = {}
    for isa in ISAS:
        for w in layouts(stored_of(arguments)):
            y = run(isa, **arguments | weight_arguments(w))
            assert_no_worse(y, plain, truth, f"{isa} {w.layout if w else ''}")
            assert torch.equal(y, bits.setdefault(isa, y)), f"{isa}: layouts differ"
    alike = [bits[isa] for isa in alike_isas(arguments["format"])]
    assert all(torch.equal(y, alike[0]) for y in alike)


@pytest.mark.parametrize("case", cover(DENSE), ids=str)
def test_zo_dense_linear(case: Case) -> None:
    check(case)


@pytest.mark.soak
@pytest.mark.parametrize("weight", DENSE["weight"])
def test_zo_dense_linear_grid(weight: str) -> None:
    check_grid(check, {**DENSE, "weight": (weight,)}, DENSE_SOAK)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight", PATHS)
def test_zo_dense_linear_row_does_not_depend_on_other_rows(isa: str, weight: str) -> None:
    arguments = example(31, 70, 200, weight)
    y = run(isa, **arguments)
    for count in (1, 2, 5, 6, 7, 12, 13, 30):
        assert torch.equal(run(isa, **arguments | dict(x=arguments["x"][:count])), y[:count]), f"M = {count}"
        assert torch.equal(run(isa, **arguments | dict(x=arguments["x"][-count:])), y[-count:]), (
            f"the last {count} rows"
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("G", "rows"), [(2, 5), (3, 1), (60, 2), (600, 1), (2, 300)])
def test_zo_dense_linear_row_does_not_depend_on_groups(isa: str, G: int, rows: int) -> None:
    arguments = example(rows * G, 70, 96, G=G)
    y = run(isa, **arguments)
    for g in (0, G // 2, G - 1):
        mine = slice(g * rows, (g + 1) * rows)
        alone = arguments | dict(x=arguments["x"][mine], sigmas=arguments["sigmas"][g : g + 1], groups=1)
        assert torch.equal(run(isa, **alone), y[mine]), f"group {g}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("M", [2, 700])
def test_zo_dense_linear_threads(isa: str, M: int) -> None:
    arguments = example(M, 800 if M < 100 else 70, 1600, G=2)  # enough work for more than one thread
    torch.set_num_threads(1)
    y = run(isa, **arguments)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert torch.equal(run(isa, **arguments), y), f"{threads} threads"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("half", [1, 9])
def test_zo_dense_linear_direction_is_felt(isa: str, noise: str, half: int) -> None:
    sigma, N, K = 1e-3, 100, 128
    x = activations(half, K, torch.float32)
    arguments = example(2 * half, N, K, G=2, S=1)
    arguments |= dict(x=torch.cat([x, x]), sigmas=torch.tensor([[sigma], [-sigma]]), noise=noise, bias=None)

    def quotient(y: Tensor) -> Tensor:
        return (y[:half] - y[half:]) / (2 * sigma)

    z = rng.noise(noise, arguments["seeds"][0], arguments["param_id"], N, K)
    w = reference.dequantize(*(arguments[n] for n in WEIGHT), N, K, torch.float32)
    plain = torch.cat(
        [x @ (w + sigma * z).T, x @ (w - sigma * z).T]
    )  # torch, too, adds W and sigma Z before it multiplies
    assert_no_worse(quotient(run(isa, **arguments)), quotient(plain), x.double() @ z.double().T, "(y+ - y-) / 2 sigma")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight", PATHS)
@pytest.mark.parametrize("M", [1, 20])
def test_zo_dense_linear_without_noise_is_zo_linear(isa: str, weight: str, M: int) -> None:
    arguments = example(M, 70, 96, weight)
    without = {k: v for k, v in arguments.items() if k not in ("seeds", "sigmas", "param_id")}
    linear = dict.fromkeys(("base_basis", "base_coeff", "basis", "coeff", "coeff_groups", "projected", *OPTIONAL[5:8]))
    with ops.using("cpu", isa=isa):
        y = ops.zo_linear(**linear | without)
    assert torch.equal(run(isa, **without), y)
    assert torch.equal(run(isa, **arguments | dict(sigmas=torch.zeros(1, 2))), y)


@pytest.mark.parametrize("isa", ISAS)
def test_zo_dense_linear_clean_group_is_clean(isa: str) -> None:
    arguments = example(9, 70, 96, G=3)
    arguments["sigmas"][0] = 0
    alone = arguments | dict(x=arguments["x"][:3], sigmas=torch.zeros(1, 2), groups=1)
    y = run(isa, **arguments)
    assert torch.equal(y[:3], run(isa, **alone))
    assert not torch.equal(y[3:6], y[6:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mask", ["magnitude", "random"])
def test_zo_dense_linear_mask_of_everything_and_nothing(isa: str, mask: str) -> None:
    arguments = example(4, 70, 96)
    named = dict(mask=mask, mask_seed=torch.tensor([3]) if mask == "random" else None)
    everything = named | dict(mask_value=torch.tensor([1.0 if mask == "random" else 1e9]))
    nothing = named | dict(mask_value=torch.tensor([0.0 if mask == "random" else -1.0]))
    clean = run(isa, **arguments | dict(sigmas=torch.zeros(1, 2)))
    noisy = run(isa, **arguments)
    truth = expected(**arguments, compute=torch.float64)
    assert_no_worse(run(isa, **arguments | everything), noisy, truth)
    masked = run(isa, **arguments | nothing)
    assert_no_worse(masked, clean, expected(**arguments | nothing, compute=torch.float64))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize(
    "weight", ["int4-g32", "int4-g64-sym", "int4-row-f32", "int8-g32", "nf4-g64-nested", "fp4-g96"]
)
@pytest.mark.parametrize(("M", "N", "K"), [(8, 33, 100), (10, 70, 700), (4, 64, 8)])
def test_zo_dense_linear_noise_on_scales(isa: str, weight: str, noise: str, M: int, N: int, K: int) -> None:
    arguments = example(M, N, K, weight, G=2, sigma=0.01) | dict(noise=noise, noise_on="scale", row_offset=5)
    arguments["sigmas"][0] = 0
    if weight == "int4-g32":
        packed = stored_of(arguments)
        assert packed is not None
        arguments["scale"][::7] = 0  # a group of one value: no zero point
    truth, plain = expected(**arguments, compute=torch.float64), expected(**arguments)
    y = run(isa, **arguments)
    assert_no_worse(y, plain, truth)
    clean = run(isa, **{k: v for k, v in arguments.items() if k != "noise_on"} | dict(sigmas=torch.zeros(2, 2)))
    assert torch.equal(y[: M // 2], clean[: M // 2])


def direct(**arguments: Any) -> Tensor:
    """The CPU implementation, whether dispatch would take it or not."""
    from zoact_kernels.cpu_ops import Cpu

    return Cpu().zo_dense_linear(**arguments)


def test_zo_dense_linear_refuses_scales_it_cannot_move() -> None:
    flat = example(2, 33, 100, "nf4-g64-flat") | dict(noise_on="scale", cols=2)
    with pytest.raises(RuntimeError, match="scales of its own per row"):
        direct(**dict.fromkeys(OPTIONAL) | flat)
    scaled = example(2, 33, 100) | dict(noise_on="scale", cols=4, noise_scale=torch.ones(33, 100))
    with pytest.raises(RuntimeError, match="no mask and no noise_scale"):
        direct(**dict.fromkeys(OPTIONAL) | scaled)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("M", [3, 20])
def test_zo_dense_linear_strides_and_shapes_of_x(isa: str, M: int) -> None:
    arguments = example(M, 33, 97)
    x, y = arguments["x"], run(isa, **arguments)
    padded = torch.full((M, 102), float("nan"))
    padded[:, 2:-3] = x
    for what, same in dict(transposed=x.T.contiguous().T, apart=padded[:, 2:-3]).items():
        assert torch.equal(run(isa, **arguments | dict(x=same)), y), what
    assert torch.equal(run(isa, **arguments | dict(x=x[:1].expand(M, 97))), y[:1].expand(M, 33))
    assert torch.equal(run(isa, **arguments | dict(x=x.view(1, M, 97))), y.view(1, M, 33))
    assert run(isa, **arguments | dict(x=x[:0])).shape == (0, 33)
