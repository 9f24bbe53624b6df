"""Update rules over regenerated noise: the host side of `zo_update_`, one launch for all layers of a model.

    g = sum_s weights[s] Z(seeds[s])        per layer, made in registers; lr, t and the rest are one small tensor

    sgd        g += wd C;  C <- C - lr g
    sign       sgd fed sign(weights)/S: the sign of the scalars
    momentum   g += wd C;  m <- beta1 m + g;  C <- C - lr m
    ema        momentum fed (1 - beta1) g
    adam       g += wd C;  m <- beta1 m + (1-beta1) g;  v <- beta2 v + (1-beta2) g^2;
               C <- C - lr (m / (1-beta1^t)) / (sqrt(v / (1-beta2^t)) + eps)
    adamw      C <- C - lr wd C first, then adam without wd

The formulas are torch.optim's and so are the results, within float32 (test_optim_equals_torch). t counts applied
updates: a skipped step changes nothing, t included.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops  # defines torch.ops.zoact
from .estimators import SCALINGS
from .perturbation import Mask

SCHEDULES = ("constant", "linear", "cosine")
HYPER_DECAY = ops.HYPER.index("weight_decay")


class _Launch(NamedTuple):
    """What one call of the op moves: names, their rows in weights [L, S], their ids, the numbers of the rule."""

    names: list[str]
    rows: Tensor
    ids: Tensor
    hyper: Tensor


class SGD:
    """C <- C - lr (g + wd C). The base of the others: they add moments.

    coeffs: {name: C [N, R]}, contiguous, all on one device; they are updated in place. float32; a rule without moments
        takes bfloat16 and float16 as well, without weight decay, and rounds them stochastically: to nearest, a step
        below half an ulp would be lost every time.
    gains: {name: factor on g}, where it is not 1. masks: {name: what of it may move}. along: {name: A [C, R]}, of a
        [N, C] that moves along Z A^T, Z [N, R], instead of Z. Both take a rule without moments and no weight decay.
        undecayed: names that weight decay leaves alone.
    param_ids: int64 [L], in the order of `coeffs`: the noise of each layer.
    """

    rule = "sgd"
    moments = 0  # tensors of C's shape kept per layer

    def __init__(
        self,
        coeffs: Mapping[str, Tensor],
        param_ids: Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        noise: str = "normal",
        gains: Mapping[str, float] | None = None,
        masks: Mapping[str, Mask] | None = None,
        undecayed: Collection[str] = (),
        along: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.along = dict(along or {})
        self.masks = {name: mask for name, mask in (masks or {}).items() if mask.kind != "none"}
        _check(coeffs, param_ids, betas, eps, weight_decay, self.moments == 0)
        if (self.masks or self.along) and (self.moments or weight_decay):
            what = "masks" if self.masks else "directions along a basis"
            raise ValueError(
                f"rule {self.rule} with weight_decay {weight_decay} takes no {what}; sgd and sign without do"
            )
        self.coeffs = dict(coeffs)
        self.betas, self.eps, self.weight_decay, self.noise = betas, eps, weight_decay, noise
        device = param_ids.device
        self.param_ids = param_ids
        # One launch for those that it takes, two if some of them decay and some don't; the others one by one.
        names = list(self.coeffs)
        self._single = [
            i
            for i, (name, c) in enumerate(self.coeffs.items())
            if name in self.masks or name in self.along or c.dtype != torch.float32
        ]
        fused = [i for i in range(len(names)) if i not in self._single]
        bare = [i for i in fused if weight_decay and names[i] in undecayed]
        self.hyper = torch.zeros(7, dtype=torch.float32, device=device)
        self._launches = [
            _Launch([names[i] for i in part], torch.tensor(part, device=device), param_ids[part], hyper)
            for part, hyper in (([i for i in fused if i not in bare], self.hyper), (bare, self.hyper.clone()))
            if part
        ]
        factors = [(gains or {}).get(name, 1.0) for name in self.coeffs]
        # [L, 1]; a method may put a tensor of its own here, which it fills before each step
        self.gains = torch.tensor(factors, device=device)[:, None] if any(f != 1 for f in factors) else None
        self.t = 0
        self.skip = torch.zeros(1, dtype=torch.bool, device=device)
        self.exp_avgs, self.exp_avg_sqs = (
            {name: torch.zeros_like(c, requires_grad=False) for name, c in self.coeffs.items()} if held else {}
            for held in (self.moments > 0, self.moments > 1)
        )

    def weights(self, weights: Tensor) -> Tensor:
        """What the rule makes of the estimator's weights [S] or [L, S]."""
        return weights

    def update(self, seeds: Tensor, weights: Tensor, *, lr: float, skipped: bool = False) -> None:
        """One step along g = sum weights Z. seeds int64 [S], weights float32 [S] or [L, S], on the device of C.

        skipped: C, moments and t stay as they are, bit for bit, whatever the weights hold.
        """
        self.prepare(lr)
        self.skip.fill_(skipped)
        self.launch(seeds, weights)
        self.finish()

    def prepare(self, lr: float) -> None:
        """The numbers of the next step into `hyper`, from the host."""
        t = self.t + 1
        # As the kernel sees them: 1 - fp32(0.999) is off by 1.3e-5, and the correction has to match it.
        beta1, beta2 = (torch.tensor(beta, dtype=torch.float32).item() for beta in self.betas)
        hyper = (lr, beta1, beta2, self.eps, self.weight_decay, 1 - beta1**t, 1 - beta2**t)
        self.hyper.copy_(torch.tensor(hyper, dtype=torch.float64))
        for launch in self._launches:
            if launch.hyper is not self.hyper:
                launch.hyper.copy_(self.hyper)
                launch.hyper[HYPER_DECAY] = 0

    @torch.no_grad()
    def launch(self, seeds: Tensor, weights: Tensor) -> None:
        """The step itself, or nothing where `skip` is set: device work only, so a CUDA graph can hold it."""
        weights = self.weights(weights)
        if self.gains is not None:
            weights = self.gains * weights
        for names, rows, ids, hyper in self._launches:
            values, *moments = (
                [held[name] for name in names] if held else []
                for held in (self.coeffs, self.exp_avgs, self.exp_avg_sqs)
            )
            own = weights[rows] if weights.dim() == 2 and len(names) < len(self.coeffs) else weights
            torch.ops.zoact.zo_update_(values, *moments, ids, seeds, own, hyper, self.skip, self.rule, self.noise)
        if not self._single or (self.skip.device.type == "cpu" and bool(self.skip)):
            return
        moves = torch.where(self.skip, torch.zeros_like(weights), -self.hyper[0] * weights)
        items = list(self.coeffs.items())
        for i in self._single:
            name, value = items[i]
            own, mask = moves[i] if moves.dim() == 2 else moves, self.masks.get(name, Mask())
            torch.ops.zoact.zo_perturb_(
                value, seeds, own, self.param_ids[i : i + 1], self.along.get(name), None, mask.value, mask.seed,
                seeds[:1], self.noise, mask.kind,
            )  # fmt: skip

    def finish(self) -> None:
        """Count the step that `launch` made, unless it was skipped: waits for the device."""
        self.t += not bool(self.skip)

    def save(self) -> list[Tensor]:
        """Copies of all that `launch` writes, in the order of `written`."""
        return [tensor.detach().clone() for tensor in self.written()]

    @torch.no_grad()
    def restore(self, saved: Sequence[Tensor], where: Tensor | None = None) -> None:
        """What `save` gave, back in its place; where: bool [1] on the device, False to leave everything as it is."""
        for tensor, before in zip(self.written(), saved, strict=True):
            tensor.copy_(before if where is None else torch.where(where, before, tensor))

    def written(self) -> list[Tensor]:
        """The values and their moments."""
        return [*self.coeffs.values(), *self.exp_avgs.values(), *self.exp_avg_sqs.values()]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of t and the moments, tensors only: "t" int64 [], "exp_avg/<name>", "exp_avg_sq/<name>"."""
        state = {"t": torch.tensor(self.t)}
        for kind, tensors in self._moments():
            state |= {f"{kind}/{name}": m.detach().clone() for name, m in tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a `state_dict` of the same rule over equally named and shaped layers, in place.

        Raises ValueError for missing or surplus entries or another shape, before anything is changed.
        """
        wanted = {f"{kind}/{name}": m for kind, tensors in self._moments() for name, m in tensors.items()}
        check_entries(state, {"t": torch.tensor(0), **wanted}, f"state of {self.rule}")
        for key, moment in wanted.items():
            moment.copy_(state[key])
        self.t = int(state["t"])

    def _moments(self) -> tuple[tuple[str, dict[str, Tensor]], ...]:
        return (("exp_avg", self.exp_avgs), ("exp_avg_sq", self.exp_avg_sqs))


