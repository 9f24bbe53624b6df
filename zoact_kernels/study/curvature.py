"""What one step along a random direction can gain: its slope squared against the curvature that it meets.

A step against d z, d = (f+ - f-) / 2 sigma, changes the loss by -eta d^2 + eta^2 d^2 h / 2, h = z^T H z. Over draws of
z, d and h nearly independent, the best eta gives

    gain = E[d^2] / (2 E[h])        h = (f+ + f- - 2 f0) / sigma^2

in which the length of z drops out, and so does the number of weights: a direction may meet the gradient at a better
angle and gain nothing by it, if it meets more curvature in the same proportion. That is the account of MeZO's rate by
the trace of the Hessian (arXiv 2305.17333), asked of every structure. It is about plain steps, not about Adam's.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from .. import rng
from ..layers import zo_layers
from ..losses import group_losses
from ..methods import create
from ..recipe import Recipe
from .plan import contender
from .settings import give_basis, load

MODEL, TASK = "dense", "trec"
CONTENDERS = ("mezo", "zo-act", "zo-act r16", "lozo", "subzero")
DRAWS = 64
SIGMA = 1e-3  # the published one of all but SubZero's, so that all see the same loss but for the direction
EXAMPLES = 16
NO_STEP = 1e-30  # an lr that moves no fp32 weight


def curvatures(model: Any, optimizer: Any, batch: Any, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """(d, h) of so many directions, each [draws]; the model stays what it is."""
    evaluate = functools.partial(group_losses, model, batch)
    with torch.no_grad():
        plain = float(group_losses(model, batch).double().mean())
    slopes, bends = [], []
    for _ in range(draws):
        losses = optimizer.step_on([evaluate], batch.leading).losses.double().mean(dim=1)
        up, down = float(losses[0]), float(losses[1])
        slopes.append((up - down) / (2 * optimizer.sigma))
        bends.append((up + down - 2 * plain) / optimizer.sigma**2)
    return np.array(slopes), np.array(bends)


def gain(slopes: np.ndarray, bends: np.ndarray) -> tuple[float, float]:
    """(E[d^2] / (2 E[h]), its standard error from the draws)."""
    parts = [slopes**2, bends]
    relative = [float(part.std(ddof=1) / math.sqrt(len(part)) / part.mean()) for part in parts]
    value = float(parts[0].mean() / (2 * parts[1].mean()))
    return value, abs(value) * math.hypot(*relative)


def curvature() -> dict[str, Any]:
    """Rows [contender, draws, E[d^2], its error, E[h], its error, gain, its error], on a batch that no basis saw."""
    rows = []
    for name in CONTENDERS:
        who, setting = contender(name), load(MODEL, TASK)
        model, dataset = setting.model, setting.training.dataset
        if who.method == "zo-act":
            give_basis(setting, who.rank, Recipe(batch_size=16))
        else:
            for layer in zo_layers(model).values():
                layer.rank = 0
        batch = next(iter(dataset.batches(EXAMPLES, np.arange(len(dataset) - EXAMPLES, len(dataset)))))
        optimizer = create(who.method, model, optimizer="sgd", lr=NO_STEP, sigma=SIGMA, seed=rng.param_id(name))
        slopes, bends = curvatures(model, optimizer, batch, DRAWS)
        told = [(part.mean(), part.std(ddof=1) / math.sqrt(len(part))) for part in (slopes**2, bends)]
        rows.append([name, DRAWS, *(float(f"{x:.5g}") for pair in (*told, gain(slopes, bends)) for x in pair)])
    columns = ["contender", "draws", "slope", "slope error", "curvature", "curvature error", "gain", "gain error"]
    return {"columns": columns, "rows": rows}
