"""The update rules: torch.optim on the materialised gradient, skipped steps, state, schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from zoact_kernels import methods, optim, rng

SHAPES = {"one": (7, 1), "wide": (33, 4), "scalar": (1, 1), "odd": (5, 3)}
IDS = torch.tensor([3, 2**32 - 1, 77, 12345])
SEEDS = torch.tensor([5, -(2**62)])


def coefficients() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def step_weights(step: int) -> Tensor:
    return torch.tensor([0.3 - 0.2 * step, math.sin(step) - 0.4])


def gradients(weights: Tensor, noise: str) -> list[Tensor]:
    """sum_s weights[s] Z_s, materialised, float64. weights [S] or [L, S]."""
    table = weights.double().expand(len(SHAPES), -1)
    return [
        sum(
            float(w) * rng.noise(noise, int(seed), int(pid), *shape).double()
            for w, seed in zip(row, SEEDS, strict=True)
        )
        for row, pid, shape in zip(table, IDS, SHAPES.values(), strict=True)
    ]


TORCH = {
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd),
    "sign": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd),
    "momentum": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=wd),
    "ema": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=wd),
    "adam": lambda p, lr, wd: torch.optim.Adam(p, lr=lr, weight_decay=wd),
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd),
}


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rule", optim.RULES)
def test_optim_equals_torch(rule, weight_decay, noise):
    ours = coefficients()
    theirs = [c.double().requires_grad_() for c in coefficients().values()]
    opt = optim.RULES[rule](ours, IDS, weight_decay=weight_decay, noise=noise)
    ref = TORCH[rule](theirs, 1e-2, weight_decay)
    for step in range(6):
        weights = step_weights(step)
        opt.update(SEEDS, weights, lr=1e-2)
        fed = {"sign": weights.sign() / 2, "ema": 0.1 * weights}.get(rule, weights)
        for p, g in zip(theirs, gradients(fed, noise), strict=True):
            p.grad = g
        ref.step()
    for c, p in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(c.double(), p.detach(), rtol=2e-6, atol=2e-6)
    assert opt.t == 6


@pytest.mark.parametrize("rule", optim.RULES)
def test_optim_undecayed(rule):
    """Those that decay move as if all did, the others as if none did, bit for bit, weights per layer included."""
    bare = {"one", "odd"}
    found = []
    for decay, undecayed in ((0.1, ()), (0.0, ()), (0.1, bare), (0.1, SHAPES)):
        c = coefficients()
        opt = optim.RULES[rule](c, IDS, weight_decay=decay, undecayed=undecayed)
        for step in range(3):
            opt.update(SEEDS, torch.arange(8).view(4, 2) - 3.0 + step, lr=1e-2)
        found.append(c)
    decayed, none, mixed, all_bare = found
    for name in SHAPES:
        assert torch.equal(mixed[name], (none if name in bare else decayed)[name])
        assert torch.equal(all_bare[name], none[name]) and not torch.equal(none[name], decayed[name])


def test_mezo_decays_by_name():
    """Where nothing else moves, a bias or a layer norm stays as it is and the rest shrinks by lr wd; `norm` decays."""
    net = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("up", "layer_norm", "input_layernorm", "norm")})
    optimizer = methods.create("mezo", net, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.rule.update(torch.tensor([1]), torch.zeros(1), lr=0.25)
    for name, p in net.named_parameters():
        assert torch.equal(p.detach(), before[name] * (0.875 if name in ("up.weight", "norm.weight") else 1)), name


def test_optim_weights_per_layer():
    ours, before = coefficients(), coefficients()
    weights = torch.arange(8, dtype=torch.float32).view(4, 2) - 3
    optim.SGD(ours, IDS).update(SEEDS, weights, lr=0.1)
    for c, b, g in zip(ours.values(), before.values(), gradients(weights, "normal"), strict=True):
        torch.testing.assert_close(c.double(), b.double() - 0.1 * g, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", optim.RULES)
def test_optim_skip_changes_nothing(rule):
    ours = coefficients()
    opt = optim.RULES[rule](ours, IDS, weight_decay=0.1)
    opt.update(SEEDS, step_weights(0), lr=1e-2)
    before = {name: c.clone() for name, c in ours.items()}, opt.state_dict()
    opt.update(SEEDS, torch.tensor([math.nan, math.inf]), lr=1e-2, skipped=True)
    assert all(torch.equal(c, before[0][name]) for name, c in ours.items())
    assert all(torch.equal(value, before[1][key]) for key, value in opt.state_dict().items())


@pytest.mark.parametrize("rule", optim.RULES)
def test_optim_state_continues(rule):
    straight, resumed = coefficients(), coefficients()
    a = optim.RULES[rule](straight, IDS)
    for step in range(5):
        a.update(SEEDS, step_weights(step), lr=1e-2)
    b = optim.RULES[rule](resumed, IDS)
    for step in range(3):
        b.update(SEEDS, step_weights(step), lr=1e-2)
    state = b.state_dict()
    b.update(SEEDS, step_weights(9), lr=1.0)  # the state is a copy
    assert int(state["t"]) == 3
    again = {name: c.clone() for name, c in coefficients().items()}
    c = optim.RULES[rule](again, IDS)
    for step in range(3):
        c.update(SEEDS, step_weights(step), lr=1e-2)
    fresh = optim.RULES[rule](again, IDS)
    fresh.load_state_dict(state)
    for step in range(3, 5):
        fresh.update(SEEDS, step_weights(step), lr=1e-2)
    assert all(torch.equal(again[name], straight[name]) for name in straight)


def test_optim_state_of_another_rule_is_refused():
    sgd, adam = optim.SGD(coefficients(), IDS), optim.Adam(coefficients(), IDS)
    with pytest.raises(ValueError, match="has no 'exp_avg/one'"):
        adam.load_state_dict(sgd.state_dict())
    with pytest.raises(ValueError, match="unknown here"):
        sgd.load_state_dict(adam.state_dict())
    state = adam.state_dict()
    state["exp_avg/wide"] = torch.zeros(33, 5)
    with pytest.raises(ValueError, match=r"'exp_avg/wide' is \(33, 5\); here it is \(33, 4\)"):
        adam.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coeffs": {"one": torch.zeros(3, 1, dtype=torch.bfloat16)}, "param_ids": IDS[:1]}, "16 bits lose"),
        ({"coeffs": {"one": torch.zeros(3, 2).T}, "param_ids": IDS[:1]}, "not contiguous"),
        ({"param_ids": IDS[:2]}, r"int64 \(4,\)"),
        ({"betas": (0.9, 1.0)}, r"each lies in \[0, 1\)"),
        ({"weight_decay": -1.0}, "neither may be negative"),
    ],
)
def test_optim_errors(change, message):
    with pytest.raises(ValueError, match=message):
        optim.Adam(**{"coeffs": coefficients(), "param_ids": IDS, **change})


# --- schedules --------------------------------------------------------------------------------------------------------


def test_learning_rate():
    def rates(schedule: str, warmup: int = 0, steps: int = 8) -> list[float]:
        return [optim.learning_rate(t, lr=2.0, schedule=schedule, steps=8, warmup=warmup) for t in range(steps + 2)]

    assert rates("constant") == [2.0] * 10
    assert rates("linear") == [2.0 * (1 - t / 8) for t in range(8)] + [0.0, 0.0]
    assert rates("cosine") == pytest.approx([1 + math.cos(math.pi * min(t, 8) / 8) for t in range(10)])
    assert rates("linear", warmup=4)[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 1.5]
    assert optim.learning_rate(10**9, lr=0.1) == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", 10, 0), "schedule is 'step'"),
        (("cosine", None, 0), "steps is None"),
        (("linear", 0, 0), "steps is 0"),
        (("linear", 10, 11), "warmup is 11"),
        (("constant", None, -1), "warmup is -1"),
    ],
)
def test_learning_rate_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.check_schedule(*arguments)
