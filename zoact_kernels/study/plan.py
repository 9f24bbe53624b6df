"""The runs of the study, as a function of what is known: `due(rows)` -> what is to be run next, in order of priority.

For each set (a model, a task, its contenders), in this order:

    cost     what a step of the contender costs: forwards, seconds beside the plain forward, bytes
    sweep    one run for each lr of its grid, seed SWEEP_SEED, judged by the loss on validation examples at the end;
             then one as long as a final run at the lr of the least loss, and while it ends with a higher loss than the
             shorter one at that lr did, at the next lower lr: what is best for a while may come apart
    final    one run for each seed at the lr that lasts, judged on the held-out examples

The grid is the same for all: centre x GRID. While the best lr is an end of the grid, the grid grows there by the same
factor, at most EXTENSIONS times. The centre is the method's published lr, times `scale` where the lr multiplies a
gradient: those were published for models a hundred times larger, and the lr that a zeroth-order step along all weights
bears falls with their number. A step of Adam, or one divided by the spread of the losses, has a size of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from ..methods import METHODS, arguments

GRID = (10**-1.0, 10**-0.5, 1.0, 10**0.5)
EXTENSIONS = 4
BASIS_BATCHES = 2  # unless a contender's recipe says otherwise
SWEEP_SEED = 100
SEEDS = (0, 1, 2)
STAGES = ("cost", "sweep", "final", "measure")


@dataclass(frozen=True)
class Contender:
    """What takes part. method: of METHODS, or of `first_order` where that is set. recipe: other than the defaults."""

    name: str
    method: str
    rank: int = 1
    recipe: Mapping[str, Any] = field(default_factory=dict)
    first_order: bool = False
    lr: float = 0.0  # centre of the grid; 0: the method's default, scaled

    @property
    def known_steps(self) -> int:
        """Steps whose examples a run has computed before its first one."""
        own = not self.first_order and METHODS[self.method].basis == "answers"
        return int(self.recipe.get("basis_batches", BASIS_BATCHES)) if own else 0

    @property
    def dense_only(self) -> bool:
        return not self.first_order and METHODS[self.method].dense

    def centre(self, scale: float) -> float:
        if self.lr:
            return self.lr
        own = {**arguments(self.method), **self.recipe}
        return float(own["lr"]) * (1.0 if own["optimizer"] in ("adam", "adamw") or own["scaling"] == "std" else scale)


ADAM_ON_C = Contender("adam on C", "adam-on-c", first_order=True, lr=3e-3)
LORA = Contender("lora by adam", "lora", first_order=True, lr=1e-3)
NODE = Contender("zo-act-node", "zo-act-node", recipe={"basis_batches": 64})  # of 16: 1 024 rows for 512 directions
BEFORE = "untrained"  # no contender: what all start from
VARIANTS = {
    c.name: c
    for c in (
        Contender("zo-act r4", "zo-act", rank=4),
        Contender("zo-act r16", "zo-act", rank=16),
        Contender("zo-act r64", "zo-act", rank=64),
        Contender("zo-act q4", "zo-act", recipe={"queries": 4}),
        Contender("zo-act q8", "zo-act", recipe={"queries": 8}),
        Contender("zo-act 16 batches", "zo-act", recipe={"basis_batches": 16}),
        Contender("zo-act sgd", "zo-act", recipe={"optimizer": "sgd", "lr": 3e-5}),
        Contender("zo-act sgd r16", "zo-act", rank=16, recipe={"optimizer": "sgd", "lr": 3e-5}),
    )
}


def contender(name: str) -> Contender:
    """Raises ValueError for a name that is none of the methods, first-order bounds and variants."""
    named = {who.name: who for who in (ADAM_ON_C, LORA, NODE)} | VARIANTS
    if name in named:
        return named[name]
    if name not in METHODS:
        raise ValueError(f"contender is {name!r}; known are {', '.join([*METHODS, *named])}")
    return Contender(name, name)


class Set(NamedTuple):
    """sweep, final: forwards of a run. scale: see above. rank: sets of a lower one come first.

    rates: sets whose sweeps choose the lr here too, of each contender the first that has it; none: its own.
    """

    name: str
    model: str
    task: str
    contenders: tuple[str, ...]
    sweep: int
    final: int
    scale: float
    rank: int
    rates: tuple[str, ...] = ()


CORE = ("zo-act", "mezo", "lozo", "subzero")
_LOW_BIT = ("zo-act", "lozo", "subzero", "qzo", NODE.name, ADAM_ON_C.name)
_DENSE = (*CORE, NODE.name, ADAM_ON_C.name, LORA.name)
_SGD = ("zo-act sgd", "zo-act sgd r16")  # whether it is Adam that holds zo-act back: on questions alone


def everything() -> tuple[str, ...]:
    """All methods, those that claims are about first, and the bounds."""
    first = (*CORE, "zo-act-one-sided", "fzoo")
    return (*first, *(name for name in METHODS if name not in first), ADAM_ON_C.name, LORA.name)


def sets() -> tuple[Set, ...]:
    """All sets, smallest informative one first."""
    return (
        Set("encoder-trec", "encoder", "trec", everything(), 2400, 6400, 100.0, 1),
        Set("dense-trec", "dense", "trec", (*_DENSE, *_SGD), 1600, 3200, 10.0, 3),
        Set("dense-sms", "dense", "sms", _DENSE, 1600, 1600, 10.0, 4, ("dense-trec",)),
        Set("dense-reviews", "dense", "reviews", _DENSE, 1600, 1600, 10.0, 4, ("dense-trec",)),
        Set("encoder-ablation", "encoder", "trec", tuple(VARIANTS), 2400, 6400, 100.0, 5),
        Set("int4-trec", "int4", "trec", _LOW_BIT, 1600, 3200, 10.0, 6, ("dense-trec",)),
        Set("int4-sms", "int4", "sms", _LOW_BIT, 1600, 1600, 10.0, 7, ("dense-trec", "int4-trec")),
        Set("int4-reviews", "int4", "reviews", _LOW_BIT, 1600, 1600, 10.0, 7, ("dense-trec", "int4-trec")),
    )


MEASURES = ("cosine", "curvature", "energy", "refresh", "precision")
MEASURES_RANK = 2


@dataclass(frozen=True)
class Run:
    """One entry of the queue. lr is None where there is none to choose."""

    set: str
    stage: str
    contender: str
    lr: float | None = None
    seed: int = 0
    forwards: int = 0

    @property
    def id(self) -> str:
        lr = "" if self.lr is None else f"/lr{self.lr:.3g}"
        return f"{self.set}/{self.stage}/{self.contender}{lr}/s{self.seed}/{self.forwards}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Row(NamedTuple):
    """What is known of a run: state done or failed (waiting, running: nothing yet), its result, or the reason."""

    run: Run
    state: str
    result: dict[str, Any]
    reason: str = ""


def due(rows: Mapping[str, Row], among: Iterable[Set] | None = None) -> list[tuple[int, Run]]:
    """(priority, run) of all runs that can be said to be needed now, known or not, least first."""
    found = []
    measured = [Run("measures", "measure", name) for name in MEASURES] if among is None else []
    for given in sets() if among is None else among:
        for position, name in enumerate(given.contenders):
            for run in _of_contender(given, name, rows):
                found.append((_priority(given.rank, run, position), run))
        before = Run(given.name, "final", BEFORE)
        found.append((_priority(given.rank, before, 0), before))
    found += [(_priority(MEASURES_RANK, run, position), run) for position, run in enumerate(measured)]
    return sorted(found, key=lambda pair: pair[0])


def _priority(rank: int, run: Run, position: int) -> int:
    """Set, then stage, then seed, then contender: what was begun is finished for all before it is refined for one."""
    order = ("cost", "measure", "sweep", "final").index(run.stage)
    return ((rank * 10 + order) * 10 + min(run.seed, 9) * (run.stage == "final")) * 1000 + position


def _of_contender(given: Set, name: str, rows: Mapping[str, Row]) -> Iterable[Run]:
    who = contender(name)
    cost = Run(given.name, "cost", name)
    yield cost
    if cost.id not in rows or rows[cost.id].state != "done":
        return
    if sweeping(given, name) == given:
        yield from grid(given, who, rows)
    choice = chosen(given, who, rows)
    if choice.asked is None and choice.lr is not None:
        yield from (Run(given.name, "final", name, choice.lr, seed, given.final) for seed in SEEDS)
    elif choice.asked is not None and choice.asked.set == given.name:
        yield choice.asked


def sweeping(given: Set, name: str) -> Set:
    """The set whose sweeps choose a contender's lr for `given`."""
    by_name = {other.name: other for other in sets()}
    return next((by_name[other] for other in given.rates if name in by_name[other].contenders), given)


