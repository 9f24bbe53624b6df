"""A whole step as one CUDA graph: forward over all row groups, losses, estimate and update in a single launch.

    graph = StepGraph(optimizer, batch)       # warms up and captures; C and the moments stay as they are
    for batch in batches:                     # of the same shapes
        result = graph.step(batch)

A step of a small model launches thousands of kernels of a few microseconds each, and the host is what it waits for; a
graph hands them over at once. What changes from step to step is read on the device (design law 2.6): the batch, seeds,
sigmas and the numbers of the rule lie in tensors that the host fills before it replays. The result is bit for bit that
of `optimizer.step_on`.
"""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .activations import evaluating
from .losses import Batch, group_losses
from .workspace import Workspace, using
from .zeroth_order import StepResult, ZeroOrder

DEVICE = "cuda"
WARM_UPS = 3  # kernels compile, libraries choose and workspaces grow before anything is captured


class StepGraph:
    """The steps of an optimizer on batches of one shape, each a replay of one captured CUDA graph.

    batch: on the model's device; its tensors are copied, and later batches are copied over them. Every batch has its
    kind, choices and shapes, hence one graph for each padded length. Steps of `floor_every` are made without the graph.
    Raises ValueError for a model that is not on a CUDA device, RuntimeError (of torch) where the model's forward waits
    for the device.
    """

    def __init__(self, optimizer: ZeroOrder, batch: Batch) -> None:
        device = optimizer.device
        if device.type != DEVICE:
            raise ValueError(f"`optimizer` trains a model on {device}; a CUDA graph needs one on a CUDA device")
        if not optimizer.one_graph:
            raise ValueError(
                f"steps of {optimizer.name} differ in more than numbers, so one CUDA graph can't hold them"
            )
        if optimizer.fork is not None and optimizer.fork.cache is not None:
            raise ValueError("`optimizer` has a prefix cache, which goes by tokens: the host would wait for them")
        self.optimizer, self.batch = optimizer, _copied(batch)
        self.graph, self.workspace = torch.cuda.CUDAGraph(), Workspace()
        optimizer._prepare()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), evaluating(optimizer.model), using(self.workspace):
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._run(dry=True)
            torch.cuda.current_stream(device).wait_stream(side)
            with torch.cuda.graph(self.graph, stream=side):  # where the warm-up has made the scratch memory
                self.losses = self._run()

    def step(self, batch: Batch) -> StepResult:
        """One step of the optimizer on `batch`. Raises ValueError for a batch of another shape."""
        for field in fields(Batch):
            held, given = getattr(self.batch, field.name), getattr(batch, field.name)
            if not isinstance(held, Tensor):
                if held != given:
                    raise ValueError(f"`batch` has {field.name}={given}; this graph was captured with {held}")
                continue
            if held.shape != given.shape:
                raise ValueError(
                    f"`batch` has {field.name} of shape {tuple(given.shape)}; this graph was captured with "
                    f"{tuple(held.shape)}: every shape needs a graph of its own"
                )
            held.copy_(given)
        optimizer = self.optimizer
        if optimizer._floor_is_due():
            return optimizer.step_on([self._losses], self.batch.leading)
        optimizer._prepare()
        self.graph.replay()
        return optimizer._finish(self.losses.cpu(), None)

    def _losses(self, groups: int) -> Tensor:
        return group_losses(self.optimizer.model, self.batch, groups)

    def _run(self, dry: bool = False) -> Tensor:
        with self.optimizer.fork.forgetful() if self.optimizer.fork else contextlib.nullcontext():
            return self.optimizer._on_device([self._losses], self.batch.leading, dry)


def _copied(batch: Batch) -> Batch:
    """The same batch in tensors of its own."""
    tensors: dict[str, Any] = {name: v.clone() for name, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **tensors)
