"""One run from its spec to its row, and the loop of a worker.

A run of a method is `trainer.train` in the run's own directory: what users run, its log, its resume. Weights that a
method trains make large snapshots, so there is the first one alone where the log can be replayed.
"""

from __future__ import annotations

import base64
import math
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import memory
from ..backend import environment
from ..finetune import Part, compare_costs
from ..layers import zo_layers
from ..losses import evaluate, group_losses
from ..methods import METHODS, StepResult, arguments
from ..methods.activation import ZOAct
from ..methods.learned import ZOFinetuner
from ..recipe import Recipe
from ..runlog import EvalRow, RunLog, StepRow
from ..trainer import Watch, train
from . import first_order, measures
from .meter import Meter
from .nets import nets_for
from .plan import BASIS_BATCHES, BEFORE, Contender, Row, Run, Set, contender, due, sets
from .queue import Claim, Queue
from .settings import TARGETS, Setting, give_basis, load, spread

BATCH = 16
EVAL_BATCH = 32
POINTS = 4  # evaluations along a final run, besides the one before
COST_STEPS, COST_REPEATS = 10, 5


class Stopped(Exception):
    """The run is not over: the time is up, or a signal came. Its directory has what is needed to go on."""


class Measured(Watch):
    """Counts forwards where they belong, and ends the run when the time is up."""

    def __init__(self, meter: Meter, deadline: float, known: int = 0) -> None:
        self.meter, self.deadline, self.known = meter, deadline, known
        self.setup, self.steps, self.reported = 0.0, 0, 0.0

    def started(self, done: int, steps: int, device: str) -> None:
        self.setup = self.reported = self.meter.forwards

    def stepped(self, row: StepRow, result: StepResult) -> None:
        self.reported = self.meter.forwards
        if row.step < self.known:
            self.setup = self.reported
        else:
            self.steps += 1
        if time.monotonic() > self.deadline:
            signal.raise_signal(signal.SIGTERM)  # train ends after the step at hand, its state saved

    def evaluating(self, step: int) -> None:
        self.meter.paused = True

    def evaluated(self, row: EvalRow) -> None:
        self.meter.paused = False

    @property
    def per_step(self) -> float:
        return (self.reported - self.setup) / self.steps if self.steps else math.nan


def recipe_of(who: Contender, *, lr: float, steps: int, seed: int, model: str = "", eval_every: int = 0) -> Recipe:
    """The recipe of a contender on a model: its method's defaults, BATCH examples of any length; lr constant but for
    methods with a schedule of their own."""
    dense = not who.first_order and METHODS[who.method].dense and METHODS[who.method].replayable
    given: dict[str, Any] = {"basis_batches": BASIS_BATCHES, **who.recipe, "lr": lr}
    if model in TARGETS and not who.first_order and "targets" in arguments(who.method):
        given["options"] = {"targets": TARGETS[model]}
    return Recipe(
        method="zo-act" if who.first_order else who.method,
        steps=steps, seed=seed, batch_size=BATCH, floor_every=0, eval_every=eval_every,
        snapshot_every=0 if dense else 50, **given,
    )  # fmt: skip


def prepare(setting: Setting, who: Contender, recipe: Recipe, begun: bool) -> None:
    """Give the layers what the method wants of them, unless the run's snapshots have it."""
    if METHODS[who.method].basis != "activations":
        return
    if issubclass(METHODS[who.method], ZOAct) and not begun:
        give_basis(setting, who.rank, recipe)
        return
    for name, layer in zo_layers(setting.model).items():
        if "lm_head" not in name:
            layer.rank = who.rank


# --- the stages -------------------------------------------------------------------------------------------------------


def perform(claim: Claim, given: Set | None, rows: dict[str, Row], deadline: float) -> dict[str, Any]:
    """The result of a run, JSON values. Raises Stopped, or whatever a run may fail by."""
    run = claim.run
    if run.stage == "measure":
        return measures.MEASURES[run.contender]()
    assert given is not None
    if run.contender == BEFORE:
        setting = load(given.model, given.task, seed=run.seed)
        return {"curve": [], "test": tested(setting.model, setting.held_out)}
    who = contender(run.contender)
    if run.stage == "cost":
        return cost(given, who, claim.directory, deadline)
    costs = rows[Run(given.name, "cost", who.name).id].result
    steps = max(1, who.known_steps + int((run.forwards - costs["setup_forwards"]) / costs["forwards_per_step"]))
    every = max(1, round(steps / POINTS)) if run.stage == "final" else 0
    assert run.lr is not None
    recipe = recipe_of(who, lr=run.lr, steps=steps, seed=run.seed, model=given.model, eval_every=every)
    if who.method == ZOFinetuner.name:
        learned = nets_for(given.model, given.task, claim.directory.parents[1] / "nets")
        recipe = replace(recipe, options={**recipe.options, "nets": str(learned)})
    setting = load(given.model, given.task, seed=run.seed)
    shown = setting.held_out if run.stage == "final" else setting.validation
    if who.first_order:
        model, result = _train_first_order(setting, who, recipe, shown, deadline)
    else:
        model, result = _train(setting, who, recipe, shown, claim.directory / "log", deadline)
    if run.stage == "final":
        result["test"] = tested(model, setting.held_out)
    return result


