"""ZO Fine-tuner: scales, probe and update against float64; MeZO where the scales are 1; its file and its state."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_no_worse
from safetensors.torch import load_file, save_file
from test_methods_dense import DTYPES, NAMES, B, evaluation, ids, noise, plain_net, run, swapped, values
from torch import Tensor, nn
from torch.func import functional_call

from zoact_kernels import methods
from zoact_kernels.layers import perturbed, release
from zoact_kernels.methods import MeZO
from zoact_kernels.methods.learned import RUN, RUNS, ZOFinetuner, moments
from zoact_kernels.trainables import weights

BLOCK = RUN * RUNS


def tuner(net: nn.Module, seed: int = 3, **changes: Any) -> ZOFinetuner:
    """With nets that say something else for every tensor, and felt by each of their inputs."""
    optimizer = ZOFinetuner(net, **{"floor_every": 0, "seed": seed, **changes})
    generator = torch.Generator().manual_seed(7)
    for tensor in optimizer.nets.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return optimizer


def scales_of(optimizer: ZOFinetuner, theta: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(s_b, c s_b) by the sheet's formulas, written out."""
    nets = {key: tensor.to(dtype) for key, tensor in optimizer.nets.tensors.items()}
    history, said = optimizer.losses.to(dtype), []
    for b, name in enumerate(theta):
        w = theta[name].to(dtype)
        x = torch.stack([w.mean(), ((w - w.mean()) ** 2).mean(), *history, optimizer.previous[b].to(dtype)])
        said.append((nets["out"][b] @ torch.tanh(nets["hidden"][b] @ x + nets["bias"][b]) + nets["shift"][b]).abs())
    s = torch.stack(said)
    n = torch.tensor([23 * 53 if name == "table.weight" else w.numel() for name, w in theta.items()]).to(dtype) / 1e6
    return s, (n.sum() / (n * s**2).sum()).sqrt() * s


def test_scales() -> None:
    """From statistics, losses and scales of the step before, at the first step and later."""
    net = swapped()
    optimizer = tuner(net, sigma=0.05, lr=1e-3)
    for step in range(3):
        optimizer.refresh()
        (plain, plain_c), (truth, truth_c) = (scales_of(optimizer, values(net), dtype) for dtype in DTYPES)
        assert_no_worse(optimizer.s, plain, truth, f"s at step {step}")
        assert_no_worse(optimizer.scales, plain_c, truth_c, f"c s at step {step}")
        before = optimizer.s.clone()
        assert 3 * float(before.min()) < float(before.max())
        (result,) = run(optimizer, 1)
        assert torch.equal(optimizer.previous, before)
        assert torch.equal(optimizer.losses, result.losses.mean(1).float())


@torch.no_grad()
def test_every_row_group_sees_its_weights() -> None:
    net = swapped()
    theta, clean = values(net), net(ids())
    optimizer = tuner(net, sigma=0.05)
    optimizer._prepare()
    seeds = optimizer._seeds
    scales = dict(zip(theta, optimizer.scales.double(), strict=True))
    with perturbed(net, seeds, optimizer._table, leading=(2 * B,)):
        y = net(ids().repeat(2, 1))
    for sign, part in zip((0.05, -0.05), y.chunk(2), strict=True):
        sign = float(torch.tensor(sign))
        moved = {
            n: w.double() + sign * scales[n] * noise("normal", int(seeds[0]), n, tuple(w.shape))
            for n, w in theta.items()
        }
        truth = functional_call(plain_net(torch.float64), moved, ids())
        plain = functional_call(plain_net(), {n: w.float() for n, w in moved.items()}, ids())
        assert_no_worse(part, plain, truth, f"group at {sign}")
        assert (part - clean).abs().max() > 100 * (plain.double() - truth).abs().max()
    assert torch.equal(net(ids()), clean)


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_update_moves_along_what_was_probed(rule: str) -> None:
    net = swapped()
    optimizer = tuner(net, sigma=1e-2, lr=0.1, optimizer=rule)
    copies = {dtype: {n: nn.Parameter(w.to(dtype)) for n, w in values(net).items()} for dtype in DTYPES}
    torchs = {
        dtype: torch.optim.SGD(list(copied.values()), lr=0.1, momentum=0.9 * (rule == "momentum"))
        for dtype, copied in copies.items()
    }
    for _ in range(3):
        (result,) = run(optimizer, 1)
        for dtype, copied in copies.items():
            for b, (name, w) in enumerate(copied.items()):
                z = noise("normal", int(result.seeds[0]), name, tuple(w.shape)).to(dtype)
                w.grad = result.weights.to(dtype) * optimizer.scales[b].to(dtype) * z
            torchs[dtype].step()
    for name, w in values(net).items():
        assert_no_worse(w, copies[torch.float32][name].detach(), copies[torch.float64][name].detach(), name)
        assert not torch.equal(w, values(swapped())[name])


