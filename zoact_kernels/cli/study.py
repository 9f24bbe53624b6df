"""`zoact study`: which method learns fastest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .runs import set_threads
from .terminal import about, console

WHAT = ("plan", "run", "status", "report", "retry")


def study(
    what: Annotated[str, typer.Argument(help="plan, run, status, report, or retry (what failed)")] = "status",
    minutes: Annotated[float, about("run: begin nothing after so many, and pause what is under way")] = math.inf,
    only: Annotated[
        str, about("run, status, retry: runs whose names begin so, comma-separated: 'int4-trec,*/final'")
    ] = "",
    threads: Annotated[int, about("run: CPU threads (0: torch's default)")] = 1,
    queue: Annotated[Path | None, about("directory of the queue (default: runs/study in the repository)")] = None,
    out: Annotated[Path | None, about("directory of rows and report (default: benchmarks/study)")] = None,
) -> None:
    """The study of all methods: a queue of runs that may be stopped at any time, and a report of what has finished.

    Several `zoact study run` may share a queue. Needs the repository.
    """
    from ..study import report, rows, work
    from ..study.plan import due
    from ..study.queue import Queue

    if what not in WHAT:
        raise ValueError(f"`what` is {what!r}; allowed are {', '.join(WHAT)}")
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file() and (queue is None or out is None):
        raise ValueError("the study is in the repository, not in the installed package: give --queue and --out")
    folder = out or root / "benchmarks" / "study"
    patterns = [pattern.strip() for pattern in only.split(",") if pattern.strip()]
    set_threads(threads)
    with Queue(queue or root / "runs" / "study") as line:
        line.adopt(rows.read(folder))
        added = line.add(due(line.rows()))
        if what == "plan":
            console.print(f"{added} runs added, {len(line.rows())} in the queue")
        elif what == "retry":
            console.print(f"{line.retry(patterns)} failed runs wait again")
        elif what == "run":
            count = work.work(line, minutes=minutes, only=patterns, said=lambda text: console.print(text, markup=False))
            console.print(f"{count} runs ended; `zoact study report` writes down what they found")
        elif what == "report":
            known = line.rows()
            rows.write(folder, known)
            for path in report.write(folder):
                console.print(str(path))
        else:
            _print_status(line, patterns)


def _print_status(line, patterns: list[str]) -> None:
    from collections import Counter

    from ..study.queue import matches

    counts: dict[str, Counter[str]] = {}
    failed = []
    for key, row in line.rows().items():
        if matches(key, patterns):
            counts.setdefault(f"{row.run.set} {row.run.stage}", Counter())[row.state] += 1
            failed += [f"{key}: {row.reason}"] if row.state == "failed" else []
    table = Table("runs", "waiting", "running", "done", "failed")
    for name, states in counts.items():
        table.add_row(name, *(str(states[state]) for state in ("waiting", "running", "done", "failed")))
    console.print(table)
    for text in failed:
        console.print(text, markup=False)
