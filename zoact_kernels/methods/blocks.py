"""A model in parts, one of which is perturbed at a time: its blocks by turns, or its modules one after the other.

    part b:  theta_b +- sigma z_b,  all else clean;  d = (f+ - f-) / (2 sigma);  theta_b <- rule_b(theta_b, d z_b)

The row groups fork at the block of the part, and every part has optimizer steps and moments of its own. What stands in
no block (embeddings, the last norm, the head) is one part more: tables and heads are often one tensor.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import optim, rng
from ..fork import Fork
from ..layers import perturbation_of
from ..perturbation import Perturbation
from ..trainables import Trainable
from ..zeroth_order import Evaluation, ZeroOrder
from .activation import ZOAct
from .dense import MeZO

LEVELS = ("block", "mlp-attn", "linear")


class Part(NamedTuple):
    """block: its number, None for what is in none. member: the module within it, "" for all."""

    block: int | None
    member: str
    trainables: list[Trainable]


def parts_of(trainables: Sequence[Trainable], level: str = "block") -> tuple[str, list[Part]]:
    """The list of blocks by its name, and the parts at a level: blocks, their children with matrices, or their linears.

    Norms, which have no matrix, go with the first member of their block. All by names alone, so that a replay without
    the model finds the same. Raises ValueError for an unknown level or a model without numbered blocks.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; it may be {', '.join(LEVELS)}")
    places = [re.match(r"(.+?)\.(\d+)\.(?:(.*)\.)?", t.parameter) for t in trainables]
    numbers: dict[str, set[str]] = {}
    for seen in filter(None, places):
        numbers.setdefault(seen[1], set()).add(seen[2])
    if not numbers:
        raise ValueError("`model` has no numbered blocks with something to train, as in layers.0, layers.1 ...")
    stack = max(numbers, key=lambda name: len(numbers[name]))

    keys: list[tuple[int | None, str]] = []
    for place in places:
        if place is None or place[1] != stack:
            keys.append((None, ""))
        else:
            path = place[3] or ""
            keys.append((int(place[2]), {"block": "", "mlp-attn": path.partition(".")[0], "linear": path}[level]))
    whole = [key for key, t in zip(keys, trainables, strict=True) if t.value.shape[1] > 1]
    first = dict(reversed(whole))
    found: dict[tuple[int | None, str], Part] = {}
    for key, trainable in zip(keys, trainables, strict=True):
        own = key if key in whole else (key[0], first.get(key[0], key[1]))
        found.setdefault(own, Part(*own, [])).trainables.append(trainable)
    return stack, list(found.values())


class InParts(ZeroOrder):
    """What the methods here have in common: a rule for each part, and `expose`, which makes one the perturbed one."""

    one_graph = False  # another part, another graph
    level = "block"

    def __init__(self, model: nn.Module, *, prefix_cache: int = 0, **others: Any) -> None:
        if prefix_cache:
            raise ValueError(f"prefix_cache is {prefix_cache}; with {self.name} what is before the fork moves too: 0")
        super().__init__(model, **others)

    def make_rule(self, optimizer: str, trainables: Sequence[Trainable], **arguments: Any) -> Any:
        self.stack_name, self.parts = parts_of(trainables, self.level)
        self._live, self._idle = perturbation_of(self.model), Perturbation()
        self._idle.idle = True
        self._owners = [{owner for t in part.trainables for owner in owners_of(t)} for part in self.parts]
        known: set[nn.Module] = set()
        for part, owners in zip(self.parts, self._owners, strict=True):
            if owners & known:
                raise ValueError(f"block {part.block} of {self.stack_name} shares a module with another part")
            known |= owners
        self.expose(0)
        make = super().make_rule
        return optim.Turns([make(optimizer, part.trainables, **arguments) for part in self.parts])

    def expose(self, part: int) -> None:
        """From now on a perturbation moves this part alone."""
        self.exposed = part
        for index, owners in enumerate(self._owners):
            for owner in owners:
                owner.perturbation = self._live if index == part else self._idle  # type: ignore[assignment]

    @functools.cached_property
    def fork(self) -> Fork | None:
        if self._fork_wanted is False:
            return None
        before = self.exposed
        try:
            self.expose(next(i for i, part in enumerate(self.parts) if part.block is not None))
            found = Fork(self.model, first=0)
        except ValueError:
            if self._fork_wanted:
                raise
            return None
        finally:
            self.expose(before)
        found.remember = False
        return found if rng.strip_prefixes(found.name) == self.stack_name else None

    def forking(self) -> contextlib.AbstractContextManager[None]:
        block = self.parts[self.exposed].block
        if self.fork is None or block is None:
            return contextlib.nullcontext()
        self.fork.first = block
        return self.fork.open()


