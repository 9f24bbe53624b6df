"""The five ops: schema and checks. They are `torch.ops.zoact.*`.

    zo_linear        y_g = x_g D(W)^T + (x_g A)(C + sum_s sigmas[g, s] Z_s)^T + b         low-rank directions
    zo_dense_linear  y_g = x_g (D(W) + sum_s sigmas[g, s] Z_s)^T + b                      dense directions
    zo_update_       C <- rule(C, sum_s weights[s] Z_s), all layers of a model in one call
    zo_perturb_      w += sum_s weights[s] Z_s (. basis^T)
    dequantize       D(W), or some of its rows

Z_s is made inside from (seeds[s], param_id, row, column) by design law 2.1; it is never an argument and never stored.
The first `groups`-th part of the rows of x belongs to row group 0, and so on. `dispatch.choose` says which code runs,
`autograd` how gradients come back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd
from .dispatch import Explanation, Problem, arch_of, choose, explain, implementation, using
from .formats import FORMATS, LAYOUTS, expected_shapes
from .triton_ops.host import tf32

__all__ = ["Explanation", "Problem", "choose", "explain", "using"]

NOISES = ("normal", "rademacher")
RULES = ("sgd", "momentum", "adam", "adamw")
MASKS = ("none", "magnitude", "random")
HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "1 - beta1^t", "1 - beta2^t")

library = torch.library.Library("zoact", "DEF")

# ---------------------------------------------------------------------------------------------------------------------
# Checks: each names the argument, what it was and what is allowed, before a pointer is taken.


def _is(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor is None:
        return
    if tensor.dtype is not dtype:
        raise ValueError(f"`{name}` is {tensor.dtype}; it has to be {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; it has to be {shape}")
    if tensor.device != device:
        raise ValueError(f"`{name}` is on {tensor.device}; x is on {device}: move it there")


def _check_weight(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    nested: Tensor | None,
    format: str,
    layout: str,
    group_size: int,
    out_features: int,
    in_features: int,
) -> None:
    if format not in FORMATS:
        raise ValueError(f"`format` is {format!r}; formats are {', '.join(FORMATS)}")
    if weight is None:
        return
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` is {layout!r}; layouts are {', '.join(LAYOUTS)}")
    flat = scale is not None and scale.dim() == 1 and weight.dim() == 1 and layout == "row"
    shapes = expected_shapes(format, layout, group_size, out_features, in_features, flat)
    stored = (("weight", weight, shapes[0]), ("scale", scale, shapes[1]), ("offset", offset, shapes[1]))
    for name, tensor, shape in stored:
        if tensor is None:
            if name == "scale" and format != "dense":
                raise ValueError(f"`scale` is None; {format} needs one of shape {shape}")
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}; {format}, layout {layout!r}, group_size {group_size}, "
                f"out_features={out_features}, in_features={in_features} needs {shape}"
            )
        if tensor.device != x.device:
            raise ValueError(f"`{name}` is on {tensor.device}; x is on {x.device}: move it there")
        if not tensor.is_contiguous():
            raise ValueError(f"`{name}` is not contiguous; pass {name}.contiguous()")
    if nested is not None and nested.device != x.device:
        raise ValueError(f"`nested` is on {nested.device}; x is on {x.device}: move it there")


def _check_noise(
    x: Tensor, seeds: Tensor | None, sigmas: Tensor | None, param_id: Tensor | None, noise: str, groups: int
) -> int:
    """Number of seeds S; 0 when the call has no perturbation."""
    if groups < 1:
        raise ValueError(f"`groups` is {groups}; it has to be at least 1")
    if x.dim() > 1 and x.shape[0] % groups:
        raise ValueError(f"`x` has a leading size of {x.shape[0]}, which {groups} row groups do not divide")
    if x.dim() == 1 and groups > 1:
        raise ValueError(f"`x` is one row; it can't hold {groups} row groups")
    if seeds is None:
        if sigmas is not None:
            raise ValueError("`sigmas` is given without `seeds`")
        return 0
    if sigmas is None or param_id is None:
        raise ValueError("`seeds` needs `sigmas` and `param_id` beside it")
    if noise not in NOISES:
        raise ValueError(f"`noise` is {noise!r}; kinds are {', '.join(NOISES)}")
    count = seeds.numel()
    _is("seeds", seeds, torch.int64, (count,), x.device)
    _is("sigmas", sigmas, torch.float32, (groups, count), x.device)
    _is("param_id", param_id, torch.int64, (1,), x.device)
    return count


def _check_bias(bias: Tensor | None, out_features: int, device: torch.device) -> None:
    if bias is not None:
        _is("bias", bias, bias.dtype, (out_features,), device)


def _rows(x: Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# zo_linear


def linear_problem(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    nested: Tensor | None,
    bias: Tensor | None,
    base_basis: Tensor | None,
    base_coeff: Tensor | None,
    basis: Tensor | None,
    coeff: Tensor | None,
    coeff_groups: Tensor | None,
    projected: Tensor | None,
    seeds: Tensor | None,
    sigmas: Tensor | None,
    param_id: Tensor | None,
    format: str,
    layout: str,
    group_size: int,
    out_features: int,
    noise: str = "normal",
    groups: int = 1,
    row_offset: int = 0,
    cols: int = 0,
) -> Problem:
    """Check the arguments of a `zo_linear` call and describe it. Raises ValueError naming what is wrong."""
    if x.dim() == 0:
        raise ValueError("`x` has no dimensions; it has to be [..., in_features]")
    N, K, device = out_features, x.shape[-1], x.device
    _check_weight(x, weight, scale, offset, nested, format, layout, group_size, N, K)
    S = _check_noise(x, seeds, sigmas, param_id, noise, groups)
    _check_bias(bias, N, device)
    M = _rows(x)
    features = []
    base_rank = 0
    if base_basis is not None or base_coeff is not None:
        if base_basis is None or base_coeff is None:
            raise ValueError("`base_basis` and `base_coeff` come together; one of them is None")
        base_rank = base_basis.shape[-1]
        _is("base_basis", base_basis, torch.float32, (K, base_rank), device)
        _is("base_coeff", base_coeff, torch.float32, (N, base_rank), device)
    rank = 0
    if projected is not None:
        if basis is not None:
            raise ValueError("`projected` is x . basis already; pass one of the two")
        rank = projected.shape[-1]
        _is("projected", projected, torch.float32, (*x.shape[:-1], rank), device)
        features.append("projected")
    elif basis is not None:
        rank = basis.shape[-1]
        _is("basis", basis, torch.float32, (K, rank) if basis.dim() == 2 else (groups, K, rank), device)
        if basis.dim() == 3:
            features.append("basis per group")
    elif coeff is not None or coeff_groups is not None or seeds is not None:
        raise ValueError("`coeff`, `coeff_groups` and `seeds` need a `basis` (or `projected`)")
    _is("coeff", coeff, torch.float32, (N, rank), device)
    _is("coeff_groups", coeff_groups, torch.float32, (groups, N, rank), device)
    if coeff_groups is not None:
        features.append("coeff per group")
    if seeds is not None and cols not in (0, rank):
        features.append("cols other than the rank")
    return Problem(
        "zo_linear",
        device.type,
        x.dtype,
        M,
        N,
        K,
        format if weight is not None else "none",
        layout,
        group_size,
        weight.dtype if weight is not None else torch.float32,
        scale.dtype if scale is not None else None,
        rank,
        base_rank,
        groups,
        S,
        noise if S else "none",
        tuple(features),
        arch_of(device),
        tf32(x),
    )


_WEIGHT = "Tensor? weight, Tensor? scale, Tensor? offset, Tensor? nested"
_STORED = "str format, str layout, int group_size, int out_features"
_SEEDED = "int groups=1, int row_offset=0, int cols=0"

library.define(
    f"zo_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? base_basis, Tensor? base_coeff, Tensor? basis, "
    "Tensor? coeff, Tensor? coeff_groups, Tensor? projected, Tensor? seeds, Tensor? sigmas, Tensor? param_id, "
    f'{_STORED}, str noise="normal", {_SEEDED}) -> Tensor'
)
library.define(
    f"zo_dense_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? seeds, Tensor? sigmas, Tensor? param_id, "
    f"Tensor? noise_scale, Tensor? mask_value, Tensor? mask_seed, {_STORED}, "
    f'str noise="normal", str noise_on="weight", str mask="none", {_SEEDED}) -> Tensor'
)
library.define(
    "zo_update_(Tensor(a!)[] coeffs, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor param_ids, Tensor seeds, "
    'Tensor weights, Tensor hyper, Tensor skip, str rule, str noise="normal", int[] row_offsets=[]) -> ()'
)
library.define(
    "zo_perturb_(Tensor(a!) w, Tensor seeds, Tensor weights, Tensor param_id, Tensor? basis=None, "
    "Tensor? noise_scale=None, Tensor? mask_value=None, Tensor? mask_seed=None, Tensor? rounding_seed=None, "
    'str noise="normal", str mask="none", int row_offset=0, int cols=0) -> ()'
)
library.define(
    "dequantize(Tensor weight, Tensor? scale, Tensor? offset, Tensor? nested, str format, str layout, int group_size, "
    "int out_features, int in_features, ScalarType dtype, int row_start=0, int rows=-1) -> Tensor"
)


def _zo_linear(x, weight, scale, offset, nested, bias, base_basis, base_coeff, basis, coeff, coeff_groups, projected,
               seeds, sigmas, param_id, format, layout, group_size, out_features, noise="normal", groups=1,
               row_offset=0, cols=0):  # fmt: skip
    args = (x, weight, scale, offset, nested, bias, base_basis, base_coeff, basis, coeff, coeff_groups, projected,
            seeds, sigmas, param_id, format, layout, group_size, out_features, noise, groups,
            row_offset, cols)  # fmt: skip
    return implementation(linear_problem(*args)).zo_linear(*args)


def _zo_linear_fake(x, weight, scale, offset, nested, bias, base_basis, base_coeff, basis, coeff, coeff_groups,
                    projected, seeds, sigmas, param_id, format, layout, group_size, out_features, noise="normal",
                    groups=1, row_offset=0, cols=0):  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


# ---------------------------------------------------------------------------------------------------------------------
# zo_dense_linear


def dense_problem(x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, noise_scale, mask_value, mask_seed,
                  format, layout, group_size, out_features, noise="normal", noise_on="weight", mask="none", groups=1,
                  row_offset=0, cols=0) -> Problem:  # fmt: skip
    """Check the arguments of a `zo_dense_linear` call and describe it. Raises ValueError naming what is wrong."""
    if x.dim() == 0:
        raise ValueError("`x` has no dimensions; it has to be [..., in_features]")
    N, K, device = out_features, x.shape[-1], x.device
    _check_weight(x, weight, scale, offset, nested, format, layout, group_size, N, K)
    S = _check_noise(x, seeds, sigmas, param_id, noise, groups)
    _check_bias(bias, N, device)
    features = _check_mask(mask, mask_value, mask_seed, noise_scale, (N, K), device)
    if noise_on not in ("weight", "scale"):
        raise ValueError(f"`noise_on` is {noise_on!r}; it has to be 'weight' or 'scale'")
    if noise_on == "scale" and (weight is None or scale is None):
        raise ValueError(f"`noise_on` is 'scale', but a {format} weight has no scales; allowed: 'weight'")
    if noise_on == "scale":
        features.append("noise on the scales")
        if weight is not None and weight.dim() == 1 and layout == "row":
            features.append("flat blocks")
    return Problem(
        "zo_dense_linear",
        device.type,
        x.dtype,
        _rows(x),
        N,
        K,
        format if weight is not None else "none",
        layout,
        group_size,
        weight.dtype if weight is not None else torch.float32,
        scale.dtype if scale is not None else None,
        groups=groups,
        seeds=S,
        noise=noise if S else "none",
        features=tuple(features),
        arch=arch_of(device),
        tf32=tf32(x),
    )


def _check_mask(mask, mask_value, mask_seed, noise_scale, shape, device) -> list[str]:
    if mask not in MASKS:
        raise ValueError(f"`mask` is {mask!r}; masks are {', '.join(MASKS)}")
    if (mask_value is None) != (mask == "none") or (mask_seed is None) != (mask != "random"):
        raise ValueError(
            f"`mask` is {mask!r}: 'magnitude' needs `mask_value`, 'random' needs `mask_value` and `mask_seed`, "
            "'none' takes neither"
        )
    _is("mask_value", mask_value, torch.float32, (1,), device)
    _is("mask_seed", mask_seed, torch.int64, (1,), device)
    _is("noise_scale", noise_scale, torch.float32, shape, device)
    return [f"{mask} mask"] * (mask != "none") + ["noise_scale"] * (noise_scale is not None)


def _zo_dense_linear(x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, noise_scale, mask_value,
                     mask_seed, format, layout, group_size, out_features, noise="normal", noise_on="weight",
                     mask="none", groups=1, row_offset=0, cols=0):  # fmt: skip
    args = (x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, noise_scale, mask_value, mask_seed,
            format, layout, group_size, out_features, noise, noise_on, mask, groups, row_offset, cols)  # fmt: skip
    return implementation(dense_problem(*args)).zo_dense_linear(*args)


def _zo_dense_linear_fake(x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, noise_scale, mask_value,
                          mask_seed, format, layout, group_size, out_features, noise="normal", noise_on="weight",
                          mask="none", groups=1, row_offset=0, cols=0):  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


# ---------------------------------------------------------------------------------------------------------------------
# zo_update_, zo_perturb_, dequantize


def _zo_update_(coeffs, exp_avgs, exp_avg_sqs, param_ids, seeds, weights, hyper, skip, rule, noise="normal",
                row_offsets=()):  # fmt: skip
    if not coeffs:
        return
    device = coeffs[0].device
    if rule not in RULES:
        raise ValueError(f"`rule` is {rule!r}; rules are {', '.join(RULES)}")
    if noise not in NOISES:
        raise ValueError(f"`noise` is {noise!r}; kinds are {', '.join(NOISES)}")
    wanted = {"sgd": (0, 0), "momentum": (1, 0), "adam": (1, 1), "adamw": (1, 1)}[rule]
    for name, states, count in (("exp_avgs", exp_avgs, wanted[0]), ("exp_avg_sqs", exp_avg_sqs, wanted[1])):
        if len(states) != count * len(coeffs):
            raise ValueError(f"`{name}` has {len(states)} tensors; rule {rule!r} needs {count * len(coeffs)}")
        for i, state in enumerate(states):
            _is(f"{name}[{i}]", state, torch.float32, tuple(coeffs[i].shape), device)
    for name, tensors in (("coeffs", coeffs), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        for i, tensor in enumerate(tensors):
            if tensor.dim() != 2 or not tensor.is_contiguous():
                raise ValueError(f"`{name}[{i}]` has shape {tuple(tensor.shape)}, strides {tensor.stride()}; "
                                 "it has to be a contiguous [out_features, rank]")  # fmt: skip
            _is(f"{name}[{i}]", tensor, torch.float32, tuple(tensor.shape), device)
    S, L = seeds.numel(), len(coeffs)
    _is("param_ids", param_ids, torch.int64, (L,), device)
    _is("seeds", seeds, torch.int64, (S,), device)
    _is("weights", weights, torch.float32, (L, S) if weights.dim() == 2 else (S,), device)
    _is("hyper", hyper, torch.float32, (len(HYPER),), device)
    _is("skip", skip, torch.bool, (1,), device)
    if row_offsets and len(row_offsets) != L:
        raise ValueError(f"`row_offsets` has {len(row_offsets)} entries; there are {L} coeffs")
    problem = Problem("zo_update_", device.type, torch.float32, N=sum(c.shape[0] for c in coeffs), rank=1,
                      seeds=S, noise=noise, arch=arch_of(device))  # fmt: skip
    implementation(problem).zo_update_(
        coeffs, exp_avgs, exp_avg_sqs, param_ids, seeds, weights, hyper, skip, rule, noise, row_offsets
    )


def _zo_perturb_(w, seeds, weights, param_id, basis=None, noise_scale=None, mask_value=None, mask_seed=None,
                 rounding_seed=None, noise="normal", mask="none", row_offset=0, cols=0):  # fmt: skip
    device = w.device
    if w.dim() != 2:
        raise ValueError(f"`w` has shape {tuple(w.shape)}; it has to be [rows, columns]")
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"`w` is {w.dtype}; it has to be float32, bfloat16 or float16")
    if noise not in NOISES:
        raise ValueError(f"`noise` is {noise!r}; kinds are {', '.join(NOISES)}")
    S = seeds.numel()
    _is("seeds", seeds, torch.int64, (S,), device)
    _is("weights", weights, torch.float32, (S,), device)
    _is("param_id", param_id, torch.int64, (1,), device)
    _is("rounding_seed", rounding_seed, torch.int64, (1,), device)
    features = _check_mask(mask, mask_value, mask_seed, noise_scale, tuple(w.shape), device)
    if basis is not None:
        _is("basis", basis, torch.float32, (w.shape[1], basis.shape[-1]), device)
        if features:
            raise ValueError(f"`basis` does not go with {features[0]}: those act on a dense direction")
    problem = Problem("zo_perturb_", device.type, w.dtype, N=w.shape[0], K=w.shape[1], seeds=S, noise=noise,
                      rank=0 if basis is None else basis.shape[1], features=tuple(features),
                      arch=arch_of(device))  # fmt: skip
    implementation(problem).zo_perturb_(
        w, seeds, weights, param_id, basis, noise_scale, mask_value, mask_seed, rounding_seed, noise, mask,
        row_offset, cols,
    )  # fmt: skip


def _dequantize(weight, scale, offset, nested, format, layout, group_size, out_features, in_features, dtype,
                row_start=0, rows=-1):  # fmt: skip
    _check_weight(weight, weight, scale, offset, nested, format, layout, group_size, out_features, in_features)
    count = out_features - row_start if rows < 0 else rows
    if row_start < 0 or row_start + count > out_features:
        raise ValueError(f"`row_start` {row_start} and `rows` {rows} leave the weight's {out_features} rows")
    problem = Problem("dequantize", weight.device.type, dtype, 0, out_features, in_features, format, layout,
                      group_size, weight.dtype, None if scale is None else scale.dtype,
                      arch=arch_of(weight.device))  # fmt: skip
    return implementation(problem).dequantize(
        weight, scale, offset, nested, format, layout, group_size, out_features, in_features, dtype, row_start, count
    )


def _dequantize_fake(weight, scale, offset, nested, format, layout, group_size, out_features, in_features, dtype,
                     row_start=0, rows=-1):  # fmt: skip
    count = out_features - row_start if rows < 0 else rows
    return weight.new_empty((count, in_features), dtype=dtype)


for _name, _function, _fake in (
    ("zo_linear", _zo_linear, _zo_linear_fake),
    ("zo_dense_linear", _zo_dense_linear, _zo_dense_linear_fake),
    ("zo_update_", _zo_update_, lambda *args, **named: None),
    ("zo_perturb_", _zo_perturb_, lambda *args, **named: None),
    ("dequantize", _dequantize, _dequantize_fake),
):
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zoact::{_name}", _fake, lib=library)

for _name, _backward, _setup in (
    ("zo_linear", autograd.linear_backward, autograd.linear_setup),
    ("zo_dense_linear", autograd.dense_backward, autograd.dense_setup),
):
    torch.library.register_autograd(f"zoact::{_name}", _backward, setup_context=_setup, lib=library)

zo_linear = torch.ops.zoact.zo_linear.default
zo_dense_linear = torch.ops.zoact.zo_dense_linear.default
zo_update_ = torch.ops.zoact.zo_update_.default
zo_perturb_ = torch.ops.zoact.zo_perturb_.default
dequantize = torch.ops.zoact.dequantize.default
