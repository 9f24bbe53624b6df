"""The run: deterministic, resumable after any end, replayable, and refusing what is not its own."""

from __future__ import annotations

import copy
import csv
import functools
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import LABELS, PROMPT, make_model_dir, write_examples
from torch import nn

from zoact_kernels import runlog, trainer
from zoact_kernels.data import Dataset, Task, read, step_indices
from zoact_kernels.integrations.transformers import load_model
from zoact_kernels.layers import zo_layers
from zoact_kernels.methods import StepResult
from zoact_kernels.plots import draw_curve
from zoact_kernels.recipe import Recipe
from zoact_kernels.replay import replay, skeleton
from zoact_kernels.runlog import RunError, RunLog, StepRow
from zoact_kernels.swap import ZOConfig
from zoact_kernels.trainer import Result, Watch, base_hash, coeff_hash, train

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(steps=7, batch_size=4, snapshot_every=3, eval_every=4, floor_every=5, basis_batches=2, lr=0.02, seed=5)


class Tiny:
    """A loaded tiny model with its data; `fresh()` is a copy that nothing has been done to."""

    def __init__(self, folder: Path) -> None:
        make_model_dir(folder / "model")
        loaded = load_model(folder / "model", ZOConfig(format="int4", group_size=32, rank=1))
        self.model: nn.Module = loaded.model
        task = Task("tiny", PROMPT, LABELS)
        self.data = Dataset(read(write_examples(folder / "train.csv", 40), task), task, loaded.tokenizer)
        self.held_out = Dataset(read(write_examples(folder / "eval.csv", 20, 40), task), task, loaded.tokenizer)

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def run(self, path: Path, recipe: Recipe = RECIPE, model: nn.Module | None = None, **more: Any) -> Result:
        return train(
            self.fresh() if model is None else model,
            recipe,
            path,
            batch_at=lambda step: self.data.batch(step_indices(recipe.seed, step, len(self.data), recipe.batch_size)),
            held_out=lambda: self.held_out.batches(8),
            **more,
        )

    def resumes(self, folder: Path, recipe: Recipe, whole: dict[str, Any], stops: tuple[int, ...]) -> None:
        """Stopped after so many steps and resumed, a run is the `record` of the whole one."""
        for after in stops:
            path = folder / f"parted{after}"
            with pytest.raises(ZeroDivisionError):
                self.run(path, recipe, watch=Interrupt(after))
            self.run(path, recipe, resume=True)
            assert record(path) == whole


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that all others are compared with."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("whole") / "run"
    tiny.run(path)
    return path


def record(path: Path) -> dict[str, Any]:
    """All of a run that has to be equal bit for bit: steps, evaluations, and the last state."""
    with RunLog.open(path) as log:
        state = log.load(log.snapshots()[-1])
        return {
            "steps": [
                (r.step, r.seeds.tolist(), r.losses.numpy().tobytes(), r.weights.numpy().tobytes(), r.lr, r.skipped)
                for r in log.steps()
            ],
            "evals": [(r.step, r.losses.tobytes(), r.correct.tobytes()) for r in log.evals()],
            "state": {name: tensor.numpy().tobytes() for name, tensor in sorted(state.items())},
        }


class Interrupt(Watch):
    """Ends a run at a step as a crash would: by an exception that nobody expects."""

    def __init__(self, after: int) -> None:
        self.after = after

    def stepped(self, row: StepRow, result: StepResult) -> None:
        if row.step + 1 == self.after:
            raise ZeroDivisionError


