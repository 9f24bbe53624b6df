"""Losses of stacked row groups, on any Hugging Face model (design 2.5).

    f[g, b] = loss of example b as row group g sees the model          [groups, B] fp64

One forward serves all groups: the batch is repeated group-major (sequences g*S .. g*S + S - 1 are group g's, design
2.10), and what makes the groups differ is the caller's: `with perturbed(model, seeds, sigmas): group_losses(...)`.

Only label positions reach the output head: a forward pre-hook on `model.get_output_embeddings()` gathers their rows,
group-major as [groups, n, H], and the model's own code goes on from there, caps and scales included. When the logits of
all rows pass `chunk_bytes`, the head is run again for the next rows by calling the model once more with its body
replaced by the remembered output of the first call; so neither [B, T, V] nor [n, V] ever exists and the body runs once.

    kind                      loss of an example                                                scores [groups, B, C]
    classification            cross-entropy over its C label words; of one token each: their    logits of the words
                              logits in one sequence per example; else one sequence per word    mean log-probabilities
    completion                negative log-likelihood of the completion's tokens, sum or mean   none
    sequence-classification   cross-entropy over the C outputs of a classifier                  logits

Token log-probabilities are fp32; from there on, sums over an example and softmax over its words are fp64, so that two
groups are differenced before anything coarse rounds them. NaN and inf stay what they are.

Pads stand on the right, where a causal mask hides them. A swapped layer keeps the bits of a row whatever the padding
(design 2.4); torch's own attention and dense products promise that at most for one T, so compare bits at equal T.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fork import moves, running
from .tail import Labels, opened

Kind = Literal["classification", "completion", "sequence-classification"]

CHUNK_BYTES = 64 << 20  # logits of one head call, counted in fp32


def _no_index() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Batch:
    """B examples as S = B * choices sequences; sequence s belongs to example s // choices. All tensors int64.

    choices is C where label words of several tokens need a sequence each, else 1. `data.Dataset` makes batches.
    """

    kind: Kind
    input_ids: Tensor  # [S, T], pads on the right
    attention_mask: Tensor  # [S, T], 1 = token
    label_rows: Tensor = field(default_factory=_no_index)  # [n] sequence, ascending
    label_positions: Tensor = field(default_factory=_no_index)  # [n] position whose logits predict the target
    targets: Tensor = field(default_factory=_no_index)  # [n] tokens; [n, C] for label words of one token (n = S = B)
    labels: Tensor | None = None  # [B] index of the right class; None for completion
    choices: int = 1
    mean: bool = False  # completion: mean over the tokens of an example instead of their sum

    @property
    def sequences(self) -> int:
        """S: leading size of one row group (a swapped layer sees groups * S)."""
        return self.input_ids.shape[0]

    @property
    def examples(self) -> int:
        """B."""
        return self.sequences // self.choices

    @property
    def leading(self) -> tuple[int, ...]:
        """Leading sizes that a row group may have in a layer: S, or S T where the model flattens tokens; 1 is what a
        head that is itself a ZOLinear meets, since its label rows come as [groups, n, K]."""
        return tuple(sorted({1, self.sequences, self.input_ids.numel()}))

    @property
    def rows(self) -> Tensor:
        """[S] the example of each sequence."""
        return torch.arange(self.sequences, device=self.input_ids.device) // self.choices

    @property
    def tokens(self) -> int:
        """Tokens of one row group, pads not counted."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in tensors.items()}
        return replace(self, **moved)

    def split(self, examples: int) -> list[Batch]:
        """Micro-batches of at most `examples` examples, of the same T (so that rows keep their bits)."""
        if examples < 1:
            raise ValueError(f"`examples` of a micro-batch is {examples}; it must be at least 1")
        return [self._part(i, min(i + examples, self.examples)) for i in range(0, self.examples, examples)]

    def _part(self, start: int, stop: int) -> Batch:
        first, last = start * self.choices, stop * self.choices
        kept = (self.label_rows >= first) & (self.label_rows < last)
        return replace(
            self,
            input_ids=self.input_ids[first:last],
            attention_mask=self.attention_mask[first:last],
            label_rows=self.label_rows[kept] - first,
            label_positions=self.label_positions[kept],
            targets=self.targets[kept],
            labels=None if self.labels is None else self.labels[start:stop],
        )


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a data set gave, example by example (so that two passes can be paired)."""

    losses: Tensor  # [n] fp64
    correct: Tensor | None  # [n] bool; None for completion

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None else float(self.correct.double().mean())


def group_losses(
    model: nn.Module, batch: Batch, groups: int = 1, *, chunk_bytes: int = CHUNK_BYTES, grad: bool = False
) -> Tensor:
    """Losses [groups, B] fp64 of a batch, all row groups in one forward.

    groups: how many copies of the batch are stacked, group-major. chunk_bytes: bound of one head call's logits, counted
    in fp32 (at least one row per group is taken). grad: leave the graph on, for first-order comparisons.
    Raises ValueError for a model in training mode (dropout would make the groups see different models), groups < 1, or
    a model whose head cannot be fed rows; the message says which.
    """
    with torch.set_grad_enabled(grad):
        if batch.kind != "completion":
            assert batch.labels is not None
            return cross_entropy(_scores(model, batch, groups, chunk_bytes), batch.labels)
        total, count = _per_sequence(_label_values(model, batch, groups, chunk_bytes), batch)
        return -(total / count if batch.mean else total)


def group_scores(
    model: nn.Module, batch: Batch, groups: int = 1, *, chunk_bytes: int = CHUNK_BYTES, grad: bool = False
) -> Tensor:
    """Scores [groups, B, C] fp64 of the C classes; `cross_entropy(scores, batch.labels)` are the losses.

    Arguments and errors are those of `group_losses`; a completion batch has no classes and raises ValueError.
    """
    with torch.set_grad_enabled(grad):
        return _scores(model, batch, groups, chunk_bytes)


def predict(model: nn.Module, batch: Batch, *, chunk_bytes: int = CHUNK_BYTES) -> tuple[Tensor, Tensor]:
    """Index [B] int64 of the best class of each example, and the scores [B, C] fp64."""
    scores = group_scores(model, batch, chunk_bytes=chunk_bytes)[0]
    return scores.argmax(-1), scores


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(scores)[label]: scores [..., B, C] fp64, labels [B] int64 -> [..., B] fp64."""
    picked = labels.expand(scores.shape[:-1]).unsqueeze(-1)
    return -scores.log_softmax(-1).gather(-1, picked).squeeze(-1)


