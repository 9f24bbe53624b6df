"""What every method is held to, whatever it perturbs: exact resumes and replays, batches in parts, the sign of a step.

`fresh(**changes)` makes an optimizer over a new model, by the test's own arguments and those; `look(model)` are tensors
that have to agree besides the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zoact_kernels.methods import Evaluation, StepResult, ZeroOrder

Fresh = Callable[..., ZeroOrder]
Run = Callable[..., list[StepResult]]  # (optimizer, steps, parts of a batch = 1)
Look = Callable[[Any], Mapping[str, Tensor]]


def nothing(model: Any) -> dict[str, Tensor]:
    return {}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) or key in but for key in a)


def resumes(fresh: Fresh, run: Run, steps: int, *, look: Look = nothing, replays: bool = True) -> None:
    """After every step, from its snapshot, bit for bit; from the log alone too, the model never evaluated (`replays`).

    Whoever resumes has another seed. Nothing is read from, or left in, torch's global generator.
    """
    straight = fresh()
    states, log, generator = [straight.state_dict()], [], torch.get_rng_state()
    for _ in range(steps):
        log += run(straight, 1)
        states.append(straight.state_dict())
    assert torch.equal(torch.get_rng_state(), generator)

    def agrees(other: ZeroOrder) -> bool:
        return same(other.state_dict(), states[-1], ("floor", "seed"))

    for after in range(steps + 1):
        resumed = fresh(seed=0)
        resumed.load_state_dict(states[after])
        got = run(resumed, steps - after)
        assert all(torch.equal(a.losses, b.losses) for a, b in zip(got, log[after:], strict=True))
        assert agrees(resumed) and same(look(resumed.model), look(straight.model))
    if replays:
        replayed: Any = fresh(lr=123.0)
        replayed.model.forward = None
        replayed.replay(log)
        del replayed.model.forward
        assert agrees(replayed) and same(look(replayed.model), look(straight.model))


def same_in_parts(fresh: Fresh, run: Run, steps: int, *, look: Look = nothing) -> ZeroOrder:
    """Stacked, group after group, and in three micro-batches: the same bits. Returns the last optimizer."""
    results = []
    for changes, parts in (({}, 1), ({"mode": "sequential"}, 1), ({}, 3)):
        optimizer, generator = fresh(**changes), torch.get_rng_state()
        results.append((run(optimizer, steps, parts), optimizer.state_dict(), look(optimizer.model)))
        assert torch.equal(torch.get_rng_state(), generator)
    wanted, state, seen = results[0]
    for got, other, others in results[1:]:
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.losses, b.losses) and torch.equal(a.weights, b.weights)
        assert same(other, state, ("floor",)) and same(others, seen)
    return optimizer


def descends(fresh: Callable[[], tuple[ZeroOrder, Evaluation]], steps: int = 20, share: float = 0.1) -> None:
    """On one batch, and with the sign of its steps turned it ascends: by `share` of the loss at least."""
    for sign in (1, -1):
        optimizer, evaluate = fresh()
        before = float(evaluate(1).detach().mean())
        optimizer.lr = sign * optimizer.lr
        for _ in range(steps):
            optimizer.step_on([evaluate])
        after = float(evaluate(1).detach().mean())
        assert after < (1 - share) * before if sign > 0 else after > (1 + share) * before
