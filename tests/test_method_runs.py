"""Every method from the command line: a run of a few steps with its defaults, resumed, replayed and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import killed, options, steps_of, zoact
from tiny_model import make_model_dir, write_examples

from zoact_kernels import cli, methods
from zoact_kernels.integrations.transformers import load_model
from zoact_kernels.recipe import Recipe
from zoact_kernels.runlog import RunLog


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    make_model_dir(folder / "model", layers=2)  # a tail has blocks before it
    return {
        "model": str(folder / "model"),
        "train": str(write_examples(folder / "train.csv", 64)),
        "eval": str(write_examples(folder / "eval.csv", 8, 24)),
    }


def command(files: dict[str, str], out: Path, method: str, **changes: object) -> list[str]:
    if method in ("zo-act-tail", "zo-act-node"):
        changes = {"batch-size": 64, "schedule": "constant", **changes}  # an example for every query
    given = options(files, out, method=method, lr=None, **changes)
    return [*given, "--dense"] if methods.METHODS[method].dense else given


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_run(method: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert zoact(*command(files, whole, method, steps=4)) == 0
    assert "unchanged" in capsys.readouterr().out
    assert zoact(*command(files, parted, method, steps=1)) == 0
    assert zoact("finetune", "--resume", "--out", str(parted), "--steps", "4") == 0
    assert steps_of(whole) == steps_of(parted)
    with RunLog.open(whole) as log:
        assert log.meta["recipe"]["method"] == method and len(list(log.steps())) == 4
        assert method == "zo-conservative" or not any(row.skipped for row in log.steps())
        own, recipe = methods.arguments(method), log.meta["recipe"]
        assert all(recipe[name] == own[name] for name in ("lr", "sigma", "queries", "sides", "optimizer", "scaling"))
        first, last = (log.load(row) for row in (log.snapshots()[0], log.snapshots()[-1]))
    assert any(not torch.equal(first[key], last[key]) for key in first if key.startswith("coeff/"))
    assert zoact("replay", str(whole)) == (0 if methods.METHODS[method].replayable else 2)
    assert zoact("export", str(whole), "--out", str(tmp_path / "exported")) == 0
    for path in (whole / "adapter").iterdir():
        assert (tmp_path / "exported" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.soak
@pytest.mark.parametrize("method", methods.METHODS)
def test_kill_9(method: str, files: dict[str, str], tmp_path: Path) -> None:
    """Killed for real between two snapshots or in one, a run goes on to the bits of one that was left alone."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    more = {"steps": 60, "snapshot-every": 7, "eval": None}
    assert zoact(*command(files, whole, method, **more)) == 0
    killed(command(files, out, method, **more), out, 0.05)
    assert zoact("finetune", "--resume", "--out", str(out)) == 0
    assert steps_of(out) == steps_of(whole)
    with RunLog.open(out) as a, RunLog.open(whole) as b:
        assert a.snapshots()[-1].coeff_hash == b.snapshots()[-1].coeff_hash


def test_trained_weights_fit_the_base_model(files: dict[str, str], tmp_path: Path) -> None:
    """What a dense method exports has the names and shapes of the model it began with, and differs from it."""
    assert zoact(*command(files, tmp_path / "run", "mezo", steps=2)) == 0
    trained = load_file(tmp_path / "run/adapter/trained.safetensors")
    base = load_file(Path(files["model"]) / "model.safetensors")
    assert trained.keys() == base.keys() and all(trained[name].shape == w.shape for name, w in base.items())
    changes = [(trained[name] - w).abs().max() for name, w in base.items()]
    assert all(0 < change < 1e-2 for change in changes)


def test_low_bit_models_are_refused(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word for word in command(files, tmp_path / "run", "mezo") if word != "--dense"]
    assert zoact(*given) == 2
    said = capsys.readouterr().err
    assert "q_proj is int4, frozen" in said and "--dense" in said
    assert not (tmp_path / "run").exists()


def test_options_of_a_method(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoact(*command(files, tmp_path / "run", "mezo"), "--option", "period=3") == 2
    assert "options that only mezo has" in capsys.readouterr().err
    assert zoact(*command(files, tmp_path / "run", "mezo"), "--option", "period") == 2
    assert "name=value" in capsys.readouterr().err
    assert cli.runs._values(["a=1", "b=true", "c=text", "d=1e-3", "e=x=y"]) == {
        "a": 1, "b": True, "c": "text", "d": 1e-3, "e": "x=y",
    }  # fmt: skip


def test_a_recipe_has_the_defaults_of_its_method() -> None:
    assert (Recipe().lr, Recipe().optimizer, Recipe().beta2) == (1e-3, "adam", 0.999)
    assert (Recipe(method="mezo").lr, Recipe(method="mezo", lr=3.0).lr) == (1e-6, 3.0)
    assert Recipe(method="mezo").optimizer == "sgd"
    with pytest.raises(ValueError, match="known are zo-act"):
        Recipe(method="adam")


def test_the_list_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoact("methods") == 0
    told = capsys.readouterr().out
    for name, method in methods.METHODS.items():
        assert name in told and method.paper in told and method.summary and "arXiv" in method.paper


def test_the_dense_twin_computes_what_the_packed_model_does(files: dict[str, str]) -> None:
    from zoact_kernels.swap import ZOConfig, dense_twin

    model = load_model(files["model"], ZOConfig(format="int4", group_size=32, rank=0)).model
    x = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model(x).logits
        report = dense_twin(model)
        after = model(x).logits
    assert {row.format for row in report.swapped} == {"dense"}
    assert (before - after).abs().max() < 1e-4 * before.abs().max()