def evaluate(model: nn.Module, batches: Iterable[Batch], *, chunk_bytes: int = CHUNK_BYTES) -> Evaluation:
    """Losses, and hits where there are classes, of all examples in order, as the model stands (no row groups).

    Raises ValueError if there are no batches.
    """
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    for batch in batches:
        if batch.kind == "completion":
            losses.append(group_losses(model, batch, chunk_bytes=chunk_bytes)[0].cpu())
            continue
        assert batch.labels is not None
        best, scores = predict(model, batch, chunk_bytes=chunk_bytes)
        losses.append(cross_entropy(scores, batch.labels).cpu())
        correct.append((best == batch.labels).cpu())
    if not losses:
        raise ValueError("`batches` is empty; evaluation needs at least one batch")
    return Evaluation(torch.cat(losses), torch.cat(correct) if correct else None)


def noise_floor(losses: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Expected |f+ - f-| from rounding alone, where f is the mean of B per-example losses: what a signal has to beat.

    losses: [groups, B] or [B], of one label or token each (a sum over t tokens has about sqrt(t) times the noise).
    dtype: of the activations. NaN in, NaN out.

    A softmax loss passes an error dz of the logits on as (1 - p) dz, p = exp(-loss) being the probability of the right
    class. In fp32 every product sums K rounded terms and dz grows to about 128 units of roundoff, u = 2^-24; 16-bit
    activations are summed in fp32 and rounded once per operation, which leaves about 16, of a far larger u. Seen on
    SmolLM2-135M against float64, 48 questions: 130 u in fp32, 16 u in bf16. Examples round independently, and so do the
    two sides once sigma moves every activation by more than u; the mean modulus of a normal is sqrt(2/pi) deviations.
    This is an estimate before the fact; a step at a tiny sigma measures the floor.
    """
    unit = torch.finfo(dtype).eps / 2 * (128 if dtype.itemsize >= 4 else 16)
    felt = -torch.expm1(-losses.double())  # 1 - p
    deviation = unit * felt.square().mean().sqrt() / math.sqrt(losses.shape[-1])
    return float(deviation) * math.sqrt(2) * math.sqrt(2 / math.pi)


# --- from label rows to examples --------------------------------------------------------------------------------------


def _scores(model: nn.Module, batch: Batch, groups: int, chunk_bytes: int) -> Tensor:
    if batch.kind == "completion":
        raise ValueError("`batch` is of kind 'completion' and has no classes to score; use group_losses")
    if batch.kind == "sequence-classification":
        logits = _logits_of(_forward(model, _owner(model, batch, groups), batch, groups))
        return logits.double().unflatten(0, (groups, -1))
    values = _label_values(model, batch, groups, chunk_bytes)
    if batch.targets.dim() == 2:
        return values.double()
    total, count = _per_sequence(values, batch)
    return (total / count).unflatten(1, (-1, batch.choices))


def _per_sequence(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """fp64 sums [groups, S] of values [groups, n] over each sequence's label positions, and their number [S].

    Laid out as [groups, S, T] and summed along T rather than by index_add_, whose atomics have no fixed order on GPUs.
    """
    laid = values.new_zeros(len(values), *batch.input_ids.shape, dtype=torch.float64)
    laid[:, batch.label_rows, batch.label_positions] = values.double()
    here = torch.zeros_like(batch.input_ids, dtype=torch.float64)
    here[batch.label_rows, batch.label_positions] = 1
    return laid.sum(-1), here.sum(-1)


def _token_values(logits: Tensor, targets: Tensor) -> Tensor:
    """fp32 logits [groups, c, V] -> log-probabilities [groups, c] of targets [c], or plain logits [.., C] of [c, C]."""
    if targets.dim() == 2:
        return logits.gather(-1, targets.expand(len(logits), -1, -1))
    picked = logits.gather(-1, targets.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)
    return picked - logits.logsumexp(-1)


# --- through the model ------------------------------------------------------------------------------------------------


def _label_values(model: nn.Module, batch: Batch, groups: int, chunk_bytes: int) -> Tensor:
    """`_token_values` of all n label rows, [groups, n] or [groups, n, C] fp32, the head fed chunk by chunk."""
    owner = _owner(model, batch, groups)
    head = owner.get_output_embeddings()
    handle: Any = getattr(head, "perturbation", None)
    if moves(head) and handle.active and handle.copies < handle.groups:
        raise ValueError(
            f"the head of {type(owner).__name__} is trained, and label rows reach it without their row groups; use "
            "spread=False"
        )
    tail = opened(model)
    if tail is None:
        return _rows_through_head(model, owner, head, batch, groups, chunk_bytes // _vocabulary(owner, head))
    with tail.reading(Labels(batch.label_rows, batch.label_positions)):
        words = batch.targets[:1]
        if words.dim() < 2 or not torch.equal(words.expand_as(batch.targets), batch.targets):
            return _rows_through_head(model, owner, head, batch, groups, chunk_bytes // _vocabulary(owner, head))
        # Behind a tail all logits of a row would be most of its cost
        rows, bias = tail.head_rows(head, words[0], owner.config.get_text_config().hidden_size, owner.dtype)
        few = replace(batch, targets=torch.arange(len(rows), device=words.device).expand_as(batch.targets))
        with running(head, lambda forward, x: F.linear(x.float(), rows, bias)):  # logits of those words alone
            return _rows_through_head(model, owner, head, few, groups, chunk_bytes // len(rows))


def _rows_through_head(model: nn.Module, owner: Any, head: nn.Module, batch: Batch, groups: int, room: int) -> Tensor:
    """The same with `room` bytes for a logit of every row of a chunk."""
    n = len(batch.targets)
    step = min(n, max(1, room // (4 * groups)))
    held: list[Tensor] = []  # [groups, n, H], once the body has run

    def values(start: int, model: nn.Module, batch_: Batch, groups_: int) -> Tensor:
        def feed(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if not held:
                held.append(_label_rows(args, owner, batch, groups))
            return (held[0][:, start : start + step], *args[1:])

        handle = head.register_forward_pre_hook(feed, prepend=True)
        try:
            logits = _logits_of(_forward(model, owner, batch_, groups_))
        finally:
            handle.remove()
        if not held:
            raise ValueError(
                f"{type(owner).__name__}.forward does not call the module its get_output_embeddings() returns; losses "
                f"reach the head through it"
            )
        return _token_values(logits.float(), batch.targets[start : start + step])

    if n <= step:
        return values(0, model, batch, groups)
    name = _body_name(owner, head)
    body = owner._modules[name]
    owner._modules[name] = _RunOnce(body)
    try:
        parts = [values(0, model, batch, groups)]
        token = replace(batch, input_ids=batch.input_ids[:1, :1], attention_mask=batch.attention_mask[:1, :1])
        parts += [values(start, owner, token, 1) for start in range(step, n, step)]
    finally:
        owner._modules[name] = body
    return torch.cat(parts, dim=1)


def _label_rows(args: tuple[Any, ...], owner: Any, batch: Batch, groups: int) -> Tensor:
    """Rows [groups, n, H] of the label positions, from what the model gave its head."""
    expected = [groups * batch.sequences, batch.input_ids.shape[1]]
    if not args or list(args[0].shape[:2]) != expected:
        raise ValueError(
            f"the head of {type(owner).__name__} was given {list(args[0].shape) if args else 'keywords only'}; losses "
            f"need hidden states that start with [sequences, tokens] = {expected}"
        )
    hidden: Tensor = args[0].unflatten(0, (groups, -1))
    return hidden[:, batch.label_rows, batch.label_positions]


class _RunOnce(nn.Module):
    """Stands in for a model's body: the first call runs it, later ones return that output cut to a single token."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.__dict__["body"] = body  # not as a child: names and state_dict of the model stay as they are
        self.__dict__["output"] = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.output is not None:
            return self.output
        output = self.body(*args, **kwargs)
        token = output[0][:1, :1].detach().clone()  # a clone: a view would keep all hidden states alive
        if isinstance(output, tuple):
            self.__dict__["output"] = (token, *output[1:])
        else:
            small = copy.copy(output)
            small["last_hidden_state"] = token
            self.__dict__["output"] = small
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["body"], name)


