"""Rules fed with gradients: torch.optim's own to the bit, and SUMO against its formulas in float64."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from close import assert_no_worse
from torch import Tensor, nn

from zoact_kernels import first_order, rng
from zoact_kernels.first_order import SUMO, polar

SHAPES = {"w": (13, 7), "wide": (5, 17), "norm": (11, 1), "layernorm": (3, 1), "one": (1, 1)}
SEEDS = torch.tensor([5, 6])


def draw(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return rng.noise("normal", seed, zlib.crc32(name.encode()), *shape)


def values(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: draw(name, shape).to(dtype) for name, shape in SHAPES.items()}


def ids(given: dict[str, Tensor]) -> Tensor:
    return torch.tensor([zlib.crc32(name.encode()) for name in given])


def make(rule: str, given: dict[str, Tensor], **arguments: Any) -> Any:
    return first_order.RULES[rule](given, ids(given), **arguments)


def step(rule: Any, seed: int, lr: float = 0.01, skipped: bool = False) -> dict[str, Tensor]:
    """One step along gradients of that seed, which are returned."""
    rule.prepare(lr)
    rule.gradients = {name: draw(name, SHAPES.get(name, (7, 9)), seed) for name in rule.coeffs}
    given = dict(rule.gradients)
    rule.skip.fill_(skipped)
    rule.launch(SEEDS)
    rule.finish()
    return given


# --- torch.optim's ----------------------------------------------------------------------------------------------------

TORCH: dict[str, Any] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, foreach=False),
    "adam": lambda groups, lr: torch.optim.Adam(groups, lr=lr, betas=(0.8, 0.99), eps=1e-6, foreach=False),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.99), eps=1e-6, foreach=False),
}


@pytest.mark.parametrize("decay", (0.0, 0.1))
@pytest.mark.parametrize("rule", TORCH)
def test_the_bits_of_torch(rule: str, decay: float) -> None:
    ours, theirs = values(), {name: nn.Parameter(value) for name, value in values().items()}
    own = make(rule, ours, betas=(0.8, 0.99), eps=1e-6, weight_decay=decay, undecayed=["norm", "layernorm"])
    bare = [p for name, p in theirs.items() if "norm" in name]
    rest = [p for name, p in theirs.items() if "norm" not in name]
    groups = [{"params": rest, "weight_decay": decay}, {"params": bare, "weight_decay": 0.0}]
    reference = TORCH[rule](groups, 0.01)
    for seed in range(1, 6):
        for name, g in step(own, seed).items():
            theirs[name].grad = g
        reference.step()
    assert all(torch.equal(ours[name], p) for name, p in theirs.items())
    assert not torch.equal(ours["w"], values()["w"]) and own.t == 5


# --- SUMO -------------------------------------------------------------------------------------------------------------


def graded(seed: int, dtype: torch.dtype, N: int = 13, K: int = 7) -> Tensor:
    """A gradient whose leading directions are far from each other: 1, 1/3, 1/9 ..., so that Q is well defined."""
    x, _ = torch.linalg.qr(draw("x", (N, N), seed).double())
    y, _ = torch.linalg.qr(draw("y", (K, K), seed).double())
    n = min(N, K)
    return (x[:, :n] * 3.0 ** -torch.arange(n) @ y[:, :n].T).to(dtype)


class Sheet:
    """The formulas, with matrices: written after the sheet, in the dtype of theta."""

    def __init__(self, theta: Tensor, rank: int, period: int, beta: float, scale: float, growth: float) -> None:
        self.theta, self.rank, self.period, self.beta = theta, rank, period, beta
        self.scale, self.growth, self.t, self.size = scale, growth, 0, 0.0

    def step(self, g: Tensor, lr: float, decay: float) -> None:
        if self.t % self.period == 0:
            x, _, _ = torch.linalg.svd(g)
            new = x[:, : self.rank]
            self.s = (new.T @ self.q) @ self.s if self.t else torch.zeros(self.rank, g.shape[1], dtype=g.dtype)
            self.q = new
        self.s = self.beta * self.s + self.q.T @ g
        x, sigma, y = torch.linalg.svd(self.s, full_matrices=False)
        o = x @ torch.diag((sigma > 1e-6 * sigma[0]).to(g.dtype)) @ y
        if self.t and o.norm() > self.growth * self.size:
            o = o * (self.growth * self.size / o.norm())
        self.size = o.norm()
        self.theta = self.theta - self.scale * lr * self.q @ o - lr * decay * self.theta
        self.t += 1


@pytest.mark.parametrize("shape", [(13, 7), (7, 13), (5, 2), (2, 5)])
@pytest.mark.parametrize("rank", (1, 3))
def test_sumo_is_the_sheet(shape: tuple[int, int], rank: int) -> None:
    """Over two renewals of Q, with decay: theta after every step."""
    theta = {"": draw("w", shape)}
    rule = make("sumo", theta, rank=rank, period=2, scale=0.7, growth=1.2, betas=(0.9, 0.99), weight_decay=0.1)
    given = (min(rank, *shape), 2, 0.9, 0.7, 1.2)
    plain, truth = (Sheet(theta[""].to(dtype), *given) for dtype in (torch.float32, torch.float64))
    for seed in range(1, 6):
        rule.prepare(0.05)
        rule.gradients = {"": graded(seed, torch.float32, *shape)}
        rule.launch(SEEDS)
        rule.finish()
        for sheet in (plain, truth):
            sheet.step(graded(seed, torch.float32, *shape).to(sheet.theta.dtype), 0.05, 0.1)
        assert_no_worse(theta[""], plain.theta, truth.theta, f"step {seed}")
    assert (theta[""] - draw("w", shape)).abs().max() > 1e-2


def test_momentum_is_carried_into_a_new_subspace() -> None:
    """Q turned by 90 degrees keeps nothing of S, an unchanged Q all of it: a step without gradient shows which."""
    for same in (False, True):
        theta = {"": torch.zeros(4, 3)}
        rule = make("sumo", theta, rank=1, period=2, growth=1e9)
        first, other = torch.zeros(4, 3), torch.zeros(4, 3)
        first[0, 0] = other[0 if same else 1, 1] = 1.0
        for g in (first, first, other):
            rule.prepare(1.0)
            rule.gradients = {"": g}
            before = theta[""].clone()
            rule.launch(SEEDS)
            rule.finish()
        moved = (before - theta[""])[0 if same else 1]
        carried = 0.9 * (1 + 0.9) if same else 0.0  # of S, along the first column
        wanted = torch.tensor([carried, 1.0, 0.0], dtype=torch.float64) / (1 + carried**2) ** 0.5
        assert_no_worse(moved.abs(), wanted.float(), wanted)


def test_the_limiter() -> None:
    """|O| is the root of the rank of S: when that grows, a step may be `growth` times as long as the one before."""
    theta = {"": torch.zeros(6, 5)}
    rule = make("sumo", theta, rank=4, period=1, growth=1.1, betas=(0.0, 0.0))
    one, four = torch.zeros(6, 5), torch.zeros(6, 5)
    one[0, 0] = 2.0
    four[:4, :4] = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    lengths = []
    for g in (one, *[four] * 9, one, four):
        rule.prepare(0.5)
        rule.gradients, before = {"": g}, theta[""].clone()
        rule.launch(SEEDS)
        rule.finish()
        lengths.append(float((theta[""] - before).norm()) / 0.5)
    wanted = [min(1.1**i, 2.0) for i in range(10)] + [1.0, 1.1]
    assert lengths == pytest.approx(wanted, rel=1e-5)


def test_orthogonalisation_is_exact_where_newton_schulz_is_not() -> None:
    """Singular values over five orders of magnitude: the polar factor has ones, and five rounds of NS5 have not."""
    x, _ = torch.linalg.qr(draw("x", (6, 6)).double())
    y, _ = torch.linalg.qr(draw("y", (11, 6)).double())
    s = ((x * 10.0 ** -torch.arange(6)) @ y.T).float()
    u, _, v = torch.linalg.svd(s.double(), full_matrices=False)
    assert_no_worse(polar(s), (u @ v).float(), u @ v)
    rounds = s / s.norm()
    for _ in range(5):
        gram = rounds @ rounds.T
        rounds = 3.4445 * rounds + (-4.7750 * gram + 2.0315 * gram @ gram) @ rounds
    assert (torch.linalg.svdvals(polar(s)) - 1).abs().max() < 1e-5 < (torch.linalg.svdvals(rounds) - 1).abs().max()
    assert torch.linalg.svdvals(polar(graded(1, torch.float32)[:, :1] @ draw("y", (1, 7)))).round().sum() == 1
    assert not polar(torch.zeros(3, 5)).any()


def test_vectors_go_by_adamw() -> None:
    ours, theirs = values(), values()
    sumo, adamw = make("sumo", ours, weight_decay=0.1), make("adamw", theirs, weight_decay=0.1)
    for seed in range(1, 4):
        step(sumo, seed)
        step(adamw, seed)
    assert {name for name in SHAPES if torch.equal(ours[name], theirs[name])} == {"norm", "layernorm", "one"}


def test_no_gradient_no_step() -> None:
    theta = {"w": draw("w", (13, 7))}
    rule = make("sumo", theta)
    rule.prepare(1.0)
    rule.gradients = {"w": torch.zeros(13, 7)}
    rule.launch(SEEDS)
    assert torch.equal(theta["w"], draw("w", (13, 7)))


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", first_order.RULES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits_are_rounded_stochastically(rule: str, dtype: torch.dtype) -> None:
    """Reckoned in fp32 from what is stored, then rounded by the first seed and the parameter's own noise."""
    ours = values(dtype)
    own = make(rule, ours, weight_decay=0.1)
    for seed in range(1, 4):
        exact = {name: value.float() for name, value in ours.items()}
        twin = make(rule, exact, weight_decay=0.1)
        twin.load_state_dict(own.state_dict())
        step(own, seed)
        step(twin, seed)
        for name, value in exact.items():
            wanted = rng.round_stochastic(value, dtype, int(SEEDS[0]), zlib.crc32(name.encode()))
            assert torch.equal(ours[name], wanted) and ours[name].dtype == dtype
    assert all(moment.dtype == torch.float32 for key, moment in own.state_dict().items() if key != "t")