class Sign(SGD):
    """SGD along the signs of the scalars: every query counts the same, and the step has no scale but lr."""

    def weights(self, weights: Tensor) -> Tensor:
        return SCALINGS["sign"](weights, math.inf) / weights.shape[-1]


class Momentum(SGD):
    """Heavy ball, beta1 = betas[0], no dampening."""

    rule = "momentum"
    moments = 1


class EMA(Momentum):
    """Heavy ball with dampening: m <- beta1 m + (1 - beta1) g, a mean rather than a sum of past estimates."""

    def weights(self, weights: Tensor) -> Tensor:
        return (1 - self.hyper[1]) * weights


class Adam(Momentum):
    """Adam on C; weight decay, if any, is L2 through the moments."""

    rule = "adam"
    moments = 2


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    rule = "adamw"


RULES: dict[str, type[SGD]] = {"sgd": SGD, "sign": Sign, "momentum": Momentum, "ema": EMA, "adam": Adam, "adamw": AdamW}


class Turns:
    """A rule for each part of a model, with steps and moments of its own; a step moves those parts whose turn it is.

    turn: indices of these parts. Where it is the turn of n parts, seeds and weights of a step are n times those of one,
    part after part.
    """

    def __init__(self, rules: Sequence[SGD]) -> None:
        self.rules, self.turn = list(rules), [0]
        self.coeffs = {name: c for rule in rules for name, c in rule.coeffs.items()}
        self.param_ids = torch.cat([rule.param_ids for rule in rules])
        self.skip = rules[0].skip
        for rule in rules:
            rule.skip = self.skip

    @property
    def moving(self) -> list[SGD]:
        return [self.rules[part] for part in self.turn]

    def update(self, seeds: Tensor, weights: Tensor, *, lr: float, skipped: bool = False) -> None:
        self.prepare(lr)
        self.skip.fill_(skipped)
        self.launch(seeds, weights)
        self.finish()

    def prepare(self, lr: float) -> None:
        for rule in self.moving:
            rule.prepare(lr)

    def launch(self, seeds: Tensor, weights: Tensor) -> None:
        own = len(seeds) // len(self.turn)
        for rule, its_seeds, its_weights in zip(self.moving, seeds.split(own), weights.split(own), strict=True):
            rule.launch(its_seeds, its_weights)

    def finish(self) -> None:
        for rule in self.moving:
            rule.finish()

    def written(self) -> list[Tensor]:
        """The values and moments of the parts whose turn it is."""
        return [tensor for rule in self.moving for tensor in rule.written()]

    save, restore = SGD.save, SGD.restore

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of every part's t and moments, under "<part>/"."""
        return {f"{i}/{key}": t for i, rule in enumerate(self.rules) for key, t in rule.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As of one rule."""
        check_entries(state, self.state_dict(), "state of the rules")
        for i, rule in enumerate(self.rules):
            rule.load_state_dict({key[len(f"{i}/") :]: t for key, t in state.items() if key.startswith(f"{i}/")})


def learning_rate(
    step: int, *, lr: float, schedule: str = "constant", steps: int | None = None, warmup: int = 0
) -> float:
    """Learning rate of step `step` (from 0), a pure function.

    The first `warmup` steps rise linearly, (step + 1) / warmup of lr. Then "constant" stays, "linear" and "cosine" fall
    from lr to 0 at `steps` (which they need), and stay 0 after it.
    """
    check_schedule(schedule, steps, warmup)
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant" or steps is None:
        return lr
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return lr * (1.0 - done) if schedule == "linear" else lr * 0.5 * (1.0 + math.cos(math.pi * done))


def check_schedule(schedule: str, steps: int | None, warmup: int) -> None:
    """Raises ValueError for an unknown schedule, a decaying one without `steps`, or a warmup outside 0 to steps."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; it may be {', '.join(SCHEDULES)}")
    if schedule != "constant" and (steps is None or steps < 1):
        raise ValueError(f"steps is {steps}; schedule {schedule!r} decays over a known number of steps, at least 1")
    if warmup < 0 or (steps is not None and warmup > steps):
        raise ValueError(f"warmup is {warmup}; it may be 0 to {steps if steps is not None else 'any number of'} steps")