def _train(
    setting: Setting, who: Contender, recipe: Recipe, shown: Part, directory: Path, deadline: float
) -> tuple[Any, dict[str, Any]]:
    begun = RunLog.exists(directory)
    meter = Meter(setting.model)
    watch = Measured(meter, deadline, who.known_steps)
    prepare(setting, who, recipe, begun)
    indices = spread(shown)
    result = train(
        setting.model, recipe, directory, batch_at=lambda step: setting.training.batch_at(recipe, step),
        held_out=lambda: shown.dataset.batches(EVAL_BATCH, indices), resume=begun, watch=watch,
    )  # fmt: skip
    meter.close()
    if result.done < recipe.steps:
        raise Stopped
    with RunLog.open(directory) as log:
        taken, evals = list(log.steps()), log.evals("eval")
    seconds = np.concatenate([[0.0], np.cumsum([row.seconds for row in taken])])
    # A run that was taken up again counts those of its last part; its setup was before.
    forwards = [watch.setup + watch.per_step * max(0, step - watch.known) for step in range(len(taken) + 1)]
    curve = [_point(row.step, forwards[row.step], seconds[row.step], row.loss, row.accuracy) for row in evals]
    told = {
        "curve": curve,
        "steps": len(taken),
        "skipped": sum(row.skipped for row in taken),
    }
    return setting.model, told


def _train_first_order(
    setting: Setting, who: Contender, recipe: Recipe, shown: Part, deadline: float
) -> tuple[Any, dict[str, Any]]:
    meter = Meter(setting.model)
    bound = first_order.begin(who.method, setting, who.rank, recipe)
    indices = spread(shown)
    took: list[float] = []
    curve = []

    def look() -> None:
        meter.paused = True
        seen = evaluate(bound.model, shown.dataset.batches(EVAL_BATCH, indices))
        assert seen.accuracy is not None
        curve.append(_point(len(took), meter.forwards, sum(took), seen.loss, seen.accuracy))
        meter.paused = False

    look()
    for seconds in first_order.steps(bound, setting, recipe):
        took.append(seconds)
        if len(took) == recipe.steps or (recipe.eval_every and len(took) % recipe.eval_every == 0):
            look()
        if time.monotonic() > deadline:
            raise Stopped
    meter.close()
    return bound.model, {"curve": curve, "steps": len(took), "skipped": 0}


def cost(given: Set, who: Contender, directory: Path, deadline: float) -> dict[str, Any]:
    """Forwards of a step as counted, and its time and peak beside the plain forward of as many rows, interleaved."""
    shutil.rmtree(directory / "log", ignore_errors=True)
    steps = who.known_steps + COST_STEPS
    recipe = recipe_of(who, lr=who.centre(given.scale), steps=steps, seed=0, model=given.model)
    setting = load(given.model, given.task)
    batch = setting.training.batch_at(recipe, 0)
    if who.first_order:
        return _cost_of_first_order(setting, who, recipe, batch)
    meter = Meter(setting.model)
    watch = Measured(meter, deadline, who.known_steps)
    prepare(setting, who, recipe, False)
    result = train(
        setting.model, recipe, directory / "log", batch_at=lambda step: setting.training.batch_at(recipe, step),
        watch=watch,
    )  # fmt: skip
    meter.close()
    if result.done < recipe.steps:
        shutil.rmtree(directory / "log", ignore_errors=True)
        raise Stopped
    optimizer = result.optimizer
    own = sum(w.numel() * w.element_size() for t in optimizer.trainables.values() for w in t.written())
    costs = compare_costs(optimizer, batch, repeats=COST_REPEATS)
    if who.known_steps:  # to do a step again, on what is kept by now, would be no step
        with RunLog.open(directory / "log") as log:
            fresh = [row.seconds for row in log.steps()][who.known_steps :]
        costs = replace(costs, step_seconds=statistics.median(fresh), step_bytes=result.peak_bytes)
    return _costs(
        watch.setup, watch.per_step, costs.step_seconds, costs.forward_seconds, optimizer.groups * BATCH,
        None if costs.step_bytes is None else max(0, costs.step_bytes - own),
        sum(t.value.numel() for t in optimizer.trainables.values()),
    )  # fmt: skip


