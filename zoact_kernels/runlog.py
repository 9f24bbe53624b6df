"""The log of a run: what happened in SQLite, one durable row a step, and snapshots of the state beside it.

    RUN_DIR/run.sqlite      meta (JSON), steps, evals, snapshots; WAL, synchronous = FULL
    RUN_DIR/snapshots/      step-000200.safetensors: A, C and all optimizer state after 200 steps
    RUN_DIR/lock            held by the process that writes; the system frees it however that process ends

A step is done when its row is committed: seeds and weights are all that an update needs (C <- rule(C, sum weights Z)),
so newest snapshot + the rows after it is the state, whenever the process was killed; a method that needs more of a step
than that has the rows evaluated again, and their losses compared. A snapshot is written to a temporary name, synced,
moved, and only then recorded; a file without a record is debris and is swept at the next open. Losses and weights are
BLOBs because NaN must survive (SQLite turns a NaN into NULL).

Steps are counted from 0; "after n steps" in snapshots and evaluations means rows 0 .. n-1 are done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE steps (
    step INTEGER PRIMARY KEY,  -- from 0; the argument of seed_for
    seeds BLOB NOT NULL,       -- int64 [S]
    groups INTEGER NOT NULL,   -- G
    losses BLOB NOT NULL,      -- float64 [G, B], nats per example
    weights BLOB NOT NULL,     -- float32 [S]
    lr REAL NOT NULL,
    skipped INTEGER NOT NULL,  -- 1: a loss was not finite, the state did not change
    signal REAL,               -- mean |f+ - f-|, nats
    floor REAL,                -- what rounding alone makes of it, nats
    tokens INTEGER NOT NULL,   -- of all groups together
    seconds REAL NOT NULL
);
CREATE TABLE evals (
    step INTEGER NOT NULL,     -- after so many steps
    split TEXT NOT NULL,
    losses BLOB NOT NULL,      -- float64 [n], nats per example
    correct BLOB NOT NULL,     -- uint8 [n]; empty where there are no label words
    seconds REAL NOT NULL,
    PRIMARY KEY (step, split)
);
CREATE TABLE snapshots (step INTEGER PRIMARY KEY, file TEXT NOT NULL, sha256 TEXT NOT NULL, coeff_hash TEXT NOT NULL);
"""
VERSION = 1  # of SCHEMA; a log of another version is refused
KEPT = 2  # newest snapshots kept, beside the first: one may be damaged by what stopped the machine


class RunError(RuntimeError):
    """Something a user can mend: the message says what and how."""


class StepRow(NamedTuple):
    step: int
    seeds: Tensor  # int64 [S]
    losses: Tensor  # float64 [G, B]
    weights: Tensor  # float32 [S]
    lr: float
    skipped: bool
    signal: float
    floor: float
    tokens: int
    seconds: float


class EvalRow(NamedTuple):
    step: int
    split: str
    losses: np.ndarray  # float64 [n]
    correct: np.ndarray  # bool [n], or empty
    seconds: float

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        """Share of examples whose label word won; NaN where the task has none."""
        return float(self.correct.mean()) if self.correct.size else math.nan


