"""What of the demo's recipe (`zo-act-node`) brings what: one thing changed at a time, on the demo's model and data.

    python -m benchmarks.recipe [--steps N] [--only NAME ...]

What comes before the tail is computed once for all of them, and the held-out questions are looked at through it too, so
that a variant costs its steps alone. Rows go to results/recipe.jsonl, the table to recipe.md; variants that have a row
of that very recipe are left out. Differences from the default are paired over the same questions. Choose by validation.
"""

from __future__ import annotations

import argparse
import base64
import functools
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from zoact_kernels import finetune
from zoact_kernels.layers import zo_layers
from zoact_kernels.losses import evaluate, group_losses
from zoact_kernels.methods.node import ZOActNode
from zoact_kernels.perturbation import Perturbation
from zoact_kernels.recipe import Recipe
from zoact_kernels.study.settings import load
from zoact_kernels.trainables import Coefficients, Nodes

from .report import write_whole
from .run import RESULTS
from .timing import machine

ROWS = "recipe.jsonl"
between: Any = importlib.import_module("zoact_kernels.trainables.between")  # its package has a function of that name
noises = between.noises
DEFAULT = "default"
OPTIONS = ("rank", "outputs")  # changes that are the method's own


class Variant(NamedTuple):
    """changes: of the recipe and its options. still: layers that do not move. bases: done to them after `prepare`.

    noise: in place of `noises`.
    """

    told: str
    changes: dict[str, Any]
    still: tuple[str, ...] = ()
    bases: Callable[[ZOActNode], None] = lambda optimizer: None
    noise: Callable[..., torch.Tensor] = noises


@torch.no_grad()
def plain_bases(optimizer: ZOActNode) -> None:
    """Directions of one length in place of whitened ones, the energy of an input the same."""
    for t in optimizer.trainables.values():
        assert isinstance(t, Nodes | Coefficients) and t.layer.basis is not None
        spread = t.layer.basis.norm(dim=0)
        t.layer.basis *= (
            torch.where(spread > 0, 1 / spread, 0) * spread[spread > 0].square().reciprocal().mean().rsqrt()
        )


@torch.no_grad()
def random_outputs(optimizer: ZOActNode) -> None:
    generator = torch.Generator().manual_seed(1)
    for t in optimizer.trainables.values():
        if isinstance(t, Nodes):
            t.left.copy_(torch.linalg.qr(torch.randn(t.left.shape, generator=generator)).Q)


