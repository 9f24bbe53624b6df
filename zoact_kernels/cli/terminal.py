"""What the commands share: the console, the display of a run, options."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import memory
from ..methods import StepResult
from ..runlog import EvalRow, StepRow
from ..trainer import Watch

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # files get whole lines


def about(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


def fields_of(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's options that are fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in options.items() if name in names}


def ranks_of(text: str) -> dict[str, int]:
    """ "*.q_proj=4,*.v_proj=0" -> {"*.q_proj": 4, "*.v_proj": 0}."""
    ranks = {}
    for item in filter(None, text.split(",")):
        pattern, _, rank = item.partition("=")
        if not rank.strip().isdigit():
            raise ValueError(f"`--ranks` has {item!r}; items are of the form pattern=rank")
        ranks[pattern.strip()] = int(rank)
    return ranks


def set_threads(threads: int) -> None:
    import torch

    if threads < 0:
        raise ValueError(f"`--threads` is {threads}; it has to be at least 1, or 0 for torch's default")
    if threads:
        torch.set_num_threads(threads)


class Display(Watch):
    """A progress bar (in a file: ten lines) with loss, accuracy, tokens/s and peak; evaluations as lines."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
        )
        self.task = self.progress.add_task("", visible=False)
        self.loss = math.nan
        self.accuracy = ""
        self.steps = 0
        self.start = memory.resident()
        self.device = "cpu"

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def started(self, done: int, steps: int, device: str) -> None:
        self.start, self.steps, self.device = memory.resident(device), steps, device
        if done:
            self.said(f"continuing after step {done}")
        self.progress.reset(self.task, total=steps, completed=done, visible=True)

    def stepped(self, row: StepRow, result: StepResult) -> None:
        loss = result.loss
        if math.isfinite(loss):  # over about 20 steps
            self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        parts = [f"loss {self.loss:.4f}{self.accuracy}", f"{row.tokens / row.seconds:,.0f} tokens/s"]
        if row.floor > 0:
            parts.append(f"signal {row.signal / row.floor:,.0f} x rounding")
        if (peak := memory.highest(self.device)) is not None and self.start is not None:
            parts.append(f"peak +{memory.human(peak - self.start)}")
        text = " | ".join(parts)
        self.progress.update(self.task, completed=row.step + 1, description=text)
        if not console.is_terminal and (row.step + 1) % max(1, self.steps // 10) == 0:
            self.said(f"step {row.step + 1} of {self.steps}: {text}")

    def evaluating(self, step: int) -> None:
        self.progress.update(self.task, description=f"evaluating after {step} steps")

    def evaluated(self, row: EvalRow) -> None:
        self.accuracy = "" if math.isnan(row.accuracy) else f" | accuracy {row.accuracy:.1%}"
        self.said(f"after {row.step} steps: held-out loss {row.loss:.4f}{self.accuracy} ({len(row.losses)} examples)")

    def said(self, text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)
