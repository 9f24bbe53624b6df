"""Schemas, checks, dispatch and torch.compile of the five ops."""

from __future__ import annotations

import contextlib

import pytest
import torch
from fake_device import on_fake_device
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from zoact_kernels import ops
from zoact_kernels.dispatch import IMPLEMENTATIONS, ROOF, Problem, choose, explain, using
from zoact_kernels.quantize import quantize

Z = torch.ops.zoact


def linear_args(M=6, N=33, K=96, R=3, G=2, format="int4", dtype=torch.float32, layout="row", S=2, **changes):
    """Arguments of a zo_linear call, by name; `changes` replace some."""
    torch.manual_seed(0)
    w = quantize(torch.randn(N, K) / K**0.5, format, 32 if format != "dense" else None).to_layout(layout)
    args = dict(
        x=(torch.randn(M, K) + 3).to(dtype),
        weight=w.weight,
        scale=w.scale,
        offset=w.offset,
        nested=None,
        bias=torch.randn(N),
        base_basis=None,
        base_coeff=None,
        basis=torch.linalg.qr(torch.randn(K, R))[0].contiguous() if R else None,
        coeff=torch.randn(N, R) if R else None,
        coeff_groups=None,
        projected=None,
        seeds=torch.arange(S) - 1 if R else None,
        sigmas=torch.randn(G, S) * 0.1 if R else None,
        param_id=torch.tensor([77]) if R else None,
        format=format,
        layout=layout,
        group_size=w.group_size,
        out_features=N,
        noise="normal",
        groups=G,
    )
    return {**args, **changes}


def dense_args(M=6, N=20, K=64, G=2, format="int4", **changes):
    torch.manual_seed(1)
    w = quantize(torch.randn(N, K) / 8, format, 32)
    args = dict(
        x=torch.randn(M, K),
        weight=w.weight,
        scale=w.scale,
        offset=w.offset,
        nested=None,
        bias=None,
        seeds=torch.tensor([4, -5]),
        sigmas=torch.randn(G, 2) * 0.1,
        param_id=torch.tensor([3]),
        noise_scale=None,
        mask_value=None,
        mask_seed=None,
        format=format,
        layout="row",
        group_size=32,
        out_features=N,
        groups=G,
    )
    return {**args, **changes}


@pytest.mark.parametrize("format", ["dense", "int8", "int4", "nf4", "fp4"])
def test_opcheck_zo_linear(format):
    torch.library.opcheck(Z.zo_linear.default, (), linear_args(format=format))
    args = linear_args(format=format)
    args["x"].requires_grad_()
    args["coeff"].requires_grad_()
    torch.library.opcheck(Z.zo_linear.default, (), args)


def test_opcheck_the_other_ops():
    torch.library.opcheck(Z.zo_dense_linear.default, (), dense_args())
    c, m, v = torch.randn(5, 2), torch.zeros(5, 2), torch.zeros(5, 2)
    hyper = torch.tensor([1e-2, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.001])
    torch.library.opcheck(
        Z.zo_update_.default,
        ([c], [m], [v], torch.tensor([9]), torch.tensor([3]), torch.ones(1), hyper, torch.tensor([False]), "adam"),
    )
    torch.library.opcheck(
        Z.zo_perturb_.default, (torch.randn(5, 7), torch.tensor([3]), torch.ones(1), torch.tensor([9]))
    )
    w = quantize(torch.randn(8, 64), "int4", 32)
    torch.library.opcheck(
        Z.dequantize.default, (w.weight, w.scale, w.offset, None, "int4", "row", 32, 8, 64, torch.float32)
    )


WRONG = [
    (dict(format="int5"), "`format` is 'int5'"),
    (dict(scale=None), "`scale` is None"),
    (dict(scale=torch.ones(64, 3)), r"`scale` has shape \(64, 3\)"),
    (dict(weight=torch.zeros(33, 40, dtype=torch.uint8)), r"`weight` has shape \(33, 40\)"),
    (dict(x=torch.randn(6, 64)), "in_features=64 needs"),
    (dict(x=torch.tensor(1.0)), "`x` has no dimensions"),
    (dict(groups=4, sigmas=torch.ones(4, 2)), "4 row groups do not divide"),
    (dict(groups=0), "`groups` is 0"),
    (dict(sigmas=torch.ones(3, 2)), r"`sigmas` has shape \(3, 2\)"),
    (dict(sigmas=torch.ones(2, 2, dtype=torch.float64)), "`sigmas` is torch.float64"),
    (dict(sigmas=None), "`seeds` needs `sigmas`"),
    (dict(seeds=None), "`sigmas` is given without `seeds`"),
    (dict(seeds=torch.ones(2, dtype=torch.int32)), "`seeds` is torch.int32"),
    (dict(noise="uniform"), "`noise` is 'uniform'"),
    (dict(bias=torch.randn(5)), r"`bias` has shape \(5,\)"),
    (dict(basis=torch.randn(90, 3)), r"`basis` has shape \(90, 3\)"),
    (dict(basis=None), "need a `basis`"),
    (dict(coeff=torch.randn(33, 4)), r"`coeff` has shape \(33, 4\)"),
    (dict(coeff=torch.randn(33, 3).half()), "`coeff` is torch.float16"),
    (dict(base_basis=torch.randn(96, 2)), "come together"),
    (dict(projected=torch.randn(6, 3)), "pass one of the two"),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=[m for _, m in WRONG])
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Z.zo_linear.default(**linear_args(**changes))


