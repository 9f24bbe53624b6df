"""The raw rows as they are committed: a line of JSON for each run that is done or failed, in the order of their names.

runs.jsonl      {set, stage, contender, lr, seed, forwards, state, reason, result: see `work`}
measures.jsonl  the same, result: {columns, rows}
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..runlog import write_whole
from .plan import Row, Run

FILES = ("runs.jsonl", "measures.jsonl")


def read(folder: Path) -> list[Row]:
    """All rows of `folder`; none where there is no file."""
    found = []
    for path in (folder / name for name in FILES):
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            entry = json.loads(line)
            state, reason, result = (entry.pop(key) for key in ("state", "reason", "result"))
            found.append(Row(Run(**entry), state, result, reason))
    return found


def write(folder: Path, known: Mapping[str, Row]) -> None:
    """Bring the files up to date: rows whose runs ended in a queue are as it says, all others stay."""
    kept = {row.run.id: row for row in read(folder)}
    kept |= {key: row for key, row in known.items() if row.state in ("done", "failed")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, measured in zip(FILES, (False, True), strict=True):
        rows = [kept[key] for key in sorted(kept) if (kept[key].run.stage == "measure") == measured]
        text = "".join(_line(row) for row in rows).encode()
        write_whole(folder / name, functools.partial(Path.write_bytes, data=text))


def _line(row: Row) -> str:
    entry = {**asdict(row.run), "state": row.state, "reason": row.reason, "result": row.result}
    return json.dumps(entry, ensure_ascii=False) + "\n"
