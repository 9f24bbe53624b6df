"""What the layers of a model are fed: their inputs without padding, and which of them are fed by the same tensor.

Forward pre-hooks on the swapped layers; each input is handed over as rows [n, K] float32 while the forward runs, and
nothing is kept here. Sharing is found by the identity of the input tensor, not by the names of layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .layers import ZOLinear

Batch = Mapping[str, Any] | Callable[[], Any]
Progress = Callable[[int, int, str], None]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and every module in eval mode: all evaluations of a step see the same function (no dropout).

    The modules' own training flags return afterwards.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Group:
    """Layers fed by the same tensor at each of their `calls` in a forward; `leader` is called first."""

    names: tuple[str, ...]
    calls: int
    rank: int
    in_features: int
    param_id: Tensor

    @property
    def leader(self) -> str:
        return self.names[0]


class Identity:
    """Numbers tensors so that two get the same number if and only if they are the same data at the same time.

    The weak reference to a storage does not keep its data alive but keeps its address from being given out again; the
    version tells a tensor from itself before an in-place change.
    """

    def __init__(self) -> None:
        self.storages: list[StorageWeakRef] = []
        self.numbers: dict[tuple, int] = {}

    def __call__(self, x: Tensor) -> int:
        storage = StorageWeakRef(x.untyped_storage())
        self.storages.append(storage)
        shape = (x.numel(), x.shape[-1]) if x.is_contiguous() else (x.shape, x.stride())
        version = 0 if x.is_inference() else x._version
        key = (storage.cdata, x.storage_offset(), x.dtype, shape, version)
        return self.numbers.setdefault(key, len(self.numbers))


class _Stop(BaseException):
    """Ends a forward early. Not an Exception, so that no model's own handler swallows it."""


class Forwards:
    """Runs the batches and feeds the inputs of chosen layers, without padding, to whoever asks."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, ZOLinear],
        runs: Sequence[Batch],
        exclude_first: bool,
        progress: Progress | None,
    ) -> None:
        self.model, self.layers, self.runs, self.exclude_first = model, layers, runs, exclude_first
        self.progress, self.done, self.total = progress, 0, 1

    def groups(self) -> list[Group]:
        """The groups as the first batch shows them, in the order of their first calls."""
        inputs = self._run(self.runs[0], lambda name, x: None, "finding shared inputs")
        missing = [name for name in self.layers if name not in inputs]
        if missing:
            raise RuntimeError(f"not reached by the first batch: {', '.join(missing)}; leave them out of the swap")
        groups = []
        for names in _partition(inputs):
            first = self.layers[names[0]]
            rank = max(self.layers[name].rank for name in names)
            groups.append(Group(names, len(inputs[names[0]]), rank, first.in_features, first.param_id))
        return groups

    def feed(
        self,
        feeds: Mapping[str, Callable[..., None]],
        stop_after: Sequence[Group] | None = None,
        groups: Sequence[Group] | None = None,
        with_first: bool = False,
    ) -> None:
        """One pass over the batches: each feed gets rows [n, K] float32, and which are first tokens if `with_first`.

        stop_after: end each forward at the last call of this one group. groups: check that they still hold.
        """
        for number, run in enumerate(self.runs):
            mask = _mask(run)
            left = stop_after[0].calls if stop_after else 0

            def hook(name: str, x: Tensor, mask: Tensor | None = mask) -> None:
                nonlocal left
                if name not in feeds:
                    return
                rows, first = _rows(name, x, mask)
                if not bool(torch.isfinite(rows).all()):
                    raise ValueError(f"inputs of {name} hold NaN or inf; a basis needs finite activations")
                if with_first:
                    feeds[name](rows, first)
                else:
                    feeds[name](rows[~first] if self.exclude_first else rows)
                left -= 1
                if stop_after and left == 0:
                    raise _Stop

            inputs = self._run(run, hook, stop_after[0].leader if stop_after else "")
            if groups and _partition(inputs) != [group.names for group in groups]:
                raise RuntimeError(f"batch {number} feeds the layers in other groups than batch 0; give it on its own")

    def _run(self, run: Batch, hook: Callable[[str, Tensor], None], what: str) -> dict[str, list[int]]:
        """One forward. Returns the identities of each reached layer's inputs, in call order."""
        identity = Identity()
        inputs: dict[str, list[int]] = {}

        def pre_hook(name: str) -> Callable[[nn.Module, tuple, dict], None]:
            def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
                x = args[0] if args else kwargs["x"]
                inputs.setdefault(name, []).append(identity(x))
                hook(name, x)

            return see

        handles = [
            layer.register_forward_pre_hook(pre_hook(name), with_kwargs=True) for name, layer in self.layers.items()
        ]
        try:
            with contextlib.suppress(_Stop):
                run() if callable(run) else self.model(**run)
        finally:
            for handle in handles:
                handle.remove()
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, max(self.total, self.done), what)
        return inputs


def _partition(inputs: Mapping[str, Sequence[int]]) -> list[tuple[str, ...]]:
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, numbers in inputs.items():
        groups.setdefault(tuple(numbers), []).append(name)
    return [tuple(names) for names in groups.values()]


def _mask(run: Batch) -> Tensor | None:
    """Which tokens of a batch are real, bool [B, T]; None where nothing says so."""
    mask = None if callable(run) else run.get("attention_mask")
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; a basis needs (batch, tokens)")
    return mask.bool()


def _rows(name: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The unpadded rows of an input [..., K] as float32 [n, K], and which are the first of their sequence, bool [n]."""
    flat = x.detach().reshape(-1, x.shape[-1])
    if mask is None:
        first = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        if x.dim() > 2:
            first[..., 0] = True
        return flat.float(), first.flatten()
    if x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        raise ValueError(
            f"input of {name} has shape {tuple(x.shape)}; with an attention_mask of {tuple(mask.shape)} it has to be "
            f"({mask.shape[0]}, {mask.shape[1]}, K) or ({mask.numel()}, K): the model regroups tokens"
        )
    mask = mask.to(x.device)
    first = mask & (mask.cumsum(dim=1) == 1)
    keep = mask.flatten()
    return flat[keep].float(), first.flatten()[keep]
