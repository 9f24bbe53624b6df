"""Blocks that matter most by gradients, all others along noise, in one step.

    importance of a block    I = sum |g * Delta|, g its gradient on the first batch, Delta what the rule makes of g
    first-order half F       the blocks that `choose` finds: much I, little cost, a suffix if it can be
    zeroth-order half Z      all others
    a step at theta          f+, f-  with noise on Z alone, and no graph;  d = (f+ - f-) / (2 sigma)
                             g = grad_F f(theta), of a clean forward
                             Z <- rule(Z, d z) and F <- first_order(F, g), both after all evaluations

The graph of g begins at the first block of F: before it nothing asks for a gradient. So activations are kept of what
comes after it alone, and of one clean copy of the batch, however many row groups the probes have. The clean forward is
one of its own: as many rows as a clean group among the others, but weights are read once more. With a fork they share
what is before it. A step is 2 queries + 1 forwards and a backward of at most 2 budget forwards: of 16 sequences through
an encoder of 6 blocks, F being one, 53.3 where MeZO's is 32.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import estimators, first_order, optim, rng
from ..activations import evaluating
from ..fork import Fork, fork_of, running
from ..layers import perturbation_of
from ..perturbation import Perturbation
from ..tail import Tail
from ..trainables import Trainable
from ..zeroth_order import Evaluation, ZeroOrder
from .activation import ZOAct
from .blocks import owners_of, parts_of
from .dense import MeZO

GAPS = 1.25  # how much more a set with gaps has to be worth than a suffix, whose graph is shorter


class Halves(optim.Turns):
    """The rule of Z and that of F, each where it has something to move; every step moves both."""

    def __init__(self, zeroth: optim.SGD | None, first: first_order.SGD | None) -> None:
        self.zeroth, self.first = zeroth, first
        rules: list[Any] = [rule for rule in (zeroth, first) if rule is not None]
        super().__init__(rules)
        self.turn = list(range(len(rules)))

    def launch(self, seeds: Tensor, weights: Tensor) -> None:
        for rule in self.rules:
            rule.launch(seeds, weights)


class _Hybrid(ZeroOrder):
    """What both have in common: Z and F of one model, divided by blocks.

    With any block in F, F has what stands behind all of them too (a last norm, a head that is not tied); with every
    block, what stands before them. A tensor or module that Z has as well is Z's. `prepare` divides by the profile,
    `divide` by hand; one of them comes before the first step.

    budget: share of the cost of all blocks' gradients that F may have: 0 is the zeroth-order method to the bit, 1
        first-order training; between them F has one block at least.
    first_order: sgd, adam, adamw or sumo (see `first_order`), with the betas, eps and weight_decay of the other half;
        sumo_rank, sumo_period: of sumo. first_lr: its learning rate, on the same schedule.
    Of the paper only the abstract was read: score, share, rules and rates are ours.

    The parts of a batch add up to its mean gradient, within rounding. A step is the same bits again with the same back
    end and threads, as far as torch's own backwards are: on CPUs they are.
    """

    replayable = False  # gradients are in no log
    one_graph = False  # the host asks whether they are finite
    preparation = "profiling the blocks by the gradients of one batch"

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: float = 0.25,
        first_order: str = "adam",
        first_lr: float = 1e-3,
        sumo_rank: int = 8,
        sumo_period: int = 200,
        **others: Any,
    ) -> None:
        if not 0 <= budget <= 1:
            raise ValueError(f"budget is {budget}; a share of the cost of all gradients lies in [0, 1]")
        if not first_lr >= 0:
            raise ValueError(f"first_lr is {first_lr}; it may not be negative")
        self.budget, self.first_lr = budget, first_lr
        self._first_rule = first_order, sumo_rank, sumo_period
        self._divided = False
        self._trouble = ""  # why the gradients of the step at hand are no use
        super().__init__(model, **others)

    # --- the halves ---------------------------------------------------------------------------------------------------

    def make_rule(self, optimizer: str, trainables: Sequence[Trainable], **arguments: Any) -> Any:
        kind, rank, period = self._first_rule
        if kind not in first_order.RULES:
            raise ValueError(f"first_order is {kind!r}; it may be {', '.join(first_order.RULES)}")
        self.stack_name, parts = parts_of(trainables)
        self.blocks = {part.block: part.trainables for part in parts if part.block is not None}
        self.blocks = dict(sorted(self.blocks.items()))
        if kind == "sumo" and all(1 in t.value.shape for own in self.blocks.values() for t in own):
            raise ValueError(
                "sumo finds no matrix to move, only what has one row or one column: coefficients of rank 1, say; give "
                "them a higher rank, or take adam"
            )
        self._live, self._idle = perturbation_of(self.model), Perturbation()
        self._idle.idle = True
        self._zeroth: Any = functools.partial(super().make_rule, optimizer, **arguments)
        told: dict[str, Any] = {key: value for key, value in arguments.items() if key != "noise"}
        sumo: dict[str, Any] = {"rank": rank, "period": period} if kind == "sumo" else {}
        rule: Any = first_order.RULES[kind]
        self._first: Any = functools.partial(rule, **told, **sumo)
        self._first({}, torch.zeros(0))  # for what it refuses
        self.importance = torch.zeros(len(self.blocks), dtype=torch.float64)  # of each trained block
        self.of_first = torch.zeros(len(trainables), dtype=torch.bool)  # which trainables are F
        return self._rule_of(set())

    def divide(self, blocks: Collection[int]) -> None:
        """From now on F has these blocks, by number. Moments begin anew. Raises ValueError for blocks not trained."""
        if unknown := set(blocks) - self.blocks.keys():
            raise ValueError(f"block {min(unknown)} of {self.stack_name} has nothing to train")
        names = list(self.trainables)
        inner = {t.name for own in self.blocks.values() for t in own}
        chosen = {t.name for block in blocks for t in self.blocks[block]}
        if blocks:
            chosen.update(names[max(i for i, name in enumerate(names) if name in inner) + 1 :])
        if set(blocks) == self.blocks.keys():
            chosen.update(names)
        while shared := self._shared(chosen):
            chosen -= shared
        self._part(chosen)

    def _shared(self, chosen: set[str]) -> set[str]:
        """What of `chosen` is in a module that something else is in too."""
        owners = {name: set(owners_of(t)) for name, t in self.trainables.items()}
        others = set().union(*(own for name, own in owners.items() if name not in chosen))
        return {name for name in chosen if owners[name] & others}

    def _part(self, chosen: set[str]) -> None:
        """Make F of the trainables of these names, or raise ValueError with nothing changed."""
        rule = self._rule_of(chosen)
        self.of_first.copy_(torch.tensor([name in chosen for name in self.trainables]))
        for name, trainable in self.trainables.items():
            for owner in owners_of(trainable):
                owner.perturbation = self._idle if name in chosen else self._live  # type: ignore[assignment]
        self.rule, self._divided = rule, True
        self.__dict__.pop("fork", None)  # another first perturbed block

    def _rule_of(self, chosen: set[str]) -> Halves:
        zeroth = [t for name, t in self.trainables.items() if name not in chosen]
        first = [t for name, t in self.trainables.items() if name in chosen]
        return Halves(self._zeroth(zeroth) if zeroth else None, self._gradient_rule(first) if first else None)

    def _gradient_rule(self, trainables: Sequence[Trainable]) -> first_order.SGD:
        return self._first(
            {t.name: t.value for t in trainables},
            torch.cat([t.param_id for t in trainables]),
            undecayed=[t.name for t in trainables if not t.decays],
        )

    @property
    def first_blocks(self) -> list[int]:
        """The blocks that F has something of, ascending."""
        names = set() if self.rule.first is None else self.rule.first.coeffs.keys()
        return [block for block, own in self.blocks.items() if any(t.name in names for t in own)]

    def prepare(self, batches: Iterable[Any], evaluate: Callable[[Any], Tensor]) -> None:
        """Divide by the gradients of the first batch. One block's graph is kept at a time, and no gradient."""
        if self.budget in (0, 1):
            self.divide(self.blocks.keys() if self.budget else ())
            return
        self._profile(evaluate, next(iter(batches)).to(self.device))
        if not bool(self.importance.isfinite().all()):
            raise ValueError("the gradients of the first batch are not finite, so no block can be chosen by them")
        through = [sum(map(_products, module.modules())) for module in self._block_modules()]
        own = {block: sum(t.value.numel() for t in trained) for block, trained in self.blocks.items()}
        worth = dict(zip(self.blocks, self.importance.tolist(), strict=True))
        first = choose(worth, own, through, self.budget)
        self.divide(first)
        share = sum(worth[block] for block in first) / (sum(worth.values()) or 1)
        told = ", ".join(map(str, first))
        self.note = f"first-order: block{'s' * (len(first) > 1)} {told} with {share:.0%} of the importance"

    def _block_modules(self) -> list[nn.Module]:
        """All blocks, those without anything to train too."""
        modules = self.model.named_modules()
        return list(next(m for name, m in modules if rng.strip_prefixes(name) == self.stack_name).children())

    def _profile(self, evaluate: Callable[[Any], Tensor], batch: Any) -> None:
        self.importance.zero_()
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for module in self._block_modules():
                stack.enter_context(running(module, _recomputed))
            every = [t for trained in self.blocks.values() for t in trained]
            stack.enter_context(differentiable(self.model, [t.leaf for t in every]))
            for index, trained in enumerate(self.blocks.values()):
                for trainable in trained:
                    weigh = functools.partial(self._weigh, index, trainable)
                    stack.callback(trainable.leaf.register_post_accumulate_grad_hook(weigh).remove)
            with_graph(evaluate, batch).mean().backward()

    @torch.no_grad()
    def _weigh(self, index: int, trainable: Trainable, leaf: Tensor) -> None:
        """Add |g * Delta| of one tensor to its block's, and drop g; Delta is that of lr 1."""
        assert leaf.grad is not None
        g, leaf.grad = leaf.grad.view(trainable.value.shape).float(), None
        moved = torch.zeros_like(g)
        rule = self._first({"": moved}, trainable.param_id)
        rule.prepare(1.0)
        rule.move(moved, g, rule.moments[""])
        self.importance[index] += float((g * moved).abs().sum(dtype=torch.float64))

    @functools.cached_property
    def fork(self) -> Fork | Tail | None:
        found = fork_of(self.model, self._fork_wanted, self._prefix_cache)
        first = self.first_blocks
        if found is None or not first or first[0] >= found.first:
            return found
        if self._fork_wanted or self._prefix_cache:
            raise ValueError(
                f"block {first[0]} is trained by gradients and stands before block {found.first}, where row groups "
                "would part: no gradient goes back through a fork"
            )
        return None

    # --- a step -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if not self._divided:
            raise RuntimeError(f"which blocks {self.name} trains by gradients is not known yet; call `prepare` first")
        super()._check()

    def _prepare(self) -> None:
        super()._prepare()
        if self.rule.first is not None:
            known: dict[str, Any] = {"schedule": self.schedule, "steps": self.steps, "warmup": self.warmup}
            self.rule.first.prepare(optim.learning_rate(self.iteration, lr=self.first_lr, **known))

    def _on_device(self, parts: Sequence[Evaluation], rows: tuple[int, ...], dry: bool = False) -> Tensor:
        first, self._trouble = self.rule.first, ""
        if self.rule.zeroth is not None:
            losses, weights = self._estimate(parts, rows)
            self._take(losses, weights, dry)
        if first is not None:
            clean = self._gradients(first, parts)
            if self.rule.zeroth is None:
                losses = clean.expand(self.groups, -1)
                self._weights.zero_()
                self.rule.skip.fill_(dry)
            if self._trouble:
                self.rule.skip.fill_(True)
        self.rule.launch(self._seeds, self._weights)
        self._settle()
        return losses

    def _gradients(self, rule: first_order.SGD, parts: Sequence[Evaluation]) -> Tensor:
        """Give `rule` the gradient of the mean loss at theta; the losses [1, B] float64, clean."""
        trainables = [self.trainables[name] for name in rule.coeffs]
        leaves = [t.leaf for t in trainables]
        mean: list[Tensor] = []
        seen: list[Tensor] = []
        for part in parts:
            with differentiable(self.model, leaves), self.forking():
                losses = with_graph(part, 1)
                found = [g.float() for g in torch.autograd.grad(losses.mean(), leaves, materialize_grads=True)]
            seen.append(losses.detach())
            share = losses.numel() / sum(map(Tensor.numel, seen))
            mean = [before.lerp(g, share) for before, g in zip(mean, found, strict=True)] if mean else found
        clean = torch.cat(seen)[None]
        lost = [t.name for t, g in zip(trainables, mean, strict=True) if not bool(g.isfinite().all())]
        if not bool(clean.isfinite().all()):
            self._trouble = f"{int((~clean.isfinite()).sum())} of {clean.numel()} clean losses are not finite"
        elif lost:
            self._trouble = f"the gradient of {lost[0]} is not finite"
        rule.gradients = {t.name: g.view(t.value.shape) for t, g in zip(trainables, mean, strict=True)}
        return clean

    def _floor_is_due(self) -> bool:
        return self.rule.zeroth is not None and super()._floor_is_due()

    def _reason(self, losses: Tensor, weights: Tensor) -> str:
        return self._trouble if losses.isfinite().all() and self._trouble else super()._reason(losses, weights)

    # --- state --------------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Tensor]:
        return {"importance": self.importance, "of_first": self.of_first}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        rule, divided, given = self.rule, self._divided, state.get("method/of_first")
        if given is not None and given.shape == self.of_first.shape:
            self._part({name for name, chosen in zip(self.trainables, given.tolist(), strict=True) if chosen})
        try:
            super().load_state_dict(state)
        except ValueError:
            self._part(set() if rule.first is None else set(rule.first.coeffs))
            self.rule, self._divided = rule, divided
            raise


