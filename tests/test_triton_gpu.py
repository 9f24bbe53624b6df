"""What only a GPU can show: the compiled kernels' numbers, equal bits in tiles of every width, a replayed graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import test_zo_perturb
import test_zo_update
import torch
from cases import DENSE, DTYPES, LINEAR, WEIGHTS, cover, dense_arguments, linear_arguments, stored
from close import assert_no_worse
from test_zo_dense_linear import OPTIONAL as DENSE_OPTIONAL
from test_zo_linear import OPTIONAL, example, rows_of
from torch import Tensor

from zoact_kernels import ops, reference

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def run(name: str = "triton", **arguments: Any) -> Tensor:
    with ops.using(name):
        return ops.zo_linear(**dict.fromkeys(OPTIONAL) | on_device(arguments)).cpu()


@pytest.mark.parametrize("name", ["triton", "panel"])
@pytest.mark.parametrize("case", [c for c in cover(LINEAR) if c.weight != "none"], ids=str)
def test_zo_linear(case: Any, name: str) -> None:
    torch.manual_seed(0)
    arguments = linear_arguments(case)
    filled = dict.fromkeys(OPTIONAL) | arguments
    truth = reference.zo_linear(**filled, compute=torch.float64)
    assert_no_worse(run(name, **arguments), reference.zo_linear(**filled), truth)


@pytest.mark.parametrize("case", cover(DENSE), ids=str)
def test_zo_dense_linear(case: Any) -> None:
    torch.manual_seed(0)
    filled = dict.fromkeys(DENSE_OPTIONAL) | dense_arguments(case)
    truth = reference.zo_dense_linear(**filled, compute=torch.float64)
    with ops.using("triton"):
        y = ops.zo_dense_linear(**on_device(filled)).cpu()
    assert_no_worse(y, reference.zo_dense_linear(**filled), truth)


@pytest.mark.parametrize("weight", [name for name in WEIGHTS if name != "none"])
def test_dequantize(weight: str) -> None:
    packed = stored(weight, 130, 257)
    assert packed is not None
    for dtype in DTYPES.values():
        with ops.using("triton"):
            moved = packed.to(DEVICE)
            got = ops.dequantize(
                moved.weight, moved.scale, moved.offset, moved.nested, moved.format, moved.layout, moved.group_size,
                130, 257, dtype,
            )  # fmt: skip
        assert torch.equal(got.cpu().view(torch.uint8), packed.dequantize(dtype).view(torch.uint8))


def moved(problem: Any) -> Any:
    """A call of zo_update_ or zo_perturb_ with its tensors on the device."""
    there = copy.copy(problem)
    for name, value in vars(problem).items():
        if isinstance(value, Tensor):
            setattr(there, name, value.to(DEVICE))
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            setattr(there, name, [tensor.to(DEVICE) for tensor in value])
    return there


@pytest.mark.parametrize("case", test_zo_update.CASES, ids=str)
def test_zo_update(case: Any) -> None:
    p = test_zo_update.problem(case)
    want, got = test_zo_update.run(p), moved(p)
    with ops.using("triton"):
        torch.ops.zoact.zo_update_(*got.arguments())
    for name in ("coeffs", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
            assert torch.equal(a.cpu(), b), name


@pytest.mark.parametrize("case", test_zo_perturb.CASES, ids=str)
def test_zo_perturb(case: Any) -> None:
    p = test_zo_perturb.problem(case)
    want, got = test_zo_perturb.run(p), moved(p)
    with ops.using("triton"):
        torch.ops.zoact.zo_perturb_(*got.arguments())
    assert test_zo_perturb.same(got.w.cpu(), want.w).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["int4-g32", "nf4-g64-flat", "int8-row", "dense-bf16"])
@pytest.mark.parametrize("N", [70, 9000])
def test_rows_have_the_same_bits_in_every_tile(N: int, weight: str, dtype: str) -> None:
    """K is split for the small N; M runs through all widths of tiles."""
    arguments = example(200, N, 1300, weight, R=20, layout="row")
    arguments["x"] = arguments["x"].to(DTYPES[dtype])
    y = run(**arguments)
    for count in (1, 2, 16, 17, 32, 33, 64, 65, 128):
        assert torch.equal(run(**rows_of(arguments, 0, count)), y[:count]), f"M = {count}"


def test_a_replayed_graph_reads_new_seeds() -> None:
    arguments = dict.fromkeys(OPTIONAL) | on_device(example(6, 70, 1300, R=20, G=2, layout="row"))
    with ops.using("triton"):
        ops.zo_linear(**arguments)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.zo_linear(**arguments)
        arguments["seeds"] += 1
        graph.replay()
        assert torch.equal(y, ops.zo_linear(**arguments))
