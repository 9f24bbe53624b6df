"""A step of ZOAct: its mean, equal ways of taking it, exact skips and resumes, a complete log, good neighbours."""

from __future__ import annotations

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zoact_kernels import methods, rng
from zoact_kernels.layers import zo_layers
from zoact_kernels.methods import ZOAct
from zoact_kernels.swap import ZOConfig, swap

B = 6
SIDES = [("two-sided", 1), ("two-sided", 3), ("one-sided", 2), ("leave-one-out", 3)]


class Toy(nn.Module):
    """x [B, 24] -> [B, 8]: two layers, an odd width, dropout that would show."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(24, 20), nn.Linear(20, 8, bias=False), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(torch.tanh(self.up(x))))


def toy(format: str = "int4", rank: int = 2, dropout: float = 0.0) -> Toy:
    """A swapped toy with orthonormal bases and coefficients that are not zero."""
    torch.manual_seed(3)
    model = Toy(dropout)
    swap(model, ZOConfig(format=format, group_size=None if format == "dense" else 8, rank=rank), example=(data()[0],))
    for layer in zo_layers(model).values():
        a = torch.linalg.qr(torch.randn(layer.in_features, rank)).Q.contiguous()
        layer.set_basis(a, 0.1 * torch.randn(layer.out_features, rank))
    return model


def fresh() -> Toy:
    """A swapped toy that has learned nothing."""
    torch.manual_seed(3)
    model = Toy()
    swap(model, ZOConfig(format="int4", group_size=8), example=(data()[0],))
    return model


def data(examples: int = B, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 24, generator=generator), torch.randn(examples, 8, generator=generator)


def losses(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Row by row, so that a row's bits do not depend on the others."""
    return torch.stack([(row - t).double().square().sum() for row, t in zip(model(x), target, strict=True)])


def evaluation(model: nn.Module, x: Tensor, target: Tensor) -> methods.Evaluation:
    return lambda groups: losses(model, x.repeat(groups, 1), target.repeat(groups, 1)).view(groups, -1)


def run(optimizer: ZOAct, steps: int, parts: int = 1) -> list[methods.StepResult]:
    """`steps` steps from where the optimizer stands; the batch is a function of the step."""
    results = []
    for _ in range(steps):
        x, target = data(seed=optimizer.iteration)
        pieces = zip(x.chunk(parts), target.chunk(parts), strict=True)
        results.append(optimizer.step_on([evaluation(optimizer.model, *piece) for piece in pieces]))
    return results