@pytest.mark.parametrize("rule", first_order.RULES)
def test_a_skipped_step_changes_nothing(rule: str) -> None:
    ours = values()
    own = make(rule, ours)
    step(own, 1)
    before = {**own.state_dict(), **{name: value.clone() for name, value in ours.items()}}
    own.prepare(0.1)
    own.gradients = {name: torch.full_like(value, float("nan")) for name, value in ours.items()}
    own.skip.fill_(True)
    own.launch(SEEDS)
    own.finish()
    after = {**own.state_dict(), **ours}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("rule", first_order.RULES)
def test_state(rule: str) -> None:
    """Taken over at any step, also between two renewals of Q, a rule goes on to the same bits."""
    more = {"period": 3} if rule == "sumo" else {}
    whole = values()
    own = make(rule, whole, **more)
    for seed in range(1, 7):
        state, held = own.state_dict(), {name: value.clone() for name, value in whole.items()}
        other = make(rule, held, **more)
        other.load_state_dict(state)
        step(own, seed)
        step(other, seed)
        assert all(torch.equal(held[name], value) for name, value in whole.items())
        assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in own.state_dict().items())
    with pytest.raises(ValueError, match="has no 't'"):
        own.load_state_dict({})
    with pytest.raises(ValueError, match="unknown here"):
        own.load_state_dict({**own.state_dict(), "more": torch.zeros(1)})


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        ("adam", {"betas": (1.0, 0.9)}, "betas are"),
        ("sgd", {"weight_decay": -1.0}, "weight_decay -1.0"),
        ("adamw", {"eps": -1.0}, "eps is -1.0"),
        ("sumo", {"rank": 0}, "rank is 0"),
        ("sumo", {"period": 0}, "period 0"),
        ("sumo", {"scale": 0.0}, "scale 0.0"),
        ("sumo", {"growth": 0.9}, "growth 0.9"),
    ],
)
def test_what_is_refused(rule: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(rule, values(), **arguments)


def test_ranks_are_bounded_by_the_matrix() -> None:
    rule = SUMO({"w": torch.zeros(3, 50)}, torch.tensor([1]), rank=8)
    assert {k: tuple(m.shape) for k, m in rule.moments["w"].items()} == {
        "subspace": (3, 3), "momentum": (3, 50), "norm": (),
    }  # fmt: skip