class HiZFO(_Hybrid, ZOAct):
    """Both halves over C of the activation basis: ZO-Act, and Adam on gradients of C, beside weights of any format."""

    name, paper = "hi-zfo", "arXiv 2601.05501"
    summary = "coefficients: of the blocks that matter by gradients, of the others along noise"


class HiZFODense(_Hybrid, MeZO):
    """Both halves over the weights themselves: MeZO, and Adam on gradients, as published."""

    name, paper = "hi-zfo-dense", "arXiv 2601.05501"
    summary = "all weights: of the blocks that matter by gradients, of the others along noise"

    def __init__(self, model: nn.Module, *, first_lr: float = 1e-5, **others: Any) -> None:
        super().__init__(model, first_lr=first_lr, **others)


def choose(importance: Mapping[int, float], own: Mapping[int, int], through: Sequence[int], budget: float) -> list[int]:
    """The blocks of the largest importance within a budget, ascending.

    A gradient of block b goes back through every block behind it, so its graph begins there: the longest suffix within
    the budget is taken unless a set with gaps is worth GAPS times as much. The last block is taken in any case.
    importance, own: of the blocks that may be chosen; own: products that the gradient of its values takes, per token.
    through [blocks]: those of passing a gradient on. budget: of what all of them cost together.
    Blocks behind a given first one are taken by importance, which is best where they have one size.
    """
    candidates = sorted(importance, reverse=True)
    whole = sum(through[candidates[-1] :]) + sum(own.values())

    def within(order: Iterable[int], start: int) -> list[int]:
        left, taken = budget * whole - sum(through[start:]), []
        for block in order:
            if own[block] <= left:
                taken.append(block)
                left -= own[block]
        return taken

    def worth(blocks: Iterable[int]) -> float:
        return sum(importance[block] for block in blocks)

    suffix = best = candidates[:1]
    for count, start in enumerate(candidates, 1):
        behind = candidates[:count]
        if within(behind, start) == behind:
            suffix = behind
        best = max(best, within(sorted(behind, key=lambda b: -importance[b]), start), key=worth)
    return sorted(best if worth(best) > GAPS * worth(suffix) else suffix)


def _products(module: nn.Module) -> int:
    """Of a linear layer, per token."""
    return int(getattr(module, "out_features", 0)) * int(getattr(module, "in_features", 0))


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextlib.contextmanager
def differentiable(model: nn.Module, leaves: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block a graph is made, and gradients go back to `leaves` and to nothing else of the model."""
    before = {tensor: tensor.requires_grad for tensor in (*model.parameters(), *leaves)}
    try:
        for tensor in before:
            tensor.requires_grad_(False)
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad():
            yield
    finally:
        for tensor, wanted in before.items():
            tensor.requires_grad_(wanted)


def with_graph(evaluate: Callable[..., Tensor], given: Any) -> Tensor:
    """evaluate(given) with its graph, losses [B] float64; it is asked for that where it takes `grad`."""
    asked = {"grad": True} if "grad" in inspect.signature(evaluate).parameters else {}
    losses = evaluate(given, **asked).reshape(-1)
    estimators.per_example(losses, 1)  # for what it refuses
    if not losses.requires_grad:
        raise ValueError("the losses carry no graph: they were detached, or do not depend on what is trained")
    return losses.double()
