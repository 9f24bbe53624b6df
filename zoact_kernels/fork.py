"""The blocks before the first perturbed one, computed once for all row groups; the groups part there.

    body(G copies of B sequences)  ->  blocks 0 .. first - 1 see B, clean  ->  from block `first` on, G B as ever

Outside the body of the model nothing is different: it is given G copies of the batch and returns G B hidden states, so
losses and heads need not know. Inside, while a fork is open, its copies are cut down to one, the blocks before the fork
run on that one with no perturbation in sight, and the fork repeats the hidden states and every argument that has a row
for each sequence. A cost of G passes becomes first / L + G (1 - first / L).

What the hidden states at the fork are is a function of the tokens as long as nothing before the fork changes, so they
can be kept. The last batch always is: the row groups of sequential mode, or several evaluations in a step, share it.
With `cache_bytes` so is every sequence, unpadded, by its tokens, the least recently used leaving first; one that is not
there is computed alone and unpadded, so that what a cache holds does not depend on the batch that first asked: a
resumed run, which begins with an empty one, sees the same bits. Rows beside a sequence's last token are zeros then,
which nothing real attends to.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .embedding import PackedEmbedding
from .layers import ZOLinear, perturbation_of
from .parameters import Perturbed
from .perturbation import Perturbation

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Fork:
    """Where the row groups of a model part: before block `first`, which may be set anew between forwards.

    cache_bytes: of hidden states kept by sequence; 0 keeps those of the last batch alone. remember: False keeps
    nothing, for a prefix that is being trained. No gradient goes back through a fork.

    Raises ValueError for a model in which no list of equal blocks is found or whose blocks are compiled, and (unless
    `first` is given) where the first block, or something before it, is perturbed: nothing could be shared.
    """

    def __init__(self, model: nn.Module, first: int | None = None, cache_bytes: int = 0) -> None:
        self.model, self.name, self.blocks = model, *find_blocks(model)
        self.body = body_of(model, self.name)
        check_compiled(model, self.blocks)
        self.handle = perturbation_of(model)
        self.cache = Cache(cache_bytes) if cache_bytes else None
        self.remember = True
        self._last: tuple[list[Tensor], Tensor] | None = None  # arguments of the body, hidden states at the fork
        self._prefix_state: list[tuple[int, int]] = []
        self._tuples = False  # whether a block returns its hidden states in a tuple
        self._extra = False  # whether a block returns more than hidden states
        self._call: _Call | None = None
        self.first = self._first() if first is None else first

    @property
    def first(self) -> int:
        return self._index

    @first.setter
    def first(self, index: int) -> None:
        if not 0 <= index < len(self.blocks):
            raise ValueError(f"`first` is {index}; {self.name} has blocks 0 to {len(self.blocks) - 1}")
        self._index = index
        after = {module for block in self.blocks[index:] for module in block.modules()}
        inside = {name: module for name, module in self.body.named_modules() if module not in after}
        self._watched = {name: module for name, module in inside.items() if moves(module)}
        self._prefix = [module for module in inside.values() if not moves(module)]
        self.forget()

    def forget(self) -> None:
        """Drop what is kept; for a prefix that has changed in a way that its tensors do not show."""
        self._last = None
        if self.cache is not None:
            self.cache.clear()

    @contextlib.contextmanager
    def forgetful(self) -> Iterator[None]:
        """Inside the block nothing is kept or used again: where nobody may wait for the device."""
        before, self.remember = self.remember, False
        try:
            yield
        finally:
            self.remember = before

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Inside the block forwards of the model fork, perturbed or clean ones (these for what is kept). Not to nest.

        Forwards raise ValueError where rows are no copies group after group, where blocks don't run in their order,
        where a perturbed module runs before the fork, or, with a cache, for batches not padded on the right.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(running(self.body, self._run_body))
            for index, block in enumerate(self.blocks):
                stack.enter_context(running(block, functools.partial(self._run_block, index)))
            for name, module in self._watched.items():
                stack.enter_context(running(module, functools.partial(self._run_watched, name)))
            yield

    def _first(self) -> int:
        found = next((i for i, block in enumerate(self.blocks) if any(map(moves, block.modules()))), 0)
        before = itertools.takewhile(lambda item: item[0] != self.name, self.model.named_modules())
        what = next((name for name, module in before if moves(module)), f"{self.name}.0" if not found else "")
        if what:
            raise ValueError(f"{what} is perturbed, so there is nothing that row groups could share")
        return found

    # --- a forward ----------------------------------------------------------------------------------------------------

    def _run_body(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        active = self.handle.active
        groups = self.handle.copies if active else 1
        args, kwargs = cut((args, kwargs), groups)
        held = self._recall(forward, args, kwargs)
        call = self._call = _Call(groups, _sequences((args, kwargs)), active, held)
        self.handle.active = False
        try:
            output = forward(*args, **kwargs)
        finally:
            self._call, self.handle.active = None, active
        if call.hidden is None:
            raise ValueError(
                f"{type(self.body).__name__} does not call block {self.first} of {self.name}; use fork=False"
            )
        if self.remember and held is None and not self._extra and kwargs.get("past_key_values") is None:
            self._last = [t.clone() for t in _tensors((args, kwargs))], call.hidden
        rows = next(_tensors(((output,), {})), None)
        if rows is None or rows.shape[0] != groups * call.sequences:
            raise ValueError(
                f"{type(self.body).__name__} returns {None if rows is None else list(rows.shape)} for {groups} row "
                f"groups of {call.sequences} sequences: it counts sequences itself; use fork=False"
            )
        return output

    def _run_block(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call is None:
            return forward(*args, **kwargs)
        if index != call.next:
            raise ValueError(f"{self.name} runs block {index} where block {call.next} was to come; use fork=False")
        call.next += 1
        if index < self.first:
            if call.held is not None:
                return (hidden_of(args, kwargs),) if self._tuples else hidden_of(args, kwargs)
            output = forward(*args, **kwargs)
            self._tuples = isinstance(output, tuple)
            self._extra |= self._tuples and any(part is not None for part in output[1:])
            return output
        if index == self.first:
            call.hidden = hidden_of(args, kwargs).detach() if call.held is None else call.held
            if call.stops:
                raise Stop
            args, kwargs = with_hidden(args, kwargs, _repeat(call.hidden, call.groups))
            self.handle.active = call.active
        args, kwargs = _mapped((args, kwargs), call.repeated)
        return forward(*args, **kwargs)

    def _run_watched(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._call is not None and self._call.next <= self.first:
            raise ValueError(f"{name} is perturbed and runs before block {self.first} of {self.name}; use fork=False")
        return forward(*args, **kwargs)

    # --- what is kept -------------------------------------------------------------------------------------------------

    def _recall(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Hidden states [B, T, H] at the fork for this call of the body, None where it has to compute them."""
        if not self.remember or not self.first or kwargs.get("past_key_values") is not None:
            return None
        given = list(_tensors((args, kwargs)))
        if self.cache is None and given[0].device.type != "cpu" and self.handle.active and self.handle.groups > 1:
            return None  # a stacked step sees its batch once; to compare it, the host would wait for the device
        state = versions(self._prefix)
        if state != self._prefix_state:
            self.forget()
            self._prefix_state = state
        if self._last is not None and _equal(given, self._last[0]):
            return self._last[1]
        if self.cache is None:
            return None
        ids, lengths = right_padded(args, kwargs)
        tokens = ids.cpu().long().numpy()
        rows = [self._sequence(forward, tokens[s, :n].tobytes(), ids[s : s + 1, :n]) for s, n in enumerate(lengths)]
        held = rows[0].new_zeros(*ids.shape, rows[0].shape[-1])
        for own, row in zip(held, rows, strict=True):
            own[: len(row)] = row
        self._last = [t.clone() for t in given], held
        return held

    def _sequence(self, forward: Callable[..., Any], key: bytes, ids: Tensor) -> Tensor:
        """Rows [t, H] of one sequence, int64 [1, t], from the cache or computed for it."""
        assert self.cache is not None
        found = self.cache.get(key)
        if found is not None:
            return found
        call = self._call = _Call(1, 1, False, None, stops=True)
        active, self.handle.active = self.handle.active, False
        try:
            forward(input_ids=ids, attention_mask=torch.ones_like(ids))
        except Stop:
            pass
        finally:
            self._call, self.handle.active = None, active
        if self._extra or call.hidden is None:
            raise ValueError(f"blocks of {self.name} hand on more than hidden states, so a cache can't stand for them")
        row = call.hidden[0].clone()
        self.cache.put(key, row)
        return row