def coefficients(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.coeff.detach().clone() for name, layer in zo_layers(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what a step estimates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", ["two-sided", "one-sided", "leave-one-out"])
def test_step_follows_the_gradient(sides):
    """The mean of weights Z over many queries is the gradient in C that autograd finds, within 4 standard errors."""
    model = toy("dense")
    x, target = data()
    optimizer = ZOAct(model, sigma=1e-3, queries=32, sides=sides, optimizer="sgd", lr=0.0, seed=4, floor_every=0)
    layers = zo_layers(model)
    loss = losses(model, x, target).mean()
    wanted = torch.autograd.grad(loss, [layer.coeff for layer in layers.values()])
    samples: list[list[Tensor]] = [[] for _ in layers]
    for _ in range(12):
        result = optimizer.step_on([evaluation(model, x, target)])
        for seed, weight in zip(result.seeds, result.weights.double() * 32, strict=True):
            for kept, layer in zip(samples, layers.values(), strict=True):
                z = rng.noise("normal", int(seed), int(layer.param_id), *layer.coeff.shape)
                kept.append(float(weight) * z.double())
    for kept, gradient in zip(samples, wanted, strict=True):
        stack = torch.stack(kept)
        error = stack.std(0) / math.sqrt(len(stack))
        deviation = ((stack.mean(0) - gradient).abs() / error).flatten()
        assert float(deviation.square().mean()) < 2 and float(deviation.max()) < 4.5  # 56 and 40 entries
        assert float(gradient.norm() / error.norm()) > 2  # there was something to see


@pytest.mark.parametrize("optimizer", ["sgd", "sign", "momentum", "adam", "adamw"])
def test_step_descends(optimizer):
    model = toy()
    x, target = data()
    before = float(losses(model, x, target).mean().detach())
    lr = {"sgd": 1e-2, "sign": 2e-2, "momentum": 2e-3, "adam": 2e-2, "adamw": 2e-2}[optimizer]
    zo = ZOAct(model, queries=4, optimizer=optimizer, lr=lr, floor_every=0)
    for _ in range(30):
        zo.step_on([evaluation(model, x, target)])
    assert float(losses(model, x, target).mean().detach()) < 0.93 * before


def test_step_flipped_ascends():
    model = toy()
    x, target = data()
    before = float(losses(model, x, target).mean().detach())
    zo = ZOAct(model, queries=4, optimizer="sgd", lr=1e-2, floor_every=0)
    zo.lr = -zo.lr
    for _ in range(30):
        zo.step_on([evaluation(model, x, target)])
    assert float(losses(model, x, target).mean().detach()) > 1.1 * before


# --- equal ways of taking the same step -------------------------------------------------------------------------------


@pytest.mark.parametrize(("sides", "queries"), SIDES)
def test_step_sequential_equals_stacked(sides, queries):
    models = [toy(), toy()]
    a, b = (
        ZOAct(model, sides=sides, queries=queries, mode=mode, lr=1e-2)
        for model, mode in zip(models, methods.MODES, strict=True)
    )
    for left, right in zip(run(a, 3), run(b, 3), strict=True):
        assert torch.equal(left.losses, right.losses) and torch.equal(left.weights, right.weights)
        assert left.floor == right.floor
    assert same(coefficients(models[0]), coefficients(models[1]))


@pytest.mark.parametrize("mode", methods.MODES)
def test_step_micro_batches(mode):
    whole, parted = toy(), toy()
    a = run(ZOAct(whole, queries=2, mode=mode), 3)
    b = run(ZOAct(parted, queries=2, mode=mode), 3, parts=3)
    assert all(torch.equal(left.losses, right.losses) for left, right in zip(a, b, strict=True))
    assert same(coefficients(whole), coefficients(parted))


def test_step_closure():
    """The documented loop, in both modes, equals step_on."""
    wanted = toy()
    run(ZOAct(wanted, lr=1e-2), 2)
    for mode in methods.MODES:
        model = toy()
        zo = ZOAct(model, lr=1e-2, mode=mode)
        for step in range(2):
            x, target = data(seed=step)
            batch = zo.stack({"x": x, "target": target})
            zo.step(lambda batch=batch, model=model: losses(model, **batch))
        assert same(coefficients(model), coefficients(wanted))


def test_stack():
    zo = ZOAct(toy(), queries=2)
    ids, mask = torch.arange(6).view(3, 2), torch.ones(3, 2)
    stacked = zo.stack({"positions": torch.arange(2)[None], "input_ids": ids, "mask": mask, "use_cache": False})
    assert torch.equal(stacked["input_ids"], torch.cat([ids] * 4)) and stacked["mask"].shape == (12, 2)
    assert stacked["positions"].shape == (1, 2) and stacked["use_cache"] is False
    assert ZOAct(toy(), queries=2, mode="sequential").stack({"input_ids": ids})["input_ids"] is ids
    with pytest.raises(ValueError, match="no tensor with a batch dimension"):
        zo.stack({"labels": 3})


def test_step_measuring_the_floor_changes_nothing():
    often, never = toy(), toy()
    a, b = run(ZOAct(often, floor_every=1), 3), run(ZOAct(never, floor_every=0), 3)
    assert same(coefficients(often), coefficients(never))
    assert all(0 <= r.floor < 0.1 * r.signal for r in a) and all(math.isnan(r.floor) for r in b)


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", methods.MODES)
def test_step_skips_lost_losses(mode, value):
    model = toy()
    zo = ZOAct(model, queries=2, mode=mode)
    run(zo, 2)
    before = coefficients(model), zo.rule.state_dict()
    calls = 0

    def poisoned(groups: int) -> Tensor:
        nonlocal calls
        calls += 1
        table = evaluation(model, *data())(groups)
        if calls == (1 if mode == "stacked" else 3):
            table[2 if mode == "stacked" else 0, 4] = value
        return table

    result = zo.step_on([poisoned])
    assert result.skipped and "group 2" in result.reason and result.step == 2
    assert not math.isfinite(result.losses[2, 4])  # the log shows what was seen
    assert same(coefficients(model), before[0]) and same(zo.rule.state_dict(), before[1])
    (after,) = run(zo, 1)
    assert zo.iteration == 4 and not after.skipped and zo.rule.t == 3
    assert torch.equal(after.seeds, torch.tensor([rng.seed_for(0, 3, j) for j in range(2)]))


def test_step_skips_without_spread():
    model = toy()
    zo = ZOAct(model, queries=3, scaling="std")
    before = coefficients(model)
    result = zo.step_on([lambda groups: torch.full((groups, B), 7.3)])
    assert result.skipped and "equal" in result.reason and same(coefficients(model), before)


@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("optimizer", ["adam", "momentum", "sgd"])
def test_resume(optimizer, after):
    arguments = {"optimizer": optimizer, "queries": 2, "schedule": "cosine", "steps": 5, "seed": 9}
    straight = toy()
    wanted = run(ZOAct(straight, **arguments), 5)
    killed = toy()
    first = ZOAct(killed, **arguments)
    run(first, after)
    state = first.state_dict()
    run(first, 1)  # whatever happens after the snapshot is lost
    fresh = toy()
    for layer in zo_layers(fresh).values():  # the state brings its own A and C
        layer.basis, layer.coeff.data = torch.zeros_like(layer.basis), torch.ones_like(layer.coeff)
    second = ZOAct(fresh, **{**arguments, "seed": 0})
    second.load_state_dict(state)
    got = run(second, 5 - after)
    assert same(coefficients(fresh), coefficients(straight))
    for left, right in zip(got, wanted[after:], strict=True):
        assert torch.equal(left.losses, right.losses) and left.lr == right.lr and left.step == right.step
    assert same(second.rule.state_dict(), {**second.rule.state_dict(), "t": torch.tensor(5)})


def test_state_dict_does_not_see_wrappers():
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = toy()
    state = ZOAct(Wrapper(model)).state_dict()
    assert state.keys() == ZOAct(model).state_dict().keys()


def test_state_dict_keeps_sharing(tmp_path):
    from safetensors.torch import load_file, save_file

    model = toy()
    layers = list(zo_layers(model).values())
    shared = layers[0].basis
    extra = copy.deepcopy(layers[0])
    extra.basis, extra.perturbation, extra.param_id = shared, layers[0].perturbation, extra.param_id + 1
    model.extra = extra
    state = ZOAct(model).state_dict()
    assert state["basis_of"].tolist() == [0, 1, 0] and "basis/2" not in state
    save_file(state, tmp_path / "state.safetensors")
    zo = ZOAct(model)
    zo.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert model.extra.basis is layers[0].basis and layers[0].basis is not layers[1].basis
    assert torch.equal(layers[0].basis, shared)


@pytest.mark.parametrize("method", ["lozo", "subzero", "qzo", "agzo"])
@pytest.mark.parametrize("wrong", ["shape", "missing", "unknown"])
def test_what_a_trainable_holds_is_checked_before_anything_is_changed(method, wrong):
    zo, other = (methods.create(method, fresh(), seed=seed) for seed in (1, 2))
    run(other, 2)
    bad, before = other.state_dict(), zo.state_dict()
    key = [key for key in bad if key.startswith("held/")][-1]  # of the last trainable, when others would be written
    if wrong == "unknown":
        bad[key + "er"] = bad[key]
    elif (value := bad.pop(key)) is not None and wrong == "shape":
        bad[key] = torch.zeros(*value.shape, 1)
    with pytest.raises(ValueError, match="state of"):
        zo.load_state_dict(bad)
    after = zo.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].nan_to_num(), tensor.nan_to_num()) for key, tensor in before.items())


