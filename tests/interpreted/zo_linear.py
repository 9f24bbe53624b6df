"""The Triton zo_linear against reference.py, and what it promises beyond closeness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LINEAR, LINEAR_SOAK, Case, activations, check_grid, cover, linear_arguments
from close import assert_no_worse
from test_zo_linear import OPTIONAL, example, expected, plainly, rows_of, strided
from torch import Tensor

from zoact_kernels import ops, rng
from zoact_kernels.triton_ops import tiles

PATHS = ("int4-g32", "int4-g64-sym", "int8-row", "nf4-g64-nested", "nf4-g64-flat", "dense-f32", "dense-bf16")


def run(**arguments: Any) -> Tensor:
    with ops.using("triton"):
        return ops.zo_linear(**dict.fromkeys(OPTIONAL) | arguments)


def row_example(*args: Any, **named: Any) -> dict[str, Any]:
    return example(*args, **named, layout="row")


def check(case: Case) -> None:
    torch.manual_seed(0)
    arguments = linear_arguments(case)
    assert_no_worse(run(**arguments), expected(**arguments), expected(**arguments, compute=torch.float64))


@pytest.mark.parametrize("case", cover(LINEAR), ids=str)
def test_zo_linear(case: Case) -> None:
    check(case)


@pytest.mark.soak
@pytest.mark.parametrize("weight", LINEAR["weight"])
def test_zo_linear_grid(weight: str) -> None:
    check_grid(check, {**LINEAR, "weight": (weight,)}, LINEAR_SOAK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [3, 70])
def test_zo_linear_split(dtype: torch.dtype, M: int) -> None:
    """K in two splits, h in three chunks: beside one another for few rows, one after the other for many."""
    assert tiles.splits(40, 1300)[0] == 2
    arguments = row_example(M, 40, 1300, S=1)
    arguments["x"] = arguments["x"].to(dtype)
    assert_no_worse(run(**arguments), expected(**arguments), expected(**arguments, compute=torch.float64))


def test_chunks_of_h_beside_one_another_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and many sum the chunks of x A in one order: equal bits, whatever M."""
    arguments = row_example(5, 40, 1300, S=1)
    beside = run(**arguments)
    assert tiles.chunk_parts(5, 1300) == (3, 1) and tiles.chunk_parts(2000, 1300) == (1, 3)
    monkeypatch.setattr(tiles, "chunk_parts", lambda M, K: (1, 3))
    assert torch.equal(run(**arguments), beside)