def fork_of(model: nn.Module, wanted: bool | None, cache_bytes: int) -> Fork | None:
    """The fork of a model; None where it is not wanted, or where it can't be and is left open (wanted=None, no cache).

    Raises ValueError as `Fork` does.
    """
    if wanted is False:
        return None
    try:
        return Fork(model, cache_bytes=cache_bytes)
    except ValueError:
        if wanted or cache_bytes:
            raise
        return None


class Cache:
    """Hidden states by the tokens of a sequence, `limit` bytes of them at most; the least recently used leave first.

    bytes: held now, keys included. hits, misses: sequences that were there when asked for, and not.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"`cache_bytes` is {limit}; it is a number of bytes, 0 for none")
        self.limit, self.bytes, self.hits, self.misses = limit, 0, 0, 0
        self.rows: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        row = self.rows.get(key)
        if row is None:
            self.misses += 1
            return None
        self.hits += 1
        self.rows.move_to_end(key)
        return row

    def put(self, key: bytes, row: Tensor) -> None:
        self.rows[key] = row
        self.bytes += row.nbytes + len(key)
        while self.bytes > self.limit:
            key, row = self.rows.popitem(last=False)
            self.bytes -= row.nbytes + len(key)

    def clear(self) -> None:
        self.rows.clear()
        self.bytes = 0


class Stop(BaseException):
    """Ends a forward at the fork. Not an Exception, so that no model's own handler swallows it."""


