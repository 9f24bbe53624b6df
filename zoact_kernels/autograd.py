"""Gradients through the two linear ops: what `ops` registers beside their schemas.

    zo_linear        to x, a dense W, bias, the bases and the coefficients
    zo_dense_linear  to x, a dense W, bias and sigmas:   dx_g = dy_g W_g,  dsigmas[g, s] = <dy_g^T x_g, Z_s>

D(W) and Z are made again, PANEL rows at a time: nothing of size N x K outlives a panel but a gradient of that size.
Sums are in fp32. Only a dense W in layout "row" has a gradient; low-bit ones are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import reference

PANEL = 512  # rows; 16 MB of D(W) at K = 8192


def linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: len(LINEAR)])
    ctx.rest = inputs[len(LINEAR) :]


def dense_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: len(DENSE)])
    ctx.rest = inputs[len(DENSE) :]


# The arguments of the ops that are tensors, in their order.
LINEAR = (
    "x", "weight", "scale", "offset", "nested", "bias", "base_basis", "base_coeff", "basis", "coeff", "coeff_groups",
    "projected", "seeds", "sigmas", "param_id",
)  # fmt: skip
DENSE = (
    "x", "weight", "scale", "offset", "nested", "bias", "seeds", "sigmas", "param_id", "noise_scale", "mask_value",
    "mask_seed",
)  # fmt: skip


def _panels(x: Tensor, stored: tuple[Any, ...], N: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, D(W)[rows] fp32) from the top, zeros without a weight; stored: weight, scale ... group_size."""
    K = x.shape[-1]
    for start in range(0, N, PANEL):
        count = min(PANEL, N - start)
        if stored[0] is None:
            w = torch.zeros(count, K, device=x.device)
        else:
            w = torch.ops.zoact.dequantize(*stored, N, K, torch.float32, start, count)
        yield slice(start, start + count), w


def _new_weight_gradient(weight: Tensor, format: str, layout: str, N: int, K: int) -> Tensor:
    if format != "dense" or layout != "row":
        raise ValueError(f"`weight` is {format} in layout {layout!r} and has no gradient; dense in layout 'row' has")
    return torch.zeros(N, K, dtype=torch.float32, device=weight.device)


def linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight, scale, offset, nested, bias, base_basis, base_coeff, basis, coeff, coeff_groups, projected,
     seeds, sigmas, param_id) = ctx.saved_tensors  # fmt: skip
    format, layout, group_size, N, noise, groups, row_offset, cols = ctx.rest
    K = x.shape[-1]
    xs, gs = x.reshape(-1, K).float(), grad.reshape(-1, N).float()
    need = dict(zip(LINEAR, ctx.needs_input_grad, strict=False))
    grads: dict[str, Tensor | None] = {}
    grad_x = torch.zeros_like(xs)
    if weight is not None and need["x"]:
        for rows, w in _panels(x, (weight, scale, offset, nested, format, layout, group_size), N):
            grad_x += gs[:, rows] @ w
    if weight is not None and need["weight"]:
        grads["weight"] = _new_weight_gradient(weight, format, layout, N, K).addmm_(gs.T, xs).to(weight.dtype)
    if bias is not None and need["bias"]:
        grads["bias"] = gs.sum(0).to(bias.dtype)
    if base_basis is not None:
        g_base = gs @ base_coeff
        grad_x += g_base @ base_basis.T
        grads["base_basis"] = xs.T @ g_base
        grads["base_coeff"] = gs.T @ (xs @ base_basis)
    if basis is not None or projected is not None:
        # One batch entry per row group: x_g [M/G, K], g_g [M/G, N], A_g [K, R], E_g = C + C_g + sum sigma Z [N, R].
        x_g, g_g = xs.view(groups, -1, K), gs.view(groups, -1, N)
        a_g = None if basis is None else (basis if basis.dim() == 3 else basis.expand(groups, -1, -1))
        h_g = projected.reshape(groups, x_g.shape[1], -1) if a_g is None else x_g @ a_g
        effective = torch.zeros(groups, N, h_g.shape[-1], dtype=torch.float32, device=x.device)
        if coeff is not None:
            effective = effective + coeff
        if coeff_groups is not None:
            effective = effective + coeff_groups
        if seeds is not None:
            effective = effective + reference.perturbation(
                noise, seeds, sigmas, param_id, N, h_g.shape[-1], row_offset, cols
            )
        grad_h = g_g @ effective
        grad_c = g_g.transpose(1, 2) @ h_g
        if coeff is not None and need["coeff"]:
            grads["coeff"] = grad_c.sum(0)
        if coeff_groups is not None and need["coeff_groups"]:
            grads["coeff_groups"] = grad_c
        if a_g is None:
            grads["projected"] = grad_h.reshape(projected.shape)
        else:
            grad_x += (grad_h @ a_g.transpose(1, 2)).flatten(0, 1)
            if need["basis"]:
                grad_a = x_g.transpose(1, 2) @ grad_h
                grads["basis"] = grad_a if basis.dim() == 3 else grad_a.sum(0)
    grads["x"] = grad_x.to(x.dtype).view(x.shape)
    return *(grads.get(name) if need[name] else None for name in LINEAR), *(None for _ in ctx.rest)


def dense_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, offset, nested, bias, seeds, sigmas, param_id, noise_scale, mask_value, mask_seed = (
        ctx.saved_tensors
    )
    format, layout, group_size, N, noise, noise_on, mask, groups, row_offset, cols = ctx.rest
    need = dict(zip(DENSE, ctx.needs_input_grad, strict=False))
    if noise_on != "weight":
        raise ValueError("no gradient through noise on the scales; evaluate under torch.no_grad()")
    K = x.shape[-1]
    x_g, g_g = x.reshape(groups, -1, K).float(), grad.reshape(groups, -1, N).float()
    grad_x = torch.zeros_like(x_g)
    grad_w = _new_weight_gradient(weight, format, layout, N, K) if weight is not None and need["weight"] else None
    grad_sigmas = None if sigmas is None else torch.zeros_like(sigmas, dtype=torch.float64)  # a sum over N K products
    one = torch.ones(1, device=x.device)
    for rows, w in _panels(x, (weight, scale, offset, nested, format, layout, group_size), N):
        g = g_g[:, :, rows]
        outer = g.transpose(1, 2) @ x_g if need["weight"] or need["sigmas"] else None  # dy_g^T x_g [G, rows, K]
        moved = w  # [rows, K], or [G, rows, K] once each row group has its noise
        for s in range(0 if seeds is None else len(seeds)):
            z = torch.zeros_like(w)
            torch.ops.zoact.zo_perturb_(
                z, seeds[s : s + 1], one, param_id, noise=noise, row_offset=row_offset + rows.start, cols=cols
            )
            z *= reference.noise_factor(
                w, noise_scale, mask, mask_value, mask_seed, param_id, rows.start, len(z), K, row_offset, cols
            )
            moved = moved + sigmas[:, s, None, None] * z
            if outer is not None and grad_sigmas is not None:
                grad_sigmas[:, s] += (outer * z).sum((1, 2))
        grad_x += g @ moved
        if outer is not None and grad_w is not None:
            grad_w[rows] = outer.sum(0)
    grads = {
        "x": grad_x.to(x.dtype).view(x.shape),
        "weight": None if grad_w is None else grad_w.to(weight.dtype),
        "bias": None if bias is None else grad.reshape(-1, N).float().sum(0).to(bias.dtype),
        "sigmas": None if grad_sigmas is None else grad_sigmas.float(),
    }
    return *(grads.get(name) if need[name] else None for name in DENSE), *(None for _ in ctx.rest)