@pytest.mark.parametrize("weight", ["int4-g32", "dense-f32"])
def test_zo_linear_splits_give_the_same_bits(weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The partial sums written and read again are those that stay in registers."""
    arguments = row_example(5, 40, 1300, weight, S=1)
    beside = run(**arguments)
    tile = tiles.linear_tile(tiles.Shape("", "float32", "int4", 5, 40, 1300))
    rows = torch.cat([arguments["x"], torch.zeros(tile.BM, 1300)])  # more than a tile: the splits follow one another
    monkeypatch.setattr(tiles, "linear_tile", lambda *_: tile)
    assert torch.equal(run(**arguments | dict(x=rows))[:5], beside)


@pytest.mark.parametrize("weight", PATHS)
def test_zo_linear_row_does_not_depend_on_other_rows(weight: str) -> None:
    """Within a tile. That tiles of other widths agree is a property of the machine code: test_machine_code.py."""
    arguments = row_example(16, 70, 200, weight)
    y = run(**arguments)
    for count in (1, 2, 7, 13):
        assert torch.equal(run(**rows_of(arguments, 0, count)), y[:count]), f"M = {count}"
        assert torch.equal(run(**rows_of(arguments, 16 - count, 16)), y[16 - count :]), f"the last {count} rows"


@pytest.mark.parametrize("G", [2, 5])
def test_zo_linear_row_does_not_depend_on_groups(G: int) -> None:
    arguments = row_example(2 * G, 70, 96, R=20, G=G)
    arguments["coeff_groups"] = torch.randn(G, 70, 20)
    y = run(**arguments)
    for g in range(G):
        alone = rows_of(arguments, 2 * g, 2 * g + 2)
        alone |= dict(
            sigmas=arguments["sigmas"][g : g + 1], coeff_groups=arguments["coeff_groups"][g : g + 1], groups=1
        )
        assert torch.equal(run(**alone), y[2 * g : 2 * g + 2]), f"group {g}"


@pytest.mark.parametrize("M", [2, 20])
def test_zo_linear_probe_survives(M: int) -> None:
    arguments = row_example(M, 96, 256, R=4)
    arguments["basis"] = arguments["basis"].abs()
    arguments["coeff"][17, 2] = 1
    moved = arguments["coeff"].clone()
    moved[17, 2] += 2**-14
    change = run(**arguments | dict(coeff=moved)) - run(**arguments)
    h = (arguments["x"] @ arguments["basis"])[:, 2]
    assert ((change[:, 17] * 2**14 / h - 1).abs() < 2**-4).all()
    assert (change[:, :17] == 0).all()
    assert (change[:, 18:] == 0).all()


@pytest.mark.parametrize("noise", rng.KINDS)
def test_zo_linear_direction_is_felt(noise: str) -> None:
    sigma, N, K, R = 1e-3, 100, 128, 4
    arguments = row_example(8, N, K, R=R, G=2, S=1)
    x = activations(4, K, torch.float32)
    arguments |= dict(x=torch.cat([x, x]), sigmas=torch.tensor([[sigma], [-sigma]]), noise=noise, bias=None)

    def quotient(y: Tensor) -> Tensor:
        return (y[:4] - y[4:]) / (2 * sigma)

    z = rng.noise(noise, arguments["seeds"][0], arguments["param_id"], N, R)
    truth = (x.double() @ arguments["basis"].double()) @ z.double().T
    assert_no_worse(quotient(run(**arguments)), quotient(expected(**arguments)), truth, "(y+ - y-) / 2 sigma")


def test_zo_linear_signs_swap() -> None:
    arguments = row_example(6, 70, 96, G=2)
    x = activations(3, 96, torch.float32)
    arguments["x"] = torch.cat([x, x])
    plus, minus = run(**arguments).chunk(2)
    assert not torch.equal(plus, minus)
    assert torch.equal(run(**arguments | dict(sigmas=arguments["sigmas"].flip(0))), torch.cat([minus, plus]))


def test_zo_linear_zero_sigma_and_coeff_change_nothing() -> None:
    arguments = row_example(9, 70, 96, G=3)
    nothing = arguments | dict(coeff=torch.zeros(70, 3), sigmas=torch.zeros(3, 2))
    assert torch.equal(run(**nothing), run(**plainly(arguments)))
    arguments["sigmas"][0] = 0
    without_noise = {k: v for k, v in arguments.items() if k not in ("seeds", "sigmas", "param_id")} | dict(groups=1)
    assert torch.equal(run(**arguments)[:3], run(**rows_of(without_noise, 0, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_zo_linear_strides(dtype: torch.dtype) -> None:
    arguments = row_example(6, 33, 64, G=2)
    arguments["x"] = arguments["x"].to(dtype)
    y = run(**arguments)
    for name, x in strided(arguments["x"]).items():
        assert torch.equal(run(**arguments | dict(x=x)), y), name
    assert torch.equal(run(**arguments | dict(x=arguments["x"].view(2, 3, 64))), y.view(2, 3, 33))


@pytest.mark.parametrize("shape", [(0, 64), (4, 0, 64)])
def test_zo_linear_of_nothing(shape: tuple[int, ...]) -> None:
    arguments = row_example(1, 33, 64) | dict(x=torch.empty(shape))
    assert run(**arguments).shape == (*shape[:-1], 33)


def test_zo_linear_rank_128() -> None:
    arguments = row_example(4, 40, 96, R=128, G=2)
    assert_no_worse(run(**arguments), expected(**arguments), expected(**arguments, compute=torch.float64))


def test_zo_linear_seeds_on_the_device() -> None:
    """A launch reads seeds and sigmas when it runs: changed in place, they change y."""
    arguments = row_example(4, 40, 96)
    before = run(**arguments)
    arguments["seeds"] += 1
    moved = run(**arguments)
    assert not torch.equal(before, moved)
    assert_no_worse(moved, expected(**arguments), expected(**arguments, compute=torch.float64))


def test_zo_linear_far_addresses() -> None:
    """Rows of the parameter beyond 2^31 elements: 64-bit addresses of the noise."""
    arguments = row_example(4, 40, 96, R=16) | dict(row_offset=2**33)
    assert_no_worse(run(**arguments), expected(**arguments), expected(**arguments, compute=torch.float64))