class _Call:
    """One call of the body: its row groups and sequences, whether they are perturbed, and how far it has come."""

    def __init__(self, groups: int, sequences: int, active: bool, held: Tensor | None, stops: bool = False) -> None:
        self.groups, self.sequences, self.active, self.held, self.stops = groups, sequences, active, held, stops
        self.next = 0  # block
        self.hidden: Tensor | None = None
        self._repeated: dict[int, tuple[Tensor, Tensor]] = {}  # blocks share their arguments

    def repeated(self, x: Tensor) -> Tensor:
        """G copies of what has a row for each sequence. A single row is broadcast, and one size alone counts tokens."""
        if self.groups == 1 or x.dim() < 2 or x.shape[0] != self.sequences or self.sequences == 1:
            return x
        if id(x) not in self._repeated:
            self._repeated[id(x)] = x, _repeat(x, self.groups)
        return self._repeated[id(x)][1]


# --- the model --------------------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The blocks of a model and their name: its longest list of modules of one type of which any is perturbed.

    A list inside a block (of experts, say) does not count. Raises ValueError where there is none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and not inside and len(module) > 1 and len(set(map(_kind, module))) == 1:
            found[name] = module
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; a fork takes one stack of blocks")
    trained = {name: blocks for name, blocks in found.items() if any(map(moves, blocks.modules()))}
    if not trained:
        seen = f"found {', '.join(found)}" if found else "found none"
        raise ValueError(f"{type(model).__name__} has no list of equal blocks with perturbed layers in it ({seen})")
    return max(trained.items(), key=lambda item: len(item[1]))


def moves(module: nn.Module) -> bool:
    """Whether a perturbation of the model, when it is active, changes what this module computes."""
    handle = getattr(module, "perturbation", None)
    if not isinstance(handle, Perturbation) or handle.idle:
        return False
    if isinstance(module, ZOLinear):
        return module.coeff is not None or module.probe is not None or module.bias_id is not None
    return True


