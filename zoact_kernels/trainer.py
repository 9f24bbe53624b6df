"""The loop of a run: steps, evaluations, log, snapshots; resume after any kind of end; replay without the model.

    model (swapped) + recipe + batch_at(step)  ->  train(...)  ->  RUN_DIR with run.sqlite, snapshots/, metrics.csv

A run is a pure function of the base weights, the recipe and `batch_at`, on one back end with one thread count. All of
these are recorded, one implementation is pinned for all layers, and a resumed run refuses another model or recipe and
warns where the back end is another. Between two forwards there is nothing but a few scalars and one durable row.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import estimators, memory
from .backend import pin
from .basis import compute_basis
from .dispatch import using
from .layers import ZOLinear, zo_layers
from .losses import Batch, evaluate, group_losses
from .methods import METHODS, StepResult, ZeroOrder
from .plots import Metrics
from .recipe import FREE, Recipe
from .runlog import EvalRow, RunError, RunLog, StepRow, hash_tensors, update_hash


class Watch:
    """What a run tells while it goes on. These say nothing; a display overrides them."""

    def started(self, done: int, steps: int, device: str) -> None: ...

    def stepped(self, row: StepRow, result: StepResult) -> None: ...

    def evaluating(self, step: int) -> None: ...

    def evaluated(self, row: EvalRow) -> None: ...

    def said(self, text: str) -> None: ...


@dataclass(frozen=True)
class Result:
    """How a run ended: steps done, the signal that stopped it (0: none), peak bytes above the loaded model's."""

    done: int
    stopped_by: int
    peak_bytes: int | None
    optimizer: ZeroOrder


def train(
    model: nn.Module,
    recipe: Recipe,
    directory: Path,
    *,
    batch_at: Callable[[int], Batch],
    held_out: Callable[[], Iterable[Batch]] | None = None,
    identity: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    resume: bool = False,
    watch: Watch | None = None,
) -> Result:
    """Run `recipe` on a swapped `model`, or continue the run in `directory`; everything is saved when this returns.

    batch_at(step): the batch of a step, a pure function. held_out(): batches to evaluate on, before, during and after.
    identity: JSON values that a resumed run has to repeat (the data's hash, say), beside the recipe and the base.
    notes: JSON values for the log of a new run that nothing is compared with.
    SIGINT and SIGTERM end the run after the step at hand; a second one ends it at once.

    Raises:
        RunError: the directory holds a run (without `resume`), none (with it), or one of another model or recipe; it is
            in use by another process; the disk is full. Nothing is written unless all arguments are good.
        ValueError: arguments out of range.
    """
    watch = watch or Watch()
    if not resume and RunLog.exists(directory):
        raise RunError(f"{directory} holds a run already; continue it with --resume, or choose another --out")
    claims = {"recipe": asdict(recipe), "base_hash": base_hash(model), **(identity or {})}
    groups = estimators.group_count(recipe.sides, recipe.queries)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RunLog.open(directory, write=True)) if resume else None
        before = log.meta["backend"] if log else None
        if log:
            _check_claims(log, claims)
        if before:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(before["threads"])
        rows = 16 * (2 if recipe.spread else groups) * recipe.batch_size  # of 16 tokens each: enough to choose by
        backend = pin(model, rows, groups, recipe.queries, before)
        for key, was in (before or {}).items():
            if backend[key] != was:
                watch.said(f"not bit-exact: {key} was {was} when the run began and is {backend[key]} now")
        stack.enter_context(using(backend["implementation"], backend["isa"], op="zo_linear"))
        if log:
            optimizer = restore(model, log, recipe, watch, batch_at)
        else:
            optimizer, meta = _begin(model, recipe, batch_at, watch)
            _check_room(directory, optimizer, recipe)
            meta |= {**claims, **(notes or {}), "backend": backend}
            log = RunLog.create(directory, meta, optimizer.state_dict(), coeff_hash(optimizer))
            stack.enter_context(log)
        return _Run(model, recipe, log, optimizer, batch_at, held_out, watch).go()