@pytest.mark.parametrize("changes", [{}, {"mode": "sequential"}, {"queries": 3}, {"optimizer": "adam"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_nets_are_mezo(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """sigma_b = 1: c = 1, and losses, weights and parameters are MeZO's, bit for bit (invariant 26)."""
    if dtype is torch.bfloat16 and changes:
        return
    left, right = swapped(dtype), swapped(dtype)
    a = ZOFinetuner(left, lr=0.05, sigma=1e-2, seed=4, **changes)
    b = MeZO(right, lr=0.05, sigma=1e-2, seed=4, **changes)
    steps = run(a, 4, parts=3), run(b, 4)
    assert "scale 1" in steps[0][0].note and not steps[0][1].note
    for x, y in zip(*steps, strict=True):
        assert torch.equal(x.losses, y.losses) and torch.equal(x.weights, y.weights)
    assert all(torch.equal(w, values(right)[name]) for name, w in values(left).items())
    assert torch.equal(a.scales, torch.ones(len(NAMES)))


def test_sequential_and_micro_batches_are_the_same_step() -> None:
    results = []
    for changes, parts in (({}, 1), ({"mode": "sequential"}, 1), ({}, 3)):
        net = swapped()
        results.append((run(tuner(net, lr=0.05, **changes), 3, parts), values(net)))
    for steps, after in results[1:]:
        for a, b in zip(steps, results[0][0], strict=True):
            assert torch.equal(a.losses, b.losses) and torch.equal(a.weights, b.weights)
        assert all(torch.equal(w, results[0][1][name]) for name, w in after.items())


def test_the_radius_stays() -> None:
    """sum n_b (c s_b)^2 = sum n_b for any s, to the rounding of c s_b; nets that all say 0 move nothing."""
    optimizer = tuner(swapped())
    n = optimizer.sizes
    for factor in (1.0, 1e-6, 1e6):
        for key in ("out", "shift"):
            optimizer.nets.tensors[key] *= factor
        optimizer.refresh()
        wanted = n.sum().view(1)
        radius = (n * optimizer.scales.double() ** 2).sum().view(1)
        assert_no_worse(radius.float(), wanted.float(), wanted)
    for key in ("out", "shift"):
        optimizer.nets.tensors[key].zero_()
    optimizer.refresh()
    assert not optimizer.scales.any()


def test_sizes() -> None:
    """Entries in millions; of a table, tied head or not, those that a batch reads, and no more than there are."""
    table = NAMES.index("table.weight")
    for tokens, entries in ((2, 2 * 23), (10**6, 53 * 23)):
        optimizer = ZOFinetuner(swapped(), tokens=tokens)
        assert float(optimizer.sizes[table]) == entries / 1e6
        assert len(optimizer.sizes) == len(NAMES) and float(optimizer.sizes[-1]) == 31 * 23 / 1e6


@torch.no_grad()
def test_freezing_a_tensor_leaves_the_noise_of_the_others() -> None:
    class Part(ZOFinetuner):
        name = "part"

        def find(self, model, handle):
            self.frozen = ("norm.bias", "side.weight")
            found = weights(model, handle, only=lambda name, p: name not in self.frozen)
            return self.prepare_scales(found)

    whole, part = swapped(), swapped()
    a, b = ZOFinetuner(whole, sigma=0.1, seed=6, lr=0.1), Part(part, sigma=0.1, seed=6, lr=0.1)
    a._prepare()
    b._prepare()
    seeds = a._seeds, b._seeds
    assert torch.equal(*seeds) and a.trainables.keys() - b.trainables.keys() == set(b.frozen)
    assert all(torch.equal(t.param_id, a.trainables[name].param_id) for name, t in b.trainables.items())
    for optimizer in (a, b):
        optimizer.rule.update(seeds[0], torch.ones(1), lr=0.1)
    for name, w in values(part).items():
        same = torch.equal(w, values(swapped())[name]) if name in b.frozen else torch.equal(w, values(whole)[name])
        assert same, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean, spread", [(0.0, 0.02), (1.0, 0.3)])
def test_moments(mean: float, spread: float, dtype: torch.dtype) -> None:
    """Near float64's, whatever the mean; the same bits with one thread and with two."""
    shapes = [(1,), (7,), (3, 5), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (2, BLOCK), (257, 331)]
    tensors = [(mean + spread * torch.randn(shape)).to(dtype) for shape in shapes]
    torch.set_num_threads(1)
    one = moments(tensors)
    torch.set_num_threads(2)
    assert torch.equal(moments(tensors), one) and one.dtype == torch.float32
    for found, w in zip(one, tensors, strict=True):
        d, f = w.double().flatten(), w.float().flatten()
        truth = torch.stack((d.mean(), ((d - d.mean()) ** 2).mean()))
        plain = torch.stack((f.mean(), ((f * f).mean() - f.mean() ** 2).clamp(min=0)))
        for i, what in enumerate(("mean", "variance")):
            assert_no_worse(found[i : i + 1], plain[i : i + 1], truth[i : i + 1], f"{what} of {tuple(w.shape)}")


# --- state ------------------------------------------------------------------------------------------------------------


def test_lost_losses_leave_the_history() -> None:
    net = swapped()
    optimizer = tuner(net, lr=0.05)
    run(optimizer, 2)
    before, s = {k: v.clone() for k, v in optimizer.state_dict().items()}, optimizer.s.clone()

    def poisoned(groups: int) -> Tensor:
        table = evaluation(net, ids())(groups)
        table[1, 1] = math.nan
        return table

    assert optimizer.step_on([poisoned]).skipped
    after = optimizer.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if key not in ("iteration", "floor"))
    optimizer.refresh()
    assert not torch.equal(optimizer.s, s)  # W has moved since the step that s belongs to
    assert not run(optimizer, 1)[0].skipped


def test_resume_and_replay_after_every_step(tmp_path: Path) -> None:
    """Bit for bit, the nets taken from the state: their file is gone."""
    path = tmp_path / "nets.safetensors"
    save_file(tuner(swapped()).nets.state(), path)
    arguments = {"nets": str(path), "lr": 0.05, "sigma": 1e-2, "floor_every": 0, "seed": 9}
    straight = swapped()
    optimizer = ZOFinetuner(straight, **arguments)
    states, log = [optimizer.state_dict()], []
    for step in range(5):
        if step == 3:
            log.append(optimizer.step_on([lambda groups: torch.full((groups, B), math.nan)]))
        else:
            log += run(optimizer, 1)
        states.append(optimizer.state_dict())
    path.unlink()
    for after in range(6):
        again = swapped()
        for t in ZOFinetuner(again).trainables.values():
            t.value.mul_(1.5)
        resumed = ZOFinetuner(again, **arguments)
        with pytest.raises(ValueError, match="no such file.*learn-perturbations"):
            run(resumed, 1)
        resumed.load_state_dict(states[after])
        if after > 3:
            got = run(resumed, 5 - after)
            assert all(torch.equal(a.losses, b.losses) for a, b in zip(got, log[after:], strict=True))
        else:
            resumed.replay(log[after:])
        assert all(torch.equal(w, values(straight)[name]) for name, w in values(again).items())
        assert torch.equal(resumed.previous, optimizer.previous) and torch.equal(resumed.losses, optimizer.losses)


def test_another_method_takes_over() -> None:
    net = swapped()
    run(tuner(net, lr=0.0), 1)
    fresh = swapped()
    results = [run(methods.create("mezo", model, seed=2), 1)[0] for model in (copy.deepcopy(net), net, fresh)]
    assert all(torch.equal(result.losses, results[2].losses) for result in results)
    release(net)
    assert net.up.sigma_scale is None and net.up.bias_sigma_scale is None and type(net.side) is nn.Linear


# --- the file ---------------------------------------------------------------------------------------------------------


def test_file_of_nets(tmp_path: Path) -> None:
    path, source = tmp_path / "nets.safetensors", tuner(swapped())
    save_file(source.nets.state(), path)
    loaded = ZOFinetuner(swapped(), nets=str(path), seed=99)
    assert not loaded.note
    for key, tensor in loaded.nets.tensors.items():
        assert torch.equal(tensor, source.nets.tensors[key])
    assert {name.rpartition("/")[0] for name in load_file(path)} == set(NAMES)


def _without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}/")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _without(s, "up.bias"), "no whole net for up.bias; nets are trained for one base model"),
        (lambda s: {k: v for k, v in s.items() if k != "up.bias/out"}, "no whole net for up.bias"),
        (lambda s: {**s, "more.weight/out": torch.zeros(64)}, "nets for more.weight, which this method does not train"),
        (lambda s: {}, "no whole net for .* and 5 more"),
        (lambda s: {**s, "up.bias/out": torch.zeros(63)}, r"'up.bias/out' is torch.float32 \(63,\); needed .* \(64,\)"),
        (lambda s: {**s, "up.bias/shift": torch.tensor(math.nan)}, "finite"),
        (lambda s: {**s, "up.bias/shift": torch.tensor(1.0).half()}, "torch.float16"),
    ],
    ids=["missing", "a part", "unknown", "empty", "shape", "NaN", "dtype"],
)
def test_nets_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "nets.safetensors"
    save_file(change(tuner(swapped()).nets.state()), path)
    with pytest.raises(ValueError, match=message):
        ZOFinetuner(swapped(), nets=str(path))


def test_no_file_and_no_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "nets.safetensors"
    optimizer = ZOFinetuner(swapped(), nets=str(path))
    with pytest.raises(ValueError, match="no such file"):
        optimizer.state_dict()  # which a new run asks for before it writes anything
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        ZOFinetuner(swapped(), nets=str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"sides": "one-sided"}, "two-sided only"), ({"tokens": 0}, "tokens is 0"), ({"rank": 2}, "no argument 'rank'")],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.create("zo-finetuner", swapped(), **arguments)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="no parameter to train"):
        ZOFinetuner(nn.Tanh())