def orthogonal(p: Perturbation, param_id: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Noise of a layer's queries, those of a row orthogonal to each other, lengths as drawn."""
    z = noises(p, param_id, rows, cols)
    turned = torch.linalg.qr(z.permute(1, 2, 0)).Q.permute(2, 0, 1)  # of the first query its direction, or the opposite
    return turned * z.norm(dim=2, keepdim=True)


VARIANTS = {
    DEFAULT: Variant("as `make demo` has it", {}),
    "no values": Variant("C of the values stays 0", {}, ("v_proj",)),
    "last alone": Variant("nothing but the last projection", {}, ("v_proj", "o_proj")),
    "not whitened": Variant("directions of one length", {}, (), plain_bases),
    "random outputs": Variant("8 random directions for U", {}, (), random_outputs),
    "no decay": Variant("weight_decay 0", {"weight_decay": 0.0}),
    "bases of 512": Variant("bases of 512 questions, not 2 048", {"basis_batches": 2}),
    "bases of all": Variant("bases of all 3 782", {"basis_batches": 15}),
    "rank 256": Variant("256 input directions", {"rank": 256}),
    "rank 128": Variant("128", {"rank": 128}),
    "rank 32": Variant("32", {"rank": 32}),
    "16 outputs": Variant("16 output directions", {"outputs": 16}),
    "constant lr": Variant("no cosine", {"schedule": "constant"}),
    "lr halved": Variant("lr 5e-3", {"lr": 5e-3}),
    "lr doubled": Variant("lr 2e-2", {"lr": 2e-2}),
    "decay doubled": Variant("weight_decay 8", {"weight_decay": 8.0}),
    "orthogonal": Variant("the noises of a row's two queries orthogonal", {}, noise=orthogonal),
    "rademacher": Variant("noise of signs", {"noise": "rademacher"}),
    "1 query": Variant("one pair a step", {"queries": 1}),
    "4 queries": Variant("four", {"queries": 4}),
    "batch 64": Variant("64 questions a step", {"batch_size": 64}),
    "half the steps": Variant("300", {"steps": 0.5}),
    "twice the steps": Variant("1 200", {"steps": 2.0}),
}


def recipe_of(variant: Variant, steps: int) -> Recipe:
    own = {name: value for name, value in variant.changes.items() if name not in OPTIONS}
    if "steps" in own:
        own["steps"] = round(steps * own["steps"])
    return Recipe(
        method=ZOActNode.name,
        **{"steps": steps, **own},
        options={k: v for k, v in variant.changes.items() if k in OPTIONS},
    )


class Bench:
    """The demo's model and data, and its tail, which outlives optimizers."""

    def __init__(self) -> None:
        self.loaded = load("int4", "trec")
        self.tail: Any = None

    def run(self, variant: Variant, steps: int, told: Callable[[int, int], None]) -> dict[str, Any]:
        model, recipe = self.loaded.model, recipe_of(variant, steps)
        for layer in zo_layers(model).values():
            layer.coeff = None
        optimizer = recipe.create(model)
        assert isinstance(optimizer, ZOActNode)
        if self.tail is not None:
            vars(optimizer)["fork"] = self.tail
        self.tail = optimizer.fork
        batch_at = functools.partial(self.loaded.training.batch_at, recipe)
        optimizer.prepare(map(batch_at, range(recipe.basis_batches)), functools.partial(group_losses, model))
        variant.bases(optimizer)
        look = optimizer._gradients

        def moving(losses: torch.Tensor) -> dict[str, torch.Tensor]:
            still = variant.still
            return {n: g * (not n.endswith(still) if still else 1) for n, g in look(losses).items()}

        optimizer._gradients = moving  # type: ignore[method-assign]
        took = []
        between.noises = variant.noise
        for step in range(recipe.steps):
            batch, misses, begun = batch_at(step), self.tail.cache.misses, time.perf_counter()
            optimizer.step_on([functools.partial(group_losses, model, batch)], batch.leading)
            if self.tail.cache.misses == misses:
                took.append(time.perf_counter() - begun)
            told(step + 1, recipe.steps)
        between.noises = noises
        with optimizer.forking():
            chosen, seen = (
                evaluate(model, part.batches(32)) for part in (self.loaded.validation, self.loaded.held_out)
            )
        assert seen.correct is not None
        trained = sum(
            t.value.numel() for n, t in optimizer.trainables.items() if not n.endswith(variant.still or ("?",))
        )
        return {
            "steps": recipe.steps, "trained": trained, "pairs": recipe.steps * recipe.queries * recipe.batch_size,
            "validation": [round(chosen.loss, 4), chosen.accuracy],
            "loss": round(seen.loss, 4), "accuracy": round(float(seen.correct.double().mean()), 4),
            "seconds_per_step": round(float(np.median(took)), 4) if took else None,
            "correct": base64.b64encode(np.packbits(seen.correct.numpy()).tobytes()).decode(), "n": len(seen.correct),
        }  # fmt: skip


def hits(row: dict[str, Any]) -> np.ndarray:
    bits = np.frombuffer(base64.b64decode(row["correct"]), np.uint8)
    return np.unpackbits(bits)[: row["n"]].astype(np.float64)


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# What of the demo's recipe brings what",
        "",
        "Made by `python -m benchmarks.recipe` from `recipe.jsonl`: `zo-act-node` on SmolLM2-135M (INT4) and question",
        "types, one thing changed at a time, seed 0. Loss and accuracy on 400 validation questions and on the 1 200",
        "held-out ones; the difference from the default is paired over the latter, ± its standard error. A pair is +",
        "and − of one query on one question.",
        "",
        "| variant | | trained numbers | pairs | validation | held-out | from the default |",
        "|---|---|---|---|---|---|---|",
    ]
    base = hits(rows[DEFAULT]) if DEFAULT in rows else None
    for name, variant in VARIANTS.items():
        if name not in rows:
            continue
        row, apart = rows[name], ""
        if base is not None and name != DEFAULT:
            difference = hits(row) - base
            apart = f"{100 * difference.mean():+.1f} ± {100 * difference.std(ddof=1) / math.sqrt(len(base)):.1f}"
        lines.append(
            f"| {name} | {variant.told} | {row['trained']:,} | {row['pairs']:,} | {row['validation'][0]:.3f}, "
            f"{100 * row['validation'][1]:.1f} % | {row['loss']:.3f}, {100 * row['accuracy']:.1f} % | {apart} |"
        )
    if missing := [name for name in VARIANTS if name not in rows]:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=finetune.demo_recipe().steps)
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="only these (repeat)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    asked = parser.parse_args(given)
    file = asked.out / ROWS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = {row["variant"]: row for row in map(json.loads, lines) if row["variant"] in VARIANTS and "recipe" in row}
    wanted = {name: asdict(recipe_of(variant, asked.steps)) for name, variant in VARIANTS.items()}
    rows = {name: row for name, row in rows.items() if row["recipe"] == wanted[name]}
    due = [name for name in asked.only or VARIANTS if name not in rows]
    bench = Bench()
    with Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        for name in due:
            bar = progress.add_task(name)
            row = bench.run(
                VARIANTS[name], asked.steps, lambda done, of, bar=bar: progress.update(bar, completed=done, total=of)
            )
            rows[name] = {"variant": name, "recipe": wanted[name], **row, "machine": machine()}
            write_whole(file, "".join(json.dumps(row) + "\n" for row in rows.values()))
            write_whole(asked.out / "recipe.md", table(rows))
            progress.console.print(f"{name}: loss {row['loss']}, accuracy {row['accuracy']}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
