"""What people look at, made from the log alone: metrics.csv and curve.png; and panels of lines."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .runlog import EvalRow, RunLog, StepRow, write_whole, writing

METRICS = "step split loss accuracy signal floor lr skipped tokens seconds".split()


class Metrics:
    """metrics.csv, one line a step or evaluation, flushed.

    It begins with all that the log holds, so half a line that a killed process left does not stay.
    Raises RunError where it can't be written.
    """

    def __init__(self, log: RunLog) -> None:
        path = log.directory / "metrics.csv"
        with writing(str(path)):
            self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115  open as long as the run
        self._writer = csv.writer(self._file)
        self._write(METRICS)
        evals, rows = {row.step: row for row in log.evals("eval")}, log.steps()
        for done in range(log.done + 1):
            if done in evals:
                self.eval(evals[done])
            if done < log.done:
                self.step(next(rows))

    def step(self, row: StepRow) -> None:
        self._write(
            (row.step + 1, "train", float(row.losses.mean()), "", row.signal, row.floor, row.lr, int(row.skipped),
             row.tokens, round(row.seconds, 4))
        )  # fmt: skip

    def eval(self, row: EvalRow) -> None:
        self._write((row.step, "eval", row.loss, row.accuracy, "", "", "", "", "", round(row.seconds, 4)))

    def _write(self, cells: Iterable[Any]) -> None:
        with writing("metrics.csv"):
            self._writer.writerow(cells)
            self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every line was flushed, or its failure raised
            self._file.close()


def draw_curve(log: RunLog, path: Path) -> None:
    """Training loss (each step, and a running mean), held-out loss and accuracy over steps, written whole to `path`.

    Raises RunError: `path` can't be written; ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    rows = list(log.steps())
    losses = np.array([float(row.losses.mean()) for row in rows])
    evals = log.evals("eval")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per example")
    axes.grid(alpha=0.25)
    if rows:
        x = np.arange(1, len(rows) + 1)
        axes.plot(x, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training batch")
        axes.plot(x, _running_mean(losses), color="tab:blue", linewidth=1.6, label="training, running mean")
    if evals:
        x = np.array([row.step for row in evals])
        loss = np.array([row.loss for row in evals])
        error = np.array([_standard_error(row.losses) for row in evals])
        axes.errorbar(x, loss, error, color="tab:red", marker="o", markersize=4, capsize=2, label="held out")
        if evals[0].correct.size:
            right = axes.twinx()
            right.plot(x, [100 * row.accuracy for row in evals], color="tab:green", marker="s", markersize=4)
            right.set_ylabel("held-out accuracy, %", color="tab:green")
    axes.legend(loc="upper center", ncols=3, fontsize=8)
    axes.set_title(log.meta.get("title", log.directory.name), fontsize=10)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))


def _running_mean(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Mean over a trailing window of `share` of the run, at least 5 steps, skipping values that aren't finite."""
    window = max(5, int(share * len(values)))
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / np.maximum(1, count[end] - count[start])


def _standard_error(values: np.ndarray) -> float:
    """Of the mean of `values`; 0 for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


class Line(NamedTuple):
    """x, y [n]; error: half a bar at each point, or None; strong: thick and opaque."""

    name: str
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | None
    strong: bool


def draw_panels(
    panels: Sequence[tuple[str, str, Sequence[Line]]], path: Path, *, columns: int = 2, title: str = ""
) -> None:
    """Panels (label of x, label of y, lines) side by side, one legend for all, written whole to `path`.

    The same lines give the same bytes (of one version of matplotlib). Raises ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.8 * rows), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    colours: dict[str, Any] = {}
    for index, (x_label, y_label, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
        for line in lines:
            colour = colours.setdefault(line.name, f"C{len(colours) % 10}")
            style = "-" if list(colours).index(line.name) < 10 else "--"
            look = {"color": colour, "linestyle": style, "linewidth": 2.2 if line.strong else 1.0}
            look |= {"alpha": 1.0 if line.strong else 0.7, "label": line.name, "marker": ".", "markersize": 4}
            axes.errorbar(line.x, line.y, line.error, capsize=2, **look)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))