def test_train_twice_is_bitwise_equal(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    model = tiny.fresh()
    before = base_hash(model)
    generator = torch.get_rng_state()
    result = tiny.run(tmp_path / "run", model=model)
    assert result.done == 7 and not result.stopped_by
    assert record(tmp_path / "run") == record(whole)
    assert base_hash(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert any(bool(layer.coeff.any()) for layer in zo_layers(model).values() if layer.coeff is not None)


def test_train_learns(tiny: Tiny, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=150, batch_size=16, queries=2, snapshot_every=0, eval_every=0)
    tiny.run(tmp_path / "run", recipe)
    with RunLog.open(tmp_path / "run") as log:
        before, after = log.evals("eval")
        assert after.loss < before.loss - 0.1
        assert [row.step for row in log.snapshots()] == [0, 150]


@pytest.mark.parametrize("after", [1, 3, 5, 7])
def test_resume_after_a_crash(tiny: Tiny, whole: Path, tmp_path: Path, after: int) -> None:
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path / "run", watch=Interrupt(after))
    tiny.run(tmp_path / "run", resume=True)
    assert record(tmp_path / "run") == record(whole)


def killed(body: Callable[[], object]) -> bool:
    """Run `body` in a forked child; whether SIGKILL ended it. Any other failure of the child fails the test."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "the child failed; see its traceback"
    return status == signal.SIGKILL


def dies_at(count: int) -> None:
    """Kill this process -9 at its `count`-th durable operation: a sync, a move, a removal or a row, or after it."""
    left = [count]

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*args: Any, **named: Any) -> Any:
            for half in range(2):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                if half == 0:
                    result = real(*args, **named)
            return result

        return call

    runlog.os.fsync = deadly(os.fsync)
    runlog.os.replace = deadly(os.replace)
    runlog.Path.unlink = deadly(Path.unlink)  # type: ignore[method-assign]
    runlog.RunLog.add_step = deadly(RunLog.add_step)  # type: ignore[method-assign]
    real_save = runlog.save_file

    def half_a_file(tensors: Any, path: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            path.write_bytes(b"half a snapshot")
            os.kill(os.getpid(), signal.SIGKILL)
        real_save(tensors, path)

    runlog.save_file = half_a_file


def test_resume_after_kill_9_anywhere(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    """Killed at every fifth durable operation of the run in turn, half-written snapshots included, and once more
    while resuming; then resumed to the end."""
    count, kills = 1, 0
    while True:
        path = tmp_path / f"run{count}"
        if not killed(lambda path=path, count=count: (dies_at(count), tiny.run(path))):
            break
        kills += 1
        if RunLog.exists(path):
            killed(lambda path=path, count=count: (dies_at(1 + count % 7), tiny.run(path, resume=True)))
        tiny.run(path, resume=RunLog.exists(path))
        assert record(path) == record(whole), f"killed at durable operation {count}"
        shutil.rmtree(path)
        count += 5
    assert kills > 5


def test_resume_of_a_finished_run_changes_nothing(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    assert tiny.run(tmp_path / "run", resume=True).done == 7
    assert record(tmp_path / "run") == record(whole)


def test_resume_with_more_steps(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    tiny.run(tmp_path / "run", replace(RECIPE, steps=4))
    tiny.run(tmp_path / "run", resume=True)
    assert record(tmp_path / "run")["state"] == record(whole)["state"]


def test_resume_goes_back_past_a_damaged_snapshot(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path / "run", watch=Interrupt(7))
    (tmp_path / "run/snapshots/step-000006.safetensors").write_bytes(b"garbage")
    said: list[str] = []
    watch = Watch()
    watch.said = said.append  # type: ignore[method-assign]
    tiny.run(tmp_path / "run", resume=True, watch=watch)
    assert any("damaged" in text and "older" in text for text in said)
    assert record(tmp_path / "run") == record(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_ends_cleanly(tiny: Tiny, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    class Stop(Watch):
        def stepped(self, row: StepRow, result: StepResult) -> None:
            if row.step == 4:
                os.kill(os.getpid(), number)

    usual = signal.getsignal(number)
    result = tiny.run(tmp_path / "run", watch=Stop())
    assert (result.done, result.stopped_by) == (5, number)
    assert signal.getsignal(number) == usual
    with RunLog.open(tmp_path / "run") as log:
        assert log.snapshots()[-1].step == 5
    tiny.run(tmp_path / "run", resume=True)
    assert record(tmp_path / "run") == record(whole)


def test_stop_during_an_evaluation_leaves_it_to_the_resumed_run(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    class Stop(Watch):
        def evaluating(self, step: int) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    assert tiny.run(tmp_path / "run", watch=Stop()).done == 4
    with RunLog.open(tmp_path / "run") as log:
        assert [row.step for row in log.evals()] == [0]
    tiny.run(tmp_path / "run", resume=True)
    assert record(tmp_path / "run") == record(whole)


def test_nan_step_is_logged_and_skipped(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = trainer.group_losses, []

    def broken(*args: Any, **named: Any) -> torch.Tensor:
        losses = real(*args, **named)
        calls.append(1)
        if len(calls) == 3:  # step 1; step 0 is evaluated twice, for the floor
            losses[1, 2] = float("nan")
        return losses

    monkeypatch.setattr(trainer, "group_losses", broken)
    said: list[str] = []
    watch = Watch()
    watch.said = said.append  # type: ignore[method-assign]
    tiny.run(tmp_path / "run", replace(RECIPE, steps=3), watch=watch)
    assert any("step 1 skipped" in text and "group 1" in text for text in said)
    with RunLog.open(tmp_path / "run") as log:
        rows = list(log.steps())
        assert [row.skipped for row in rows] == [False, True, False]
        assert bool(torch.isnan(rows[1].losses[1, 2])) and bool(torch.isfinite(rows[2].losses).all())
        assert int(log.load(log.snapshots()[-1])["rule/t"]) == 2
        assert replay(log).identical


@pytest.mark.parametrize(
    "changes",
    [
        {"queries": 2},
        {"sides": "one-sided", "queries": 2},
        {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warmup": 2},
        {"optimizer": "momentum", "noise": "rademacher"},
        {"optimizer": "sgd", "mode": "sequential"},
        {"scaling": "sign", "optimizer": "sign"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_resume_and_replay_every_kind_of_run(tiny: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = replace(RECIPE, **changes)
    result = tiny.run(tmp_path / "whole", recipe)
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path / "run", recipe, watch=Interrupt(5))
    tiny.run(tmp_path / "run", recipe, resume=True)
    assert record(tmp_path / "run") == record(tmp_path / "whole")
    with RunLog.open(tmp_path / "run") as log:
        again = replay(log)
        assert again.identical and again.steps == 7
        assert [step for step, _ in again.checked] == [row.step for row in log.snapshots()]
        assert again.coeff_hash == coeff_hash(result.optimizer)
        trained = zo_layers(result.optimizer.model)
        for name, layer in zo_layers(again.model).items():
            assert torch.equal(layer.coeff, trained[name].coeff) and torch.equal(layer.basis, trained[name].basis)


def test_replay_notices_a_changed_log(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with RunLog.open(tmp_path / "run", write=True) as log:
        log._database.execute("UPDATE steps SET lr = lr * 1.001 WHERE step = 2")
        assert not replay(log).identical


def test_micro_batches_and_sequential_groups_give_the_same_run(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    """Same seeds, losses side by side: within rounding of the model's own dense products (head, attention)."""
    with RunLog.open(whole) as log:
        expected = [row.losses for row in log.steps()]
    for name, changes in (("micro", {"micro_batch": 3}), ("sequential", {"mode": "sequential"})):
        recipe = replace(RECIPE, steps=1, **changes)
        tiny.run(tmp_path / name, recipe)
        with RunLog.open(tmp_path / name) as log:
            (row,) = log.steps()
            torch.testing.assert_close(row.losses, expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("model", "hash of the base weights was"),
        ("recipe", "`sigma` was 0.001 and is 0.01; `lr` was 0.02 and is 0.5"),
        ("data", "hash of the training data was one and is two"),
        ("schedule", "`steps` was 7 and is 9"),
    ],
)
def test_resume_refuses_another_run(tiny: Tiny, tmp_path: Path, what: str, words: str) -> None:
    first = replace(RECIPE, steps=7, schedule="linear") if what == "schedule" else RECIPE
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path / "run", first, identity={"train": "one"}, watch=Interrupt(1))
    before = record(tmp_path / "run")
    model, recipe, data = tiny.fresh(), first, "one"
    if what == "model":
        next(iter(zo_layers(model).values())).weight.view(torch.uint8)[3] ^= 1
    elif what == "recipe":
        recipe = replace(first, lr=0.5, sigma=0.01)
    elif what == "schedule":
        recipe = replace(first, steps=9)
    else:
        data = "two"
    with pytest.raises(RunError, match=words):
        tiny.run(tmp_path / "run", recipe, model, identity={"train": data}, resume=True)
    assert record(tmp_path / "run") == before


