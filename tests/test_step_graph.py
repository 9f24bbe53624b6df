"""A whole step as a CUDA graph: nothing in it waits for the device, and replaying it is `step_on`, bit for bit.

Without a GPU the region that a graph would hold runs on fake tensors of a CUDA device, and the class itself with a
stand-in for a graph that runs the region again. On a GPU the real thing runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_device import ThroughAten, on_fake_device
from test_losses import V, _llama
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoact_kernels import methods, step_graph
from zoact_kernels.basis import compute_basis
from zoact_kernels.losses import Batch, group_losses
from zoact_kernels.methods import ZOAct
from zoact_kernels.step_graph import StepGraph
from zoact_kernels.swap import ZOConfig, swap

ARGUMENTS: list[dict[str, Any]] = [
    {"sides": "two-sided", "lr": 0.05},
    {"sides": "one-sided", "queries": 3, "scaling": "std", "optimizer": "momentum"},
    {"sides": "leave-one-out", "queries": 2, "optimizer": "sign", "noise": "rademacher", "scaling": "clipped"},
]


def batch_of(seed: int, length: int = 7) -> Batch:
    """Three sequences with one label position each and two label words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (3, length), generator=generator)
    rows, positions = torch.arange(3), torch.tensor([length - 1, 2, 4])
    mask = (torch.arange(length) <= positions[:, None]).long()
    targets = torch.tensor([[5, 9]]).repeat(3, 1)
    return Batch("classification", ids, mask, rows, positions, targets, torch.tensor([0, 1, seed % 2]))


def model_and_optimizer(layout: str | None = None, device: str = "cpu", **arguments: Any) -> tuple[nn.Module, ZOAct]:
    model = _llama()
    swap(model, ZOConfig(rank=2, group_size=8, layout=layout))
    compute_basis(model, [{"input_ids": batch_of(0).input_ids}], seed=0)
    model.to(device)
    return model, ZOAct(model, **{"sigma": 1e-2, **arguments})