class SnapshotRow(NamedTuple):
    step: int
    file: Path
    sha256: str
    coeff_hash: str


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn a full disk, a broken disk or a missing permission into a RunError that names `what`."""
    try:
        yield
    except (OSError, sqlite3.OperationalError, SafetensorError) as error:
        hint = "nothing before it is lost: make room, or make the place writable, and continue with --resume"
        raise RunError(f"{what} can't be written: {error}; {hint}") from error


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary)`, synced and moved to `path`: readers see the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(str(path)):
        try:
            write(temporary)
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over (name, dtype, shape, bytes) of each tensor in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        update_hash(digest, name, tensors[name])
    return digest.hexdigest()


def update_hash(digest: Any, name: str, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class RunLog:
    """The log in `directory`. `create` starts one, `open` continues or reads one; both are context managers."""

    def __init__(self, directory: Path, database: sqlite3.Connection, lock: sqlite3.Connection | None):
        self.directory = directory
        self._database = database
        self._lock = lock
        self.meta: dict[str, Any] = {
            key: json.loads(value) for key, value in database.execute("SELECT key, value FROM meta")
        }
        (last,) = database.execute("SELECT max(step) FROM steps").fetchone()
        self.done: int = 0 if last is None else last + 1  # steps done

    # ------------------------------------------------------------------------------------------------- open, create

    @staticmethod
    def exists(directory: Path) -> bool:
        return (directory / "run.sqlite").exists()

    @classmethod
    def create(cls, directory: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], coeff_hash: str) -> RunLog:
        """A new log: `meta` (JSON values) and the state before step 0, there as one or not at all.

        Raises RunError: `directory` holds a run, or can't be written.
        """
        path = directory / "run.sqlite"
        with writing(str(directory)):
            (directory / "snapshots").mkdir(parents=True, exist_ok=True)
        lock = acquire(directory)
        try:
            if path.exists():
                raise RunError(f"{directory} holds a run already; continue it with --resume, or choose another --out")
            first = _write_snapshot(directory, 0, tensors, coeff_hash)

            def build(temporary: Path) -> None:
                temporary.unlink(missing_ok=True)
                with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as database:
                    database.execute("PRAGMA journal_mode = OFF")  # a torn file is thrown away, not rolled back
                    database.execute(f"PRAGMA user_version = {VERSION}")
                    database.executescript(SCHEMA)
                    rows = [(key, json.dumps(value)) for key, value in meta.items()]
                    database.executemany("INSERT INTO meta VALUES (?, ?)", rows)
                    database.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?)", first)

            write_whole(path, build)
            log = cls(directory, _connect(path), lock)
            log._sweep()
            return log
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open(cls, directory: Path, *, write: bool = False) -> RunLog:
        """The log of an earlier run. `write` takes the lock and sweeps debris.

        Raises:
            RunError: no run in `directory`, not a log of ours, of another version, or another process writes it.
        """
        path = directory / "run.sqlite"
        if not path.exists():
            raise RunError(f"{directory} holds no run (there is no {path})")
        lock = acquire(directory) if write else None
        try:
            log = cls(directory, _connect(path), lock)
            if write:
                log._sweep()
            return log
        except BaseException:
            if lock is not None:
                lock.close()
            raise

    def close(self) -> None:
        self._database.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def set_meta(self, **values: Any) -> None:
        with writing("the run log"):
            rows = [(key, json.dumps(value)) for key, value in values.items()]
            self._database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)
        self.meta.update(values)

    # ------------------------------------------------------------------------------------------------- steps, evals

    def add_step(self, row: StepRow) -> None:
        """Commit one step; durable when this returns. Raises RunError: the disk is full; ValueError: out of order."""
        if row.step != self.done:
            raise ValueError(f"`step` is {row.step}; {self.done} steps are logged, so the next is {self.done}")
        losses = row.losses.to(torch.float64)
        with writing(f"step {row.step} of the run log"):
            self._database.execute(
                "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.step,
                    _bytes(row.seeds, torch.int64),
                    losses.shape[0],
                    _bytes(losses, torch.float64),
                    _bytes(row.weights, torch.float32),
                    row.lr,
                    int(row.skipped),
                    row.signal,
                    row.floor,
                    row.tokens,
                    row.seconds,
                ),
            )
        self.done += 1

    def steps(self, after: int = 0) -> Iterator[StepRow]:
        """Rows of step `after` and later, in order."""
        query = self._database.execute("SELECT * FROM steps WHERE step >= ? ORDER BY step", (after,))
        for step, seeds, groups, losses, weights, lr, skipped, signal, floor, tokens, seconds in query:
            yield StepRow(
                step,
                _tensor(seeds, np.int64),
                _tensor(losses, np.float64).view(groups, -1),
                _tensor(weights, np.float32),
                lr,
                bool(skipped),
                math.nan if signal is None else signal,
                math.nan if floor is None else floor,
                tokens,
                seconds,
            )

    def add_eval(self, row: EvalRow) -> None:
        losses = np.asarray(row.losses, np.float64).tobytes()
        correct = np.asarray(row.correct, np.uint8).tobytes()
        with writing(f"the evaluation after {row.step} steps"):
            self._database.execute(
                "INSERT OR REPLACE INTO evals VALUES (?, ?, ?, ?, ?)",
                (row.step, row.split, losses, correct, row.seconds),
            )

    def evals(self, split: str | None = None) -> list[EvalRow]:
        query = self._database.execute("SELECT * FROM evals WHERE ? IS NULL OR split = ? ORDER BY step", (split, split))
        return [
            EvalRow(step, name, np.frombuffer(losses), np.frombuffer(correct, np.uint8).astype(bool), seconds)
            for step, name, losses, correct, seconds in query
        ]

    # --------------------------------------------------------------------------------------------------- snapshots

    def add_snapshot(self, tensors: Mapping[str, Tensor], coeff_hash: str) -> None:
        """Make the state after the steps done so far durable, then drop all but the first and the newest ones.

        Raises RunError: it can't be written; earlier snapshots and the log are as they were.
        """
        record = _write_snapshot(self.directory, self.done, tensors, coeff_hash)
        with writing(f"the record of snapshot {record[1]}"):
            self._database.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)", record)
            for row in self.snapshots()[1:-KEPT]:
                self._database.execute("DELETE FROM snapshots WHERE step = ?", (row.step,))
                row.file.unlink(missing_ok=True)

    def snapshots(self) -> list[SnapshotRow]:
        """Oldest first. The first holds the state before step 0."""
        query = self._database.execute("SELECT * FROM snapshots ORDER BY step")
        return [SnapshotRow(step, self.directory / "snapshots" / file, sha, coeff) for step, file, sha, coeff in query]

    def load(self, row: SnapshotRow) -> dict[str, Tensor]:
        """The tensors of a snapshot. Raises RunError: the file is missing or not what was written."""
        if not row.file.exists():
            raise RunError(f"{row.file} is missing, though the log records it")
        if _hash_file(row.file) != row.sha256:
            raise RunError(f"{row.file} is damaged: its sha256 isn't the one that the log records")
        with safe_open(row.file, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict

    def _sweep(self) -> None:
        """Remove what a killed process left: temporary files, and snapshots that were never recorded."""
        recorded = {row.file.name for row in self.snapshots()}
        folder = self.directory / "snapshots"
        folder.mkdir(exist_ok=True)
        for path in [*folder.iterdir(), *self.directory.glob("*.tmp")]:
            if path.is_file() and (path.parent != folder or path.name not in recorded):
                path.unlink()


def _write_snapshot(
    directory: Path, step: int, tensors: Mapping[str, Tensor], coeff_hash: str
) -> tuple[int, str, str, str]:
    """Write and sync the file; its row of the table, which is still to be recorded."""
    name = f"step-{step:06d}.safetensors"
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    digest = ""

    def write(temporary: Path) -> None:
        nonlocal digest
        save_file(whole, temporary)
        temporary.chmod(0o644)  # safetensors gives 0o600, and a run is there to be read
        digest = _hash_file(temporary)

    write_whole(directory / "snapshots" / name, write)
    return step, name, digest, coeff_hash


def _connect(path: Path) -> sqlite3.Connection:
    try:
        database = sqlite3.connect(path, isolation_level=None, timeout=30)
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version != VERSION:
            raise RunError(f"{path} is a log of version {version}; this program reads version {VERSION}")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        return database
    except sqlite3.DatabaseError as error:
        raise RunError(f"{path} can't be read as a run log: {error}") from error


def acquire(directory: Path) -> sqlite3.Connection:
    """An exclusive lock on `directory`: a second SQLite file held in a transaction, which works on every system."""
    path = directory / "lock"
    with writing(str(path)):
        lock = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            lock.close()
            if "locked" not in str(error):
                raise
            raise RunError(f"another process is writing the run in {directory}; wait for it or stop it") from error
        return lock


def _bytes(tensor: Tensor, dtype: torch.dtype) -> bytes:
    return tensor.detach().to("cpu", dtype).contiguous().numpy().tobytes()


def _tensor(blob: bytes, dtype: Any) -> Tensor:
    return torch.from_numpy(np.frombuffer(blob, dtype).copy())