class _Run:
    """The loop itself, once the state stands."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        log: RunLog,
        optimizer: ZeroOrder,
        batch_at: Callable[[int], Batch],
        held_out: Callable[[], Iterable[Batch]] | None,
        watch: Watch,
    ) -> None:
        self.model, self.recipe, self.log, self.optimizer = model, recipe, log, optimizer
        self.batch_at, self.held_out, self.watch = batch_at, held_out, watch
        self.stopped_by = 0

    def go(self) -> Result:
        memory.trim()
        device = str(self.optimizer.device)
        start = memory.resident(device) if memory.reset_highest(device) else None
        log, recipe = self.log, self.recipe
        with stop_signals(self._stop), contextlib.closing(Metrics(log)) as metrics:
            self.watch.started(log.done, recipe.steps, device)
            self._evaluate(metrics)
            while log.done < recipe.steps and not self.stopped_by:
                row, result = self._step()
                log.add_step(row)
                metrics.step(row)
                self.watch.stepped(row, result)
                if result.note:
                    self.watch.said(f"step {row.step}: {result.note}")
                if result.skipped:
                    self.watch.said(f"step {row.step} skipped, nothing changed: {result.reason}")
                if recipe.snapshot_every and log.done % recipe.snapshot_every == 0:
                    _snapshot(log, self.optimizer)
                self._evaluate(metrics)
            _snapshot(log, self.optimizer)
        end = memory.highest(device)
        peak = end - start if start is not None and end is not None else None
        return Result(log.done, self.stopped_by, peak, self.optimizer)

    def _step(self) -> tuple[StepRow, StepResult]:
        start = time.perf_counter()
        optimizer, batch = self.optimizer, self.batch_at(self.log.done).to(self.optimizer.device)
        result = take_step(optimizer, self.recipe, batch)
        seconds = time.perf_counter() - start
        tokens = batch.tokens * len(result.losses) * optimizer.copies // optimizer.groups
        row = StepRow(
            result.step, result.seeds, result.losses, result.weights, result.lr, result.skipped, result.signal,
            result.floor, tokens, seconds,
        )  # fmt: skip
        return row, result

    def _evaluate(self, metrics: Metrics) -> None:
        """Evaluate if it is due here and not in the log yet; given up, unrecorded, when the run is being stopped."""
        done, every = self.log.done, self.recipe.eval_every
        due = done in (0, self.recipe.steps) or (every and done % every == 0)
        if self.held_out is None or not due or any(row.step == done for row in self.log.evals("eval")):
            return
        self.watch.evaluating(done)
        start = time.perf_counter()
        try:
            batches = (batch.to(self.optimizer.device) for batch in self.held_out())
            with self.optimizer.forking():
                seen = evaluate(self.model, self._until_stopped(batches))
        except _Stopped:
            return
        correct = torch.zeros(0) if seen.correct is None else seen.correct
        row = EvalRow(done, "eval", seen.losses.numpy(), correct.bool().numpy(), time.perf_counter() - start)
        self.log.add_eval(row)
        metrics.eval(row)
        self.watch.evaluated(row)

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.stopped_by:
                raise _Stopped
            yield batch

    def _stop(self, signum: int) -> None:
        self.stopped_by = signum
        self.watch.said("stopping after this step; once more stops at once")


class _Stopped(Exception):
    pass


def take_step(optimizer: ZeroOrder, recipe: Recipe, batch: Batch) -> StepResult:
    """One step on a batch that is on the optimizer's device, in the micro-batches of the recipe."""
    parts = batch.split(recipe.micro_batch) if recipe.micro_batch else [batch]
    evaluations = [functools.partial(group_losses, optimizer.model, part) for part in parts]
    return optimizer.step_on(evaluations, tuple(sorted({size for part in parts for size in part.leading})))


@contextlib.contextmanager
def stop_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Inside the block the first SIGINT or SIGTERM calls stop(signum); the next one has its usual effect."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        restore()
        stop(number)

    for number in usual:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


# --- the base and the state -------------------------------------------------------------------------------------------