class OnDevice(TorchDispatchMode):
    """Refuses every operation that a CUDA graph could not hold: one on, to or from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.count += 1
        for value in tree_leaves((args, kwargs, out)):
            # A number of the Python side reaches a kernel by value, but is never copied.
            copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            if isinstance(value, torch.Tensor) and value.device.type != "cuda" and (value.dim() or copies):
                raise AssertionError(f"{func} has a tensor of {tuple(value.shape)} on {value.device}")
        return out


@contextlib.contextmanager
def fake_step(**arguments: Any) -> Iterator[tuple[ZOAct, Batch]]:
    """An optimizer of a model on a fake CUDA device, and a batch beside it."""
    _, optimizer = model_and_optimizer("row", **arguments)
    mode = FakeTensorMode()
    fake = on_fake_device(mode, (optimizer, batch_of(1)))
    with mode, ThroughAten(), torch.no_grad():
        yield fake


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: a["sides"])
def test_nothing_in_a_step_waits_for_the_device(arguments: dict[str, Any]) -> None:
    """FakeTensor raises where a value is read; OnDevice where a tensor is or goes somewhere else."""
    with fake_step(**arguments) as (optimizer, batch), OnDevice() as seen:
        losses = optimizer._on_device([lambda groups: group_losses(optimizer.model, batch, groups)], batch.leading)
    assert losses.device.type == "cuda" and losses.shape == (optimizer.groups, 3)
    assert seen.count > 100


def test_a_wait_is_seen() -> None:
    """The test itself: a loss that is read, or that takes the way over the host."""

    def read(groups: int) -> torch.Tensor:
        losses = group_losses(optimizer.model, batch, groups)
        return losses * float(losses.sum())

    def over_the_host(groups: int) -> torch.Tensor:
        return group_losses(optimizer.model, batch, groups).cpu()

    with fake_step() as (optimizer, batch), OnDevice():
        with pytest.raises(RuntimeError):
            optimizer._on_device([read], batch.leading)
        with pytest.raises(AssertionError, match="on cpu"):
            optimizer._on_device([over_the_host], batch.leading)


class Again:
    """Stands in for torch.cuda.CUDAGraph: what `graph` would capture runs again at every replay."""

    def replay(self) -> None:
        self.owner.losses.copy_(self.owner._run())  # type: ignore[attr-defined]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, *_: Any) -> None: ...

        def wait_stream(self, _: Any) -> None: ...

    monkeypatch.setattr(step_graph, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Again)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    run = StepGraph._run
    # A capture executes nothing, so neither does the run that would be captured.
    monkeypatch.setattr(StepGraph, "_run", lambda self, dry=False: run(self, dry or not hasattr(self, "losses")))


def same_steps(device: str, arguments: dict[str, Any], steps: int = 5) -> None:
    _, optimizer = model_and_optimizer(device=device, floor_every=3, **arguments)
    _, plain = model_and_optimizer(device=device, floor_every=3, **arguments)
    graph = StepGraph(optimizer, batch_of(0).to(device))
    if device == "cpu":
        graph.graph.owner = graph  # type: ignore[attr-defined]
    assert optimizer.iteration == 0 and all(not c.any() for c in optimizer.rule.coeffs.values()), "capturing trains"
    for step in range(steps):
        batch = batch_of(step + 1).to(device)
        if step == 3:  # one step of NaN losses: skipped in both
            batch.input_ids.fill_(0)
            for layer in (*optimizer.layers.values(), *plain.layers.values()):
                layer.basis.mul_(torch.nan if step == 3 else 1)
        got = graph.step(batch)
        want = plain.step_on([lambda groups, b=batch: group_losses(plain.model, b, groups)], batch.leading)
        assert (got.step, got.lr, got.skipped, got.reason) == (want.step, want.lr, want.skipped, want.reason)
        for name in ("seeds", "losses", "weights"):
            assert torch.equal(getattr(got, name).nan_to_num(-1), getattr(want, name).nan_to_num(-1)), name
        for (name, a), b in zip(optimizer.rule.coeffs.items(), plain.rule.coeffs.values(), strict=True):
            assert torch.equal(a, b), name
    assert got.skipped and optimizer.rule.t == plain.rule.t == 3
    assert any(c.any() for c in optimizer.rule.coeffs.values())


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: a["sides"])
def test_steps_of_a_graph_are_steps(stand_in: None, arguments: dict[str, Any]) -> None:
    same_steps("cpu", arguments)


# Methods other than ZO-Act, over a dense model; a V that is renewed between two replays of one graph.
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("mezo", {"lr": 1e-3}), ("sparse-mezo", {"lr": 1e-3}), ("fzoo", {}), ("zo-momentum", {"lr": 1e-4}),
    ("lozo", {"lr": 1e-3, "period": 2}), ("subzero", {"lr": 1e-3, "period": 2, "rank": 4}),
    ("agzo", {"lr": 1e-4, "sides": "two-sided"}),
    ("mezo-gv-history", {"lr": 1e-3, "queries": 4}), ("forward-gradient-dense", {"lr": 1e-3, "queries": 2}),
]  # fmt: skip


def method_steps(device: str, method: str, arguments: dict[str, Any]) -> None:
    """The steps of a graph are those of `step_on`: same losses, same state after."""
    made = []
    for _ in range(2):
        model = _llama()
        swap(model, ZOConfig(format="dense", rank=0, layout="row"))
        made.append(methods.create(method, model.to(device), **{"floor_every": 0, "sigma": 1e-2, **arguments}))
    optimizer, plain = made
    graph = StepGraph(optimizer, batch_of(0).to(device))
    if device == "cpu":
        graph.graph.owner = graph  # type: ignore[attr-defined]
    for step in range(5):
        batch = batch_of(step + 1).to(device)
        got, want = graph.step(batch), plain.step_on([lambda g, b=batch: group_losses(plain.model, b, g)])
        assert torch.equal(got.losses, want.losses) and not got.skipped
    after, wanted = optimizer.state_dict(), plain.state_dict()
    assert all(torch.equal(after[key], wanted[key]) for key in wanted if key != "floor")


@pytest.mark.parametrize(("method", "arguments"), METHODS, ids=[name for name, _ in METHODS])
def test_steps_of_a_graph_are_steps_of_every_method(stand_in: None, method: str, arguments: dict[str, Any]) -> None:
    method_steps("cpu", method, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("method", "arguments"), METHODS, ids=[name for name, _ in METHODS])
def test_steps_of_a_captured_graph_are_steps_of_every_method(method: str, arguments: dict[str, Any]) -> None:
    method_steps("cuda", method, arguments)


# Forward-mode formulas make meta tensors of fake ones, so that method has to show it on a GPU.
FAKED = [row for row in METHODS if not row[0].startswith("forward-gradient")]


@pytest.mark.parametrize(("method", "arguments"), FAKED, ids=[name for name, _ in FAKED])
def test_nothing_in_a_step_of_a_method_waits(method: str, arguments: dict[str, Any]) -> None:
    model = _llama()
    swap(model, ZOConfig(format="dense", rank=0, layout="row"))
    optimizer = methods.create(method, model, **arguments)
    optimizer._prepare()
    mode = FakeTensorMode()
    optimizer, batch = on_fake_device(mode, (optimizer, batch_of(1)))
    with mode, ThroughAten(), torch.no_grad(), OnDevice() as seen:
        optimizer._on_device([lambda groups: group_losses(optimizer.model, batch, groups)], batch.leading)
    assert seen.count > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: a["sides"])
def test_steps_of_a_captured_graph_are_steps(arguments: dict[str, Any]) -> None:
    same_steps("cuda", arguments)


def test_refuses_what_it_was_not_captured_for(stand_in: None) -> None:
    _, optimizer = model_and_optimizer()
    graph = StepGraph(optimizer, batch_of(0))
    with pytest.raises(ValueError, match=r"input_ids of shape \(3, 9\).*\(3, 7\).*a graph of its own"):
        graph.step(batch_of(1, length=9))


def test_refuses_the_cpu() -> None:
    _, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match="trains a model on cpu; a CUDA graph needs"):
        StepGraph(optimizer, batch_of(0))