def check_entries(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError unless `state` has exactly the keys and shapes of `wanted`; names the first offender."""
    for key, tensor in wanted.items():
        if key not in state:
            raise ValueError(f"{what} has no {key!r}: it belongs to another model or rule")
        if state[key].shape != tensor.shape:
            raise ValueError(f"{what}: {key!r} is {tuple(state[key].shape)}; here it is {tuple(tensor.shape)}")
    surplus = next((key for key in state if key not in wanted), None)
    if surplus is not None:
        raise ValueError(f"{what} has {surplus!r}, unknown here: it belongs to another model or rule")


def _check(
    coeffs: Mapping[str, Tensor],
    param_ids: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounds: bool,
) -> None:
    if param_ids.dtype != torch.int64 or param_ids.shape != (len(coeffs),):
        raise ValueError(f"param_ids are {param_ids.dtype} {tuple(param_ids.shape)}; needed are int64 ({len(coeffs)},)")
    for name, c in coeffs.items():
        sixteen = c.dtype in (torch.bfloat16, torch.float16)
        if sixteen and rounds and weight_decay:
            raise ValueError(f"weight_decay is {weight_decay}, and {name} is {c.dtype}: only float32 weights decay")
        taken = c.dtype == torch.float32 or (sixteen and rounds)
        if not taken or not c.is_contiguous() or c.device != param_ids.device:
            raise ValueError(
                f"coeff of {name} is {c.dtype} on {c.device}{'' if c.is_contiguous() else ', not contiguous'}; "
                f"a rule updates contiguous float32 on one device ({param_ids.device}): 16 bits lose small updates"
            )
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}; each lies in [0, 1)")
    if eps < 0 or weight_decay < 0:
        raise ValueError(f"eps is {eps} and weight_decay {weight_decay}; neither may be negative")
