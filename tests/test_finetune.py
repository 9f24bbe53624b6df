"""Order of the data, comparisons, and what a job refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import LABELS, PROMPT, make_model_dir, write_examples

from zoact_kernels.data import DataError
from zoact_kernels.finetune import Job, demo_recipe, finetune, grouped_indices, paired
from zoact_kernels.recipe import Recipe
from zoact_kernels.replay import replay
from zoact_kernels.runlog import RunLog

LENGTHS = np.array([(i * 37) % 41 + 3 for i in range(203)])


def test_grouped_indices_is_a_pure_function_that_visits_everything_once() -> None:
    steps = 203 // 8
    for epoch in range(2):
        batches = [grouped_indices(9, epoch * steps + k, LENGTHS, 8, 4) for k in range(steps)]
        seen = np.concatenate(batches)
        assert len(set(seen.tolist())) == len(seen) == steps * 8
        assert all(len(batch) == 8 for batch in batches)
    again = grouped_indices(9, 30, LENGTHS, 8, 4)
    assert np.array_equal(again, grouped_indices(9, 30, LENGTHS, 8, 4))
    assert not np.array_equal(again, grouped_indices(10, 30, LENGTHS, 8, 4))
    assert not np.array_equal(grouped_indices(9, 0, LENGTHS, 8, 4), grouped_indices(9, steps, LENGTHS, 8, 4))


def test_grouped_indices_saves_pads() -> None:
    def padded(window: int) -> int:
        return sum(8 * LENGTHS[grouped_indices(1, k, LENGTHS, 8, window)].max() for k in range(25))

    assert padded(8) < 0.8 * padded(1)


@pytest.mark.parametrize("size", [300, 203, 1])
def test_grouped_indices_of_any_size(size: int) -> None:
    chosen = grouped_indices(0, 5, LENGTHS, size, 8)
    assert len(chosen) == min(size, 203) and len(set(chosen.tolist())) == len(chosen)


def test_paired() -> None:
    before, after = np.array([True, False, False, True]), np.array([True, True, True, True])
    mean, error = paired(before, after)
    assert mean == 0.5 and error == pytest.approx(np.std([0, 1, 1, 0], ddof=1) / 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "either `train`"),
        ({"train": "a.csv", "demo": "trec"}, "either `train`"),
        ({"train": "a.csv", "dtype": "int4"}, "`dtype` is 'int4'"),
        ({"train": "a.csv", "device": "gpu"}, "`device` is 'gpu'; it may be 'cpu', 'cuda'"),
        ({"train": "a.csv", "eval_batch": 0}, "`eval_batch` is 0"),
    ],
)
def test_job_refuses(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Job(model="m", **changes)  # type: ignore[arg-type]


def test_job_of_an_unknown_demo() -> None:
    with pytest.raises(DataError, match="no demo 'nothing'"):
        Job(model="m", demo="nothing").examples()


def test_demo_recipe_is_that_of_its_method() -> None:
    recipe = demo_recipe()
    assert (recipe.method, recipe.optimizer, recipe.sides, recipe.mode) == (
        "zo-act-node", "adamw", "two-sided", "stacked",
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch sees one")
def test_job_refuses_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="sees no CUDA device"):
        Job(model="m", train="a.csv", device="cuda:1")


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
def test_a_run_on_a_device(tmp_path: Path, device: str) -> None:
    """Train, resume and replay: the base stays, the log rebuilds C, a resumed run is the run."""
    pytest.importorskip("transformers")
    job = Job(
        model=str(make_model_dir(tmp_path / "model")), train=str(write_examples(tmp_path / "train.csv", 40)),
        eval=str(write_examples(tmp_path / "eval.csv", 6, 100)), prompt=PROMPT, labels=LABELS, group_size=16,
        device=device, dtype="float32" if device == "cpu" else "bfloat16",
    )  # fmt: skip
    recipe = Recipe(steps=6, batch_size=4, queries=2, lr=0.01, snapshot_every=2, floor_every=4)
    whole, loaded = finetune(job, recipe, tmp_path / "whole")
    assert {p.device.type for p in loaded.model.parameters()} == {device}
    assert whole.base_unchanged and whole.after is not None and np.isfinite(whole.after.losses).all()
    finetune(job, replace(recipe, steps=3), tmp_path / "cut")
    cut, _ = finetune(job, recipe, tmp_path / "cut", resume=True)
    ends = []
    for directory in (whole.directory, cut.directory):
        with RunLog.open(directory) as log:
            told = replay(log)
            assert told.steps == 6 and told.identical
            ends.append([(row.losses.tolist(), row.weights.tolist()) for row in log.steps()])
    assert ends[0] == ends[1]
    assert any(layer.any() for layer in cut.result.optimizer.rule.coeffs.values())
