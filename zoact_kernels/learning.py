"""Learning to learn: the nets of ZO Fine-tuner, trained along first-order trajectories of the model.

From the pretrained theta, for each minibatch (arXiv 2510.00419):

    s = nets(...);  L+, L-  ->  d                        as in a step of the method
    theta' = theta - reach d c s_b z_b                   a function of s alone: c, d and the history are numbers
    nets  <- nets - lr_nets grad L(theta')               on the same minibatch
    theta <- theta - lr_t momentum(clipped grad L(theta))

lr_t falls to 0 until theta, momentum and history begin again, every `restart_every` epochs. z is made again in forward
and backward; beside the model stand its gradient, its momentum and its pretrained copy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import estimators
from .activations import evaluating
from .finetune import Job, load
from .layers import perturbed
from .losses import Batch, group_losses
from .methods.learned import ZOFinetuner, read_nets
from .recipe import Recipe
from .runlog import write_whole
from .trainables import Weight


@dataclass(frozen=True)
class Course:
    """How nets are trained; defaults are the released ones for a single task, but for `clip`, which is ours.

    epochs over the training examples, `batch_size` at a time, the model beginning anew every `restart_every`.
    lr, momentum, clip (norm of the whole gradient): of the model. lr_nets: of the nets, plain SGD. reach: the size of
    the step that the nets are judged by. limit: steps of an epoch (0: all examples). Others as in `Recipe`.
    What moves the nets is lr_nets reach |grad L|^2: at the released 1e-7 those of a model of 135M did not move by 1e-3
    in a few lessons, and an encoder of 22M needed 4e-3.
    """

    epochs: int = 15
    restart_every: int = 5
    batch_size: int = 8
    length_window: int = 8
    lr: float = 0.01
    momentum: float = 0.8
    clip: float = 1.0
    lr_nets: float = 0.1
    reach: float = 1e-6
    sigma: float = 1e-3
    seed: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "restart_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it has to be at least 1")
        for name in ("lr", "lr_nets", "reach", "clip", "sigma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it has to be a positive number")
        if not 0 <= self.momentum < 1 or self.limit < 0 or self.length_window < 0:
            raise ValueError(
                f"`momentum` is {self.momentum} (in [0, 1)), `limit` {self.limit} and `length_window` "
                f"{self.length_window} (at least 0)"
            )


@dataclass(frozen=True)
class Lesson:
    """One minibatch of `steps`: the clean loss at theta, that at theta', the smallest and largest c s_b."""

    step: int
    steps: int
    loss: float
    ahead: float
    scales: tuple[float, float]
    skipped: bool  # a loss or gradient was not finite, so nets or model stayed as they were


