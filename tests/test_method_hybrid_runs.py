"""Hi-ZFO over many steps: what a snapshot holds, what a lost step leaves, parts, forks, spread queries, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_no_worse
from test_cli import killed, options, steps_of, zoact
from test_method_blocks import B, evaluation, ids, plain_net
from test_method_hybrid import PRESETS, make, run, same, swapped, trained
from tiny_model import make_model_dir, write_examples
from torch import Tensor, nn

from zoact_kernels import methods, step_graph
from zoact_kernels.layers import zo_layers
from zoact_kernels.runlog import RunLog
from zoact_kernels.step_graph import StepGraph
from zoact_kernels.swap import ZOConfig, swap


def whole(optimizer: Any) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in optimizer.state_dict().items() if key != "iteration"}


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ("adam", "sumo"))
@pytest.mark.parametrize("preset", PRESETS)
def test_resume_after_every_step(preset: str, rule: str) -> None:
    """The division comes with the state, and with it the moments of both halves: no `prepare`, the same bits."""
    more = {"first_order": rule, "sumo_rank": 2, "sumo_period": 2, "optimizer": "momentum", "floor_every": 2}
    optimizer = make(preset, budget=0.5, schedule="cosine", steps=6, **more)
    optimizer.prepare([ids()], lambda x: evaluation(optimizer.model, x)(1))
    states, results = [optimizer.state_dict()], []
    for _ in range(4):
        results += run(optimizer, 1)
        states.append(optimizer.state_dict())
    for k, state in enumerate(states[:-1]):
        resumed = make(preset, budget=0.5, schedule="cosine", steps=6, **more)
        resumed.load_state_dict(state)
        for a, b in zip(run(resumed, 4 - k), results[k:], strict=True):
            assert torch.equal(a.losses, b.losses) and torch.equal(a.weights, b.weights) and a.lr == b.lr
        assert same(resumed.state_dict(), states[-1]), k
    assert not same(whole(optimizer), states[-2])


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    optimizer, other = make("hi-zfo-dense", {2}), make("hi-zfo-dense", {1, 2}, first_order="sgd")
    run(optimizer, 2)
    before, rule = optimizer.state_dict(), optimizer.rule
    with pytest.raises(ValueError, match="has no '1/exp_avg"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="has no 'method/of_first'"):
        optimizer.load_state_dict({key: t for key, t in before.items() if key != "method/of_first"})
    assert same(optimizer.state_dict(), before) and optimizer.rule is rule
    twin = make("hi-zfo-dense", {2})
    twin.load_state_dict(before)
    run(twin, 1)
    run(optimizer, 1)
    assert same(twin.state_dict(), optimizer.state_dict())


def test_killed_for_real(tmp_path: Path) -> None:
    """Between two snapshots a run dies; the steps after the last one are evaluated again, to the same bits."""
    make_model_dir(tmp_path / "model", layers=2)
    files = {"model": str(tmp_path / "model"), "train": str(write_examples(tmp_path / "train.csv", 64))}
    more = {"method": "hi-zfo", "lr": None, "steps": 12, "snapshot-every": 5}
    assert zoact(*options(files, tmp_path / "whole", **more)) == 0
    killed(options(files, tmp_path / "run", **more), tmp_path / "run", 0.05)
    assert zoact("finetune", "--resume", "--out", str(tmp_path / "run")) == 0
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    with RunLog.open(tmp_path / "run") as a, RunLog.open(tmp_path / "whole") as b:
        assert a.snapshots()[-1].coeff_hash == b.snapshots()[-1].coeff_hash


@pytest.mark.parametrize("dense", (False, True), ids=["int4", "dense"])
def test_options_from_the_command_line(dense: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 steps by SUMO, in micro-batches: the base stands, the profile is told, the log can't be replayed."""
    make_model_dir(tmp_path / "model", layers=2)
    files = {"model": str(tmp_path / "model"), "train": str(write_examples(tmp_path / "train.csv", 64))}
    method = "hi-zfo-dense" if dense else "hi-zfo"
    own = {"micro-batch": 2, "rank": None if dense else 2}  # dense weights have no bases
    given = options(files, tmp_path / "run", method=method, lr=None, steps=20, **own)
    given += [word for value in ("first_order=sumo", "sumo_rank=2", "budget=0.5", "first_lr=0.01")
              for word in ("--option", value)]  # fmt: skip
    assert zoact(*given, *(["--dense"] if dense else [])) == 0
    told = capsys.readouterr().out
    assert "profiling the blocks" in told and "first-order: block 1 with" in told and "unchanged" in told
    with RunLog.open(tmp_path / "run") as log:
        assert log.meta["recipe"]["options"]["first_order"] == "sumo" and not any(row.skipped for row in log.steps())
        first, last = (log.load(row) for row in (log.snapshots()[0], log.snapshots()[-1]))
    assert any(key.startswith("rule/1/subspace") and ".layers.1." in key for key in last)
    moved = {key for key in last if key.startswith("coeff/") and not torch.equal(first[key], last[key])}
    assert {key.split(".layers.")[1][0] for key in moved if ".layers." in key} == {"0", "1"}
    assert zoact("replay", str(tmp_path / "run")) == 2 and "need more than the seeds" in capsys.readouterr().err


