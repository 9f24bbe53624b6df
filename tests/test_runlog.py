"""The run log: what is written survives, byte for byte, and nothing half-written is ever taken for a run."""

from __future__ import annotations

import math
import os
import resource
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch

from zoact_kernels import runlog
from zoact_kernels.runlog import EvalRow, RunError, RunLog, StepRow

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = {"coeff/a": torch.arange(6.0).view(3, 2), "rule/t": torch.tensor(0)}
META = {"recipe": {"lr": 1e-3}, "base_hash": "abc", "words": ["ä", "b"]}


def step_row(step: int, losses: list[list[float]] | None = None) -> StepRow:
    table = torch.tensor(losses or [[0.1 + step, 0.2], [0.3, 1e-300]], dtype=torch.float64)
    weights = torch.tensor([math.pi * (step + 1)], dtype=torch.float32)
    seeds = torch.tensor([-(2**63) + step])
    return StepRow(step, seeds, table, weights, 0.1 + step / 3, step % 2 == 1, math.nan, 1e-9, 17, 0.25)


def create(path: Path) -> RunLog:
    return RunLog.create(path, META, STATE, "hash0")


def same(a: StepRow, b: StepRow) -> bool:
    blobs = all(
        x.numpy().tobytes() == y.numpy().tobytes()
        for x, y in ((a.seeds, b.seeds), (a.losses, b.losses), (a.weights, b.weights))
    )
    rest = [(a[i] == b[i]) or (a[i] != a[i] and b[i] != b[i]) for i in (0, 4, 5, 6, 7, 8, 9)]
    return blobs and all(rest)


def test_rows_come_back_bit_for_bit(tmp_path: Path) -> None:
    rows = [step_row(0), step_row(1, [[math.nan, math.inf], [-math.inf, -0.0]]), step_row(2)]
    with create(tmp_path / "run") as log:
        for row in rows:
            log.add_step(row)
        log.add_eval(EvalRow(0, "eval", np.array([0.5, np.nan]), np.array([True, False]), 1.5))
        log.add_eval(EvalRow(3, "eval", np.array([0.25]), np.array([]), 1.5))
    with RunLog.open(tmp_path / "run") as log:
        assert log.meta == META and log.done == 3
        assert all(same(a, b) for a, b in zip(rows, log.steps(), strict=True))
        assert [row.step for row in log.steps(after=2)] == [2]
        first, last = log.evals("eval")
        assert np.isnan(first.losses[1]) and first.accuracy == 0.5
        assert last.loss == 0.25 and math.isnan(last.accuracy)
        (snapshot,) = log.snapshots()
        state = log.load(snapshot)
        assert snapshot.coeff_hash == "hash0" and state.keys() == STATE.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in STATE.items())


def test_is_durable(tmp_path: Path) -> None:
    with create(tmp_path / "run") as log:
        assert log._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert log._database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_steps_are_in_order(tmp_path: Path) -> None:
    with create(tmp_path / "run") as log:
        log.add_step(step_row(0))
        with pytest.raises(ValueError, match="`step` is 3.*the next is 1"):
            log.add_step(step_row(3))


def test_one_writer_many_readers(tmp_path: Path) -> None:
    with create(tmp_path / "run") as log:
        log.add_step(step_row(0))
        with pytest.raises(RunError, match="another process is writing"):
            RunLog.open(tmp_path / "run", write=True)
        with RunLog.open(tmp_path / "run") as reader:
            assert reader.done == 1
    with RunLog.open(tmp_path / "run", write=True) as log:
        assert log.done == 1


def test_lock_dies_with_its_process(tmp_path: Path) -> None:
    create(tmp_path / "run").close()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        RunLog.open(tmp_path / "run", write=True)
        os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    with pytest.raises(RunError, match="another process is writing"):
        RunLog.open(tmp_path / "run", write=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    RunLog.open(tmp_path / "run", write=True).close()


@pytest.mark.parametrize("case", ["nothing", "no database", "other version", "a run already"])
def test_refuses(tmp_path: Path, case: str) -> None:
    path = tmp_path / "run"
    if case == "nothing":
        with pytest.raises(RunError, match="holds no run"):
            RunLog.open(path)
        assert not path.exists()
        return
    create(path).close()
    if case == "a run already":
        with pytest.raises(RunError, match="holds a run already"):
            create(path)
    elif case == "no database":
        (path / "run.sqlite").write_bytes(b"not a database, but long enough to have a header" * 50)
        with pytest.raises(RunError, match="can't be read as a run log"):
            RunLog.open(path)
    else:
        with sqlite3.connect(path / "run.sqlite") as database:
            database.execute("PRAGMA user_version = 99")
        with pytest.raises(RunError, match="version 99"):
            RunLog.open(path)


def test_keeps_first_and_newest_snapshots(tmp_path: Path) -> None:
    with create(tmp_path / "run") as log:
        for step in range(6):
            log.add_step(step_row(step))
            log.add_snapshot({**STATE, "rule/t": torch.tensor(step + 1)}, f"hash{step + 1}")
        assert [row.step for row in log.snapshots()] == [0, 5, 6]
        assert int(log.load(log.snapshots()[-1])["rule/t"]) == 6
        files = sorted(path.name for path in (tmp_path / "run/snapshots").iterdir())
        assert files == ["step-000000.safetensors", "step-000005.safetensors", "step-000006.safetensors"]


def test_damaged_snapshot_is_noticed(tmp_path: Path) -> None:
    with create(tmp_path / "run") as log:
        (row,) = log.snapshots()
        data = bytearray(row.file.read_bytes())
        data[-1] ^= 1
        row.file.write_bytes(data)
        with pytest.raises(RunError, match="damaged"):
            log.load(row)
        row.file.unlink()
        with pytest.raises(RunError, match="missing"):
            log.load(row)


def test_debris_is_swept(tmp_path: Path) -> None:
    create(tmp_path / "run").close()
    for name in ("run.sqlite.tmp", "snapshots/step-000009.safetensors", "snapshots/step-000010.safetensors.tmp"):
        (tmp_path / "run" / name).write_bytes(b"half")
    (tmp_path / "run/notes.txt").write_text("not ours")
    RunLog.open(tmp_path / "run", write=True).close()
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == {"run.sqlite", "lock", "step-000000.safetensors", "notes.txt"}


def test_full_disk(tmp_path: Path) -> None:
    """A limit on file sizes, hit in the middle of a step and of a snapshot: an error that says so, and a whole log."""
    child = os.fork()
    if child == 0:
        try:
            log = create(tmp_path / "run")
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
            with pytest.raises(RunError, match="step .* of the run log can't be written"):
                for step in range(1000):
                    log.add_step(step_row(step, [[0.5] * 64] * 2))
            with pytest.raises(RunError, match=r"safetensors can't be written: .*make room"):
                log.add_snapshot({"big": torch.zeros(50_000)}, "h")
            os._exit(0)
        except BaseException as error:
            print(repr(error))
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    with RunLog.open(tmp_path / "run", write=True) as log:
        rows = list(log.steps())
        assert 0 < log.done == len(rows) < 1000
        assert [row.step for row in log.snapshots()] == [0]
        assert not list((tmp_path / "run").rglob("*.tmp"))
        log.add_step(step_row(log.done))  # with room again it goes on
        log.add_snapshot(STATE, "h")


def test_read_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runlog.Path, "mkdir", refuse)
    with pytest.raises(RunError, match="Permission denied.*writable"):
        create(tmp_path / "run")