def test_refuses_before_writing(tiny: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="holds a run already.*--resume"):
        tiny.run(whole)
    with pytest.raises(RunError, match="holds no run"):
        tiny.run(tmp_path / "run", resume=True)
    for changes in ({"sigma": -1.0}, {"sides": "three"}, {"optimizer": "lion"}, {"schedule": "cosine", "steps": 0}):
        with pytest.raises(ValueError):
            tiny.run(tmp_path / "run", replace(RECIPE, **changes))
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        replace(RECIPE, batch_size=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    with pytest.raises(RunError, match=r"full: 5.0 kB free, and this run needs"):
        tiny.run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_full_disk_midway(tiny: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = runlog.os.fsync, []

    def full(handle: int) -> None:
        calls.append(1)
        if len(calls) > 5:  # the beginning has four; then comes the snapshot after step 3
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(runlog.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device; nothing before it is lost"):
        tiny.run(tmp_path / "run")
    monkeypatch.undo()
    torch.set_num_threads(1)
    with RunLog.open(tmp_path / "run") as log:
        assert log.done == len(list(log.steps()))
        assert all(log.load(row) for row in log.snapshots())
    tiny.run(tmp_path / "run", resume=True)
    assert record(tmp_path / "run") == record(whole)


def test_changed_back_end_warns(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path / "run", watch=Interrupt(2))
    with RunLog.open(tmp_path / "run", write=True) as log:
        log.set_meta(backend={**log.meta["backend"], "torch": "1.0", "implementation": "abacus", "isa": None})
    said: list[str] = []
    watch = Watch()
    watch.said = said.append  # type: ignore[method-assign]
    tiny.run(tmp_path / "run", resume=True, watch=watch)
    assert any("not bit-exact: torch was 1.0" in text for text in said)
    assert any("not bit-exact: implementation was abacus" in text for text in said)


def test_resume_takes_the_threads_and_the_instruction_set_of_the_run(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path / "run", watch=Interrupt(2))
    with RunLog.open(tmp_path / "run") as log:
        assert log.meta["backend"]["threads"] == 1
    torch.set_num_threads(2)
    tiny.run(tmp_path / "run", resume=True)
    assert torch.get_num_threads() == 2
    assert record(tmp_path / "run") == record(whole)


def test_metrics_and_curve(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path / "run", watch=Interrupt(5))
    with open(tmp_path / "run/metrics.csv", "a") as file:
        file.write("5,train,0.1")  # half a line
    tiny.run(tmp_path / "run", resume=True)
    tables = []
    for path in (tmp_path / "run", whole):
        with open(path / "metrics.csv", newline="") as file:
            tables.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    assert [row["split"] for row in tables[0]].count("train") == 7
    assert [row["step"] for row in tables[0] if row["split"] == "eval"] == ["0", "4", "7"]
    with RunLog.open(whole) as log:
        draw_curve(log, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_base_hash_sees_every_weight_and_no_learned_one(tiny: Tiny) -> None:
    model = tiny.fresh()
    before = base_hash(model)
    layer = zo_layers(model)["model.layers.0.mlp.up_proj"]
    layer.set_basis(torch.eye(48)[:, :1].contiguous(), torch.ones(80, 1))
    assert base_hash(model) == before
    for change in (model.model.norm.weight.data, layer.scale, layer.weight.view(torch.uint8)):
        kept = change.clone()
        change.view(-1)[-1] += 1
        assert base_hash(model) != before
        change.copy_(kept)
    assert base_hash(model) == before


def test_skeleton_is_the_trained_layers_without_weights(tiny: Tiny, whole: Path) -> None:
    with RunLog.open(whole) as log:
        bones = zo_layers(skeleton(log))
    layers = zo_layers(tiny.model)
    for name, layer in bones.items():
        assert (layer.in_features, layer.out_features) == (layers[name].in_features, layers[name].out_features)
        assert torch.equal(layer.param_id, layers[name].param_id)
        assert layer.weight.untyped_storage().nbytes() == 4