# --- a step that is lost ----------------------------------------------------------------------------------------------


class Lost(torch.autograd.Function):
    """Values as they are, gradients NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("nan")


@pytest.mark.parametrize("where", ("probe", "clean", "gradient"))
@pytest.mark.parametrize("preset", PRESETS)
def test_a_lost_step_changes_nothing(preset: str, where: str) -> None:
    """Whichever forward gave NaN, neither half moves: values, moments, their counts; the next step is as ever."""
    optimizer = make(preset, {1, 2}, optimizer="momentum")
    run(optimizer, 2)
    before = whole(optimizer)
    usual = evaluation(optimizer.model, ids(2))

    def evaluate(groups: int) -> Tensor:
        found = usual(groups)
        if where == "gradient" and groups == 1:
            return Lost.apply(found)
        hit = (where == "clean") == (groups == 1)
        return torch.where(torch.arange(B) == 1, float("nan"), found) if hit and where != "gradient" else found

    result = optimizer.step_on([evaluate])
    assert result.skipped and same(whole(optimizer), before) and optimizer.iteration == 3
    reasons = {
        "probe": "1 of 3 losses of group 0", "clean": "1 of 3 clean losses", "gradient": r"the gradient of ",
    }  # fmt: skip
    assert reasons[where] in result.reason
    (after,) = run(optimizer, 1)
    assert not after.skipped and after.reason == "" and not same(whole(optimizer), before)


# --- parts of a batch, modes, forks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_parts_and_modes_take_the_same_step(preset: str) -> None:
    """Micro-batches, one group after the other, a closure over stacked inputs: the whole batch's, within rounding."""
    truth = make(preset, {1, 2}, first_order="sgd")
    others = [
        make(preset, {1, 2}, first_order="sgd", mode=mode)
        for mode in ("stacked", "sequential", "stacked", "sequential")
    ]
    run(truth, 1)
    run(others[0], 1, parts=B)
    run(others[1], 1, parts=2)
    for optimizer in others[2:]:
        inputs = optimizer.stack({"input_ids": ids(0)})["input_ids"]
        optimizer.step(lambda o=optimizer, x=inputs: evaluation(o.model, x)(1)[0])
    start = trained(make(preset))
    for optimizer in others:
        # what is compared is how far theta went, of which fp32 keeps a last place of theta
        for name, value in trained(optimizer).items():
            assert_no_worse(value, trained(truth)[name], trained(truth)[name].double(), name)
            assert not torch.equal(value, start[name])


def late(**changes: Any) -> Any:
    """Coefficients in the last two blocks alone, so that groups may part behind the first."""
    net = swapped(rank=2)
    for name, layer in zo_layers(net).items():
        if not name.startswith(("layers.1", "layers.2")):
            layer.rank, layer.coeff, layer.basis = 0, None, None
    given = {"floor_every": 0, "lr": 0.02, "first_lr": 0.03, "sigma": 0.02, **changes}
    optimizer = methods.create("hi-zfo", net, **given)
    optimizer.divide({2})
    return optimizer