def _forward(model: nn.Module, owner: Any, batch: Batch, groups: int) -> Any:
    """One forward of `groups` stacked copies of the batch."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.repeat(groups, 1),
        "attention_mask": batch.attention_mask.repeat(groups, 1),
    }
    if "use_cache" in inspect.signature(owner.forward).parameters:
        inputs["use_cache"] = False
    return model(**inputs)


def _logits_of(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output.logits)


def _owner(model: nn.Module, batch: Batch, groups: int) -> Any:
    """The Hugging Face module inside all wrappers (peft, DistributedDataParallel) whose forward calls the head.

    For label positions that is the innermost one that has output embeddings; for a classifier the outermost.
    """
    if groups < 1:
        raise ValueError(f"`groups` is {groups}; it must be at least 1")
    if model.training:
        raise ValueError("`model` is in training mode, where dropout differs between row groups; call model.eval()")
    # Asked of the type: wrappers forward unknown attributes to what they wrap.
    found: list[Any] = [module for module in model.modules() if hasattr(type(module), "get_output_embeddings")]
    if batch.kind != "sequence-classification":
        found = [module for module in found if module.get_output_embeddings() is not None][::-1]
    if not found:
        raise ValueError(
            f"{type(model).__name__} is no Hugging Face "
            + ("classifier" if batch.kind == "sequence-classification" else "language model with output embeddings")
        )
    owner = found[0]
    if getattr(owner.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(owner).__name__} is an encoder-decoder; losses take decoders and classifiers")
    if batch.kind != "sequence-classification":
        head = owner.get_output_embeddings()
        for module in model.modules():
            compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
            if compiled and any(inner is head for inner in module.modules()):
                raise ValueError(
                    f"{type(owner).__name__} is compiled together with its head, where a hook that feeds the head is "
                    f"not seen; compile its body or its blocks instead"
                )
    return owner


def _body_name(owner: Any, head: nn.Module) -> str:
    """Name of the child of `owner` that computes the hidden states."""
    name = getattr(owner, "base_model_prefix", "")
    body = owner._modules.get(name)
    if body is None or any(module is head for module in body.modules()):
        raise ValueError(
            f"{type(owner).__name__} has no body apart from its head (looked for {name!r}), so its logits cannot be "
            f"chunked; raise `chunk_bytes` until all label rows fit, or use smaller batches"
        )
    return cast(str, name)


def _vocabulary(owner: Any, head: Any) -> int:
    """V, the number of logits of one row."""
    size = getattr(head, "out_features", None)
    return int(size if size is not None else owner.config.get_text_config().vocab_size)
