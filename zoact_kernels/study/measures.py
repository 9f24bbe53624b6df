"""Gradients of the dense twin, by autograd, against the directions and bases of the methods.

    cosine     |cos| of single directions with the gradient of their layer, by structure, beside what theory says
    energy     share |grad A|^2 / |grad|^2 of the activation basis, by layer, rank 1-64 and 1-64 calibration batches
    refresh    the same along a first-order trajectory: the one-shot basis beside bases of the model as it is by then
    curvature  what a step along a direction gains: slope against curvature, by method (see `curvature`)
    precision  the directional derivative that two perturbed forwards give beside autograd's: fp32, bf16, int4

The gradient is that of the mean loss of GRADIENT examples of the training split; bases see other examples of it. An
estimate along a direction is a multiple of it, so its cosine with the gradient is the direction's but for the sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..basis import compute_basis
from ..layers import perturbed, zo_layers
from ..losses import Batch, group_losses
from ..recipe import Recipe
from ..trainables.factors import fill_normal
from ..trainer import head_on_last_token
from .curvature import curvature
from .first_order import FirstOrder
from .settings import Setting, give_basis, load, plain
from .statistics import expected_cosine

MODEL, TASK = "dense", "trec"
BLOCKS = (0, 9, 19, 29)  # first, last and between, of 30
GRADIENT = 64  # examples of the gradient, at the end of the training split, where no basis looks
DRAWS = 200
RANKS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (1, 4, 16, 64)  # of 16 examples
UV_RANK, UZV_RANK = 2, 8  # published defaults of LOZO and SubZero
Row = list[Any]


def chosen(name: str, blocks: Sequence[int] = BLOCKS) -> bool:
    """Whether a layer belongs to one of the blocks, by the number in its name."""
    return any(f".{block}." in name for block in blocks)


def gradient_batches(setting: Setting, count: int = GRADIENT, size: int = 16) -> list[Batch]:
    dataset = setting.training.dataset
    return list(dataset.batches(size, np.arange(len(dataset) - count, len(dataset))))


def gradients(model: Any, batches: Iterable[Batch], names: Iterable[str]) -> dict[str, Tensor]:
    """Of the mean loss over all examples, fp32 [N, K], of the linears `names` of a model with ordinary modules."""
    weights = {name: model.get_submodule(name).weight for name in names}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    examples = 0
    for batch in batches:
        loss = group_losses(model, batch, grad=True).sum()
        for name, part in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += part
        examples += batch.examples
    model.requires_grad_(False)
    return {name: part.detach() / examples for name, part in total.items()}


# --- cosines ----------------------------------------------------------------------------------------------------------


def cosines(gradient: Tensor, param_id: int, basis: Tensor | None, draws: int, seed: int = 0) -> list[Row]:
    """[structure, draws, mean |cos|, its standard error, theory, that of dense directions] of one layer, grad [N, K].

    structure   Delta, its noise from the generator as a method has it     theory of E|cos|, b(d) = expected_cosine(d)
    dense       Z [N, K]                                                   b(N K)
    right       Z A^T, A [K, R] orthonormal                                b(N R) |grad A| / |grad|
    UV          U V^T, both normal, new each draw; Q = orth(V)             mean of b(N R) |grad Q| / |grad|
    UZV         U Z V^T, U and V orthonormal, Z [R, R]                     mean of b(R^2) |U^T grad V| / |grad|

    The factors of UV are normal, not orthonormal: averaged over V its theory errs by O(R / K), relative.
    """
    N, K = gradient.shape
    norm = gradient.norm()
    ids = {key: torch.tensor([rng.param_id(f"{param_id}#{key}")]) for key in ("Z", "U", "V")}

    def normal(key: str, rows: int, cols: int, draw: int) -> Tensor:
        out = torch.empty(rows, cols)
        fill_normal(out, torch.tensor([rng.seed_for(seed, draw)]), ids[key])
        return out

    found = []
    dense = expected_cosine(N * K)
    seen = [abs(_cosine(gradient, normal("Z", N, K, draw))) for draw in range(draws)]
    found.append(_summary("dense", seen, [dense] * draws, dense))
    if basis is not None:
        inside = gradient @ basis
        seen = [
            abs(_cosine(inside, normal("Z", N, basis.shape[1], draw)) * float(inside.norm() / norm))
            for draw in range(draws)
        ]
        told = expected_cosine(inside.numel()) * float(inside.norm() / norm)
        found.append(_summary("right", seen, [told] * draws, dense))
    R = min(UV_RANK, N, K)
    seen, theory = [], []
    for draw in range(draws):
        u, v = normal("U", N, R, draw), normal("V", K, R, draw)
        inner = float(((gradient @ v) * u).sum(dtype=torch.float64))
        length = math.sqrt(float(((u.T @ u) * (v.T @ v)).sum(dtype=torch.float64)))  # |U V^T|^2 = <U^T U, V^T V>
        seen.append(abs(inner) / (length * float(norm)))
        theory.append(expected_cosine(N * R) * float((gradient @ torch.linalg.qr(v).Q).norm() / norm))
    found.append(_summary("UV", seen, theory, dense))
    R = min(UZV_RANK, N, K)
    seen, theory = [], []
    for draw in range(draws):
        u, v = (torch.linalg.qr(normal(key, size, R, draw)).Q for key, size in (("U", N), ("V", K)))
        core = u.T @ gradient @ v
        share = float(core.norm() / norm)
        seen.append(abs(_cosine(core, normal("Z", R, R, draw))) * share)
        theory.append(expected_cosine(R * R) * share)
    found.append(_summary("UZV", seen, theory, dense))
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / (a.norm() * b.norm()))


def _summary(structure: str, seen: list[float], theory: list[float], dense: float) -> Row:
    """The error is that of the mean of (seen - theory): what both share by the same factors drops out."""
    difference = np.array(seen) - np.array(theory)
    error = float(difference.std(ddof=1)) / math.sqrt(len(seen))
    return [structure, len(seen), _short(np.mean(seen)), _short(error), _short(np.mean(theory)), _short(dense)]


def cosine() -> dict[str, Any]:
    setting = load(MODEL, TASK)
    reports = _bases(setting, 1, 16)
    bases = {name: basis for name, (_, basis) in reports.items()}
    found = gradients(plain(setting), gradient_batches(setting), bases)
    rows = [[name, *row] for name, g in found.items() for row in cosines(g, rng.param_id(name), bases[name], DRAWS)]
    columns = ["layer", "structure", "draws", "cosine", "error", "theory", "dense"]
    return {"columns": columns, "rows": rows}


# --- bases ------------------------------------------------------------------------------------------------------------


def _bases(
    setting: Setting, rank: int, batches: int, blocks: Sequence[int] = BLOCKS
) -> dict[str, tuple[float, Tensor]]:
    """(energy of the inputs, A [K, rank]) of the chosen layers from the first batches of a run with seed 0.

    Columns are in the order of their singular values, so the first r of them are the basis of rank r.
    """
    model, recipe = setting.model, Recipe(batch_size=16)
    for name, layer in zo_layers(model).items():
        layer.rank = rank if chosen(name, blocks) else 0
    runs = [_inputs(setting.training.batch_at(recipe, step)) for step in range(batches)]
    with head_on_last_token(model):
        # Few columns are cheaper by power iteration; many need the whole spectrum.
        report = compute_basis(model, runs, method="power" if rank <= 4 else "gram")
    found = {}
    for row in report.layers:
        layer = zo_layers(model)[row.name]
        assert layer.basis is not None
        found[row.name] = (row.energy, layer.basis)
        layer.rank, layer.coeff, layer.basis = 0, None, None
    return found


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def shares(gradient: Tensor, basis: Tensor, ranks: Iterable[int]) -> list[float]:
    """|grad A_r|^2 / |grad|^2 of the first r columns."""
    by_column = (gradient @ basis).double().square().sum(0).cumsum(0) / gradient.double().square().sum()
    return [_short(by_column[r - 1]) for r in ranks]


def energy() -> dict[str, Any]:
    setting = load(MODEL, TASK)
    bases = {count: _bases(setting, max(RANKS), count) for count in BATCHES}
    found = gradients(plain(setting), gradient_batches(setting), next(iter(bases.values())))
    rows = [
        [name, g.shape[1], count, *shares(g, bases[count][name][1], RANKS)]
        for count in BATCHES
        for name, g in found.items()
    ]
    return {"columns": ["layer", "in_features", "batches", *(f"rank {r}" for r in RANKS)], "rows": rows}


MOMENTS = (0, 20, 60)  # steps of first-order Adam on C after which the bases are compared
REFRESH_LR = 3e-3


def refresh() -> dict[str, Any]:
    """Bases: one-shot (of the model at the beginning, 2 batches, as ZO-Act has it), refreshed (the same examples, the
    model as it is), step (a batch of the gradient itself, as AGZO has it)."""
    setting, recipe = load(MODEL, TASK), Recipe(batch_size=16)
    model = setting.model
    give_basis(setting, 1, recipe)
    parameters = [layer.coeff for layer in zo_layers(model).values() if layer.coeff is not None]
    adam = FirstOrder(model, parameters, torch.optim.Adam(parameters, lr=REFRESH_LR))
    step, rows = 0, []
    once: dict[str, Tensor] = {}
    for moment in MOMENTS:
        while step < moment:
            adam.step(setting.training.batch_at(recipe, step))
            step += 1
        now = load(MODEL, TASK)
        weights = {name: layer.dequantize() + layer.delta() for name, layer in zo_layers(model).items()}
        for name, layer in zo_layers(now.model).items():
            layer.weight.copy_(weights[name])
        first = {name: a for name, (_, a) in _bases(now, 1, 2).items()}
        once = once or first
        batches = gradient_batches(setting)
        own = _bases_of(now, batches[:1])
        changed = plain(now)
        wide, narrow = gradients(changed, batches, once), gradients(changed, batches[:1], once)
        for name in once:
            parts = [
                _short(shares(g, a, (1,))[0])
                for g in (wide[name], narrow[name])
                for a in (once[name], first[name], own[name])
            ]
            rows.append([name, moment, *parts])
    kinds = [f"{basis}, {of}" for of in ("gradient of 64", "of 16") for basis in ("one-shot", "refreshed", "step")]
    return {"columns": ["layer", "step", *kinds], "rows": rows}


def _bases_of(setting: Setting, batches: Sequence[Batch]) -> dict[str, Tensor]:
    model = setting.model
    for name, layer in zo_layers(model).items():
        layer.rank = 1 if chosen(name) else 0
    with head_on_last_token(model):
        compute_basis(model, [_inputs(batch) for batch in batches], method="power")
    found = {}
    for name, layer in zo_layers(model).items():
        if layer.basis is not None:
            found[name] = layer.basis
            layer.rank, layer.coeff, layer.basis = 0, None, None
    return found


# --- finite differences -----------------------------------------------------------------------------------------------

SIGMAS = (1e-4, 1e-3, 1e-2)
QUERIES = 8
KINDS: dict[str, tuple[str, torch.dtype]] = {
    "fp32": ("dense", torch.float32), "bf16": ("dense", torch.bfloat16), "int4": ("int4", torch.float32),
    "int4, bf16 activations": ("int4", torch.bfloat16),
}  # fmt: skip


def derivatives(model: Any, batch: Batch, sigmas: Sequence[float], queries: int) -> list[Row]:
    """[sigma, seed, (f+ - f-) / 2 sigma, <grad C, Z>] of directions on C of every layer, each a pair of forwards.

    The gradient is the model's own, in its own precision.
    """
    layers = {name: layer for name, layer in zo_layers(model).items() if layer.basis is not None}
    coeffs = [layer.coeff for layer in layers.values() if layer.coeff is not None]
    loss = group_losses(model, batch, grad=True).mean()
    found = dict(zip(layers, torch.autograd.grad(loss, coeffs), strict=True))
    rows = []
    for query in range(queries):
        seed = torch.tensor([rng.seed_for(0, 0, query)])
        exact = 0.0
        for name, layer in layers.items():
            z = torch.empty_like(found[name])
            fill_normal(z, seed, layer.param_id)
            exact += float((found[name].double() * z.double()).sum())
        for sigma in sigmas:
            table = torch.tensor([[sigma], [-sigma]])
            with torch.no_grad(), perturbed(model, seed, table):
                losses = group_losses(model, batch, 2)
            rows.append([sigma, query, _short((losses[0] - losses[1]).mean() / (2 * sigma)), _short(exact)])
    return rows


def precision() -> dict[str, Any]:
    rows: list[Row] = []
    truth: dict[str, Tensor] = {}
    for kind, (name, dtype) in KINDS.items():
        setting = load(name, TASK, dtype=dtype)
        bases = truth or {key: a for key, (_, a) in _bases(setting, 1, 2, range(1000)).items()}
        truth = truth or bases  # all models get the bases of the first, so that their directions are the same
        for key, layer in zo_layers(setting.model).items():
            if key in bases:
                layer.set_basis(bases[key])
        batch = gradient_batches(setting)[0]
        rows += [[kind, *row] for row in derivatives(setting.model, batch, SIGMAS, QUERIES)]
    return {"columns": ["model", "sigma", "query", "measured", "exact"], "rows": rows}


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


MEASURES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "cosine": cosine,
    "curvature": curvature,
    "energy": energy,
    "refresh": refresh,
    "precision": precision,
}
