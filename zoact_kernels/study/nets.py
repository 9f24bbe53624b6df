"""Nets of zo-finetuner, learned once for a model, on another task than the one that they are judged on."""

from __future__ import annotations

from pathlib import Path

from ..learning import Course, lessons, save
from ..methods.learned import ZOFinetuner
from ..recipe import Recipe
from .settings import load

TASK, OTHER = "sms", "trec"
# A hundred lessons take the scales of the encoder from 1 to 0.35 .. 1.7; `reach` is what its size needs (see Course).
COURSE = Course(epochs=1, restart_every=1, limit=100, reach=4e-3)


def nets_for(model: str, task: str, folder: Path) -> Path:
    """The file of nets for runs of `model` on `task`; learned now, and written into `folder`, if it is not there."""
    where = OTHER if task == TASK else TASK
    path = folder / f"{model}-{where}.safetensors"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    setting = load(model, where)
    optimizer = ZOFinetuner(setting.model, sigma=COURSE.sigma, seed=COURSE.seed, floor_every=0)
    recipe = Recipe(
        method=ZOFinetuner.name, batch_size=COURSE.batch_size, length_window=COURSE.length_window, seed=COURSE.seed
    )
    for _ in lessons(optimizer, COURSE, lambda step: setting.training.batch_at(recipe, step), COURSE.limit):
        pass
    save(optimizer, path, {"model": model, "train": where})
    return path
