"""The specification of every op, in plain torch, written to be read.

Tests compare every implementation with these functions; dispatch falls back on them; the formulas of the methods are
explained by them. They materialise what the kernels never do (Z, the dequantised weight), they take any device, and
`compute=torch.float64` turns each into the truth that tolerances are derived from.

Shapes, everywhere: x [..., K] flattened to M rows, weight of N = out_features rows, R rank, G row groups of M / G
consecutive rows each, S seeds. Noise is design law 2.1 (`rng.noise`): a pure function of (seed, param_id, row, column).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import rng
from .formats import PackedWeight


def packed(
    weight: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    nested: Tensor | None,
    format: str,
    layout: str,
    group_size: int,
    out_features: int,
    in_features: int,
) -> PackedWeight:
    return PackedWeight(
        format=format,
        layout=layout,
        group_size=group_size,
        out_features=out_features,
        in_features=in_features,
        weight=weight,
        scale=scale,
        offset=offset,
        nested=nested,
    )


def dequantize(
    weight: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    nested: Tensor | None,
    format: str,
    layout: str,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    row_start: int = 0,
    rows: int = -1,
) -> Tensor:
    """D(W)[row_start : row_start + rows] as [rows, in_features] of `dtype`; rows = -1 means all that follow."""
    w = packed(weight, scale, offset, nested, format, layout, group_size, out_features, in_features)
    return w.dequantize(dtype, row_start, None if rows < 0 else rows)


def perturbation(
    kind: str, seeds: Tensor, sigmas: Tensor, param_id: Tensor, rows: int, cols: int, row_offset: int, total_cols: int
) -> Tensor:
    """sum over s of sigmas[g, s] * Z(seeds[s]), for each group g: [G, rows, cols], dtype of sigmas."""
    out = torch.zeros(sigmas.shape[0], rows, cols, dtype=sigmas.dtype, device=sigmas.device)
    for s in range(seeds.shape[0]):
        z = rng.noise(
            kind,
            seeds[s],
            param_id,
            rows,
            cols,
            row_offset=row_offset,
            total_cols=total_cols or cols,
            device=sigmas.device,
        )
        out += sigmas[:, s, None, None] * z.to(sigmas.dtype)
    return out


def noise_rows(
    kind: str, seed: Tensor, param_id: Tensor, start: int, rows: int, cols: int, row_offset: int, total_cols: int
) -> Tensor:
    """Rows start .. start + rows of Z(seed), fp32 [rows, cols]."""
    return rng.noise(
        kind, seed, param_id, rows, cols, row_offset=row_offset + start, total_cols=total_cols or cols,
        device=seed.device,
    )  # fmt: skip


def noise_factor(
    clean: Tensor | None,
    noise_scale: Tensor | None,
    mask: str,
    mask_value: Tensor | None,
    mask_seed: Tensor | None,
    param_id: Tensor,
    start: int,
    rows: int,
    cols: int,
    row_offset: int,
    total_cols: int,
) -> Tensor | float:
    """What multiplies Z elementwise in rows start .. start + rows: noise_scale times the mask, or 1.

    `clean` holds the same rows of the unperturbed weight in fp32: a magnitude mask looks at nothing else, so that
    the probes and the update agree on it (arXiv 2402.15751).
    """
    factor: Tensor | float = 1.0
    if noise_scale is not None:
        factor = noise_scale[start : start + rows]
    if mask == "magnitude" and mask_value is not None and clean is not None:
        factor = factor * (clean.abs() <= mask_value).float()
    if mask == "random" and mask_value is not None and mask_seed is not None:
        keep = rng.mask(
            mask_seed, param_id, mask_value, rows, cols, row_offset=row_offset + start, total_cols=total_cols or cols,
            device=param_id.device,
        )  # fmt: skip
        factor = factor * keep.float()
    return factor


def zo_linear(
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
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """y_g = x_g D(W)^T + (x_g base_basis) base_coeff^T + (x_g A) (C + C_g + sum_s sigmas[g, s] Z_s)^T + bias.

    x [..., K]; y [..., N] in the dtype of x (float64 when `compute` is float64). See `ops.zo_linear` for every
    argument. ZO-Act is `basis` = A, `coeff` = C, one seed a query (arXiv 2607.01125).
    """
    out_dtype = torch.float64 if compute == torch.float64 else x.dtype
    xs = x.reshape(-1, x.shape[-1]).to(compute)
    y = xs.new_zeros(xs.shape[0], out_features)
    if weight is not None:
        w = packed(weight, scale, offset, nested, format, layout, group_size, out_features, x.shape[-1])
        y = y + xs @ w.dequantize(compute).T
    if base_basis is not None and base_coeff is not None:
        y = y + (xs @ base_basis.to(compute)) @ base_coeff.to(compute).T
    if basis is not None or projected is not None:
        per_group = xs.shape[0] // groups
        if projected is not None:
            h = projected.reshape(xs.shape[0], -1).to(compute)
        elif basis is not None and basis.dim() == 3:
            h = (xs.view(groups, per_group, -1) @ basis.to(compute)).flatten(0, 1)
        elif basis is not None:
            h = xs @ basis.to(compute)
        if coeff is not None:
            y = y + h @ coeff.to(compute).T
        terms = xs.new_zeros(groups, out_features, h.shape[1])
        if coeff_groups is not None:
            terms = terms + coeff_groups.to(compute)
        if seeds is not None and sigmas is not None and param_id is not None:
            terms = terms + perturbation(
                noise, seeds, sigmas.to(compute), param_id, out_features, h.shape[1], row_offset, cols
            )
        if coeff_groups is not None or seeds is not None:
            y = y + (h.view(groups, per_group, -1) @ terms.transpose(1, 2)).flatten(0, 1)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(out_dtype).view(*x.shape[:-1], out_features)


def zo_dense_linear(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    nested: Tensor | None,
    bias: Tensor | None,
    seeds: Tensor | None,
    sigmas: Tensor | None,
    param_id: Tensor | None,
    noise_scale: Tensor | None,
    mask_value: Tensor | None,
    mask_seed: Tensor | None,
    format: str,
    layout: str,
    group_size: int,
    out_features: int,
    noise: str = "normal",
    noise_on: str = "weight",
    mask: str = "none",
    groups: int = 1,
    row_offset: int = 0,
    cols: int = 0,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """y_g = x_g (D(W) + mask * noise_scale * sum_s sigmas[g, s] Z_s)^T + bias (MeZO and relatives, arXiv 2305.17333).

    With noise_on = "scale" the noise is one value a scale, [N, groups of K], and moves the zero point with it:
    w = (q - zero) * (scale + sum sigma * z), zero = -offset / scale fixed (QZO, arXiv 2505.13430).
    """
    out_dtype = torch.float64 if compute == torch.float64 else x.dtype
    N, K = out_features, x.shape[-1]
    xs = x.reshape(-1, K).to(compute)
    y = xs.new_zeros(xs.shape[0], N)
    w: PackedWeight | None = None
    if weight is not None:
        w = packed(weight, scale, offset, nested, format, layout, group_size, N, K)
        y = y + xs @ w.dequantize(compute).T
    if seeds is not None and sigmas is not None and param_id is not None:
        size = xs.shape[0] // groups
        if noise_on == "scale":
            if w is None:
                raise ValueError("`noise_on` is 'scale' but there is no weight; allowed: 'weight'")
            factor = w.codes_over_scale(compute)
            span = K if group_size < 0 else group_size
            z = perturbation(noise, seeds, sigmas.to(compute), param_id, N, w.groups, row_offset, cols)
            z = z.repeat_interleave(span, dim=2)[:, :, :K] * factor
        else:
            z = perturbation(noise, seeds, sigmas.to(compute), param_id, N, K, row_offset, cols)
        clean = None if w is None else w.dequantize(torch.float32)
        z = z * noise_factor(clean, noise_scale, mask, mask_value, mask_seed, param_id, 0, N, K, row_offset, cols)
        y = y + (xs.view(groups, size, K) @ z.transpose(1, 2)).flatten(0, 1)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(out_dtype).view(*x.shape[:-1], N)


def zo_update_(
    coeffs: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    param_ids: Tensor,
    seeds: Tensor,
    weights: Tensor,
    hyper: Tensor,
    skip: Tensor,
    rule: str,
    noise: str = "normal",
    row_offsets: Sequence[int] = (),
) -> None:
    """One optimizer step for every C [N, R] in `coeffs`, in place, along g = sum_s weights[s] Z_s.

    The formulas of torch.optim in fp32, each operation rounded on its own: this is the order of operations of every
    implementation, and they agree bit for bit. Where `skip` holds, nothing is read and nothing changes.
    """
    if bool(skip):
        return
    lr, beta1, beta2, eps, weight_decay, correction1, correction2 = hyper
    for i, c in enumerate(coeffs):
        g = torch.zeros_like(c)
        for seed, weight in zip(seeds, weights[i] if weights.dim() == 2 else weights, strict=True):
            offset = row_offsets[i] if row_offsets else 0
            g = g + weight * rng.noise(noise, seed, param_ids[i], *c.shape, row_offset=offset, device=c.device)
        if rule == "adamw":
            c.sub_(lr * weight_decay * c)
        else:
            g = g + weight_decay * c
        if rule == "sgd":
            c.sub_(lr * g)
            continue
        m = exp_avgs[i]
        if rule == "momentum":
            m.copy_(beta1 * m + g)
            c.sub_(lr * m)
            continue
        v = exp_avg_sqs[i]
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        denominator = rng.exact_sqrt(v) / rng.exact_sqrt(correction2) + eps
        c.sub_(lr / correction1 * (m / denominator))


def zo_perturb_(
    w: Tensor,
    seeds: Tensor,
    weights: Tensor,
    param_id: Tensor,
    basis: Tensor | None = None,
    noise_scale: Tensor | None = None,
    mask_value: Tensor | None = None,
    mask_seed: Tensor | None = None,
    rounding_seed: Tensor | None = None,
    noise: str = "normal",
    mask: str = "none",
    row_offset: int = 0,
    cols: int = 0,
) -> None:
    """w [N, C] <- w + sum_s weights[s] Z_s (* noise_scale | . basis^T), in place, where the mask lets an element move.

    Everything in fp32, each operation rounded on its own, then one rounding to the dtype of w: to nearest, or
    stochastically with `rounding_seed` (bf16 and fp16; fp32 needs none). All implementations agree bit for bit.
    `cols` is the number of columns of the whole Z: of the whole w, or the rank with a basis [C, R].
    """
    rows, columns = w.shape
    width = columns if basis is None else basis.shape[1]
    total = cols or width
    g = w.new_zeros((rows, width), dtype=torch.float32)
    for seed, weight in zip(seeds, weights, strict=True):
        z = rng.noise(noise, seed, param_id, rows, width, row_offset=row_offset, total_cols=total, device=w.device)
        g = g + weight * z
    if basis is None:
        delta = g if noise_scale is None else g * noise_scale
    else:
        total = columns  # of what is rounded
        delta = w.new_zeros(w.shape, dtype=torch.float32)
        for r in range(width):
            delta = delta + g[:, r, None] * basis[:, r]
    clean = w.float()
    moved = clean + delta
    if mask == "magnitude" and mask_value is not None:
        moved = torch.where(clean.abs() <= mask_value, moved, clean)
    elif mask == "random" and mask_value is not None and mask_seed is not None:
        part = rng.mask(
            mask_seed, param_id, mask_value, rows, columns, row_offset=row_offset, total_cols=total, device=w.device
        )
        moved = torch.where(part, moved, clean)
    if rounding_seed is not None and w.dtype != torch.float32:
        moved = rng.round_stochastic(moved, w.dtype, rounding_seed, param_id, row_offset=row_offset, total_cols=total)
    w.copy_(moved)
