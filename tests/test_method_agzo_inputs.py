"""AGZO: whose inputs its A is made of, what A is, and what a batch or a model may not do to it."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from close import assert_no_worse
from test_method_agzo import FORMATS, PRESETS, make, sheet_basis
from torch import Tensor, nn

from zoact_kernels import methods, rng
from zoact_kernels.basis import power_basis
from zoact_kernels.layers import perturbation_of
from zoact_kernels.methods import AGZO
from zoact_kernels.swap import ZOConfig, swap
from zoact_kernels.trainables import AlongInputs


class Block(nn.Module):
    """x [B, T, K] and an attention_mask -> values of each sequence: q, k, v share an input, gate and up another one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 8), nn.Linear(24, 24, bias=False)
        self.gate, self.up, self.down = nn.Linear(24, 37), nn.Linear(24, 37), nn.Linear(37, 24)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.q(x) * self.v(x)) + self.k(x).mean(-1, keepdim=True)
        y = self.down(self.gate(h) * self.up(h).sigmoid())
        if attention_mask is not None:
            y = torch.where(attention_mask[..., None].bool(), y, 0.0)
        return y.sum(1)


def block(format: str = "dense") -> Block:
    torch.manual_seed(4)
    net = Block().eval().requires_grad_(False)
    group = None if format == "dense" else 8
    swap(net, ZOConfig(format=format, group_size=group, rank=0), example=(torch.zeros(2, 3, 24),))
    return net


def of_block(net: nn.Module, x: Tensor, mask: Tensor | None) -> methods.Evaluation:
    def evaluate(groups: int) -> Tensor:
        given = None if mask is None else mask.repeat(groups, 1)
        return net(x.repeat(groups, 1, 1), attention_mask=given).double().square().sum(1).view(groups, -1)

    return evaluate


def bases(optimizer: AGZO) -> dict[str, Tensor]:
    return {name: t._basis.clone() for name, t in optimizer.trainables.items() if isinstance(t, AlongInputs)}


def batch(pad: float = 0.0, more: int = 0) -> tuple[Tensor, Tensor]:
    """x [3, 6 + more, 24] with a mean of 3, padding on both sides of the tokens."""
    x = torch.randn(3, 6, 24, generator=torch.Generator().manual_seed(8)) + 3
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    x[mask == 0] = pad
    return nn.functional.pad(x, (0, 0, more, 0), value=pad), nn.functional.pad(mask, (more, 0))


@pytest.mark.parametrize("format", FORMATS)
def test_padding_never_matters(format):
    """Whatever stands in it, NaN too, the step has the same bits; with more of it A is the sheet's all the same."""
    states = []
    for pad in (0.0, -7e3, math.nan):
        optimizer = make("one-sided", net := block(format), seed=2)
        result = optimizer.step_on([of_block(net, *batch(pad))])
        assert not result.skipped
        states.append((bases(optimizer), result.losses, optimizer.state_dict()))
    for state in states[1:]:
        assert all(torch.equal(a, states[0][0][name]) for name, a in state[0].items())
        assert torch.equal(state[1], states[0][1])
        assert all(torch.equal(a, state[2][key]) for key, a in states[0][2].items() if key != "floor")
    for more in (0, 5):
        optimizer = make("one-sided", net := block(format), seed=2)
        x, mask = batch(math.nan, more)
        optimizer.step_on([of_block(net, x, mask)])
        h = x[mask == 1]
        plain, truth = (
            sheet_basis(h.to(dtype), rng.seed_for(2, 0), "q", 1) for dtype in (torch.float32, torch.float64)
        )
        assert_no_worse(bases(optimizer)["q"], plain, truth)


def test_layers_of_one_input_share_one_basis():
    optimizer = make("one-sided", net := block())
    made: list[str] = []
    real = optimizer._basis_of
    optimizer._basis_of = lambda leader, *rest: made.append(leader) or real(leader, *rest)  # type: ignore[method-assign]
    optimizer.step_on([of_block(net, *batch())])
    assert made == ["q", "gate", "down"]
    found = bases(optimizer)
    assert torch.equal(found["q"], found["k"]) and torch.equal(found["q"], found["v"])
    assert torch.equal(found["gate"], found["up"]) and not torch.equal(found["q"], found["gate"])
    assert all(abs(float(a.norm()) - 1) < 1e-6 for a in found.values())


def test_inputs_are_not_kept():
    """Those of one layer are gone before the next one's are taken."""
    optimizer = make("one-sided", net := block())
    real, taken = optimizer._basis_of, []

    def make_basis(leader: str, rows: Tensor, number: Tensor | None) -> Tensor:
        assert all(ref() is None for ref in taken)
        taken.append(weakref.ref(rows))
        return real(leader, rows, number)

    optimizer._basis_of = make_basis  # type: ignore[method-assign]
    optimizer.step_on([of_block(net, *batch())])
    assert len(taken) == 3 and taken[-1]() is None