def test_zo_update_checks():
    c = torch.randn(5, 2)
    good = dict(
        coeffs=[c], exp_avgs=[], exp_avg_sqs=[], param_ids=torch.tensor([9]), seeds=torch.tensor([3]),
        weights=torch.ones(1), hyper=torch.zeros(7), skip=torch.tensor([False]), rule="sgd",
    )  # fmt: skip
    for changes, message in (
        (dict(rule="rmsprop"), "`rule` is 'rmsprop'"),
        (dict(rule="adam"), "`exp_avgs` has 0 tensors"),
        (dict(coeffs=[c.T]), r"`coeffs\[0\]` has shape"),
        (dict(weights=torch.ones(2)), r"`weights` has shape \(2,\)"),
        (dict(hyper=torch.zeros(3)), "`hyper` has shape"),
        (dict(param_ids=torch.tensor([9, 9])), "`param_ids` has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            Z.zo_update_.default(**{**good, **changes})


def test_dispatch_is_pure_explained_and_forced():
    problem = ops.linear_problem(**linear_args())
    told = explain(problem)
    assert told.chosen == choose(problem).name
    assert set(told.refusals) | set(told.seconds) == {i.name for i in IMPLEMENTATIONS}
    assert told.seconds[told.chosen] == min(told.seconds.values())
    with using("reference"):
        assert explain(problem).chosen == "reference"
        assert ops.implementation(problem).name == "reference"
    assert explain(problem).chosen == told.chosen
    with using("reference", op="dequantize"):
        assert explain(problem).chosen == told.chosen
        assert explain(problem._replace(op="dequantize")).chosen == "reference"
    with pytest.raises(ValueError, match="`op` is 'linear'"), using("cpu", op="linear"):
        pass
    with pytest.raises(ValueError, match="implementations are cuda, triton, panel, cpu, reference"), using("gpu"):
        pass
    with pytest.raises(ValueError, match="`isa` is 'neon'"), using("cpu", isa="neon"):
        pass


def test_a_forced_implementation_that_declines_raises():
    args = linear_args(dtype=torch.float64)
    with using("cpu"), pytest.raises(RuntimeError, match="float64 is not float32"):
        Z.zo_linear.default(**args)
    assert Z.zo_linear.default(**args).dtype == torch.float64  # the reference takes it, and explain says so
    assert "float64" in explain(ops.linear_problem(**args)).refusals["cpu"]


def test_batch_invariance_can_be_asked_for():
    problem = Problem("zo_linear", "cpu", torch.float64, 1, 2, 3)
    with pytest.raises(RuntimeError, match="batch_invariant is False"):
        choose(problem, None, True)


def test_costs_are_positive_and_roofs_known():
    problem = ops.linear_problem(**linear_args())
    for implementation in IMPLEMENTATIONS:
        flops, moved = implementation.cost(problem)
        assert flops > 0 and moved > 0
    assert "cpu" in ROOF


def every_op():
    """(op, arguments by name) of each op, every optional tensor present in some call."""
    linear, dense = (
        linear_args(),
        dense_args(mask="random", mask_value=torch.tensor([0.5]), mask_seed=torch.tensor([5])),
    )
    yield Z.zo_linear.default, {**linear, "base_basis": torch.randn(96, 2), "base_coeff": torch.randn(33, 2)}
    yield Z.zo_linear.default, linear_args(coeff_groups=torch.randn(2, 33, 3), basis=torch.randn(2, 96, 3))
    yield Z.zo_dense_linear.default, {**dense, "noise_scale": torch.rand(20, 64)}
    step = dict(seeds=torch.tensor([4, -5]), weights=torch.randn(2))
    coeffs = [torch.randn(7, 3), torch.randn(1, 5)]
    moments = dict(exp_avgs=[c.clone() for c in coeffs], exp_avg_sqs=[c.clone() for c in coeffs])
    numbers = dict(hyper=torch.zeros(7), skip=torch.zeros(1, dtype=torch.bool), rule="adam")
    yield Z.zo_update_.default, {"coeffs": coeffs, **moments, "param_ids": torch.tensor([1, 2]), **step, **numbers}
    param_id = torch.tensor([3])
    yield (
        Z.zo_perturb_.default,
        {"w": torch.randn(9, 5), **step, "param_id": param_id, "rounding_seed": param_id, "basis": torch.randn(5, 2)},
    )
    stored = {name: linear[name] for name in "weight scale offset nested format layout group_size out_features".split()}
    yield Z.dequantize.default, {**stored, "in_features": 96, "dtype": torch.bfloat16, "row_start": 3, "rows": 7}


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_ops_on_a_device_that_is_not_there(device, index):
    """Shapes, dtypes and devices of fake tensors are those of the real call; in-place ops keep their tensors."""
    op, args = list(every_op())[index]
    mode = FakeTensorMode()
    there = on_fake_device(mode, args)
    if device == "meta":
        there = tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), args)
    with mode if device == "cuda" else contextlib.nullcontext():
        made = op(**there)
    want = op(**args)
    if want is None:
        assert made is None
    else:
        assert (made.shape, made.dtype, made.device.type) == (want.shape, want.dtype, device)
        assert made.stride() == want.stride()