def _kind(module: nn.Module) -> type:
    return type(module).__bases__[1] if isinstance(module, Perturbed) else type(module)


def body_of(model: nn.Module, name: str) -> nn.Module:
    """The innermost module around the blocks that looks tokens up; the model where none does."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        around = model.get_submodule(".".join(parts[:depth]))
        own = ".".join(parts[depth:])
        for inner, module in around.named_modules():
            if isinstance(module, nn.Embedding | PackedEmbedding) and not inner.startswith(f"{own}."):
                return around
    return model


def check_compiled(model: nn.Module, blocks: nn.ModuleList) -> None:
    within = set(blocks)
    for module in model.modules():
        compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if compiled and (module in within or any(inner in within for inner in module.modules())):
            raise ValueError(f"{type(module).__name__} is compiled and can't be forked; compile what is in its blocks")


@contextlib.contextmanager
def running(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Inside the block `module` runs as run(its forward, *args, **kwargs)."""
    own, forward = module.__dict__.get("forward"), module.forward

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return run(forward, *args, **kwargs)

    module.__dict__["forward"] = wrapper
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


LEARNED = ("basis", "coeff", "out_basis")  # of a ZOLinear: what is kept of its inputs and base product is without them


def versions(modules: Iterable[nn.Module], trained: Container[nn.Module] = ()) -> list[tuple[int, int]]:
    """What tells whether tensors of these modules were replaced or written to, what `trained` ones learn aside."""
    return [
        (t.data_ptr(), 0 if t.is_inference() else t._version)
        for module in modules
        for name, t in (*module._parameters.items(), *module._buffers.items())
        if t is not None and not (name in LEARNED and module in trained)
    ]


# --- arguments --------------------------------------------------------------------------------------------------------


def _values(value: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists and mappings."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _values(part)
    elif hasattr(value, "items"):
        for _, part in value.items():
            yield from _values(part)
    else:
        yield value


def _tensors(call: Call) -> Iterator[Tensor]:
    return (value for value in _values(call) if isinstance(value, Tensor))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples, lists and dicts with their tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, change) for part in value)
    return {key: _mapped(part, change) for key, part in value.items()} if type(value) is dict else value


def _sequences(call: Call) -> int:
    ids = call[1].get("input_ids")
    first = ids if isinstance(ids, Tensor) else next(_tensors(call), None)
    if first is None or not first.dim():
        raise ValueError("the model is called without a tensor of sequences, so its rows can't be forked")
    return first.shape[0]


def cut(call: Call, groups: int) -> Call:
    """One copy of a batch that is `groups` copies."""
    if groups == 1:
        return call
    rows = _sequences(call)
    if rows % groups:
        raise ValueError(f"the model is called with {rows} sequences, which {groups} row groups can't share equally")
    sequences = rows // groups

    def one(x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[0] != rows:
            return x
        if x.device.type == "cpu" and not (x.unflatten(0, (groups, sequences)) == x[:sequences]).all():
            raise ValueError("the row groups differ before the first block; a fork needs copies of one batch")
        return x[:sequences]

    cut: Call = _mapped(call, one)
    return cut


def right_padded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, list[int]]:
    """(ids [B, T], tokens of each sequence) of a body's call that says nothing else; ValueError for others."""
    ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    tensors = [t for t in _tensors((args, kwargs)) if t is not ids and t is not mask]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or tensors:
        raise ValueError("a prefix cache goes by tokens: it takes input_ids [B, T] and attention_mask, nothing else")
    if mask is None:
        return ids, [ids.shape[1]] * len(ids)
    lengths = mask.sum(1)
    if not torch.equal(mask.bool(), torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]) or (
        len(ids) and int(lengths.min()) < 1
    ):
        raise ValueError("a prefix cache takes pads on the right of at least one token; `attention_mask` has others")
    return ids, lengths.tolist()


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _repeat(x: Tensor, groups: int) -> Tensor:
    return x.repeat(groups, *(1 for _ in x.shape[1:]))


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ValueError("blocks take no hidden states as first argument or `hidden_states`; use fork=False")
    return hidden


def with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Call:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