def _cost_of_first_order(setting: Setting, who: Contender, recipe: Recipe, batch: Any) -> dict[str, Any]:
    meter = Meter(setting.model)
    bound = first_order.begin(who.method, setting, who.rank, recipe)
    setup = meter.forwards
    bound.step(batch)
    per_step = meter.forwards - setup
    meter.close()
    with memory.peak_memory() as peak:
        bound.step(batch)
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(COST_REPEATS):
        for run, seconds in zip(
            (lambda: bound.step(batch), lambda: group_losses(bound.model, batch)), took, strict=True
        ):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    above = None if peak.bytes is None else peak.bytes + bound.state_bytes
    trained = sum(p.numel() for p in bound.parameters)
    return _costs(setup, per_step, statistics.median(took[0]), statistics.median(took[1]), BATCH, above, trained)


def _costs(
    setup: float, per_step: float, step: float, forward: float, sequences: int, peak: int | None, trained: int
) -> dict[str, Any]:
    return {
        "setup_forwards": _short(setup),
        "forwards_per_step": _short(per_step),
        "step_seconds": _short(step),
        "forward_seconds": _short(forward),
        "forward_sequences": sequences,
        "peak_bytes": peak,
        "trained": trained,
        "load": _short(os.getloadavg()[0]),
        "machine": _machine(),
    }


def _machine() -> str:
    about = environment()
    return f"{about['processor']}; torch {about['torch']}; zoact_kernels {about['zoact_kernels']}"


def tested(model: Any, part: Part) -> dict[str, Any]:
    """Loss and hits of all examples of a split, hits as bits in the order of the file."""
    order = np.argsort(part.lengths, kind="stable")
    seen = evaluate(model, part.dataset.batches(EVAL_BATCH, order))
    assert seen.correct is not None
    correct = np.zeros(len(order), bool)
    correct[order] = seen.correct.numpy()
    bits = base64.b64encode(np.packbits(correct).tobytes()).decode()
    return {"loss": _short(seen.loss), "accuracy": _short(float(correct.mean())), "n": len(order), "correct": bits}


def hits(test: dict[str, Any]) -> np.ndarray:
    """[n] bool of what `tested` gave."""
    return np.unpackbits(np.frombuffer(base64.b64decode(test["correct"]), np.uint8))[: test["n"]].astype(bool)


def _point(step: int, forwards: float, seconds: float, loss: float, accuracy: float) -> list[Any]:
    return [step, _short(forwards), _short(seconds), _short(loss), _short(accuracy)]


def _short(value: float) -> float | None:
    """Six digits are more than is known; None for what JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


# --- the worker -------------------------------------------------------------------------------------------------------


def work(
    queue: Queue,
    *,
    minutes: float = math.inf,
    only: Sequence[str] = (),
    said: Callable[[str], None] = lambda text: None,
) -> int:
    """Run what is due until nothing is, the time is up or a signal comes; returns how many runs were done or failed.

    A run that fails is recorded with its reason and the next one begins.
    """
    deadline = time.monotonic() + 60 * minutes
    by_name = {given.name: given for given in sets()}
    count = 0
    while time.monotonic() < deadline:
        queue.add(due(queue.rows()))
        claim = queue.claim(only)
        if claim is None:
            if not queue.others_at_work(only):
                break
            time.sleep(1.0)  # what they find out may bring new runs
            continue
        run, start = claim.run, time.monotonic()
        said(f"{run.id}{f', attempt {claim.attempts}' if claim.attempts > 1 else ''}")
        try:
            result = perform(claim, by_name.get(run.set), queue.rows(), deadline)
        except (Stopped, KeyboardInterrupt):
            queue.give_back(claim)
            said(f"{run.id}: stopped, to be continued")
            claim.close()
            break
        except Exception as problem:  # one method's trouble is not the study's
            queue.fail(claim, f"{type(problem).__name__}: {problem}")
            said(f"{run.id}: failed, {type(problem).__name__}: {problem}")
        else:
            queue.finish(claim, {**result, "elapsed": _short(time.monotonic() - start)})
            said(f"{run.id}: {_told(result)} in {time.monotonic() - start:.0f} s")
        count += 1
        claim.close()
        shutil.rmtree(claim.directory, ignore_errors=True)  # weights in snapshots are large; the row has what counts
        memory.trim()
    return count


def _told(result: dict[str, Any]) -> str:
    if result.get("test"):
        return f"held-out loss {result['test']['loss']}, accuracy {result['test']['accuracy']:.3f}"
    if result.get("curve"):
        return f"loss {result['curve'][-1][3]}, accuracy {result['curve'][-1][4]}"
    return ", ".join(f"{key} {value}" for key, value in result.items() if isinstance(value, int | float))