@pytest.mark.parametrize("more", [{}, {"mode": "sequential"}], ids=str)
def test_a_fork_changes_no_bit(more: dict[str, Any]) -> None:
    """What is before the fork runs once for probes and gradient; what is between it and F is in no graph."""
    plain, forked = late(fork=False, **more), late(fork=True, **more)
    rows: list[int] = []
    forked.model.layers[0].mix.register_forward_hook(lambda module, args, y: rows.append(len(y)))
    assert plain.fork is None and forked.fork.first == 1
    for a, b in zip(run(plain, 3), run(forked, 3), strict=True):
        assert torch.equal(a.losses, b.losses)
    assert same(trained(plain), trained(forked)) and forked.model.layers[0].mix.coeff is None
    assert rows == [B] * 3


def test_kept_prefixes_and_a_resume(tmp_path: Path) -> None:
    """With the first block kept by sequence, a run resumed with nothing kept sees the same bits; both others train."""
    make_model_dir(tmp_path / "model", layers=3)
    files = {"model": str(tmp_path / "model"), "train": str(write_examples(tmp_path / "train.csv", 16))}
    more = {"method": "hi-zfo", "prefix-cache": 1 << 20, "target": "*layers.[12]*"}
    assert zoact(*options(files, tmp_path / "whole", **more, steps=6)) == 0
    assert zoact(*options(files, tmp_path / "run", **more, steps=4)) == 0
    assert zoact("finetune", "--resume", "--out", str(tmp_path / "run"), "--steps", "6") == 0
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    with RunLog.open(tmp_path / "run") as log:
        first, last = (log.load(row) for row in (log.snapshots()[0], log.snapshots()[-1]))
    moved = {key for key in last if key.startswith("coeff/") and not torch.equal(first[key], last[key])}
    assert {key.split(".layers.")[1][0] for key in moved} == {"1", "2"}
    assert any(key.startswith("rule/0/exp_avg/model.layers.1") for key in last)
    assert any(key.startswith("rule/1/exp_avg/model.layers.2") for key in last)


def test_gradients_before_a_fork_are_refused() -> None:
    for given, refused in (({"fork": True}, True), ({}, False)):
        optimizer = late(**given)
        optimizer.divide({1})
        if refused:
            with pytest.raises(ValueError, match="block 1 is trained by gradients and stands before block 2"):
                run(optimizer, 1)
        else:
            assert optimizer.fork is None
            twin = late(fork=False)
            twin.divide({1})
            run(optimizer, 2)
            run(twin, 2)
            assert same(trained(optimizer), trained(twin)) and optimizer.rule.first.t == 2


