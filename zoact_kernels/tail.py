"""The end of a model, from its first trained linear on, at label rows alone; all that is before is computed once.

    whole   tokens -> blocks -> last block ... first -> ... -> norm -> head         once per sequence, clean, and kept
    tail    copies of the kept rows [n, ...]    first -> ... -> norm -> head        G n rows of one token each

Behind the attention of a model's last block nothing mixes tokens any more, so a loss that is read at n label positions
depends on those n rows alone. Where all trained linears lie there, a forward of G row groups costs G n rows of what is
left instead of G B T rows of everything: for the last projection of SmolLM2-135M and 20 tokens, a thousandth.

The block itself still runs, on its own code: it is given the kept hidden states as sequences of one token, every linear
before the first trained one returns what was kept of it, and the first trained one goes on from its kept input. What
the block computes between them (an attention of one token to itself) is thrown away. That this is all the same is not
taken on trust: the first sequence of a Tail is compared with the whole model. Outputs that do not matter even where
they are NaN are not kept.

The linear that makes the values of the last attention may be trained too, though it sees all tokens: attention mixes
them by weights that it has no part in, so its share of head h at a label row is C A^T m_h, m_h = sum_t p_ht x_t the
mixture of its inputs. `Values` says which linear that is; the mixtures are kept for each row, as wide as all heads.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fork import (
    Cache,
    Stop,
    body_of,
    check_compiled,
    cut,
    find_blocks,
    hidden_of,
    moves,
    right_padded,
    running,
    versions,
    with_hidden,
)
from .layers import ZOLinear, base_product, perturbation_of

HIDDEN, INPUT, BASE = "hidden states", "input", "base product"  # of the last block; of its first trained linear
MIXED = "mixed inputs"  # of the values, for every head
COMPANY = 512  # tokens of sequences of one length that run together: 2.5 times as fast as each alone, on two threads
CHECKED = 2.0**-12  # agreement asked for, relative: other lengths take other sums in torch's attention and norms


class Labels(NamedTuple):
    """Label rows of one copy of a batch: sequence and position, int64 [n] each."""

    sequences: Tensor
    positions: Tensor


class Values(NamedTuple):
    """The linear of the last block that makes values, and the heads that attention mixes them in."""

    layer: ZOLinear
    heads: int
    width: int  # of a head

    def side(self, mixed: Tensor) -> Tensor:
        """What C A^T of the layer adds to attention's output [n, heads * width]; mixed [n, heads, K]."""
        assert self.layer.basis is not None and self.layer.coeff is not None
        rows, weight = mixed.float() @ self.layer.basis, self.layer.coeff.detach()
        parts = weight.view(-1, self.width, weight.shape[1])
        shared = rows.view(len(rows), len(parts), -1, rows.shape[2])  # heads of one part stand side by side
        return torch.einsum("npgk,pwk->npgw", shared, parts).flatten(1)


_opened: ContextVar[Tail | None] = ContextVar("opened", default=None)


def opened(model: nn.Module) -> Tail | None:
    """The open Tail of this model."""
    tail = _opened.get()
    return tail if tail is not None and tail.model is model else None