def lessons(
    optimizer: ZOFinetuner, course: Course, batch_at: Callable[[int], Batch], epoch_steps: int
) -> Iterator[Lesson]:
    """Train `optimizer.nets` in place, a minibatch with each item; whenever the iterator ends, the model is as before.

    batch_at(step): the minibatch of a step, a pure function. Nothing else is random but z.
    """
    weights = [t for t in optimizer.trainables.values() if isinstance(t, Weight)]
    pretrained = [w.value.clone() for w in weights]
    span, steps = course.restart_every * epoch_steps, course.epochs * epoch_steps
    try:
        for step in range(steps):
            if step % span == 0:
                begin(optimizer, weights, pretrained)
                leaves = [getattr(w.owner, w.key) for w in weights]
                sgd = torch.optim.SGD(leaves, lr=course.lr, momentum=course.momentum)
            batch = batch_at(step).to(optimizer.device)
            judged = teach(optimizer, batch, course)
            length = min(span, steps - step // span * span)
            sgd.param_groups[0]["lr"] = course.lr * (1 - step % span / length)
            loss = descend(optimizer, batch, sgd, course.clip)
            optimizer.iteration += 1
            low, high = (float(bound) for bound in optimizer.scales.aminmax())
            yield Lesson(step, steps, loss, judged, (low, high), not (math.isfinite(loss) and math.isfinite(judged)))
    finally:
        begin(optimizer, weights, pretrained)


@torch.no_grad()
def begin(optimizer: ZOFinetuner, weights: list[Weight], pretrained: list[Tensor]) -> None:
    for weight, value in zip(weights, pretrained, strict=True):
        weight.value.copy_(value)
    optimizer.losses.zero_()
    optimizer.previous.fill_(1)


def teach(optimizer: ZOFinetuner, batch: Batch, course: Course) -> float:
    """One step of the nets on `batch`; the loss at theta'. NaN, nothing changed, if not finite."""
    optimizer._prepare()
    with evaluating(optimizer.model):
        losses = optimizer._evaluate([functools.partial(group_losses, optimizer.model, batch)], 1.0, batch.leading)
    d = estimators.weights(losses, optimizer.sides, optimizer.queries, optimizer.sigma)
    ahead, grads = look_ahead(optimizer, batch, (-course.reach * d).float())
    if not all(bool(torch.isfinite(t).all()) for t in (d, ahead, *grads)):
        return math.nan
    for tensor, grad in zip(optimizer.nets.tensors.values(), grads, strict=True):
        tensor -= course.lr_nets * grad
    optimizer.observe(losses)
    return float(ahead)


def look_ahead(optimizer: ZOFinetuner, batch: Batch, reach: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mean loss at theta + sum_j reach[j] c s_b z_b(j) [], and its gradient to each of `nets.tensors`, c held fixed.

    reach: fp32 [S], for the seeds of the step at hand.
    """
    model, tensors = optimizer.model, list(optimizer.nets.tensors.values())
    for tensor in tensors:
        tensor.requires_grad_()
    try:
        s = optimizer.nets(optimizer.seen)
        scales = optimizer.normaliser(s.detach()) * s
        with optimizer.sized(scales), perturbed(model, optimizer._seeds, reach[None], optimizer.noise, batch.leading):
            loss = group_losses(model, batch, grad=True).mean()
        return loss.detach(), torch.autograd.grad(loss, tensors)
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)


def descend(optimizer: ZOFinetuner, batch: Batch, sgd: torch.optim.SGD, clip: float) -> float:
    """One first-order step of the model on `batch`; the loss before it. NaN, nothing changed, if not finite."""
    leaves = sgd.param_groups[0]["params"]
    for leaf in leaves:
        leaf.requires_grad_()
    try:
        loss = group_losses(optimizer.model, batch, grad=True).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves, clip)
        fine = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if fine:
            sgd.step()
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)
            leaf.grad = None
    return float(loss.detach()) if fine else math.nan


def learn(
    job: Job, course: Course, out: Path, *, start: Path | None = None, said: Callable[[str], None] = lambda text: None
) -> Iterator[Lesson]:
    """Train nets on a job's training examples and write them to `out` after each epoch, a lesson with each item.

    start: nets to go on from, of the same model. Raises ValueError or OSError for what can't be loaded or written.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(f"`out` is {str(out)!r}, and there is no folder {str(out.parent)!r}")
    said(f"loading {job.model}")
    loaded = load(replace(job, dense=True, rank=0, ranks={}, eval="", eval_limit=0))
    recipe = Recipe(
        method=ZOFinetuner.name, batch_size=course.batch_size, length_window=course.length_window, seed=course.seed
    )
    optimizer = ZOFinetuner(loaded.model, sigma=course.sigma, seed=course.seed, floor_every=0)
    if start is not None:
        optimizer.nets.take(read_nets(start), f"`start` {str(start)!r}")
    epoch_steps = max(1, len(loaded.training.dataset) // course.batch_size)
    epoch_steps = min(epoch_steps, course.limit or epoch_steps)
    told = {"model": Path(job.model).name, "train": loaded.training.sha256, "course": str(asdict(course))}
    for lesson in lessons(optimizer, course, lambda step: loaded.training.batch_at(recipe, step), epoch_steps):
        yield lesson
        if (lesson.step + 1) % epoch_steps == 0:
            save(optimizer, out, told)


def save(optimizer: ZOFinetuner, path: Path, told: dict[str, Any]) -> None:
    """Write the nets, by temporary name and move; `told`: strings for the file's header."""
    write_whole(path, lambda temporary: save_file(optimizer.nets.state(), temporary, {"format": "pt", **told}))