def base_hash(model: nn.Module, without: ZeroOrder | None = None) -> str:
    """sha256 of all that training must not change, packed weights in row layout, one layer alive at a time.

    Learned tensors (A, C) and values that are computed rather than stored (rotary tables) are left out, as are the
    weights that `without` trains.
    """
    digest = hashlib.sha256()
    trained = {w.data_ptr() for t in without.trainables.values() for w in t.written()} if without else set()
    layers = zo_layers(model)
    for name, layer in layers.items():
        digest.update(f"{name}|{layer.format}|{layer.group_size}|{layer.out_features}|{layer.in_features}|".encode())
        packed = layer.packed().to_layout("row")
        for key, tensor in {**packed.tensors, "bias": layer.bias}.items():
            if tensor is not None and tensor.data_ptr() not in trained:
                update_hash(digest, f"{name}.{key}", tensor)
    for prefix, module in model.named_modules():
        if isinstance(module, ZOLinear):
            continue
        stored = dict(module.named_parameters(recurse=False))
        stored |= {k: b for k, b in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
        for key, tensor in stored.items():
            if tensor.data_ptr() not in trained:
                update_hash(digest, f"{prefix}.{key}", tensor)
    return digest.hexdigest()


def coeff_hash(optimizer: ZeroOrder) -> str:
    """sha256 of all that is trained."""
    return hash_tensors(optimizer.rule.coeffs)


def _check_claims(log: RunLog, claims: Mapping[str, Any]) -> None:
    """Raises RunError naming all that differs between a run and what wants to continue it."""
    before, now = dict(log.meta), dict(claims)
    old, new = before.pop("recipe"), now.pop("recipe")
    free = FREE + (("steps",) if new["schedule"] == "constant" else ())  # other schedules depend on the end
    pairs = [(f"`{name}`", old.get(name), new[name]) for name in new if name not in free]
    names = {"base_hash": "the hash of the base weights", "train": "the hash of the training data"}
    pairs += [(names.get(name, f"`{name}`"), before.get(name), value) for name, value in now.items()]
    found = [f"{name} was {_short(was)} and is {_short(is_)}" for name, was, is_ in pairs if was != is_]
    if found:
        told = "; ".join(found)
        raise RunError(f"{log.directory} holds another run: {told}; use its model and options, or another --out")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _check_room(directory: Path, optimizer: ZeroOrder, recipe: Recipe) -> None:
    """Raises RunError if the disk can't hold the snapshots (first, two newest, one in the making), log and adapter."""
    state = sum(t.numel() * t.element_size() for t in optimizer.state_dict().values())
    row = 8 * (recipe.batch_size * optimizer.copies + 2 * recipe.queries) + 200
    needed = 5 * state + 2 * recipe.steps * row + (1 << 20)
    place = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        room = f"{memory.human(free)} free, and this run needs {memory.human(needed)}"
        raise RunError(f"the disk of {directory} is full: {room}; free some space or choose another --out")


def _begin(
    model: nn.Module, recipe: Recipe, batch_at: Callable[[int], Batch], watch: Watch
) -> tuple[ZeroOrder, dict[str, Any]]:
    """The optimizer of a new run, the basis computed unless one was imported, and what the log has to know of it."""
    _ = recipe.create(model).fork  # only for its errors, before minutes are spent on a basis
    energies: list[list[Any]] = []
    layers = [layer for layer in zo_layers(model).values() if layer.rank]
    by_activations = METHODS[recipe.method].basis == "activations"
    if by_activations and any(layer.basis is None for layer in layers):
        watch.said(f"computing the basis of {len(layers)} layers from {recipe.basis_batches} batches")
        batches = []
        for batch in map(batch_at, range(recipe.basis_batches)):
            inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            if getattr(getattr(model, "config", None), "use_cache", False):
                inputs["use_cache"] = False
            batches.append(inputs)
        with head_on_last_token(model):
            report = compute_basis(
                model,
                batches,
                method=recipe.basis_method,
                exclude_first_token=recipe.basis_without_first,
                seed=recipe.seed,
            )
        energies = [[row.name, row.energy, row.energy_without_first] for row in report.layers]
    optimizer = recipe.create(model)
    if optimizer.preparation:
        watch.said(optimizer.preparation)
    optimizer.prepare(map(batch_at, range(recipe.basis_batches)), functools.partial(group_losses, model))
    anatomy = [trainable.anatomy() for trainable in optimizer.trainables.values()]
    causal_lm = hasattr(model, "lm_head")  # for the adapter's task type
    meta = {"layers": anatomy, "energies": energies, "causal_lm": causal_lm}
    if any(trainable.written() for trainable in optimizer.trainables.values()):
        meta["frozen_hash"] = base_hash(model, optimizer)
    return optimizer, meta


@contextlib.contextmanager
def head_on_last_token(model: Any) -> Iterator[None]:
    """A basis needs no logits; the head then sees one token a sequence, and [B, T, V] never exists."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _snapshot(log: RunLog, optimizer: ZeroOrder) -> None:
    """Record the state after the steps done, unless that is recorded already."""
    if not any(row.step == log.done for row in log.snapshots()):
        log.add_snapshot(optimizer.state_dict(), coeff_hash(optimizer))


def restore(
    model: nn.Module, log: RunLog, recipe: Recipe, watch: Watch, batch_at: Callable[[int], Batch] | None = None
) -> ZeroOrder:
    """The optimizer as it stood after the last logged step: the newest whole snapshot, and the rows after it.

    Those are replayed, or where the method is not `replayable` evaluated again, which takes the model and `batch_at`.
    Raises RunError: no snapshot can be read, or steps would have to be evaluated and there is no `batch_at`;
    ValueError: the model's layers are not those of the run.
    """
    for snapshot in reversed(log.snapshots()):
        try:
            state = log.load(snapshot)
        except RunError as error:
            watch.said(f"{error}; going back to an older snapshot")
            continue
        optimizer = load_state(model, log, recipe, state)
        left = log.done - optimizer.iteration
        if optimizer.replayable:
            for row in log.steps(after=optimizer.iteration):
                optimizer.replay([row])
                optimizer.floor = row.floor
        elif left and batch_at is None:
            raise RunError(
                f"{log.directory} ended {left} steps after its newest snapshot, and {recipe.method} can't be replayed "
                "without the model; continue the run with --resume first"
            )
        elif left and batch_at is not None:
            watch.said(f"evaluating the last {left} steps again: {recipe.method} can't be replayed from the log")
            _evaluate_again(optimizer, log, recipe, watch, batch_at)
        return optimizer
    raise RunError(f"no snapshot of {log.directory} can be read, so the run can't be continued")


def _evaluate_again(
    optimizer: ZeroOrder, log: RunLog, recipe: Recipe, watch: Watch, batch_at: Callable[[int], Batch]
) -> None:
    """Take the logged steps after `iteration` once more; says at which one the losses or weights are others first."""
    every, optimizer.floor_every = optimizer.floor_every, 0  # that evaluation trains nothing; its result is in the log
    same = True
    for row in log.steps(after=optimizer.iteration):
        result = take_step(optimizer, recipe, batch_at(row.step).to(optimizer.device))
        optimizer.floor = row.floor
        if same and hash_tensors(_seen(row)) != hash_tensors(_seen(result)):  # of bits, so that NaN equals NaN
            same = False
            watch.said(f"not bit-exact: step {row.step} gives other losses now than those of the log")
    optimizer.floor_every = every


def _seen(step: StepRow | StepResult) -> dict[str, Tensor]:
    return {"seeds": step.seeds, "losses": step.losses, "weights": step.weights}


def load_state(model: nn.Module, log: RunLog, recipe: Recipe, state: Mapping[str, Tensor]) -> ZeroOrder:
    """An optimizer over the layers that the run trains, with the A, C and moments of a snapshot."""
    METHODS[recipe.method].adopt(model, [entry["name"] for entry in log.meta["layers"]], state)
    optimizer = recipe.create(model)
    optimizer.load_state_dict(state)
    return optimizer
