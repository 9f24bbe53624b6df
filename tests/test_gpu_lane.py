"""`make test-gpu` without a GPU: outcomes, crashes, hangs and the end of time all arrive in the one results file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_lane
import pytest

SAMPLE = """
import os, time, pytest

def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="no such thing here")
def test_skipped(): pass
def test_crash(): os._exit(11)
def test_behind_the_crash(): pass
def test_lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_behind_the_loss(): pass
@pytest.fixture
def broken():
    yield
    raise ValueError("on the way out")
def test_teardown(broken): pass
"""


def outcomes(folder: Path, source: str, seconds: float = 600, shares: int = 2) -> dict:
    (folder / "test_sample.py").write_text(source)
    result = gpu_lane.run_all(
        [folder / "test_sample.py"], shares, time.time() + seconds, folder / "out.json", {"device": "none"}
    )
    assert json.loads((folder / "out.json").read_text()) == result
    assert result["complete"]
    return result


@pytest.mark.parametrize("shares", [1, 3])
def test_every_outcome_is_told(tmp_path: Path, shares: int) -> None:
    result = outcomes(tmp_path, SAMPLE, shares=shares)
    found = {nodeid.split("::")[1]: outcome for nodeid, (outcome, _) in result["tests"].items()}
    assert found == {
        "test_good": "passed", "test_bad": "failed", "test_skipped": "skipped", "test_crash": "crashed",
        "test_behind_the_crash": "passed", "test_lost": "failed", "test_behind_the_loss": "passed",
        "test_teardown": "failed",
    }  # fmt: skip
    assert result["counts"] == {"passed": 3, "failed": 3, "skipped": 1, "crashed": 1, "not run": 0}
    why = {entry["id"].split("::")[1]: entry["why"] for entry in result["failed"]}
    assert why["test_crash"] == "exit 11" and "assert 1 == 2" in why["test_bad"]
    assert any("no such thing here" in reason for reason in result["skipped"])


def jump(monkeypatch: pytest.MonkeyPatch, mark: Path, seconds: float) -> str:
    """The lane's clock leaps once `mark` is there; returns a test that makes it after it was heard of, and hangs."""
    clock = SimpleNamespace(sleep=time.sleep, time=lambda: time.time() + seconds * mark.exists())
    monkeypatch.setattr(gpu_lane, "time", clock)
    body = f"time.sleep(2); pathlib.Path({str(mark)!r}).touch(); time.sleep(999)"
    return f"import pathlib, time\ndef test_hang(): {body}\n"


def test_a_hang_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jump(monkeypatch, tmp_path / "mark", gpu_lane.STALL_SECONDS + 1)
    result = outcomes(tmp_path, f"{source}def test_behind(): pass\n", shares=1)
    assert [outcome for outcome, _ in result["tests"].values()] == ["passed", "crashed"]
    assert result["failed"][0]["why"] == "no sign of life for 200 s"


def test_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jump(monkeypatch, tmp_path / "mark", 9999)
    result = outcomes(tmp_path, f"def test_first(): pass\n{source}def test_last(): pass\n", shares=1)
    assert result["counts"] == {"passed": 1, "not run": 2}
    assert [nodeid.split("::")[1] for nodeid in result["not_run"]] == ["test_hang", "test_last"]


def test_a_file_that_does_not_import_is_a_failure(tmp_path: Path) -> None:
    result = outcomes(tmp_path, "import nothing_of_this_name\n", shares=1)
    assert result["counts"]["failed"] == 1 and "nothing_of_this_name" in result["failed"][0]["why"]


def test_the_files_are_there() -> None:
    names = [file.name for file in gpu_lane.chosen_files()]
    assert names[0] == "test_gpu.py"
    assert {"test_zo_linear.py", "test_zo_dense_linear.py", "test_zo_update.py", "test_zo_perturb.py"} < set(names)
