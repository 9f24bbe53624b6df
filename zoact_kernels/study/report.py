"""report.md and its figures, from the rows of a folder alone: the same rows give the same bytes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..memory import human
from ..plots import Line, draw_panels
from ..runlog import write_whole
from . import claims, gradients
from .plan import (
    ADAM_ON_C,
    BEFORE,
    EXTENSIONS,
    GRID,
    LORA,
    NODE,
    SEEDS,
    Choice,
    Row,
    Run,
    Set,
    chosen,
    contender,
    due,
    sets,
)
from .rows import read
from .settings import CURVE
from .statistics import Interval, interval, seed_interval
from .work import hits

HEAD = """# Which method learns fastest

Made by `zoact study report` from `runs.jsonl` and `measures.jsonl`; `zoact study run` goes on where this ends.

* **A forward** is one sequence through all blocks of the model, counted block by block as the run makes them: 16
  examples, two-sided, one query are 32 a step. A backward counts as two, a tangent as one more, a sequence that enters
  halfway as a half; a label row behind the last attention as the share of one block that it is of its sequence's
  tokens. Computing a basis counts, evaluations do not; nor do the nets of zo-finetuner, learned once by first-order
  steps on another task.
* **Splits.** The lr is chosen by the loss on {curve} validation examples after a shorter run of its own seed: {grid}
  rates half a decade apart around the published one (where it multiplies a gradient around ten times that, on the
  encoder a hundred), and up to {more} more while the best is an end; then the best runs as long as a final run, and
  while that ends worse than the short one, the next lower lr (*by short runs*: this is to come). The same rule for all.
  What was chosen on questions is kept for messages and reviews, and from the dense twin for the INT4 model. Only final
  runs see the held-out examples, all of them at the end, {curve} along the curves. A new head is drawn by the seed, for
  all alike.
* **Intervals** are 95 % and hold for other seeds and other examples at once: the variance of the mean is that between
  the means of {seeds} seeds plus that between examples, Student's t with the degrees of freedom of Welch and
  Satterthwaite. Differences are paired: same examples, and a seed gives all methods the same batches.
* **Seconds** are of the steps alone. The machine is shared, so beside those that were measured stand calibrated ones: a
  step over the plain forward of as many rows, timed alternately, times the shortest such forward seen in that set. What
  is computed once, before the first step, is not in them; but every step of zo-act-node is calibrated as one on new
  examples, while those that its bases were made of come first and cost next to nothing.
