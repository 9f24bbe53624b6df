"""The part of the report that is about gradients: what `measures` found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import Line, draw_panels
from .plan import Row, Run

Table = dict[str, Any]


def section(rows: Mapping[str, Row], folder: Path) -> list[str]:
    """Nothing where nothing was measured."""
    lines = []
    kinds = {
        "cosine": _cosine,
        "curvature": _curvature,
        "energy": _energy,
        "refresh": _refresh,
        "precision": _precision,
    }
    for name, told in kinds.items():
        row = rows.get(Run("measures", "measure", name).id)
        if row is not None and row.state == "done":
            lines += told(row.result, folder)
    head = ["## Gradients", "", "Of the dense twin on TREC, the layers of four blocks, by autograd.", ""]
    return head + lines if lines else []


def _columns(table: Table) -> dict[str, np.ndarray]:
    return {
        name: np.array(column) for name, column in zip(table["columns"], zip(*table["rows"], strict=True), strict=True)
    }


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]


def _cosine(table: Table, folder: Path) -> list[str]:
    of = _columns(table)
    lines = [
        "### Cosine of one direction with the gradient",
        "",
        "E|cos| of a layer's direction, mean over layers with two standard errors, beside the theory (see `measures`). "
        "z: (measured - theory) / standard error, of each layer.",
        "",
        "| structure | layers | measured | theory | over dense | with -2 <= z <= 2 | farthest z |",
        "|---" * 7 + "|",
    ]
    for structure in dict.fromkeys(of["structure"]):
        here = of["structure"] == structure
        z = (of["cosine"] - of["theory"])[here] / of["error"][here]
        within = int((np.abs(z) <= 2).sum())
        error = math.sqrt((of["error"][here] ** 2).sum()) / int(here.sum())
        gain = float(np.exp(np.log(of["theory"][here] / of["dense"][here]).mean()))
        measured, theory = of["cosine"][here].mean(), of["theory"][here].mean()
        lines.append(
            f"| {structure} | {len(z)} | {measured:.3e} ± {2 * error:.1e} | {theory:.3e} | {gain:.1f} x | "
            f"{within} of {len(z)} | {z[np.abs(z).argmax()]:+.1f} |"
        )
    expected = "About 95 % of the layers should lie within 2; of 112 values the largest of a true theory is near 2.9. "
    expected += "Published: AGZO .0123, MeZO .0015, eight times (another model, all layers; second hand)."
    panels = []
    for structure in dict.fromkeys(of["structure"]):
        here = of["structure"] == structure
        x = np.arange(int(here.sum()), dtype=float)
        seen = Line("measured", x, of["cosine"][here], 2 * of["error"][here], True)
        panels.append((f"{structure}, layer", "|cos|", [seen, Line("theory", x, of["theory"][here], None, False)]))
    draw_panels(panels, folder / "cosine.png", columns=2)
    return [*lines, "", expected, "", "![cosines by layer](cosine.png)", ""]


def _curvature(table: Table, folder: Path) -> list[str]:
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    base = next(row for row in rows if row["contender"] == "mezo")
    lines = [
        "### What a step along a random direction can gain",
        "",
        "All trained weights at once, on the loss of 16 examples, along noise as the method makes it: the slope d, the "
        "curvature h = zᵀHz that it meets, both by two-sided differences of radius 1e-3, and the most that a plain "
        "step can take off that loss, E[d²] / (2 E[h]), with its standard error. The length of z drops out, and so "
        "does the angle by itself: a subspace that holds as much of the curvature as of the gradient gains nothing by "
        "being small.",
        "",
        f"| contender ({base['draws']} draws) | E[d²] | E[h] | gain a step | of MeZO's |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        share = row["gain"] / base["gain"]
        error = share * math.hypot(row["gain error"] / row["gain"], base["gain error"] / base["gain"])
        ratio = "1" if row is base else f"{share:.2f} ± {error:.2f}"
        lines.append(
            f"| {row['contender']} | {row['slope']:.3g} ± {row['slope error']:.2g} | {row['curvature']:.4g} ± "
            f"{row['curvature error']:.2g} | {row['gain']:.3f} ± {row['gain error']:.3f} | {ratio} |"
        )
    return [*lines, ""]


def _energy(table: Table, folder: Path) -> list[str]:
    ranks = [int(name.removeprefix("rank ")) for name in table["columns"] if name.startswith("rank ")]
    of = _columns(table)
    lines = [
        "### Energy of the gradient that the activation basis holds",
        "",
        "Share in %, mean over layers, of a gradient of examples that the basis has not seen; by chance R / K.",
        "",
        "| batches of 16 | " + " | ".join(f"rank {r}" for r in ranks) + " |",
        "|---" * (len(ranks) + 1) + "|",
    ]
    for count in dict.fromkeys(of["batches"]):
        here = of["batches"] == count
        lines.append(f"| {count} | " + " | ".join(f"{100 * of[f'rank {r}'][here].mean():.1f}" for r in ranks) + " |")
    chance = [100 * float((r / of["in_features"]).mean()) for r in ranks]
    lines.append("| chance | " + " | ".join(f"{share:.1f}" for share in chance) + " |")
    most = of["batches"] == of["batches"].max()
    kinds = np.array([_kind(layer) for layer in of["layer"]])
    lines += [
        "",
        f"By kind of layer, {of['batches'].max()} batches:",
        "",
        "| layer | " + " | ".join(f"rank {r}" for r in ranks) + " |",
    ]
    lines.append("|---" * (len(ranks) + 1) + "|")
    drawn = []
    for kind in dict.fromkeys(kinds):
        here = most & (kinds == kind)
        shares = [100 * float(of[f"rank {r}"][here].mean()) for r in ranks]
        lines.append(f"| {kind} | " + " | ".join(f"{share:.1f}" for share in shares) + " |")
        drawn.append(Line(str(kind), np.log2(ranks), np.array(shares), None, False))
    drawn.append(Line("chance", np.log2(ranks), np.array(chance), None, True))
    draw_panels([("log2 of the rank", "share of the gradient, %", drawn)], folder / "energy.png")
    return [*lines, "", "![energy by rank](energy.png)", ""]


def _refresh(table: Table, folder: Path) -> list[str]:
    of = _columns(table)
    kinds = [name for name in table["columns"] if name not in ("layer", "step")]
    lines = [
        "### One-shot against refreshed bases",
        "",
        "Share of the gradient in %, rank 1, mean over layers, after steps of first-order Adam on C. One-shot: from "
        "the model at the beginning; refreshed: same examples, the model of that step; step: from 16 of the gradient's "
        "own examples. The gradient is that of 64 examples, or of those 16 alone.",
        "",
        "| steps | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for step in dict.fromkeys(of["step"]):
        here = of["step"] == step
        lines.append(f"| {step} | " + " | ".join(f"{100 * of[kind][here].mean():.1f}" for kind in kinds) + " |")
    return [*lines, ""]


def _precision(table: Table, folder: Path) -> list[str]:
    of = _columns(table)
    lines = [
        "### Finite differences in few bits",
        "",
        "(f+ - f-) / 2 sigma of directions on C beside autograd's derivative of the same model: root mean square of "
        "the error over that of the derivative, and their correlation.",
        "",
        "| model | sigma | error | correlation |",
        "|---|---|---|---|",
    ]
    for model in dict.fromkeys(of["model"]):
        for sigma in dict.fromkeys(of["sigma"]):
            here = (of["model"] == model) & (of["sigma"] == sigma)
            seen, exact = of["measured"][here].astype(float), of["exact"][here].astype(float)
            error = math.sqrt(((seen - exact) ** 2).mean() / (exact**2).mean())
            lines.append(f"| {model} | {sigma:g} | {100 * error:.2g} % | {np.corrcoef(seen, exact)[0, 1]:.4f} |")
    return [*lines, ""]


TOLD: Mapping[str, Callable[[Table, Path], list[str]]] = {
    "cosine": _cosine, "curvature": _curvature, "energy": _energy, "refresh": _refresh, "precision": _precision,
}  # fmt: skip
