"""A zeroth-order step, whatever is perturbed and however: evaluate, estimate, update, log, resume, replay.

    step t:   seeds_j = seed_for(seed, t, j);  losses [G, B] of the row groups sigmas [G, S] (estimators)
              weights [S] = estimator(losses), rounded to float32 once
              theta <- rule(theta, sum_s weights[s] Z(seeds[s])) for all trainables theta, one launch (optim)

A method says which parameters are its trainables and how a forward perturbs them (trainables); the rest is here. A step
is a function of (theta, moments, t) and of the losses, so (seeds, weights, lr, skipped) of every step is a complete
log: `replay` rebuilds theta from it without evaluating the model, unless a direction is made of what it computes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import estimators, ops, optim, rng
from .activations import evaluating
from .fork import Fork, fork_of
from .layers import perturbed, release
from .perturbation import Perturbation
from .state import restore, state_of
from .tail import Tail
from .trainables import Trainable

MODES = ("stacked", "sequential")
RECENT = 20  # steps over which the signal is averaged before it is judged

Evaluation = Callable[[int], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step saw and did.

    seeds int64 [S], losses float64 [G, B] (clean group first where there is one), weights float32 [S]: on the CPU, as
    they were applied. signal: |f+ - f-| (|f_j - f_0|, |f_j - mean f|), mean over queries; floor: how much
    of that is rounding, as last measured, NaN if never. skipped: nothing was changed, `reason` says why.
    better_sigma: set when the recent signal drowns in the floor.
    """

    step: int
    seeds: Tensor
    losses: Tensor
    weights: Tensor
    lr: float
    skipped: bool
    reason: str
    signal: float
    floor: float
    better_sigma: float | None = None
    note: str = ""  # what the method has to tell of this step

    @property
    def loss(self) -> float:
        """Mean loss over groups and examples; of the clean group alone where there is one."""
        odd = self.losses.shape[0] == len(self.seeds) + 1
        return float((self.losses[0] if odd else self.losses).mean())


class Radii(NamedTuple):
    """Signed radius of every seed in every row group of a forward."""

    table: Tensor  # float32 [G, S], on the device
    used: tuple[tuple[int, ...], ...]  # seeds that a group has at all: known to the host, which may not read the table

    @classmethod
    def of(cls, table: Tensor, device: torch.device) -> Radii:
        """From a table on the CPU."""
        used = tuple(tuple(row.nonzero().flatten().tolist()) for row in table)
        return cls(table.to(device, copy=True), used)