* **Peak** is the largest memory of a step above the weights, state of the optimizer included.
"""


class Final(NamedTuple):
    """The final runs of a contender in a set. correct: bool [seeds, n], None before one is done."""

    name: str
    choice: Choice
    correct: np.ndarray | None
    losses: list[float]
    curves: list[np.ndarray]  # [points, (step, forwards, seconds, loss, accuracy)]
    cost: dict[str, Any] | None
    seconds_per_step: list[float]

    @property
    def accuracy(self) -> Interval | None:
        return None if self.correct is None else interval(self.correct)


def finals(given: Set, rows: Mapping[str, Row]) -> list[Final]:
    """All contenders of a set that have a row, what all start from first."""
    found = []
    before = rows.get(Run(given.name, "final", BEFORE).id)
    if before is not None and before.state == "done":
        test = before.result["test"]
        found.append(Final(BEFORE, Choice(), hits(test)[None], [test["loss"]], [], None, []))
    for name in given.contenders:
        cost = rows.get(Run(given.name, "cost", name).id)
        if cost is None or cost.state != "done":
            continue
        choice = chosen(given, contender(name), rows)
        if choice.lr is None:
            found.append(Final(name, choice, None, [], [], cost.result, []))
            continue
        runs = [rows.get(Run(given.name, "final", name, choice.lr, seed, given.final).id) for seed in SEEDS]
        done = [row.result for row in runs if row is not None and row.state == "done"]
        correct = np.stack([hits(result["test"]) for result in done]) if done else None
        curves = [np.array(result["curve"], dtype=float) for result in done]  # None becomes NaN
        losses = [math.nan if r["test"]["loss"] is None else r["test"]["loss"] for r in done]
        took = [float(curve[-1, 2] / curve[-1, 0]) for curve in curves]
        found.append(Final(name, choice, correct, losses, curves, cost.result, took))
    return found


def difference(a: Final, b: Final) -> Interval | None:
    """Accuracy of `a` less that of `b`, over the seeds that both have."""
    if a.correct is None or b.correct is None:
        return None
    seeds = min(len(a.correct), len(b.correct))
    return interval(a.correct[:seeds].astype(float) - b.correct[:seeds].astype(float))


def loss_difference(a: Final, b: Final) -> Interval | None:
    """Held-out loss of `a` less that of `b`, over the seeds that both have; of those alone, not of other examples."""
    seeds = min(len(a.losses), len(b.losses))
    return seed_interval(np.array(a.losses[:seeds]) - np.array(b.losses[:seeds])) if seeds else None


# --- tables -----------------------------------------------------------------------------------------------------------


def _percent(value: Interval | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    mean = f"{100 * value.mean:+.1f}" if signed else f"{100 * value.mean:.1f}"
    if math.isnan(value.half):
        return f"{mean} (one run)" if value.seeds == 1 else mean
    return f"{mean} ± {100 * value.half:.1f}" + ("" if value.seeds >= len(SEEDS) else f" ({value.seeds} seeds)")


def section(given: Set, rows: Mapping[str, Row], folder: Path) -> list[str]:
    """The table of a set, its figure, and what they say."""
    found = finals(given, rows)
    if not found:
        return []
    by_name = {final.name: final for final in found}
    quiet = _quiet(found)
    shortest = min((_calibrated(f, quiet) * f.curves[0][-1, 0] for f in found if f.curves and f.cost), default=math.nan)
    when = "one time" if math.isnan(shortest) else f"{shortest:.0f} s"
    lines = [
        f"## {given.name}: {given.task} on {given.model}, {given.final:,} forwards",
        "",
        f"Held-out accuracy in %. *At {when}*: on the curve's examples when the fastest contender was done, "
        "in calibrated seconds. *Of first order*: the share of what Adam on C (where there is none, on a LoRA) gained "
        "over the untrained model.",
        "",
        f"| contender | lr | accuracy | less zo-act's | of first order | loss | at {when} | "
        "forwards a step | ms a step, measured (calibrated) | trained | peak |",
        "|---" * 11 + "|",
    ]
    best = {final.name: final.accuracy.mean for final in found if final.accuracy}
    for final in sorted(found, key=lambda f: -best.get(f.name, -1)):
        lines.append(_line(final, by_name, quiet, shortest))
    if any(final.curves for final in found):
        figure = f"curve-{given.name}.png"
        _draw(found, quiet, folder / figure, given)
        lines += ["", f"![accuracy over forwards and seconds]({figure})"]
    return [*lines, "", *_verdicts(by_name), *_memory(found), *_came_apart(by_name), ""]


def _line(final: Final, by_name: Mapping[str, Final], quiet: float, shortest: float) -> str:
    ours, before = by_name.get("zo-act"), by_name.get(BEFORE)
    bound = by_name.get(ADAM_ON_C.name, by_name.get(LORA.name))
    versus = "–" if ours is None or final.name in ("zo-act", BEFORE) else _percent(difference(final, ours), signed=True)
    share = "–"
    if before and bound and before.accuracy and bound.accuracy and final.accuracy and final.name != BEFORE:
        gain = bound.accuracy.mean - before.accuracy.mean
        share = f"{(final.accuracy.mean - before.accuracy.mean) / gain:.0%}" if gain > 0 else "–"
    lr = "–" if final.choice.lr is None else f"{final.choice.lr:.2g}"
    lr += " (end of the grid)" * final.choice.edge + " (by short runs)" * (final.choice.asked is not None)
    cells = [final.name, lr, _percent(final.accuracy), versus, share]
    cells.append(f"{np.mean(final.losses):.3f}" if final.losses else "–")
    if final.cost is None:
        return "| " + " | ".join([*cells, *["–"] * 5]) + " |"
    at = [_at(curve, shortest / _calibrated(final, quiet)) for curve in final.curves]
    cells.append(_percent(seed_interval(np.array(at))) if at else "–")
    measured = f"{1e3 * np.median(final.seconds_per_step):.0f}" if final.seconds_per_step else "–"
    cells += [
        f"{final.cost['forwards_per_step']:g}", f"{measured} ({1e3 * _calibrated(final, quiet):.0f})",
        f"{final.cost['trained']:,}", human(final.cost["peak_bytes"]),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _quiet(found: Iterable[Final]) -> float:
    """Seconds of a forward of one sequence, the shortest seen: what the machine does when it is left alone."""
    costs = [final.cost for final in found if final.cost]
    return min((cost["forward_seconds"] / cost["forward_sequences"] for cost in costs), default=math.nan)


def _calibrated(final: Final, quiet: float) -> float:
    """Seconds of a step."""
    assert final.cost is not None
    cost = final.cost
    return float(cost["step_seconds"] / cost["forward_seconds"] * cost["forward_sequences"] * quiet)


def _at(curve: np.ndarray, step: float) -> float:
    """Accuracy of the last point of a curve that is not beyond `step`."""
    return float(curve[curve[:, 0] <= step + 1e-9][-1, 4])


def _verdicts(by_name: Mapping[str, Final]) -> list[str]:
    """Whether ZO-Act beats the three that it is measured against, by intervals that do not meet; and our own of it."""
    lines = []
    for who, other in itertools.product(("zo-act", NODE.name), ("mezo", "lozo", "subzero")):
        ours, theirs = by_name.get(who), by_name.get(other)
        if ours is None or theirs is None or ours.accuracy is None or theirs.accuracy is None:
            continue
        a, b, paired = ours.accuracy, theirs.accuracy, difference(ours, theirs)
        if math.isnan(a.half) or math.isnan(b.half):
            said = "not known yet: fewer than two seeds are done"
        elif a.low > b.high:
            said = "yes, the intervals are disjoint"
        elif a.high < b.low:
            said = "no, it is the other way round, and the intervals are disjoint"
        else:
            said = "no, the intervals meet"
        loss = loss_difference(ours, theirs)
        lines.append(
            f"* {who} beats {other}: {said} ({_percent(a)} against {_percent(b)}, paired {_percent(paired, True)}; "
            f"held-out loss, over seeds alone, {'–' if loss is None else claims.of_loss(loss)})."
        )
    return lines


def _memory(found: Iterable[Final]) -> list[str]:
    """Of the methods that forward passes alone train: those that no other beats with less memory."""
    known = [
        (f.cost["peak_bytes"], f.accuracy.mean, f.name)
        for f in found
        if f.cost and f.accuracy and f.cost["peak_bytes"] is not None and not contender(f.name).first_order
    ]
    best = [(p, a, n) for p, a, n in known if not any(q <= p and b > a for q, b, m in known if m != n)]
    if not best:
        return []
    told = ", ".join(f"{name} ({human(peak)}, {100 * accuracy:.1f})" for peak, accuracy, name in sorted(best))
    return [f"* At equal memory above the weights nothing beats, from least to most: {told}."]


def _came_apart(by_name: Mapping[str, Final]) -> list[str]:
    """Those that end worse than they began."""
    if BEFORE not in by_name:
        return []
    worse = {f.name: float(np.mean(f.losses)) for f in by_name.values() if f.losses}
    start = worse.pop(BEFORE)
    told = ", ".join(f"{name} ({loss:.2f})" for name, loss in sorted(worse.items()) if not loss <= start)
    if not told:
        return []
    return [f"* Above the untrained model's loss ({start:.2f}) in the end, in the mean of their seeds: {told}."]


def _draw(found: Sequence[Final], quiet: float, path: Path, given: Set) -> None:
    """Mean over seeds of the accuracy on the curve's examples; the interval of the last point as a bar."""
    shown = sorted((f for f in found if f.curves), key=lambda f: -f.curves[0][-1, 4])
    core = {"zo-act", "mezo", "lozo", "subzero"}
    over: dict[str, list[Line]] = {"forwards": [], "calibrated seconds": []}
    for final in shown:
        points = min(len(curve) for curve in final.curves)
        table = np.stack([curve[:points] for curve in final.curves])  # [seeds, points, 5]
        mean = table.mean(axis=0)
        half = [seed_interval(column).half for column in table[:, :, 4].T]
        error = np.nan_to_num(np.array(half))
        strong = final.name in core
        for axis, x in (("forwards", mean[:, 1]), ("calibrated seconds", mean[:, 0] * _calibrated(final, quiet))):
            over[axis].append(Line(final.name, x, 100 * mean[:, 4], 100 * error if strong else None, strong))
    draw_panels([(axis, "accuracy, %", lines) for axis, lines in over.items()], path, title=given.name)


