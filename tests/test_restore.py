"""A run of a method whose log is no recipe: resumed by evaluating the steps after the newest snapshot once more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import RECIPE, Interrupt, Tiny, dies_at, killed, record, tiny  # noqa: F401
from torch import Tensor

from zoact_kernels import methods, trainer
from zoact_kernels.methods import StepResult, ZOAct
from zoact_kernels.recipe import Recipe
from zoact_kernels.replay import replay, skeleton
from zoact_kernels.runlog import RunError, RunLog
from zoact_kernels.trainer import Watch

pytestmark = pytest.mark.usefixtures("one_thread")

NAN_STEP = 4


class Remembering(ZOAct):
    """The weights of its updates depend on losses of the whole past, which no row of the log has."""

    name, replayable = "remembering", False

    def __init__(self, *args: Any, **others: Any) -> None:
        self.past = torch.zeros(1, dtype=torch.float64)
        super().__init__(*args, **others)

    def own_state(self) -> dict[str, Tensor]:
        return {"past": self.past}

    def _finish(self, *args: Any) -> StepResult:
        result = super()._finish(*args)
        self.past += torch.nan_to_num(result.losses).mean() * self.rule.exp_avgs["model.layers.0.mlp.up_proj"].norm()
        self.lr = 0.02 + float(self.past.frac()) / 100
        return result

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.lr = 0.02 + float(self.past.frac()) / 100


@pytest.fixture(autouse=True)
def method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "remembering", Remembering)
    real = trainer.take_step

    def with_nan(optimizer: Any, recipe: Recipe, batch: Any) -> StepResult:
        if optimizer.iteration == NAN_STEP:  # a step that is skipped is skipped again
            return optimizer.step_on([lambda groups: torch.full((groups, 4), float("nan"))])
        return real(optimizer, recipe, batch)

    monkeypatch.setattr(trainer, "take_step", with_nan)


class Listening(Watch):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def said(self, text: str) -> None:
        self.heard.append(text)


@pytest.fixture(params=["remembering", "agzo"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    lr = 1e-5 if request.param == "agzo" else RECIPE.lr
    return Recipe(request.param, steps=7, batch_size=4, snapshot_every=4, floor_every=5, lr=lr, seed=5)


@pytest.fixture
def whole(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> Path:  # noqa: F811
    tiny.run(tmp_path / "whole", recipe)
    with RunLog.open(tmp_path / "whole") as log:
        assert [row.skipped for row in log.steps()] == [step == NAN_STEP for step in range(7)]
    return tmp_path / "whole"


@pytest.mark.parametrize(("after", "again"), [(1, 1), (4, 4), (6, 2), (7, 3)])
def test_resume_after_a_crash(
    tiny: Tiny,  # noqa: F811
    whole: Path,
    recipe: Recipe,
    tmp_path: Path,
    after: int,
    again: int,
) -> None:
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path / "run", recipe, watch=Interrupt(after))
    watch = Listening()
    tiny.run(tmp_path / "run", recipe, resume=True, watch=watch)
    assert record(tmp_path / "run") == record(whole)
    assert any(f"evaluating the last {again} steps again" in text for text in watch.heard)
    assert not any("not bit-exact" in text for text in watch.heard)


def test_resume_after_kill_9(tiny: Tiny, whole: Path, recipe: Recipe, tmp_path: Path) -> None:  # noqa: F811
    """Killed at every ninth durable operation, and once more while resuming."""
    kills = 0
    for count in range(2, 200, 9):
        path = tmp_path / f"run{count}"
        if not killed(lambda path=path, count=count: (dies_at(count), tiny.run(path, recipe))):
            break
        kills += 1
        if RunLog.exists(path):
            killed(lambda path=path: (dies_at(4), tiny.run(path, recipe, resume=True)))
        tiny.run(path, recipe, resume=RunLog.exists(path))
        assert record(path) == record(whole), f"killed at durable operation {count}"
        shutil.rmtree(path)
    assert kills > 2


def test_other_losses_are_told(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path / "run", recipe, watch=Interrupt(3))
    watch, usual = Listening(), tiny.data
    tiny.data = tiny.held_out  # as if the hash of the data had not been compared
    try:
        assert tiny.run(tmp_path / "run", recipe, resume=True, watch=watch).done == 7
    finally:
        tiny.data = usual
    assert sum("not bit-exact: step 0" in text for text in watch.heard) == 1
    assert sum("not bit-exact" in text for text in watch.heard) == 1


def test_without_the_model(tiny: Tiny, whole: Path, recipe: Recipe, tmp_path: Path) -> None:  # noqa: F811
    """Nothing to evaluate: fine after a whole run, an error that says what to do after a crash; never a replay."""
    with RunLog.open(whole) as log:
        restored = trainer.restore(skeleton(log), log, recipe, Watch())
        assert restored.iteration == 7 and trainer.coeff_hash(restored) == log.snapshots()[-1].coeff_hash
        with pytest.raises(RunError, match=f"is a run of {recipe.method}, whose steps need more than the seeds"):
            replay(log)
        with pytest.raises(ValueError, match=f"{recipe.method} can't be replayed"):
            restored.replay([])
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path / "run", recipe, watch=Interrupt(3))
    with RunLog.open(tmp_path / "run") as log, pytest.raises(RunError, match="ended 3 steps after .* --resume first"):
        trainer.restore(skeleton(log), log, recipe, Watch())