class LoggedStep(Protocol):
    """A row of a run log, as `replay` needs it; a StepResult is one."""

    @property
    def step(self) -> int: ...
    @property
    def seeds(self) -> Tensor: ...
    @property
    def losses(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor: ...
    @property
    def lr(self) -> float: ...
    @property
    def skipped(self) -> bool: ...


class ZeroOrder:
    """Trains the trainables of a model from forward passes; the base of every method.

        optimizer = ZOAct(model, sigma=1e-3, lr=1e-3)
        inputs = optimizer.stack(batch)                        # G copies of the batch, one per row group
        optimizer.step(lambda: losses_per_example(model(**inputs)))

    sigma: perturbation radius. queries: directions per step. sides, scaling, clip: see `estimators`.
    mode: "stacked" evaluates all groups in one forward; "sequential" one after the other, in the memory of one.
    optimizer, betas, eps, weight_decay: see `optim`. lr, schedule, steps, warmup: see `optim.learning_rate`.
    seed: with step and query the whole of the randomness; no global generator is read. noise: "normal" or "rademacher".
    fork: compute the blocks before the first perturbed one once for all groups (see `fork`); None where it is possible.
    prefix_cache: bytes of hidden states kept there by sequence, for sequences that come again.
    spread: deal the examples of a batch out to the queries, B / queries for each, instead of showing all of them to
        every query: for the same rows in a forward the estimate is one over queries times as many examples.
    floor_every: every so many steps, from the first, the groups are evaluated once more at sigma / 32 to see how much
        of a difference is rounding; 0 for never. It changes nothing that is trained.

    A method is a subclass: its defaults are those of its `__init__`, `find` says what it trains, `refresh` what changes
    between steps. Raises ValueError for a model that it cannot train, and for any argument out of range.
    """

    name = ""
    paper = ""
    summary = ""  # one line
    replayable = True  # from the logged numbers of each step, without the model; False: evaluated again at resume
    basis = "none"  # what A is made of: "activations" (of the first batches, once), "inputs" (of each step), "random"
    one_graph = True  # whether every step does the same on the device, so that a CUDA graph can hold it
    dense = False  # whether it trains the weights themselves
    preparation = ""  # what `prepare` does, to tell those who wait for it
    recipe: ClassVar[dict[str, Any]] = {}  # what of a `recipe.Recipe` its runs have otherwise than others
    known_sides: tuple[str, ...] = estimators.SIDES

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma: float = 1e-3,
        queries: int = 1,
        sides: str = "two-sided",
        scaling: str = "plain",
        clip: float = estimators.CLIP,
        mode: str = "stacked",
        optimizer: str = "adam",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        schedule: str = "constant",
        steps: int | None = None,
        warmup: int = 0,
        seed: int = 0,
        noise: str = "normal",
        floor_every: int = 100,
        fork: bool | None = None,
        prefix_cache: int = 0,
        spread: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it may be {', '.join(MODES)}")
        if optimizer not in optim.RULES:
            raise ValueError(f"optimizer is {optimizer!r}; it may be {', '.join(optim.RULES)}")
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; it may not be negative")
        if noise not in ops.NOISES:
            raise ValueError(f"noise is {noise!r}; it may be {', '.join(ops.NOISES)}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed is {seed}; it is a 64-bit integer, -2^63 to 2^63 - 1")
        optim.check_schedule(schedule, steps, warmup)
        if sides not in self.known_sides:
            raise ValueError(f"sides is {sides!r}; here it may be {', '.join(self.known_sides)}")
        estimators.check(sides, queries, scaling, clip)
        if spread and (sides != "two-sided" or mode != "stacked"):
            raise ValueError(f"spread goes with two-sided, stacked groups; sides is {sides!r} and mode {mode!r}")
        if prefix_cache < 0 or (fork is False and prefix_cache):
            raise ValueError(f"prefix_cache is {prefix_cache} and fork {fork}; bytes of hidden states kept at a fork")
        self.model = model
        self.sigma, self.queries, self.sides, self.scaling, self.clip = sigma, queries, sides, scaling, clip
        self.mode, self.noise, self.seed, self.floor_every = mode, noise, seed, floor_every
        self.lr, self.schedule, self.steps, self.warmup = lr, schedule, steps, warmup
        self.note = ""  # of the step at hand
        self.iteration = 0  # steps taken, skipped ones included: the next step's number
        self.trainables = {t.name: t for t in self.find(model, release(model))}
        self._fork_wanted, self._prefix_cache, self.spread = fork, prefix_cache, spread
        rule = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "noise": noise}
        self.rule: Any = self.make_rule(optimizer, list(self.trainables.values()), **rule)  # optim.SGD or like it
        self.floor = float("nan")
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._warned = False

        device = self.device
        self._table = self.radii()
        self.groups = len(self._table)
        self._radii = Radii.of(self._table, device)
        self._seeds = torch.zeros(self.draws(), dtype=torch.int64, device=device)
        self._weights = torch.zeros(self.draws(), dtype=torch.float32, device=device)

    def find(self, model: nn.Module, handle: Perturbation) -> Sequence[Trainable]:
        """The parameters that this method moves, set up so that `perturbed` (through `handle`) moves them."""
        raise NotImplementedError

    def radii(self) -> Tensor:
        """Signed radius of every seed in every row group, float32 [G, S] on the CPU.

        A method may put groups of its own before those of the estimator; its `_evaluate` then drops their losses.
        """
        return estimators.group_sigmas(self.sides, self.queries, self.sigma)

    def prepare(self, batches: Iterable[Any], evaluate: Callable[[Any], Tensor]) -> None:
        """Take from the first batches of a new run what is fixed from then on. evaluate(batch): a clean forward."""

    def draws(self) -> int:
        """S, the noises of a step."""
        return self.queries

    def refresh(self) -> None:
        """Bring what changes from step to step (a basis, say) to step `iteration`; steps and replay both call it."""

    def observe(self, losses: Tensor) -> None:
        """Take note of the losses [G, B] of a step that was not skipped; steps and replay both call it, at the end."""

    def own_state(self) -> dict[str, Tensor]:
        """What a method's own state is, besides that of its trainables: the tensors themselves, by name."""
        return {}

    @functools.cached_property
    def fork(self) -> Fork | Tail | None:
        """Where the row groups part, None if at once. Raises ValueError where what was asked for can't be."""
        return fork_of(self.model, self._fork_wanted, self._prefix_cache)

    def forking(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block forwards of the model, clean ones too, share what is before the fork and what it keeps."""
        return self.fork.open() if self.fork else contextlib.nullcontext()

    def make_rule(self, optimizer: str, trainables: Sequence[Trainable], **arguments: Any) -> optim.SGD:
        """What moves the values of `trainables`."""
        return optim.RULES[optimizer](
            {t.name: t.value for t in trainables},
            torch.cat([t.param_id for t in trainables]),
            gains={t.name: t.gain for t in trainables},
            masks={t.name: t.mask for t in trainables},
            along={t.name: t.along for t in trainables if t.along is not None},
            undecayed=[t.name for t in trainables if not t.decays],
            **arguments,
        )

    @classmethod
    def adopt(cls, model: nn.Module, layers: Sequence[str], state: Mapping[str, Tensor]) -> None:
        """Give a freshly loaded model the shape that it had in the run whose snapshot `state` is."""

    @property
    def whole_batch(self) -> bool:
        """Whether a step's examples can't be given in parts."""
        return self.spread

    @property
    def copies(self) -> int:
        """Of a batch, that a stacked forward is given: one for every row group, or for + and - of all queries."""
        return 2 if self.spread else self.groups

    @property
    def device(self) -> torch.device:
        """Where the model's layers, and so this optimizer's tensors, are."""
        return self.rule.param_ids.device

    def stack(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as a forward of this optimizer wants it: G copies of the examples, group after group.

        Repeats tensors whose first size is the batch size (that of "input_ids", else of the first tensor) and passes
        the rest on. In sequential mode a forward holds one group, and the batch comes back as it is.
        """
        if self.mode == "sequential":
            return dict(batch)
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
        if not tensors:
            raise ValueError(f"batch has no tensor with a batch dimension; its keys are {', '.join(batch)}")
        examples = tensors.get("input_ids", next(iter(tensors.values()))).shape[0]
        return {
            key: value.repeat(self.copies, *(1 for _ in value.shape[1:]))
            if key in tensors and value.shape[0] == examples
            else value
            for key, value in batch.items()
        }

    def step(self, closure: Callable[[], Tensor]) -> StepResult:
        """One step on the per-example losses that `closure()` computes, float32 or float64.

        stacked: called once, on inputs from `stack`; returns [G B] or [G, B], group after group.
        sequential: called once per group on the plain batch; returns [B] (or one number, the batch's loss).
        Every call must see the same batch: on the steps of `floor_every` they are all made a second time.
        """
        return self.step_on([lambda groups: closure()])

    def step_on(self, evaluations: Iterable[Evaluation], rows: tuple[int, ...] = ()) -> StepResult:
        """One step on a batch given in parts: each evaluation runs one micro-batch, evaluate(groups) -> [groups, B].

        The parts see the same seeds, and their examples' losses are put side by side before anything is summed, so the
        parts do not show in the result.
        rows: leading sizes that one group may have in a layer (B, or B T where the model flattens tokens); anything
        else raises with the layer's name. () allows all that the groups divide.
        Raises ValueError for losses of a wrong shape or in 16 bits, RuntimeError for layers that got another C since.
        """
        parts = list(evaluations)
        if not parts:
            raise ValueError("evaluations is empty; a step needs at least one batch")
        if self.whole_batch and len(parts) > 1:
            raise ValueError(f"{self.name} deals noise out to a whole batch; it is given in {len(parts)} micro-batches")
        self._prepare()
        with evaluating(self.model):
            shrunk = self._evaluate(parts, estimators.FLOOR_SHRINK, rows).cpu() if self._floor_is_due() else None
            losses = self._on_device(parts, rows)
        return self._finish(losses.cpu(), shrunk)

    def replay(self, rows: Iterable[LoggedStep]) -> None:
        """Apply logged steps without evaluating the model; values and moments become those of the logged run.

        rows: consecutive steps from `iteration` on. Raises ValueError where one is missing or does not fit, and for a
        method that is not `replayable`.
        """
        if not self.replayable:
            raise ValueError(f"{self.name} can't be replayed: its steps need the model, not only seeds and weights")
        for row in rows:
            if row.step != self.iteration:
                raise ValueError(f"the log goes on with step {row.step}; step {self.iteration} is next")
            if row.seeds.shape != self._seeds.shape or row.weights.shape != self._weights.shape:
                raise ValueError(
                    f"step {row.step} has seeds {tuple(row.seeds.shape)} and weights {tuple(row.weights.shape)}; "
                    f"with {self.queries} queries they are ({self.draws()},)"
                )
            self._check()
            self.refresh()
            self._seeds.copy_(row.seeds)
            self._weights.copy_(row.weights)
            self.rule.update(self._seeds, self._weights, lr=row.lr, skipped=row.skipped)
            self._settle()
            if not row.skipped:
                self.observe(row.losses)
            self.iteration += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that a bit-exact resume needs besides the arguments, by the names of room `state`."""
        return state_of(self._counters(), self.trainables, self.rule, self.own_state())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a `state_dict` of an equally configured optimizer over the same model, values and bases included.

        Raises ValueError for entries that are missing, unknown or of another shape, before anything is changed.
        """
        restore(state, self._counters(), self.trainables, self.rule, self.own_state())
        self.seed, self.iteration, self.floor = int(state["seed"]), int(state["iteration"]), float(state["floor"])
        self._recent.clear()

    def _counters(self) -> dict[str, Tensor]:
        floor = torch.tensor(self.floor, dtype=torch.float64)
        return {"seed": torch.tensor(self.seed), "iteration": torch.tensor(self.iteration), "floor": floor}

    # --- the parts of a step ------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """What the host decides before the device runs: the seeds, and the numbers of the rule."""
        self._check()
        self.refresh()
        self._seeds.copy_(self._draw())
        self.rule.prepare(self._rate())

    def _draw(self) -> Tensor:
        """Seeds of step `iteration`, int64 [S] on the CPU."""
        return torch.tensor([rng.seed_for(self.seed, self.iteration, query) for query in range(self.draws())])

    def _on_device(self, parts: Sequence[Evaluation], rows: tuple[int, ...], dry: bool = False) -> Tensor:
        """Evaluate, estimate, update: losses float64 [G, B]. The host neither waits nor decides in between, so a CUDA
        graph can hold it (StepGraph). dry: change nothing."""
        losses, weights = self._estimate(parts, rows)
        self._take(losses, weights, dry)
        self.rule.launch(self._seeds, self._weights)
        self._settle()
        return losses

    def _take(self, losses: Tensor, weights: Tensor, dry: bool) -> None:
        """The weights [S] of a step, which is skipped where they, or the losses that they come from, are no use."""
        self._weights.copy_(weights)
        fine = torch.isfinite(losses).all() & torch.isfinite(self._weights).all()
        if self.scaling == "std":  # zeros where all queries saw the same
            fine &= self._weights.any()
        self.rule.skip.copy_(fine.logical_not())
        if dry:
            self.rule.skip.fill_(True)

    def _estimate(self, parts: Sequence[Evaluation], rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Losses float64 [G, B] and the weights [S] that they give `_seeds`, on the device. Raises nothing for NaN."""
        losses = self._evaluate(parts, 1.0, rows)
        estimate = (losses, self.sides, self.queries, self.sigma)
        return losses, estimators.weights(*estimate, scaling=self.scaling, clip=self.clip)

    def _finish(self, losses: Tensor, shrunk: Tensor | None) -> StepResult:
        """Count the step and tell what it did, once its losses [G, B] are on the CPU."""
        if shrunk is not None:
            self.floor = estimators.rounding_floor(losses[: self.groups], shrunk, self.sides, self.queries)
        step, lr, signal = self.iteration, self._rate(), self._signal(losses)
        seeds, weights = (tensor.to("cpu", copy=True) for tensor in (self._seeds, self._weights))
        reason = self._reason(losses, weights) if bool(self.rule.skip) else ""
        self.rule.finish()
        if not reason:
            self.observe(losses)
        self.iteration += 1
        note, self.note = self.note, ""
        return StepResult(
            step, seeds, losses, weights, lr, bool(reason), reason, signal, self.floor, self._advice(signal), note
        )

    def _rate(self) -> float:
        return optim.learning_rate(
            self.iteration, lr=self.lr, schedule=self.schedule, steps=self.steps, warmup=self.warmup
        )

    def _floor_is_due(self) -> bool:
        return self.floor_every > 0 and self.iteration % self.floor_every == 0

    def _evaluate(
        self, parts: Sequence[Evaluation], shrink: float, rows: tuple[int, ...], radii: Radii | None = None
    ) -> Tensor:
        """Losses float64 [G, B] of all parts side by side, at `radii` (None: the estimator's) * shrink."""
        radii = radii or self._radii
        with self.forking():
            return torch.cat([torch.cat(list(self._groups(part, shrink, rows, radii))) for part in parts], dim=1)

    def _groups(self, evaluate: Evaluation, shrink: float, rows: tuple[int, ...], radii: Radii) -> Iterator[Tensor]:
        """Losses of one part: [G, B] at once when stacked, else [1, B] group by group."""
        groups = len(radii.used)
        if self.mode == "stacked":
            copies = 2 if self.spread else groups
            leading = tuple(copies * size for size in rows)
            seeds, sigmas = self._noises(radii, slice(None))
            if self.spread:  # one copy of the batch for all +, one for all -; in each a part for every query
                sigmas = torch.cat([sigmas[0::2], sigmas[1::2]])
            with perturbed(self.model, seeds, sigmas * shrink, self.noise, leading, copies):
                losses = estimators.per_example(evaluate(copies), copies)
            if self.spread and losses.shape[1] % self.queries:
                raise ValueError(f"a batch has {losses.shape[1]} examples; {self.queries} queries can't share them")
            yield losses.unflatten(1, (-1, losses.shape[1] * copies // groups)).transpose(0, 1).flatten(0, 1)
            return
        examples = 0
        for g in range(groups):
            seeds, sigmas = self._noises(radii, slice(g, g + 1))
            with perturbed(self.model, seeds, sigmas * shrink, self.noise, rows):
                losses = estimators.per_example(evaluate(1), 1)
            if examples not in (0, losses.numel()):
                raise ValueError(f"a group has {losses.numel()} losses, another {examples}; all see the same batch")
            examples = losses.numel()
            yield losses

    def _noises(self, radii: Radii, groups: slice) -> tuple[Tensor, Tensor]:
        """Seeds [S'] that some of `groups` have, one at least, and their radii [groups, S'], on the device."""
        used = sorted(set().union(*radii.used[groups])) or [0]
        seeds = torch.cat([self._seeds[s : s + 1] for s in used])
        return seeds, torch.cat([radii.table[groups, s : s + 1] for s in used], dim=1)

    def _signal(self, losses: Tensor) -> float:
        return float(estimators.contrasts(losses, self.sides, self.queries).abs().mean())

    def _reason(self, losses: Tensor, weights: Tensor) -> str:
        """Why a step had to be skipped."""
        bad = (~torch.isfinite(losses)).sum(dim=1)
        if bool(bad.any()):
            group = int(bad.argmax())
            return f"{int(bad[group])} of {losses.shape[1]} losses of group {group} are not finite"
        if not bool(torch.isfinite(weights).all()):
            return "the loss differences overflow float32"
        return "the losses of all queries are equal, so they cannot be normalised by their spread"

    def _advice(self, signal: float) -> float | None:
        """A better sigma where the recent signal drowns in rounding; warns the first time it does."""
        if math.isfinite(signal):
            self._recent.append(signal)
        if len(self._recent) < RECENT:
            return None
        mean = sum(self._recent) / RECENT
        better = estimators.better_sigma(mean, self.floor, self.sigma)
        if better is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"the loss differences ({mean:.1e}) drown in rounding ({self.floor:.1e}) at sigma={self.sigma:g}; "
                f"try sigma={better:g}, or higher precision",
                stacklevel=4,
            )
        return better

    def _settle(self) -> None:
        for trainable in self.trainables.values():
            trainable.settle()

    def _check(self) -> None:
        for trainable in self.trainables.values():
            trainable.check()