def test_state_dict_of_another_model_is_refused():
    zo = ZOAct(toy())
    before = zo.state_dict()
    with pytest.raises(ValueError, match=r"coeff/up.*\(20, 3\)|coeff/up.*\(20, 2\)"):
        zo.load_state_dict(ZOAct(toy(rank=3)).state_dict())
    with pytest.raises(ValueError, match="exp_avg"):
        zo.load_state_dict(ZOAct(toy(), optimizer="sgd").state_dict())
    bad = zo.state_dict()
    bad["basis/1"] = torch.zeros(20, 5)
    with pytest.raises(ValueError, match="basis of down"):
        zo.load_state_dict(bad)
    after = zo.state_dict()
    assert all(torch.equal(before[k], after[k]) or k == "floor" for k in before)


@pytest.mark.parametrize("optimizer", ["adam", "sign", "adamw"])
def test_replay(optimizer):
    arguments = {"optimizer": optimizer, "queries": 2, "schedule": "linear", "steps": 6, "weight_decay": 0.01}
    model = toy()
    zo = ZOAct(model, **arguments)
    log = run(zo, 3)
    log.append(zo.step_on([lambda groups: torch.full((groups, B), math.nan)]))
    log += run(zo, 2)
    again = toy()
    replayed = ZOAct(again, **{**arguments, "lr": 123.0})  # the log knows the learning rates
    again.forward = None  # never evaluated
    replayed.replay(log)
    assert same(coefficients(again), coefficients(model)) and replayed.iteration == 6
    assert same(replayed.rule.state_dict(), zo.rule.state_dict())
    with pytest.raises(ValueError, match="step 3; step 6 is next"):
        replayed.replay(log[3:])


