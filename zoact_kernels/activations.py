"""What the layers of a model are fed: their inputs without padding, and which of them are fed by the same tensor.

Forward pre-hooks on the layers; each input is handed over as rows [n, K] float32 while the forward runs, and nothing is
kept here. Sharing is found by the identity of the input tensor, not by the names of layers. `Forwards` runs a model for
its inputs alone; `CleanInputs` reads them off the clean row group of a step's own forward.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .layers import ZOLinear
from .perturbation import Perturbation

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


class Layer(NamedTuple):
    """Who reads an input. give: takes what was made of it."""

    name: str
    give: Callable[[Tensor], None]


class CleanInputs:
    """In a `with` block: what the clean row group feeds each layer is shown right before the layer uses it.

    make(leader, rows, number) -> tensor: called once for all layers that are fed by the same tensor, with the name of
        the first, that group's rows [n, K] float32, zeros where a token is padding, and the number of each row's token
        among the unpadded ones, int64 [n] (None: nothing is padding). Its result is given to each of these layers.

    Group 0 of a forward is the clean one; where groups run one by one that is the first, and the caller sets `clean` to
    False after it. A layer that is called again (a head that gets its rows in chunks) keeps what its first call gave.
    Raises ValueError, with the name of the layer, where rows are regrouped or there are none; RuntimeError where the
    first group that calls a layer is not the clean one.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[nn.Module, Layer],
        perturbation: Perturbation,
        make: Callable[[str, Tensor, Tensor | None], Tensor],
    ) -> None:
        self.model, self.layers, self.perturbation, self.make = model, layers, perturbation, make
        self.clean = True
        self.seen: set[str] = set()  # names of the layers that were given something
        self.identity, self.made = Identity(), dict[int, Tensor]()
        self.given: Tensor | None = None  # the attention_mask of the forward that runs
        self.tokens: tuple[Tensor, Tensor] | None = None  # of the clean group: real [B, T], number [B T]
        self.signature = inspect.signature(model.forward)

    def __enter__(self) -> CleanInputs:
        self.hooks = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self.hooks += [layer.register_forward_pre_hook(self._see, with_kwargs=True) for layer in self.layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**self.signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        self.given = named.get("attention_mask")
        self.tokens = None

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, give = self.layers[module]
        if name in self.seen:
            return
        if not self.clean:
            raise RuntimeError(f"layer {name!r} is called by a perturbed row group, but was not by the clean one")
        if len(args) + len(kwargs) > 1:
            raise ValueError(f"layer {name!r} is told the row group of its rows; its clean rows can't be found")
        x = args[0] if args else next(iter(kwargs.values()))
        self.perturbation.sigmas_of(name, x)  # raises where rows are regrouped
        number = self.identity(x)
        if number not in self.made:
            self.made[number] = self.make(name, *self._clean_rows(name, x))
        give(self.made[number])
        self.seen.add(name)

    def _clean_rows(self, name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        groups = self.perturbation.groups
        x = x.detach()[: x.shape[0] // groups]
        if x.numel() == 0:
            raise ValueError(f"layer {name!r} was given no rows, so nothing can be made of its inputs")
        rows, leading = x.reshape(-1, x.shape[-1]).float(), tuple(x.shape[:-1])
        if self.given is None:
            return rows, None
        if self.tokens is None:
            self.tokens = _tokens(self.given, groups)
        real, number = self.tokens
        if leading in (tuple(real.shape), (real.numel(),)):
            return torch.where(real.view(-1, 1), rows, torch.zeros_like(rows)), number
        if leading[0] == 1 or leading == real.shape[:1]:  # a head's label rows [groups, n, K]; pooled sequences
            return rows, None
        raise ValueError(
            f"input of layer {name!r} has shape {tuple(x.shape)} in the clean group, whose attention_mask is "
            f"{tuple(real.shape)}: the model regroups tokens here; leave the layer out of the swap"
        )


def _tokens(mask: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of the first of `groups` copies in an attention_mask [G B, T]: real bool [B, T], number int64 [B T]."""
    if mask.dim() != 2 or len(mask) % groups:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; the clean one of {groups} row groups needs "
            f"({groups} * batch, tokens)"
        )
    real = mask[: len(mask) // groups].bool()
    if real.device.type == "cpu" and not bool(real.any()):  # elsewhere it would wait for the device
        raise ValueError("the clean row group has no unpadded token, so nothing can be made of its inputs")
    return real, (real.flatten().cumsum(0) - 1).clamp_min(0)