class Tail:
    """Where the label rows of a model leave its tokens.

    cache_bytes: of kept rows; the least recently used leave first. values: where those are trained too (C alone, no row
    group moves them). Raises ValueError for a model in which no list of equal blocks is found, whose blocks are
    compiled, or where anything is trained but linears of the last block.
    """

    def __init__(self, model: nn.Module, cache_bytes: int, values: Values | None = None) -> None:
        self.model, self.name, self.blocks = model, *find_blocks(model)
        self.body, self.last = body_of(model, self.name), self.blocks[-1]
        check_compiled(model, self.blocks)
        self.linears = {n: m for n, m in self.last.named_modules() if isinstance(m, ZOLinear | nn.Linear)}
        inside = set(self.linears.values())
        outside = [name for name, module in model.named_modules() if moves(module) and module not in inside]
        if outside:
            raise ValueError(
                f"{outside[0]} is trained; a tail has nothing but linears of {self.name}.{len(self.blocks) - 1}"
            )
        self.values = values
        self.mixed: Tensor | None = None  # [n, heads, K] of the rows of the last forward, where `values` is given
        self.read: Labels | None = None  # of the last forward, and how many sequences it had
        self.sequences = 0
        self.work = 0.0  # of all forwards so far, in sequences through one block; a row is its share of the tokens
        self.cache = Cache(cache_bytes)
        self.handle = perturbation_of(model)
        self._kept: dict[str, int] = {}  # the parts of a kept row and their widths
        self._idle: set[str] = set()  # linears whose output is thrown away in the tail
        self._widths: dict[str, int] = {}
        self.first: nn.Module | None = None  # the first linear that row groups move, once it ran
        self._tuples = False  # whether a block returns its hidden states in a tuple
        self._call: _Call | None = None
        self._labels: Labels | None = None
        self._words: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._modules = list(model.modules())
        self._state: list[tuple[int, int]] = []
        self._checked = False
        self._leaves = [m for m in self.body.modules() if not [*m.children()] and not isinstance(m, ZOLinear)]
        self._alone = not all(isinstance(m, ZOLinear) for m in inside)  # bits in company are, or may be, others
        self._looked_at: set[int] = set()  # lengths of sequences that company is known to leave alone

    @property
    def busy(self) -> bool:
        """Whether a forward is under way, so that what runs of the model is counted in `work`."""
        return self._call is not None

    def forget(self) -> None:
        """Drop what is kept; for a model that has changed in a way that its tensors do not show."""
        self.cache.clear()
        self._words.clear()

    @contextlib.contextmanager
    def forgetful(self) -> Iterator[None]:
        raise RuntimeError("a tail looks its rows up on the host; a CUDA graph can't hold that")
        yield

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Inside the block `losses` of the model run its tail. Not to nest.

        What was kept is dropped if a tensor of the model was replaced or written to since, what is trained aside.
        """
        trained = {linear for linear in self.linears.values() if moves(linear)}
        if self.values is not None:
            trained.add(self.values.layer)
        state = versions(self._modules, trained)
        if state != self._state:
            self.forget()
            self._state = state
        with contextlib.ExitStack() as stack:
            stack.enter_context(running(self.body, self._run_body))
            for index, block in enumerate(self.blocks):
                stack.enter_context(running(block, functools.partial(self._run_block, index)))
            for name, module in self.linears.items():
                stack.enter_context(running(module, functools.partial(self._run_linear, name)))
            token = _opened.set(self)
            try:
                yield
            finally:
                _opened.reset(token)

    @contextlib.contextmanager
    def reading(self, labels: Labels) -> Iterator[None]:
        """Inside the block forwards are read at these rows alone; their other rows are of no meaning."""
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def head_rows(self, head: nn.Module, tokens: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows [C, H] and biases [C] of a head's weight, of tokens [C], fp32, in whatever form it is kept.

        dtype: of the activations that it takes.
        """
        key = tokens.cpu().numpy().tobytes()
        if key not in self._words:
            units = torch.eye(width + 1, width, device=tokens.device, dtype=dtype)  # the last of them is nothing
            found = torch.cat([head(part)[:, tokens].float() for part in units.split(64)])
            self._words[key] = (found[:-1] - found[-1]).T.contiguous(), found[-1]
        return self._words[key]

    # --- a forward ----------------------------------------------------------------------------------------------------

    def _run_body(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        labels = self._labels
        if labels is None:
            return forward(*args, **kwargs)
        copies = self.handle.copies if self.handle.active else 1
        one, named = cut((args, kwargs), copies)
        ids, lengths = right_padded(one, named)
        if not self._checked:
            longest = max(range(len(lengths)), key=lengths.__getitem__)
            self._check(forward, ids[longest : longest + 1, : lengths[longest]])
        kept = self._look_up(forward, ids, lengths, labels)
        n, (S, T) = len(kept), ids.shape
        self.read, self.sequences = labels, S
        dealt, places = self._dealt(kept, labels.sequences, S, copies)
        output, states = self._rows(forward, ids, dealt, copies)
        states = states.unflatten(0, (copies, -1))[:, places].flatten(0, 1)
        if n == S and torch.equal(labels.sequences, torch.arange(S, device=ids.device)):
            whole = states.expand(-1, T, -1)  # a view: its other positions are never read
        else:
            whole = states.new_zeros(copies, S, T, states.shape[-1])
            whole[:, labels.sequences, labels.positions] = states.view(copies, n, -1)
            whole = whole.flatten(0, 1)
        if isinstance(output, tuple):
            return (whole, *output[1:])
        output = copy.copy(output)
        output["last_hidden_state"] = whole
        return output

    def _dealt(self, kept: Tensor, sequences: Tensor, S: int, copies: int) -> tuple[Tensor, Tensor | slice]:
        """Rows so that all row groups have as many, and where those of `kept` [n, width] are among them.

        Groups that share a copy have a part of its S sequences each, whose label rows may be more or fewer.
        """
        shares = self.handle.groups // copies if self.handle.active else 1
        if S % shares:
            raise ValueError(f"a batch has {S} sequences; {shares} queries can't share them")
        own = sequences * shares // S  # [n], ascending
        counts = own.bincount(minlength=shares)
        most = int(counts.max())
        if int(counts.min()) == most:
            return kept, slice(None)
        first = counts.cumsum(0) - counts
        places = own * most + torch.arange(len(own), device=own.device) - first[own]
        dealt = kept.new_zeros(shares * most, kept.shape[1])
        dealt[places] = kept
        return dealt, places

    def _rows(self, forward: Callable[..., Any], ids: Tensor, kept: Tensor, copies: int) -> tuple[Any, Tensor]:
        """(output of the body, its hidden states [copies n, 1, H]) for kept rows [n, width]."""
        parts = dict(zip(self._kept, kept.split(list(self._kept.values()), dim=1), strict=True))
        if self.values is not None:
            self.mixed = parts.pop(MIXED).unflatten(1, (self.values.heads, -1))
            parts[INPUT] = parts[INPUT] + self.values.side(self.mixed).to(kept.dtype)
            if isinstance(self.first, ZOLinear):
                parts[BASE] = base_product(self.first, parts[INPUT], self.first.bias)
        self._call = _Call(given=parts, copies=copies)
        tokens = ids[:1, :1].expand(copies * len(kept), 1)
        self.work += len(tokens) / ids.shape[1]
        leading, self.handle.leading = self.handle.leading, (len(tokens),)  # label rows, not sequences
        try:
            output = forward(input_ids=tokens, attention_mask=torch.ones_like(tokens), **_without_cache(self.body))
        finally:
            self._call, self.handle.leading = None, leading
        return output, output[0] if isinstance(output, tuple) else output.last_hidden_state

    def _look_up(self, forward: Callable[..., Any], ids: Tensor, lengths: list[int], labels: Labels) -> Tensor:
        """What is kept of every label row, [n, width], from the cache or computed for its sequence."""
        tokens, keys = ids.cpu().long().numpy(), []
        found: dict[bytes, Tensor] = {}
        missing: dict[int, dict[bytes, tuple[int, int]]] = {}  # by length of the sequence
        for s, p in zip(labels.sequences.tolist(), labels.positions.tolist(), strict=True):
            key = tokens[s, : lengths[s]].tobytes() + p.to_bytes(8, "little")
            keys.append(key)
            if (row := self.cache.get(key)) is not None:
                found[key] = row
            else:
                missing.setdefault(lengths[s], {})[key] = s, p
        for length, wanted in missing.items():
            company = max(1, COMPANY // length)
            for start in range(0, len(wanted), company):
                some = dict(list(wanted.items())[start : start + company])
                places = torch.tensor(list(some.values()), device=ids.device)
                rows = self._of_one_length(forward, ids[places[:, 0], :length], places[:, 1])
                for key, row in zip(some, rows, strict=True):
                    found[key] = row.clone()  # its own bytes, which leave with it
                    self.cache.put(key, found[key])
        return torch.stack([found[key] for key in keys])

    def _of_one_length(self, forward: Callable[..., Any], ids: Tensor, positions: Tensor) -> Tensor:
        """Kept rows [b, width] of sequences [b, t] without pads, in the bits that each has alone.

        What a cache holds must not depend on the batch that first asked, or a resumed run would see other bits. Our
        linears keep the rows of a company apart; torch's modules do not (a product by its blocks, an exp by whether it
        falls into a whole vector), so they run sequence by sequence. Functions between them are left, attention above
        all: for the ends of each length's first company they are looked at, and where they differ all run alone.
        """
        if self._alone or len(ids) == 1:
            each = zip(ids.split(1), positions.split(1), strict=True)
            return torch.cat([self._rows_of(forward, *one) for one in each])
        with contextlib.ExitStack() as stack:
            for leaf in self._leaves:
                stack.enter_context(running(leaf, functools.partial(_one_by_one, len(ids))))
            rows = self._rows_of(forward, ids, positions)
        if ids.shape[1] not in self._looked_at:
            for i in (0, len(ids) - 1):
                alone = self._rows_of(forward, ids[i : i + 1], positions[i : i + 1])
                if not torch.equal(alone.view(torch.uint8), rows[i : i + 1].view(torch.uint8)):
                    self._alone = True
                    self.cache.clear()
                    return self._of_one_length(forward, ids, positions)
            self._looked_at.add(ids.shape[1])
        return rows

    def _rows_of(self, forward: Callable[..., Any], ids: Tensor, positions: Tensor) -> Tensor:
        parts = self._record(forward, ids, positions)
        if {name: part.shape[1] for name, part in parts.items()} != self._kept:
            raise ValueError(
                f"the linears of {self.name} ran otherwise for another sequence; a tail can't stand for it"
            )
        return torch.cat(list(parts.values()), dim=1)

    def _record(self, forward: Callable[..., Any], ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Rows [b, width] at a position [b] of each sequence of ids [b, t]: HIDDEN, kept linears, INPUT, BASE."""
        call = self._call = _Call(positions=positions)
        self.work += len(ids) * len(self.blocks)
        active, self.handle.active = self.handle.active, False
        try:
            forward(input_ids=ids, attention_mask=torch.ones_like(ids), **_without_cache(self.body))
        except Stop:
            pass
        finally:
            self._call, self.handle.active = None, active
        if INPUT not in call.kept:
            raise ValueError(f"no trained linear of {self.name}.{len(self.blocks) - 1} ran, so it has no tail")
        return call.kept

    def _run_block(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call is None:
            return forward(*args, **kwargs)
        call.inside = index == len(self.blocks) - 1
        if call.given is None:
            if call.inside:
                call.keep(HIDDEN, hidden_of(args, kwargs))
            try:
                output = forward(*args, **kwargs)
            except Stop:
                if self.values is not None:
                    self._mix(call, functools.partial(forward, *args, **kwargs))
                raise
            self._tuples = isinstance(output, tuple)
            return output
        if not call.inside:
            hidden = hidden_of(args, kwargs)
            return (hidden,) if self._tuples else hidden
        args, kwargs = with_hidden(args, kwargs, call.part(HIDDEN))
        return forward(*args, **kwargs)

    def _mix(self, call: _Call, block: Callable[[], Any]) -> None:
        # The block runs again with columns of the values' inputs in place of values, as many as a head is wide.
        assert self.values is not None
        (layer, heads, width), attended = self.values, call.kept[INPUT]
        if call.values is None:
            raise ValueError(f"{layer.name} does not run before the first trained linear: it makes no values")
        if attended.shape[1] != heads * width or layer.out_features % width:
            raise ValueError(
                f"{layer.name} makes values for {heads} heads of {width}, and the first trained linear takes "
                f"{attended.shape[1]} features: train the one that takes attention's output too, or no values"
            )
        parts = []
        for columns in call.values.split(width, dim=-1):
            wide = F.pad(columns, (0, width - columns.shape[-1]))
            call.columns, call.reached = wide.repeat(1, 1, layer.out_features // width), False
            self.work += len(attended)
            with contextlib.suppress(Stop):
                block()
            parts.append(call.kept[INPUT].unflatten(1, (heads, width))[..., : columns.shape[-1]])
        call.kept[INPUT], call.kept[MIXED] = attended, torch.cat(parts, dim=2).flatten(1)

    def _run_linear(self, name: str, forward: Callable[..., Any], x: Tensor) -> Any:
        call, linear = self._call, self.linears[name]
        if call is None or not call.inside or call.reached:
            return forward(x)
        values = self.values is not None and self.values.layer is linear
        call.reached = moves(linear) and not values
        if call.given is None:
            if values and call.columns is not None:
                return call.columns
            if not call.reached:
                output = base_product(linear, x, linear.bias) if values and isinstance(linear, ZOLinear) else forward(x)
                if values:
                    call.values = x
                if name in self._kept or not self._checked:
                    call.keep(name, output)
                self._widths[name] = output.shape[-1]
                return output
            call.keep(INPUT, x)
            self.first = linear
            if isinstance(linear, ZOLinear) and call.columns is None:
                call.kept[BASE] = base_product(linear, call.kept[INPUT], linear.bias)
            raise Stop
        if not call.reached:
            if name in call.given:
                return call.part(name)
            return x.new_zeros(1).expand(*x.shape[:-1], self._widths[name])
        if BASE in call.given and self.handle.active and isinstance(linear, ZOLinear) and linear.probe is not None:
            linear.known = (call.given[INPUT], call.given[BASE])
            try:
                return forward(x.new_zeros(1).expand(x.shape[0], 1, linear.in_features))
            finally:
                linear.known = None
        return forward(call.part(INPUT))

    def _check(self, forward: Callable[..., Any], ids: Tensor) -> None:
        """Find out, on one clean sequence [1, t], which outputs matter to the tail, and whether it is exact then.

        Raises ValueError unless the tail gives what the whole model gives. A sequence of one token, which has nothing
        to mix, leaves the question open.
        """
        self._idle.clear()
        self.cache.clear()
        active, self.handle.active = self.handle.active, False
        try:
            output = forward(input_ids=ids, attention_mask=torch.ones_like(ids), **_without_cache(self.body))
            wanted = (output[0] if isinstance(output, tuple) else output.last_hidden_state)[0][[0, -1]]
            ends = torch.tensor([0, ids.shape[1] - 1], device=ids.device)
            found = self._record(forward, ids.expand(2, -1), ends)
            self._kept = {name: part.shape[1] for name, part in found.items()}
            mine = self._rows(forward, ids, torch.cat(list(found.values()), dim=1), 1)[1][:, 0]
            for name in [n for n in self._kept if n in self.linears]:
                poisoned = found | {name: torch.full_like(found[name], torch.nan)}
                if torch.equal(self._rows(forward, ids, torch.cat(list(poisoned.values()), dim=1), 1)[1][:, 0], mine):
                    self._idle.add(name)
        finally:
            self.handle.active = active
        if self.values is not None:
            self._check_values(self.values, found)
        error = float((mine - wanted).abs().max() / wanted.abs().max())
        if not error < self._allowed(wanted.dtype):
            raise ValueError(
                f"the tail of {type(self.body).__name__} is not what the whole model gives (relative error "
                f"{error:.1e}): after its first trained linear something mixes tokens, or is no linear"
            )
        if ids.shape[1] > 1:
            self._kept = {name: width for name, width in self._kept.items() if name not in self._idle}
            self._checked = True

    def _allowed(self, dtype: torch.dtype) -> float:
        # 16-bit mixtures and attention are rounded apart; heads in another order are off by as much as they are
        return CHECKED if self.values is None else max(CHECKED, 8 * torch.finfo(dtype).eps)

    def _check_values(self, values: Values, found: dict[str, Tensor]) -> None:
        # Attention is given by what `Values` says of its heads, or their C would be learned for other heads.
        layer = values.layer
        mixed = found[MIXED].unflatten(1, (values.heads, -1)).float()
        every = base_product(layer, mixed.to(found[MIXED].dtype).flatten(0, 1), layer.bias)
        every = every.view(*mixed.shape[:2], -1, values.width)  # by all parts of the values; a head has one
        heads = torch.arange(values.heads, device=every.device)
        made = every[:, heads, heads * every.shape[2] // values.heads].flatten(1)
        error = float((made - found[INPUT]).abs().max() / found[INPUT].abs().max())
        if not error < self._allowed(made.dtype):
            raise ValueError(
                f"{values.heads} heads of {values.width} mixed by attention are not what the first trained linear "
                f"is given (relative error {error:.1e}): {layer.name} does not make its values, or in another order"
            )


class _Call:
    """One call of the body: rows [n, ...] that it is given, `copies` times, or the label positions whose rows it keeps.

    inside: the last block is running. reached: so is its first trained linear, or it has been.
    """

    def __init__(
        self, given: dict[str, Tensor] | None = None, copies: int = 1, positions: Tensor | None = None
    ) -> None:
        self.given, self.copies, self.positions = given, copies, positions
        self.inside = self.reached = False
        self.values: Tensor | None = None  # inputs of the values, all tokens
        self.columns: Tensor | None = None  # of them, in place of values
        self.kept: dict[str, Tensor] = {}

    def keep(self, name: str, x: Tensor) -> None:
        """Of x, a row for each token of the b sequences, those at the positions [b]."""
        assert self.positions is not None
        b = len(self.positions)
        self.kept[name] = x.reshape(b, -1, x.shape[-1])[torch.arange(b, device=x.device), self.positions]

    def part(self, name: str) -> Tensor:
        """A kept part as sequences of one token, [copies n, 1, width]."""
        assert self.given is not None
        return self.given[name].repeat(self.copies, 1)[:, None]


def _one_by_one(b: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module's output for b sequences, each run alone; for what is no tensor of b sequences as it is."""
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or len(args[0]) != b:
        return forward(*args, **kwargs)
    found = [forward(x) for x in args[0].split(1)]
    return torch.cat(found) if isinstance(found[0], Tensor) else forward(*args)


def _without_cache(body: Any) -> dict[str, Any]:
    return {"use_cache": False} if getattr(getattr(body, "config", None), "use_cache", None) is not None else {}
