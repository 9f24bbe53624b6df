"""Every method of `zoact methods` from the command line for a few steps: does it run, and what does a step ask for.

    python -m benchmarks.every_method [--steps 20] [--method NAME] [--again]

Each is `zoact finetune --demo trec --method NAME` on the demo's model, in a process of its own: on its INT4 weights,
with --dense where the method moves weights themselves. All else is the method's own; 32 held-out examples before and
after say how often to look and change no step. None needs an option to begin. What helps two of them:

    zo-finetuner  is MeZO, and says so, without nets: `zoact learn-perturbations` makes, --option nets=FILE takes them
    zo-act-tail   has batches of 1 024 questions, which its 64 queries share, and computes all of them before step 1

A row for each goes to results/methods.jsonl and methods.md; methods that have a good row for as many steps are left out
(--again: are not). What they said is in --logs. The exit code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from zoact_kernels.methods import METHODS

from .report import write_whole
from .run import RESULTS
from .timing import machine

HELD_OUT = 32
ROWS = "methods.jsonl"


def command(method: str, steps: int, model: str, out: Path) -> list[str]:
    """Of the command line, after `zoact`."""
    asked = ["finetune", "--model", model, "--demo", "trec", "--out", str(out), "--method", method]
    asked += ["--steps", str(steps), "--eval-limit", str(HELD_OUT)]
    return asked + ["--dense"] * METHODS[method].dense


def run_here(arguments: Sequence[str]) -> int:
    """`zoact` with `arguments`, and the forwards that training made: sequences through all blocks (study/meter.py)."""
    from zoact_kernels import cli, finetune
    from zoact_kernels.cli import runs
    from zoact_kernels.study.meter import Meter

    load, meters = finetune.load, []

    def metered(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        meters.append(Meter(loaded.model))
        return loaded

    class Counting(cli.Display):
        def evaluating(self, step: int) -> None:
            meters[0].paused = True

        def evaluated(self, row: Any) -> None:
            meters[0].paused = False

    finetune.load, runs.Display = metered, Counting
    try:
        cli.main(arguments)
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        print(json.dumps({"forwards": meters[0].forwards if meters else 0.0}), flush=True)


def measure(method: str, steps: int, model: str, log: Path) -> dict[str, Any]:
    """The row of a method: what its run log holds, or the last line that it said where it failed."""
    from zoact_kernels.runlog import RunLog

    with tempfile.TemporaryDirectory() as folder:
        out, begun = Path(folder) / "run", time.time()
        asked = command(method, steps, model, out)
        run = [sys.executable, "-m", "benchmarks.every_method", "--", *asked]
        done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log.write_text(done.stdout, encoding="utf-8")
        *_, counted = done.stdout.splitlines() or ["{}"]
        row = {
            "method": method, "steps": steps, "model": Path(model).name, "dense": METHODS[method].dense,
            "wall_seconds": round(time.time() - begun, 1), "code": done.returncode,
        }  # fmt: skip
        if done.returncode:
            said = [line for line in done.stdout.splitlines() if line.strip()]
            return {**row, "error": next((line for line in reversed(said) if not line.startswith("{")), "nothing said")}
        with RunLog.open(out) as run_log:
            told, (before, after) = list(run_log.steps()), run_log.evals("eval")
            row["batch_size"] = run_log.meta["recipe"]["batch_size"]
        first, last = (float(told[i].losses.mean()) for i in (0, -1))
        return {
            **row, "seconds": round(sum(step.seconds for step in told), 1), "first": first, "last": last,
            "skipped": sum(step.skipped for step in told), "forwards": json.loads(counted)["forwards"],
            "tokens": sum(step.tokens for step in told), "held_out": [before.loss, after.loss],
            "accuracy": [before.accuracy, after.accuracy],
        }  # fmt: skip


def known(file: Path) -> dict[str, dict[str, Any]]:
    """The rows that are there, by method; without those of methods that are gone."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {row["method"]: row for row in map(json.loads, lines) if row["method"] in METHODS}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in the order of METHODS, as markdown."""
    order = list(METHODS)
    lines = [
        "# Every method from the command line",
        "",
        "Made by `make every-method` from `methods.jsonl`: `zoact finetune --demo trec --method NAME --steps N`, all",
        "else the method's own, on SmolLM2-135M: INT4 as packaged, or its dense fp32 twin where a method moves the",
        "weights. That they run, and what a step asks for; so few steps say nothing about learning. Seconds are of the",
        "steps, on a machine with other work. A forward is one sequence through all blocks, those of bases and of the",
        "rounding floor included. Losses: mean of the first and the last batch over all row groups; of 32 held-out",
        "questions before and after.",
        "",
        "| method | weights | steps | skipped | seconds | forwards | first, last loss | held-out loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: order.index(row["method"])):
        weights = "dense" if row["dense"] else "INT4"
        if row["code"]:
            lines.append(f"| {row['method']} | {weights} | failed: {row['error']} | | | | | |")
            continue
        held = f"{row['held_out'][0]:.4f} → {row['held_out'][1]:.4f}"
        lines.append(
            f"| {row['method']} | {weights} | {row['steps']} | {row['skipped']} | {row['seconds']:.0f} | "
            f"{row['forwards']:,.0f} | {row['first']:.4f}, {row['last']:.4f} | {held} |"
        )
    if missing := [name for name in METHODS if name not in {row["method"] for row in rows}]:
        lines += ["", f"Not run yet (`make every-method` goes on): {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    if "--" in sys.argv[1:2]:
        return run_here(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--method", action="append", choices=list(METHODS), help="only these (repeat)")
    parser.add_argument("--again", action="store_true", help="those too that have a row")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--logs", type=Path, default=Path("runs/every-method"), help="folder of what was said")
    parser.add_argument("--model", default="", help="default: that of the demo")
    given = parser.parse_args()
    from zoact_kernels.finetune import demo_job

    model = given.model or demo_job().model
    file = given.out / ROWS
    good = [name for name, row in known(file).items() if row["steps"] == given.steps and not row["code"]]
    due = [name for name in given.method or METHODS if given.again or name not in good]
    given.logs.mkdir(parents=True, exist_ok=True)
    failed = []
    with Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        for name in progress.track(due, description="methods"):
            row = measure(name, given.steps, model, given.logs / f"{name}.log")
            rows = known(file) | {name: {**row, "machine": machine()}}  # another may have written in the meantime
            write_whole(file, "".join(json.dumps(row) + "\n" for row in rows.values()))
            write_whole(given.out / "methods.md", table(list(rows.values())))
            failed += [name] * bool(row["code"])
            outcome = f"failed: {row['error']}" if row["code"] else f"loss {row['first']:.4f} → {row['last']:.4f}"
            progress.console.print(f"{name}: {outcome}, {row['wall_seconds']:.0f} s", markup=False, soft_wrap=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