@pytest.mark.parametrize("mode", methods.MODES)
@pytest.mark.parametrize("preset", PRESETS)
def test_basis_comes_from_clean_rows(preset, mode):
    """The same bits whatever the radius, though perturbed rows then differ by far; another A at each step."""
    found = []
    for sigma in (1e-6, 1.0):
        optimizer = make(preset, net := block(), mode=mode, sigma=sigma, lr=0.0, seed=1)
        optimizer.step_on([of_block(net, *batch())])
        found.append(bases(optimizer))
        optimizer.step_on([of_block(net, *(torch.flip(t, [0]) for t in batch()))])
        later = bases(optimizer)
    assert all(torch.equal(a, found[1][name]) for name, a in found[0].items())
    assert all(not torch.equal(a, found[1][name]) for name, a in later.items())


@pytest.mark.parametrize("rank", [1, 3])
def test_power_basis_finds_the_leading_directions(rank):
    """tan of the principal angle to the exact singular vectors: (s_{R+1} / s_R)^7 of the start's (invariant 24)."""
    generator = torch.Generator().manual_seed(rank)
    n, K = 67, 41
    u, v = (torch.linalg.qr(torch.randn(size, K, generator=generator).double()).Q for size in (n, K))
    s = torch.cat([torch.linspace(9, 6, rank), 2.0 * 0.95 ** torch.arange(K - rank)]).double()
    h, start = u * s @ v.T, torch.randn(n, rank, generator=generator)
    a = power_basis(h.float(), start, 3).double()
    inside, outside = u[:, :rank].T @ start.double(), u[:, rank:].T @ start.double()
    bound = (2.0 / 6.0) ** 7 * float((outside @ inside.inverse()).norm(2))
    sine = torch.linalg.svdvals(v[:, rank:].T @ a).max()
    assert float(sine) < bound + 1e-6 and bound < 0.05  # fp32 has 6e-8 an operation, 67 of them in a sum
    assert_no_worse(a.float().T @ a.float(), torch.eye(rank), torch.eye(rank).double())
    assert float(torch.linalg.svdvals(v[:, rank:].T @ power_basis(h.float(), start, 0).double()).max()) > 4 * bound


def test_power_basis_of_bad_inputs():
    """Zeros, so that nothing moves: of no signal, of NaN; and a rank above the number of rows stays orthonormal."""
    start = torch.ones(5, 2)
    for h in (torch.zeros(5, 7), torch.full((5, 7), math.nan), torch.full((5, 7), math.inf)):
        assert torch.equal(power_basis(h, start, 3), torch.zeros(7, 2))
        assert torch.equal(power_basis(h, start[:, :1], 3), torch.zeros(7, 1))
    q = power_basis(torch.randn(1, 7), torch.randn(1, 3), 3)
    assert_no_worse(q.T @ q, torch.eye(3), torch.eye(3).double())


# --- what it declines -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forward_of(net: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    usual, type(net).forward = type(net).forward, forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        type(net).forward = usual  # type: ignore[method-assign]


def test_bad_batches():
    net = block()
    optimizer = make("one-sided", net)
    before = optimizer.state_dict()
    x, mask = batch()
    with pytest.raises(ValueError, match="comes in 2 parts, and each would give agzo another basis"):
        optimizer.step_on([of_block(net, x, mask)] * 2)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 1, 6\)"):
        optimizer.step_on([lambda groups: net(x.repeat(groups, 1, 1), attention_mask=mask[:, None, None])])
    with pytest.raises(ValueError, match="no unpadded token"):
        optimizer.step_on([of_block(net, x, torch.zeros_like(mask))])
    with (
        forward_of(net, lambda self, x, attention_mask=None: self.q(x.reshape(27, 2, 24)).sum((1, 2))),
        pytest.raises(ValueError, match=r"layer 'q' .* regroups tokens"),
    ):
        optimizer.step_on([of_block(net, *batch())])
    with (
        forward_of(net, lambda self, x, attention_mask=None: self.q(x[:, 0, None][:, :0]).sum((1, 2))),
        pytest.raises(ValueError, match="layer 'q' was given no rows"),
    ):
        optimizer.step_on([of_block(net, x, None)])
    with (
        forward_of(net, lambda self, x, attention_mask=None: self.q(x.transpose(0, 1)).sum((0, 2))),
        pytest.raises(ValueError, match=r"layer 'q'.*regroups rows"),
    ):
        optimizer.step_on([of_block(net, x, None)], rows=(3,))
    now = optimizer.state_dict()
    assert all(torch.equal(tensor, now[key]) for key, tensor in before.items() if key != "floor")
    assert not net.q._forward_pre_hooks and not net._forward_pre_hooks


def test_layers_that_a_step_does_not_reach():
    """They stay as they are, and the step says so; reached by perturbed groups alone they are an error."""
    net = block()
    optimizer = make("one-sided", net, mode="sequential", queries=1)
    run_once = lambda: optimizer.step_on([of_block(net, *batch())])  # noqa: E731
    assert not run_once().note
    before = net.v.weight.clone()
    with forward_of(net, lambda self, x, attention_mask=None: self.down(self.up(self.q(x))).sum(1)):
        result = run_once()
    assert result.note == "not reached, left as they are: k, v, gate" and torch.equal(net.v.weight, before)

    def now_and_then(self: Block, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.q(x).sum(1) if not perturbation_of(self).sigmas.any() else self.k(self.q(x)).sum(1)

    with forward_of(net, now_and_then), pytest.raises(RuntimeError, match="layer 'k' is called by a perturbed row"):
        run_once()
