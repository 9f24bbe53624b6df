"""Addresses past 2^31 elements: in x, in the weight, in w. A 32-bit product of a row and a stride wraps there.

Here the compiled CPU kernels; tests/interpreted/addressing.py runs the same tests on the Triton kernels.
"""

from __future__ import annotations

import pytest
import torch
from cases import stored
from sparse_memory import FAR, far_rows, last_rows
from test_zo_linear import OPTIONAL, example

from zoact_kernels import native, ops
from zoact_kernels.triton_ops import interpreted

NAME = "triton" if interpreted() else "cpu"
pytestmark = pytest.mark.skipif(NAME == "cpu" and native.module() is None, reason=native.why_missing())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_of_x_far_apart(dtype: torch.dtype) -> None:
    arguments = dict.fromkeys(OPTIONAL) | example(5, 33, 100, R=3, G=1, S=1, layout="row")
    arguments["x"] = arguments["x"].to(dtype)
    with ops.using(NAME):
        near = ops.zo_linear(**arguments)
        far = ops.zo_linear(**arguments | {"x": far_rows(arguments["x"])})
    assert torch.equal(near, far)


def test_x_of_zo_dense_linear_far_apart() -> None:
    packed = stored("int4-g32", 20, 64)
    assert packed is not None
    one = torch.ones(1, dtype=torch.int64)
    x = torch.randn(3, 64)

    def run(x: torch.Tensor) -> torch.Tensor:
        with ops.using(NAME):
            return ops.zo_dense_linear(
                x, packed.weight, packed.scale, packed.offset, None, None, one, torch.ones(1, 1), one, None, None,
                None, "int4", "row", 32, 20,
            )  # fmt: skip

    assert torch.equal(run(x), run(far_rows(x)))


@pytest.mark.parametrize("weight", ["int4-g32", "int8-row", "dense-bf16"])
def test_rows_of_a_weight_past_2_to_the_31(weight: str) -> None:
    """The last rows of a weight of more than 2^31 stored elements."""
    K, tail = 4096, 70
    packed = stored(weight, tail, K)
    assert packed is not None
    stored_columns = packed.weight.shape[1]
    rows = (1 << 31) // stored_columns + 100
    tensors = [None if t is None else last_rows(t, rows) for t in (packed.weight, packed.scale, packed.offset)]
    with ops.using(NAME):
        got = ops.dequantize(
            *tensors, None, packed.format, "row", packed.group_size, rows, K, torch.float32, rows - tail, tail
        )
    assert torch.equal(got, packed.dequantize(torch.float32))


@pytest.mark.parametrize("rank", [0, 3])
def test_rows_of_w_far_apart(rank: int) -> None:
    def run(w: torch.Tensor) -> torch.Tensor:
        one = torch.ones(1, dtype=torch.int64)
        basis = torch.linspace(-1, 1, 9 * rank).view(9, rank) if rank else None
        with ops.using(NAME):
            torch.ops.zoact.zo_perturb_(w, one, torch.ones(1), one, basis)
        return w

    w = torch.randn(5, 9)
    assert torch.equal(run(w.clone()), run(far_rows(w)))


def test_far_is_far() -> None:
    assert 2 * FAR > 2**31