def test_step_is_deterministic_and_seeded():
    models = [toy(), toy(), toy()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        run(ZOAct(model, seed=seed), 2)
    assert same(coefficients(models[0]), coefficients(models[1]))
    assert not same(coefficients(models[0]), coefficients(models[2]))


# --- good neighbours --------------------------------------------------------------------------------------------------


def test_step_leaves_generators_and_weights_alone():
    model = toy(dropout=0.5).train()
    frozen = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("coeff")}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    zo = ZOAct(model)
    run(zo, 3)
    zo.replay([])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]  # noqa: NPY002
    assert all(torch.equal(v, frozen[k]) for k, v in model.state_dict().items() if k in frozen)
    assert model.training and model.dropout.training
    quiet = toy(dropout=0.0)
    run(ZOAct(quiet), 3)
    assert same(coefficients(model), coefficients(quiet))  # dropout took no part
    assert all(p.grad is None for p in model.parameters())


def test_step_two_models():
    alone, first, second = toy(), toy(), toy("nf4")
    run(ZOAct(alone), 4)
    a, b = ZOAct(first), ZOAct(second, queries=3, sides="one-sided")
    for _ in range(4):
        run(a, 1)
        run(b, 1)
    assert same(coefficients(first), coefficients(alone))


def test_step_deepcopy():
    model = toy()
    zo = ZOAct(model)
    run(zo, 2)
    twin, other = copy.deepcopy((model, zo))
    before = coefficients(model)
    run(other, 2)
    assert same(coefficients(model), before) and not same(coefficients(twin), before)
    run(zo, 2)
    assert same(coefficients(model), coefficients(twin))


def test_step_failure_in_a_closure_changes_nothing():
    model = toy()
    zo = ZOAct(model)
    before = coefficients(model)

    def fails(groups: int) -> Tensor:
        model(data()[0].repeat(groups, 1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zo.step_on([fails])
    assert zo.iteration == 0 and same(coefficients(model), before)
    x, _ = data(5)
    assert model(x).shape == (5, 8)  # clean again: 5 rows are no multiple of 2 groups
    run(zo, 1)
    assert not same(coefficients(model), before)


def test_step_warns_when_the_signal_drowns():
    model = toy()
    zo = ZOAct(model, sigma=1e-3)

    def rounded(groups: int) -> Tensor:
        exact = evaluation(model, *data())(groups)
        return exact + 0.1 * (exact * 1e7).frac()  # as erratic as low precision in a deep model

    with pytest.warns(UserWarning, match=r"drown in rounding .* try sigma=0\.0"):
        results = [zo.step_on([rounded]) for _ in range(methods.RECENT + 1)]
    assert results[0].better_sigma is None and 5e-3 <= results[-1].better_sigma <= 5e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ZOAct(toy()), methods.RECENT + 1)


def test_step_checks_rows():
    model = toy()
    zo = ZOAct(model)
    x, target = data()
    zo.step_on([evaluation(model, x, target)], rows=(B,))
    with pytest.raises(ValueError, match=r"'up'.*regroups"):
        zo.step_on([evaluation(model, x, target)], rows=(B - 1,))


def test_create():
    assert methods.create("zo-act", toy()).sides == "two-sided"
    zo = methods.create("zo-act-one-sided", toy(), queries=3)
    assert zo.sides == "one-sided" and zo.groups == 4
    with pytest.raises(ValueError, match="known are zo-act, zo-act-one-sided"):
        methods.create("no-such", toy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "mode is 'both'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"sides": "left"}, "sides is 'left'"),
        ({"scaling": "std"}, "spread of at least 2"),
        ({"queries": 0}, "queries is 0"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"schedule": "cosine"}, "steps is None"),
        ({"noise": "uniform"}, "noise is 'uniform'"),
        ({"seed": 2**63}, "seed is"),
    ],
)
def test_zoact_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ZOAct(toy(), **arguments)


def test_zoact_needs_something_to_train():
    with pytest.raises(ValueError, match="no layer of the model can be trained"):
        ZOAct(Toy())
    model = Toy()
    swap(model, ZOConfig(rank=0, group_size=8), example=(data()[0],))
    with pytest.raises(ValueError, match="rank=1"):
        ZOAct(model)


def test_step_errors():
    model = toy()
    zo = ZOAct(model)
    with pytest.raises(ValueError, match="bfloat16"):
        zo.step(lambda: torch.zeros(2 * B, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"shape \(3,\); 2 row groups"):
        zo.step(lambda: torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        zo.step(lambda: torch.zeros(3, 2))
    with pytest.raises(ValueError, match="evaluations is empty"):
        zo.step_on([])
    sizes = iter((5, 6))
    with pytest.raises(ValueError, match="all see the same batch"):
        ZOAct(model, mode="sequential").step(lambda: torch.zeros(next(sizes)))
    layer = zo_layers(model)["up"]
    layer.set_basis(layer.basis)
    with pytest.raises(RuntimeError, match="layer up got another coeff"):
        run(zo, 1)
