"""What can be learned behind the last attention of a model, where a forward costs next to nothing."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import rng
from ..fork import running
from ..layers import ZOLinear, zo_layers
from ..perturbation import Perturbation
from ..tail import Tail
from ..trainables import Between, Trainable, between
from ..zeroth_order import ZeroOrder

SMALL = 1e-6  # of the largest eigenvalue: directions with less are rounding
# rms of what a unit vector along U does to the logits of the answers in SmolLM2-135M on question types, where radius
# and rates were found. U does as much in every model, or they would mean less where hidden states are larger.
FELT = 0.0461
FELT_ROWS = 256  # label rows that it is measured on, or a few more: 2 % of error with 8 directions
NUDGE = 1 / 16  # of a layer's output, two-sided: off by its square


class ZOActTail(ZeroOrder):
    """W_eff = D(W) + U (S +- sigma Z) A^T in the last linears of the last block; everything before is computed once.

    A [K, R]: top directions of the layer's inputs at label rows, each divided by its standard deviation, so that all
    coordinates of S move the output alike. U [N, Q]: top directions of the head's rows of the answers, less their mean:
    what of the output the losses can tell apart; of one length, by which a step of 1 moves the answers' logits by FELT.
    S [Q, R], by Adam. Every query sees examples of its own.

    layers: how many linears, from the last. rank, outputs: R and Q. tail_cache: bytes of rows kept (see `tail`).
    Raises ValueError for a model whose last block is not swapped, that can't be cut there, or that has learned C.
    """

    name, paper = "zo-act-tail", "arXiv 2607.01125"
    summary = "of this package, after zo-act: few numbers behind the last attention, over activations computed once"
    basis = "answers"
    preparation = "computing what comes before the tail, once for every example, and bases from it"
    recipe: ClassVar[dict[str, Any]] = {
        "steps": 3000, "batch_size": 1024, "length_window": 0, "schedule": "cosine", "floor_every": 0,
        "snapshot_every": 500,
    }  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: int = 1,
        rank: int = 128,
        outputs: int = 8,
        tail_cache: int = 1 << 30,
        queries: int = 64,
        spread: bool = True,
        sigma: float = 1e-2,
        lr: float = 3e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        **others: Any,
    ) -> None:
        for name, value in (("layers", layers), ("rank", rank), ("outputs", outputs)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it has to be at least 1")
        if others.get("fork") is False or others.get("prefix_cache"):
            raise ValueError(f"{self.name} has a tail in place of a fork: fork and prefix_cache say nothing here")
        self.count, self.rank, self.outputs, self.tail_cache = layers, rank, outputs, tail_cache
        super().__init__(model, queries=queries, spread=spread, sigma=sigma, lr=lr, betas=betas, **others)

    def find(self, model: nn.Module, handle: Perturbation) -> list[Trainable]:
        last = list(self.last_block(model).values())
        if len(last) < self.count:
            raise ValueError(f"layers is {self.count}; the last block of the model has {len(last)} swapped linears")
        self.free(model)
        for layer in last[-self.count :]:
            self.give_bases(layer)
        return between(model)

    def last_block(self, model: nn.Module) -> dict[str, ZOLinear]:
        """The swapped linears of the last block, by name."""
        blocks = [module[-1] for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        inside = {layer for block in blocks for layer in zo_layers(block).values()}
        # A replay has the trained layers alone
        return {rng.strip_prefixes(n): x for n, x in zo_layers(model).items() if x in inside or not inside}

    def free(self, model: nn.Module) -> None:
        """No layer of the model has a basis any more. Raises ValueError, nothing changed, where C was learned."""
        layers = zo_layers(model)
        for name, layer in layers.items():
            if layer.coeff is not None and bool(layer.coeff.detach().any()):
                raise ValueError(f"{name} has learned coefficients, which {self.name} would drop; merge them first")
        for layer in layers.values():
            layer.rank, layer.basis, layer.coeff, layer.out_basis = 0, None, None, None

    def give_bases(self, layer: ZOLinear) -> None:
        """Bases of zeros, until `prepare`."""
        device = layer.weight.device
        layer.set_basis(torch.zeros(layer.in_features, min(self.rank, layer.in_features), device=device))
        layer.out_basis = torch.zeros(layer.out_features, min(self.outputs, layer.out_features), device=device)

    @functools.cached_property
    def fork(self) -> Tail:
        return Tail(self.model, self.tail_cache)

    inputs: dict[ZOLinear, float]  # rms of what a layer is given at label rows

    @torch.no_grad()
    def prepare(self, batches: Iterable[Any], evaluate: Callable[[Any], Tensor]) -> None:
        layers = [t.layer for t in self.trainables.values() if isinstance(t, Between)]
        grams = [torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64) for layer in layers]
        counts, tokens = [0] * len(layers), []
        batches = [batch.to(self.device) for batch in batches]
        model: Any = self.model
        head = model.get_output_embeddings() if hasattr(type(model), "get_output_embeddings") else None
        if head is None or any(batch.kind == "sequence-classification" for batch in batches):
            raise ValueError(
                f"{type(model).__name__} is no language model with output embeddings; {self.name} goes by label rows"
            )
        last = layers[-1]
        if (width := getattr(head, "in_features", last.out_features)) != last.out_features:
            raise ValueError(f"the head takes {width} features, and {self.name} trains a layer of {last.out_features}")
        with self.forking():  # the tail's own check, on other rows than labels, is over then
            evaluate(max(batches, key=lambda batch: int(batch.attention_mask.sum(1).max())))

        def see(index: int, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1]).double().cpu()
            grams[index] += rows.T @ rows
            counts[index] += len(rows)
            return forward(x)

        with contextlib.ExitStack() as stack:
            for i, layer in enumerate(layers):
                stack.enter_context(running(layer, functools.partial(see, i)))
            stack.enter_context(self.forking())  # outside of them: it has the rows
            for batch in batches:
                evaluate(batch)
                self.seen()
                tokens.append(batch.targets.flatten())
        size = (math.sqrt(gram.trace() / count / len(gram)) for gram, count in zip(grams, counts, strict=True))
        self.inputs = dict(zip(layers, size, strict=True))
        answers = torch.cat(tokens).unique()
        rows = self.fork.head_rows(head, answers, last.out_features, model.dtype)[0].double().cpu()
        rows -= rows.mean(dim=0)
        few = next((i for i in range(len(batches)) if counts[0] * i >= FELT_ROWS * len(batches)), len(batches))
        for layer, gram, count in zip(layers, grams, counts, strict=True):
            assert layer.basis is not None and layer.out_basis is not None
            layer.basis.copy_(whitening(gram / count, layer.rank))
            own = rows  # seen from before the last linear: through its weight
            if layer.out_features != last.out_features:
                own = rows @ last.dequantize(torch.float64).cpu()
            directions = torch.linalg.svd(own, full_matrices=False)
            kept = int((SMALL * directions.S[0] < directions.S).sum().clamp(max=layer.out_basis.shape[1]))
            along = directions.Vh[:kept].T.float().to(self.device)
            length = self._felt(layer, along, answers, batches[:few], evaluate)
            layer.out_basis[:, :kept] = along * (FELT / length if length else 0.0)

    def seen(self) -> None:
        """Called by `prepare` after each of its batches."""

    def _felt(
        self,
        layer: ZOLinear,
        along: Tensor,
        answers: Tensor,
        batches: Iterable[Any],
        evaluate: Callable[[Any], Tensor],
    ) -> float:
        """rms over label rows of what noise along `along` [N, Q] in the layer's output, of length 1 in the root mean
        square, does to the logits of `answers` [C], less their mean. Its coordinates: `rng.noise`, seed and id 0.

        By forwards, not by formulas of a norm: models scale a block's output, norm it once more, scale or cap logits.
        """
        size, total, count = 0.0, 0.0, 0
        owners: list[Any] = [m for m in self.model.modules() if hasattr(type(m), "get_output_embeddings")]
        owner = [m for m in owners if m.get_output_embeddings() is not None][-1]  # losses call this, chunk by chunk
        logits: list[Tensor] = []

        def push(noise: float, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            nonlocal size
            y = forward(x)
            z = rng.noise("normal", 0, 0, y.shape[:-1].numel(), along.shape[1], device=along.device)
            step = (z @ along.T).view_as(y)
            size = abs(noise) * (float(y.float().norm()) or 1.0)
            return y + (step * (math.copysign(size, noise) / step.norm())).to(y.dtype)

        def see(module: nn.Module, args: Any, output: Any) -> None:
            # Of all words, or label words alone
            found = (output[0] if isinstance(output, tuple) else output.logits).flatten(0, -2)
            logits.append((found if found.shape[1] <= len(answers) else found[:, answers]).double())

        for batch in batches:
            ends = []
            for noise in (NUDGE, -NUDGE):
                logits.clear()
                with running(layer, functools.partial(push, noise)), self.forking():
                    handle = owner.register_forward_hook(see)
                    try:
                        evaluate(batch)
                    finally:
                        handle.remove()
                ends.append(torch.cat(logits))
            change = (ends[0] - ends[1]) / (2 * size)
            change -= change.mean(dim=1, keepdim=True)
            total += len(change) * float(change.square().mean(dim=1).sum())
            count += len(change)
        return math.sqrt(total / count)


def whitening(gram: Tensor, rank: int) -> Tensor:
    """[K, rank]: the top eigenvectors of a second moment fp64 [K, K], each over the square root of its eigenvalue."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    return torch.where(values > SMALL * values[0], vectors / values.clamp_min(1e-300).sqrt(), 0)