def test_spread_queries_share_a_batch_that_the_gradient_sees_whole() -> None:
    optimizer = make("hi-zfo", {2}, queries=3, spread=True)
    twin = make("hi-zfo", {2}, queries=3)
    (result,) = run(optimizer, 1)
    run(twin, 1)
    assert result.losses.shape == (6, B // 3)
    for name, c in twin.rule.first.coeffs.items():
        assert torch.equal(optimizer.rule.first.coeffs[name], c) and c.any()


def test_the_gradient_knows_nothing_of_the_estimator() -> None:
    """Nor of its noise: whatever the probes are, the first step of F is the same."""
    found = []
    for more in ({}, {"sides": "one-sided"}, {"queries": 2, "sides": "leave-one-out"}, {"noise": "rademacher"}):
        optimizer = make("hi-zfo-dense", {1, 2}, **more)
        (result,) = run(optimizer, 1)
        assert len(result.losses) == optimizer.groups and result.weights.any()
        found.append({name: value.detach() for name, value in optimizer.rule.first.coeffs.items()})
    assert all(same(found[0], other) for other in found[1:])


def test_a_tied_head_is_the_tables() -> None:
    """The table runs before the blocks, so it is Z's, and with it whatever its head has beside it."""
    net = plain_net()
    net.head.bias = nn.Parameter(torch.ones(net.head.out_features), requires_grad=False)
    swap(net, ZOConfig(format="dense", rank=0, layout="row", skip=()), where=["layers.*"], example=(ids(),))
    optimizer = methods.create("hi-zfo-dense", net, floor_every=0, lr=0.1, first_lr=0.1)
    optimizer.divide({2})
    first = set(optimizer.rule.first.coeffs)
    assert {name for name in first if not name.startswith("layers.2.")} == {"norm.weight", "norm.bias"}
    before = trained(optimizer)
    run(optimizer, 1)
    assert not any(torch.equal(value, before[name]) for name, value in trained(optimizer).items())
    optimizer.divide({0, 1, 2})
    assert optimizer.rule.zeroth is None and "table.weight" in optimizer.rule.first.coeffs
    run(optimizer, 1)


# --- what stays as it was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_no_trace(preset: str) -> None:
    """Generators, gradients, flags, and every tensor that is not trained."""
    optimizer = make(preset, budget=0.5)
    net = optimizer.model
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    flags = {name: t.requires_grad for name, t in (*net.named_parameters(), *net.named_buffers())}
    frozen = {name: t.clone() for name, t in net.named_buffers() if not optimizer.dense}
    optimizer.prepare([ids()], lambda x: evaluation(net, x)(1))
    run(optimizer, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert {name: t.requires_grad for name, t in (*net.named_parameters(), *net.named_buffers())} == flags
    assert all(p.grad is None for p in net.parameters()) and not any("forward" in vars(m) for m in net.modules())
    assert all(torch.equal(dict(net.named_buffers())[name], tensor) for name, tensor in frozen.items())
    twin = copy.deepcopy(net)
    after = methods.create("mezo" if optimizer.dense else "zo-act", net, floor_every=0)  # all blocks see noise again
    again = methods.create("mezo" if optimizer.dense else "zo-act", twin, floor_every=0)
    assert not any(torch.equal(a, b) for a, b in [moved_by(after), moved_by(again)])


def moved_by(optimizer: Any) -> tuple[Tensor, Tensor]:
    """A value of the last block before and after a step."""
    value = next(v for name, v in optimizer.rule.coeffs.items() if name.startswith("layers.2"))
    before = value.detach().clone()
    run(optimizer, 1)
    return before, value.detach()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": -0.1}, "budget is -0.1"),
        ({"budget": 1.1}, "budget is 1.1"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"first_lr": -1.0}, "first_lr is -1.0"),
        ({"first_order": "muon"}, "first_order is 'muon'; it may be sgd, adam, adamw, sumo"),
        ({"first_order": "sumo", "sumo_rank": 0}, "rank is 0"),
        ({"first_order": "sumo", "sumo_period": 0}, "period 0"),
        ({"lr": -1.0}, "lr is -1.0"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.create("hi-zfo", swapped(rank=2), **arguments)


def test_more_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--dense"):
        methods.create("hi-zfo-dense", swapped("int4"))
    with pytest.raises(ValueError, match="no numbered blocks"):
        methods.create("hi-zfo-dense", torch.nn.Linear(3, 3))
    optimizer = make("hi-zfo")
    with pytest.raises(RuntimeError, match="call `prepare` first"):
        run(optimizer, 1)
    with pytest.raises(ValueError, match="block 3 of layers has nothing to train"):
        optimizer.divide({2, 3})
    with pytest.raises(ValueError, match="not finite, so no block"):
        optimizer.prepare([ids()], lambda x: evaluation(optimizer.model, x)(1) * float("nan"))
    optimizer.divide({2})
    with pytest.raises(ValueError, match="the losses carry no graph"):
        optimizer.step_on([lambda groups: evaluation(optimizer.model, ids())(groups).detach()])
    with pytest.raises(ValueError, match="losses are torch.bfloat16"):
        optimizer.step_on([lambda groups: evaluation(optimizer.model, ids())(groups).bfloat16()])
    with pytest.raises(ValueError, match="can't be replayed"):
        optimizer.replay([])
    assert not optimizer.replayable and not methods.METHODS["hi-zfo-dense"].replayable
    monkeypatch.setattr(step_graph, "DEVICE", "cpu")
    with pytest.raises(ValueError, match="differ in more than numbers"):
        StepGraph(optimizer, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sumo finds no matrix"):
        methods.create("hi-zfo", swapped(rank=1), first_order="sumo")