# --- the whole --------------------------------------------------------------------------------------------------------


def write(folder: Path) -> list[Path]:
    """Write report.md and the figures into `folder`, from its rows; returns what was written."""
    rows = {row.run.id: row for row in read(folder)}
    for old in folder.glob("*.png"):
        old.unlink()
    lines = [HEAD.format(curve=CURVE, grid=len(GRID), more=EXTENSIONS, seeds=len(SEEDS))]
    for given in sets():
        lines += section(given, rows, folder)
    scenes = {given: {f.name: f for f in finals(given, rows)} for given in sets()}
    lines += claims.section(scenes, difference, loss_difference)
    lines += gradients.section(rows, folder)
    lines += _machines(rows)
    lines += missing(rows)
    text = "\n".join(lines).rstrip() + "\n"
    write_whole(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    return [folder / "report.md", *sorted(folder.glob("*.png"))]


def _machines(rows: Mapping[str, Row]) -> list[str]:
    told = Counter(row.result["machine"] for row in rows.values() if row.state == "done" and "machine" in row.result)
    if not told:
        return []
    return ["## Machine", "", *(f"* {name} ({count} runs)" for name, count in sorted(told.items())), ""]


def missing(rows: Mapping[str, Row]) -> list[str]:
    """What is not in the report: runs that wait, runs that failed and why, sweeps whose best lr is an end."""
    waiting = Counter((run.set, run.stage) for _, run in due(rows) if run.id not in rows)
    lines = ["## What is missing", ""]
    for given in sets():
        stages = {stage: waiting[given.name, stage] for stage in ("cost", "sweep", "final")}
        undecided = sum(
            chosen(given, contender(name), rows).lr is None
            for name in given.contenders
            if (cost := rows.get(Run(given.name, "cost", name).id)) is None or cost.state == "done"
        )
        told = [f"{count} {stage} runs" for stage, count in stages.items() if count]
        told += [f"the final runs of {undecided} contenders, whose lr is not chosen yet"] if undecided else []
        if told:
            lines.append(f"* {given.name}: {', '.join(told)}.")
    measures = [run.contender for _, run in due(rows) if run.stage == "measure" and run.id not in rows]
    if measures:
        lines.append(f"* measures: {', '.join(measures)}.")
    failed = [row for row in rows.values() if row.state == "failed"]
    for row in sorted(failed, key=lambda row: row.run.id):
        lines.append(f"* failed: {row.run.id}: {' '.join(row.reason.split())[:300]}")
    if len(lines) == 2:
        lines.append("Nothing: every run of the plan is done.")
    return lines