def grid(given: Set, who: Contender, rows: Mapping[str, Row]) -> list[Run]:
    """The runs of the sweep as far as they are known to be needed, by rising lr."""
    rates = [who.centre(given.scale) * factor for factor in GRID]
    step = GRID[1] / GRID[0]
    for _ in range(EXTENSIONS):
        runs = [_sweep(given, who, lr) for lr in rates]
        if (losses := _losses(runs, rows)) is None:
            return runs
        best = min(range(len(runs)), key=lambda i: losses[i])
        if best not in (0, len(runs) - 1) or not math.isfinite(losses[best]):
            return runs
        rates = [rates[0] / step, *rates] if best == 0 else [*rates, rates[-1] * step]
    return [_sweep(given, who, lr) for lr in rates]


class Choice(NamedTuple):
    """lr: None where not all of the grid is known, or no run of it ended with a finite loss. edge: the best of the grid
    is an end of it. asked: the run that says whether the lr lasts, if that is still to come."""

    lr: float | None = None
    edge: bool = False
    asked: Run | None = None


def chosen(given: Set, who: Contender, rows: Mapping[str, Row]) -> Choice:
    given = sweeping(given, who.name)
    runs = grid(given, who, rows)
    losses = _losses(runs, rows)
    if losses is None or not math.isfinite(min(losses)):
        return Choice()
    best = at = min(range(len(runs)), key=lambda i: losses[i])
    while given.sweep < given.final:
        longer = replace(runs[at], forwards=given.final)
        known = _losses([longer], rows)
        if known is None:
            return Choice(runs[at].lr, best in (0, len(runs) - 1), longer)
        if known[0] <= losses[at] or at == 0:
            break
        at -= 1
    return Choice(runs[at].lr, best in (0, len(runs) - 1))


def _sweep(given: Set, who: Contender, lr: float) -> Run:
    return Run(given.name, "sweep", who.name, float(f"{lr:.3g}"), SWEEP_SEED, given.sweep)


def _losses(runs: Iterable[Run], rows: Mapping[str, Row]) -> list[float] | None:
    """Loss at the end of each run, inf for one that failed or was not finite; None while one is missing."""
    found = []
    for run in runs:
        row = rows.get(run.id)
        if row is None or row.state not in ("done", "failed"):
            return None
        loss = row.result["curve"][-1][3] if row.state == "done" else None
        found.append(loss if loss is not None and math.isfinite(loss) else math.inf)
    return found
