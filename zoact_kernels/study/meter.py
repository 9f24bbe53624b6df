"""Forwards as a run really makes them, whatever the method does inside a step.

One forward is one sequence through all blocks of the model. It is counted block by block: a sequence that enters at the
middle of the network, because what lies before is known, is half a forward; the tangent that runs beside a sequence in
forward mode is a second one; a label row in a tail is the share of one block that it is of its sequence's tokens. A
backward through a block counts as two forwards of it: it is two products of the size of
the forward's one. Embeddings and head are left out. Evaluations on held-out examples are not counted, bases are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tail import Tail, opened


class Meter:
    """Counts from now on, in `forwards`; `paused` while evaluations run. `close` takes its hooks off.

    Raises ValueError for a model without a list of blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        blocks = max(lists, key=len, default=None)
        if not blocks:
            raise ValueError(f"{type(model).__name__} has no list of blocks, through which forwards are counted")
        self._model, self._blocks, self._rows, self._paused = model, len(blocks), 0.0, False
        self._tail: Tail | None = None
        self._counted = 0.0  # of its work
        self._hooks = [block.register_forward_hook(self._passed, with_kwargs=True) for block in blocks]

    @property
    def forwards(self) -> float:
        self._catch_up()
        return self._rows / self._blocks

    @property
    def paused(self) -> bool:
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._catch_up()
        self._paused = paused

    def _catch_up(self) -> None:
        if self._tail is not None:
            self._rows += 0 if self.paused else self._tail.work - self._counted
            self._counted = self._tail.work

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _passed(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        tail = opened(self._model)
        if tail is not None and tail.busy:
            self._tail = tail
            return
        if self.paused:
            return
        x = args[0] if args else kwargs["hidden_states"]
        y = output if isinstance(output, Tensor) else output[0]
        dual = torch.autograd.forward_ad.unpack_dual(x).tangent is not None
        self._rows += len(x) * (1 + dual)
        if y.requires_grad and torch.is_grad_enabled():
            y.register_hook(lambda gradient: self._back(len(x)))

    def _back(self, rows: int) -> None:
        self._rows += 2 * rows
