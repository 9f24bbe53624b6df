"""The queue of runs: SQLite, a row each; several workers, each of which may be killed at any time.

    waiting -> running -> done | failed (with the reason)
                  |
                  +-> waiting   given back: the worker's time was up
                  +-> running   taken up by another worker, when the one that had it is gone

Who runs a run holds a lock in its directory, which the system frees however that process ends. So a run that says
"running" and whose lock is free was killed, and the next worker takes it up; after ATTEMPTS deaths it has failed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runlog import RunError, acquire
from .plan import Row, Run

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY,
    spec TEXT NOT NULL,         -- plan.Run as JSON
    priority INTEGER NOT NULL,  -- least first
    state TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL DEFAULT 0,  -- how often it was begun and not given back
    result TEXT NOT NULL DEFAULT '{}'     -- JSON
);
"""
ATTEMPTS = 3


@dataclass
class Claim:
    """A run that this process has to itself until `close`; directory: of its files."""

    run: Run
    directory: Path
    attempts: int
    lock: sqlite3.Connection

    def close(self) -> None:
        self.lock.close()


class Queue:
    """The queue in `directory`, made if there is none."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._database = sqlite3.connect(directory / "queue.sqlite", isolation_level=None, timeout=60)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute(SCHEMA)

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *exc: object) -> None:
        self._database.close()

    def add(self, runs: Iterable[tuple[int, Run]]) -> int:
        """Put runs (priority, run) in the queue that aren't there; others get their priority. Returns how many are new.

        Other workers may do the same at the same time.
        """
        with self._transaction():
            (before,) = self._database.execute("SELECT count(*) FROM runs").fetchone()
            self._database.executemany(
                "INSERT INTO runs (id, spec, priority, state) VALUES (?, ?, ?, 'waiting') "
                "ON CONFLICT (id) DO UPDATE SET priority = excluded.priority",
                [(run.id, run.to_json(), priority) for priority, run in runs],
            )
            (after,) = self._database.execute("SELECT count(*) FROM runs").fetchone()
        return int(after - before)

    def adopt(self, rows: Iterable[Row]) -> None:
        """Take over rows that another machine finished; what is known here stays, but for what was never done here."""
        with self._transaction():
            self._database.executemany(
                "INSERT INTO runs (id, spec, priority, state, reason, result) VALUES (?, ?, 0, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET state = 'done', reason = '', result = excluded.result "
                "WHERE runs.state IN ('waiting', 'failed') AND excluded.state = 'done'",
                [(row.run.id, row.run.to_json(), row.state, row.reason, json.dumps(row.result)) for row in rows],
            )

    def rows(self) -> dict[str, Row]:
        """All of it by id, in order of priority."""
        query = self._database.execute("SELECT id, spec, state, result, reason FROM runs ORDER BY priority, id")
        return {
            key: Row(Run(**json.loads(spec)), state, json.loads(result), reason)
            for key, spec, state, result, reason in query
        }

    def claim(self, only: Sequence[str] = ()) -> Claim | None:
        """The first run that waits, or whose worker is gone, now running and ours; None if there is none.

        only: patterns (fnmatch) of ids.
        """
        with self._transaction():
            query = self._database.execute(
                "SELECT id, spec, state, attempts FROM runs WHERE state IN ('waiting', 'running') "
                "ORDER BY priority, state, id"
            )
            for key, spec, state, attempts in query.fetchall():
                if not matches(key, only):
                    continue
                directory = self._place(key)
                directory.mkdir(parents=True, exist_ok=True)
                try:
                    lock = acquire(directory)
                except RunError:
                    continue  # its worker is at it
                if state == "running" and attempts >= ATTEMPTS:
                    lock.close()
                    self._set(key, "failed", f"its worker ended without a word {attempts} times")
                    continue
                self._database.execute(
                    "UPDATE runs SET state = 'running', attempts = attempts + 1 WHERE id = ?", (key,)
                )
                return Claim(Run(**json.loads(spec)), directory, attempts + 1, lock)
        return None

    def others_at_work(self, only: Sequence[str] = ()) -> bool:
        """Whether another living worker has a run of `only`."""
        running = self._database.execute("SELECT id FROM runs WHERE state = 'running'").fetchall()
        return any(matches(key, only) and not _free(self._place(key)) for (key,) in running)

    def finish(self, claim: Claim, result: dict[str, Any]) -> None:
        self._set(claim.run.id, "done", "", json.dumps(result))

    def fail(self, claim: Claim, reason: str) -> None:
        self._set(claim.run.id, "failed", reason)

    def give_back(self, claim: Claim) -> None:
        """To be taken up again, here or elsewhere."""
        self._database.execute(
            "UPDATE runs SET state = 'waiting', attempts = attempts - 1 WHERE id = ?", (claim.run.id,)
        )

    def retry(self, only: Sequence[str] = ()) -> int:
        """Failed runs wait again. Returns how many."""
        failed = [
            key
            for (key,) in self._database.execute("SELECT id FROM runs WHERE state = 'failed'").fetchall()
            if matches(key, only)
        ]
        self._database.executemany(
            "UPDATE runs SET state = 'waiting', reason = '', attempts = 0 WHERE id = ?", [(key,) for key in failed]
        )
        return len(failed)

    def _place(self, key: str) -> Path:
        return self.directory / "runs" / key.replace("/", "__").replace(" ", "-")

    def _set(self, key: str, state: str, reason: str, result: str = "{}") -> None:
        self._database.execute(
            "UPDATE runs SET state = ?, reason = ?, result = ? WHERE id = ?", (state, reason, result, key)
        )

    @contextlib.contextmanager
    def _transaction(self):
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def matches(key: str, only: Sequence[str]) -> bool:
    """Whether an id begins as one of the patterns has it; no patterns: always."""
    return not only or any(fnmatch.fnmatch(key, f"{pattern}*") for pattern in only)


def _free(directory: Path) -> bool:
    """Whether nobody holds the lock of a run's directory."""
    if not directory.exists():
        return True
    try:
        acquire(directory).close()
    except RunError:
        return False
    return True