class _ByTurns(InParts):
    """One part a step, in a random order that comes again: part b of step t is order[t mod parts]."""

    def refresh(self) -> None:
        noise = rng.noise("normal", self.seed, rng.param_id("order of the parts"), 1, len(self.parts))
        part = int(noise[0].argsort(stable=True)[self.iteration % len(self.parts)])
        self.rule.turn = [part]
        self.expose(part)


class MeZOBCD(_ByTurns, MeZO):
    """MeZO on one block a step, by turns in a random order; the others are neither perturbed nor moved."""

    name, paper = "mezo-bcd", "arXiv 2501.19099"
    summary = "MeZO on one block at a time"


class ZOActBCD(_ByTurns, ZOAct):
    """ZO-Act on one block a step, by turns in a random order, beside weights of any format."""

    name, paper = "zo-act-bcd", "arXiv 2501.19099"
    summary = "ZO-Act on one block at a time"


class ZOModuleWise(InParts, MeZO):
    """MeZO with a pair of forwards for every module, each along noise of its own, all on one batch.

    level: what a module is: "block", "mlp-attn" (the children of a block) or "linear". coordinate: a module moves right
    after its own pair, before the next one's; a copy of what is trained stands by, since losses that are not finite
    have to leave everything as it was. Otherwise all move at the end. A step costs 2 queries forwards a module.
    """

    name, paper = "zo-module-wise", "arXiv 2402.11592"
    summary = "MeZO module by module, a pair of forwards each"

    def __init__(self, model: nn.Module, *, level: str = "block", coordinate: bool = True, **others: Any) -> None:
        self.level, self.coordinate = level, coordinate
        super().__init__(model, **others)

    def draws(self) -> int:
        return len(self.parts) * self.queries

    def refresh(self) -> None:
        self.rule.turn = list(range(len(self.parts)))

    def _on_device(self, parts: Sequence[Evaluation], rows: tuple[int, ...], dry: bool = False) -> Tensor:
        seeds, weights, every = self._seeds, self._weights, self.rule.turn
        saved = self.rule.save() if self.coordinate else []
        useless, found = torch.zeros_like(self.rule.skip), []
        try:
            for part, own_seeds in enumerate(seeds.split(self.queries)):
                self._seeds, self._weights = own_seeds, weights.split(self.queries)[part]
                self.expose(part)
                losses, estimate = self._estimate(parts, rows)
                found.append(losses)
                self._take(losses, estimate, dry)
                self.rule.skip.copy_(useless.logical_or_(self.rule.skip))
                if self.coordinate:
                    self.rule.turn = [part]
                    self.rule.launch(self._seeds, self._weights)
                    self._settle()
        finally:
            self._seeds, self._weights, self.rule.turn = seeds, weights, every
        if self.coordinate:
            self.rule.restore(saved, useless)
        else:
            self.rule.launch(seeds, weights)
        self._settle()
        return torch.cat(found)

    def _floor_is_due(self) -> bool:
        return False  # of which module?

    def _signal(self, losses: Tensor) -> float:
        each = [super(ZOModuleWise, self)._signal(own) for own in losses.split(self.groups)]
        return sum(each) / len(each)


def owners_of(trainable: Any) -> list[nn.Module]:
    """The modules that read a trainable's value."""
    return [owner for owner, _ in trainable.sites] if hasattr(trainable, "sites") else [trainable.layer]
