"""zo_update_: C <- rule(C, g) with g = sum_s weights[s] Z_s, for all layers of a model in one launch.

C, m, v fp32 [N, R], contiguous, in place; bit for bit reference.zo_update_, every operation rounded on its own. Each is
read and written once, Z made in registers: bound by memory. One program takes 1024 neighbouring elements of one layer,
from an address that is a multiple of 128, so that no word of Philox is made twice. Where the layers lie stands in a
table on the device, made once for a set of tensors: a captured graph replays without the host.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import host
from .words import noise

ROWS, COLS = 8, 128  # elements of a program
FIELDS = tl.constexpr(6)  # of a layer in the table: addresses of C, m, v; elements; address e of the first; first block


@triton.jit
def elements(entry, i, VECTORS: tl.constexpr):
    """Pointers to the fp32 elements i [ROWS, COLS] of the tensor whose address stands in the table."""
    where = tl.load(entry).to(tl.pointer_type(tl.float32)) + i
    if VECTORS:
        where = tl.multiple_of(where, (4, 16))  # bytes
    return where


@triton.jit
def update_kernel(
    layer_of_block, table, param_ids, seeds, weights, hyper, skip, S, layer_stride,
    RULE: tl.constexpr, NOISE: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """weights [S] (layer_stride 0) or [L, S]. VECTORS: every C, m, v lies on 16 bytes, its e0 and its number of
    elements are multiples of 4."""
    if tl.load(skip).to(tl.int32) == 0:
        layer = tl.load(layer_of_block + tl.program_id(0)).to(tl.int64)
        entry = table + layer * FIELDS
        count, e0 = tl.load(entry + 3), tl.load(entry + 4)
        block = tl.program_id(0) - tl.load(entry + 5)
        first = ((e0 >> 7) << 7) + (block * ROWS + tl.arange(0, ROWS)) * COLS
        start = first - e0
        if VECTORS:
            start, count = tl.multiple_of(start, 4), tl.multiple_of(count, 4)
        i = start[:, None] + tl.arange(0, COLS)[None, :]
        inside = (i >= 0) & (i < count)

        g = tl.zeros((ROWS, COLS), tl.float32)
        for s in range(S):
            z = noise(NOISE, tl.load(seeds + s), tl.load(param_ids + layer), first, COLS, COLS)
            g = g + tl.load(weights + layer * layer_stride + s) * z

        c_where = elements(entry, i, VECTORS)
        c = tl.load(c_where, mask=inside, other=0)
        lr, beta1, beta2, eps = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
        weight_decay, correction1, correction2 = tl.load(hyper + 4), tl.load(hyper + 5), tl.load(hyper + 6)
        if RULE == "adamw":
            c = c - lr * weight_decay * c
        else:
            g = g + weight_decay * c
        if RULE == "sgd":
            c = c - lr * g
        else:
            m_where = elements(entry + 1, i, VECTORS)
            m = tl.load(m_where, mask=inside, other=0)
            if RULE == "momentum":
                m = beta1 * m + g
                c = c - lr * m
            else:
                v_where = elements(entry + 2, i, VECTORS)
                v = tl.load(v_where, mask=inside, other=0)
                m = beta1 * m + (1.0 - beta1) * g
                v = beta2 * v + (1.0 - beta2) * g * g
                denominator = tl.div_rn(tl.sqrt_rn(v), tl.sqrt_rn(correction2)) + eps
                c = c - tl.div_rn(lr, correction1) * tl.div_rn(m, denominator)
                tl.store(v_where, v, mask=inside)
            tl.store(m_where, m, mask=inside)
        tl.store(c_where, c, mask=inside)


@functools.cache  # a captured graph keeps reading it, so it stays: 48 bytes a layer, 4 bytes a thousand elements
def _table(layers: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer of each block, table) for layers of (C, m, v, elements, e of the first)."""
    entries: list[list[int]] = []
    blocks: list[int] = []
    for number, (*fields, count, e0) in enumerate(layers):
        entries.append([*fields, count, e0, len(blocks)])
        blocks += [number] * -(-(count + e0 % 128) // (ROWS * COLS) if count else 0)
    return (
        torch.tensor(blocks, dtype=torch.int32, device=device),
        torch.tensor(entries, dtype=torch.int64, device=device),
    )


def zo_update_(coeffs, exp_avgs, exp_avg_sqs, param_ids, seeds, weights, hyper, skip, rule, noise="normal",
               row_offsets=()):  # fmt: skip
    """The op, arguments checked: see ops.zo_update_."""
    param_ids, seeds, weights, hyper = (t.contiguous() for t in (param_ids, seeds, weights, hyper))
    layers = []
    for i, c in enumerate(coeffs):
        m = exp_avgs[i].data_ptr() if exp_avgs else 0
        v = exp_avg_sqs[i].data_ptr() if exp_avg_sqs else 0
        layers.append((c.data_ptr(), m, v, c.numel(), (row_offsets[i] if row_offsets else 0) * c.shape[1]))
    blocks, table = _table(tuple(layers), coeffs[0].device)
    if not blocks.numel():
        return
    vectors = all(c % 16 == m % 16 == v % 16 == count % 4 == e0 % 4 == 0 for c, m, v, count, e0 in layers)
    with torch.cuda.device_of(coeffs[0]):
        update_kernel[(blocks.numel(),)](
            blocks, table, param_ids, seeds, weights, hyper, skip, seeds.numel(),
            seeds.numel() if weights.dim() == 2 else 0, rule, noise, vectors, ROWS, COLS,
            **host.options(coeffs[0].device, 8),
        )  # fmt: skip
