"""The command that trains the nets of ZO Fine-tuner."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data import parse_label_words
from ..finetune import Job
from ..learning import Course, Lesson, learn
from .terminal import about, console, fields_of, set_threads

EVERY = 5.0  # seconds between lines where there is no bar


def learn_perturbations(
    context: typer.Context,
    out: Annotated[Path, about("file of nets to write (safetensors), after every epoch")],
    model: Annotated[str, about("GGUF file or Hugging Face directory (safetensors): the base model")],
    train: Annotated[str, about("training examples: .jsonl, .csv or .tsv")] = "",
    demo: Annotated[str, about("packaged task instead of --train: trec, sms or reviews")] = "",
    prompt: Annotated[str, about("template over the columns: '{question}\\nType:'")] = "",
    labels: Annotated[str, about("label=word,... or word,...: what the model should answer")] = "",
    label_column: Annotated[str, about("column that holds the label")] = "label",
    completion: Annotated[str, about("template of the answer, instead of --labels")] = "",
    separator: Annotated[str, about("between prompt and answer")] = " ",
    max_length: Annotated[int, about("tokens of a sequence; prompts lose their beginning")] = 512,
    dtype: Annotated[str, about("weights and activations: float32, bfloat16, float16")] = "float32",
    device: Annotated[str, about("cpu, cuda or cuda:1")] = "cpu",
    start: Annotated[Path | None, about("nets to go on from (trained on another task, say)")] = None,
    epochs: Annotated[int, about("passes over the examples")] = Course.epochs,
    restart_every: Annotated[int, about("epochs after which the model begins anew")] = Course.restart_every,
    batch_size: Annotated[int, about("examples a step")] = Course.batch_size,
    lr: Annotated[float, about("learning rate of the model's first-order steps")] = Course.lr,
    lr_nets: Annotated[float, about("learning rate of the nets")] = Course.lr_nets,
    reach: Annotated[float, about("size of the step that the nets are judged by")] = Course.reach,
    sigma: Annotated[float, about("perturbation radius")] = Course.sigma,
    limit: Annotated[int, about("steps of an epoch (0: all examples)")] = Course.limit,
    seed: Annotated[int, about("the whole of the randomness")] = Course.seed,
    threads: Annotated[int, about("CPU threads (0: torch's default)")] = 0,
) -> None:
    """Train the nets of zo-finetuner on one task, once for a base model: finetune --option nets=FILE uses them.

    Needs the memory of first-order training, unlike all else here: weights, gradients, momentum and a copy.
    """
    set_threads(threads)
    options = dict(context.params) | {"labels": parse_label_words(labels) if labels else {}}
    job, course = Job(**fields_of(Job, options)), Course(**fields_of(Course, options))
    columns = (
        TextColumn("lesson"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        task, mean, last, skipped = progress.add_task("", visible=False), math.nan, time.monotonic(), 0
        for lesson in learn(job, course, out, start=start, said=_say):
            if not lesson.skipped:
                mean = lesson.loss if math.isnan(mean) else 0.95 * mean + 0.05 * lesson.loss
            skipped += lesson.skipped
            told = _told(lesson, mean)
            progress.update(task, total=lesson.steps, completed=lesson.step + 1, description=told, visible=True)
            if not console.is_terminal and time.monotonic() > last + EVERY:
                last = time.monotonic()
                _say(f"lesson {lesson.step + 1} of {lesson.steps}: {told}")
    if skipped:
        _say(f"{skipped} lessons skipped: a loss or gradient was not finite")
    _say(f"nets in {out}; use them with: zoact finetune --method zo-finetuner --dense --option nets={out}")


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _told(lesson: Lesson, mean: float) -> str:
    return f"loss {mean:.4f} | scales {lesson.scales[0]:.3f} to {lesson.scales[1]:.3f}"
