"""Forward gradient: derivatives against autograd's in float64, equal ways to take them, and no tangent lost unnoticed.

What a step differentiates is rebuilt from a plain model: weights W in float64, Delta = Z A^T or Z from the generator's
words, <grad f, Delta> by a backward pass for each example.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import numpy as np
import pytest
import test_methods
import test_methods_dense
import torch
from close import assert_no_worse
from test_methods import coefficients, data, same, toy
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from zoact_kernels import methods, rng, tangent
from zoact_kernels.layers import ZOLinear, perturbed, zo_layers
from zoact_kernels.losses import Batch, group_losses
from zoact_kernels.methods import ZeroOrder
from zoact_kernels.swap import ZOConfig, swap

B, T, V, R = 3, 7, 61, 2
FORMATS = {"forward-gradient": "int4", "forward-gradient-dense": "dense"}
# A learned position table, looked up once for all row groups, is what the dense methods refuse in the encoder.
CASES = [("decoder", "forward-gradient"), ("encoder", "forward-gradient"), ("decoder", "forward-gradient-dense")]


@functools.cache
def _plain(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(3)
    shape = dict(
        vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    if kind == "decoder":
        config = transformers.LlamaConfig(**shape, num_key_value_heads=2, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, num_labels=3))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)  # a random init of 0.02 makes an almost linear model
    return model.eval().requires_grad_(False)


def plain(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return copy.deepcopy(_plain(kind)).to(dtype)


def batch(kind: str, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(1, V, (B, T), generator=generator), torch.ones(B, T, dtype=torch.int64)
    mask[1, 5:] = 0
    if kind == "encoder":
        return Batch("sequence-classification", ids, mask, labels=torch.tensor([2, 0, 1]))
    where = torch.tensor([0, 0, 1, 2]), torch.tensor([2, 6, 4, 6])
    return Batch("completion", ids, mask, *where, torch.tensor([5, 9, 11, 2]))


def swapped(kind: str, method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """What `method` trains: over INT4 with bases and a C and a delta that are not zero, or over dense weights."""
    model, low_bit = plain(kind, dtype), FORMATS[method] == "int4"
    config = ZOConfig(format=FORMATS[method], group_size=16 if low_bit else None, rank=R if low_bit else 0)
    swap(model, config, example=(batch(kind).input_ids,))
    generator = torch.Generator().manual_seed(1)
    for layer in zo_layers(model).values() if low_bit else ():
        N, K = layer.out_features, layer.in_features
        a = torch.linalg.qr(torch.randn(K, R, generator=generator)).Q.contiguous()
        layer.set_basis(a, 0.05 * torch.randn(N, R, generator=generator))
        layer.base_basis = torch.randn(K, 3, generator=generator) / 8
        layer.base_coeff = 0.05 * torch.randn(N, 3, generator=generator)
    return model


def make(kind: str, method: str, dtype: torch.dtype = torch.float32, **changes: Any) -> ZeroOrder:
    return methods.create(method, swapped(kind, method, dtype), **changes)


def step(optimizer: ZeroOrder, *parts: Batch) -> methods.StepResult:
    evaluations = [functools.partial(group_losses, optimizer.model, part) for part in parts]
    return optimizer.step_on(evaluations, tuple(sorted({size for part in parts for size in part.leading})))


def derivatives(optimizer: ZeroOrder, given: Batch, seeds: Tensor) -> Tensor:
    """float64 [q, B]: of every example along every seed, through the layers."""
    model, groups = optimizer.model, len(seeds)
    with torch.no_grad(), tangent.tangents(model, watch=True), perturbed(model, seeds, torch.eye(groups)):
        return forward_ad.unpack_dual(group_losses(model, given, groups)).tangent


def weights_of(optimizer: ZeroOrder, kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A plain float64 model that computes what the swapped one does, and its parameters that are trained or changed."""
    model = plain(kind, torch.float64)
    own = dict(model.named_parameters())
    for name, layer in zo_layers(optimizer.model).items():
        own[f"{name}.weight"].data.copy_(layer.dequantize(torch.float32).double())
        if layer.coeff is not None:
            change = layer.coeff.detach().double() @ layer.basis.double().T
            own[f"{name}.weight"].data += change + layer.base_coeff.double() @ layer.base_basis.double().T
    return model, own


def direction(optimizer: ZeroOrder, seed: Tensor) -> dict[str, Tensor]:
    """Delta of every trained parameter, float64."""
    found = {}
    for name, t in optimizer.trainables.items():
        shape = t.value.shape if t.value.shape[1] > 1 or t.basis is not None else t.value.shape[::-1]
        z = rng.noise("normal", int(seed), int(t.param_id), *shape).double()
        found[t.parameter] = z @ t.basis.double().T if t.basis is not None else z.view(t.value.shape)
        assert name in (t.parameter, t.parameter.removesuffix(".weight"))
    return found


def through_autograd(optimizer: ZeroOrder, kind: str, seeds: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 [q, B] by a backward pass for each example, in `dtype`."""
    model = weights_of(optimizer, kind)[0].to(dtype).requires_grad_(True)
    losses = group_losses(model, batch(kind), grad=True)[0]
    deltas = [direction(optimizer, seed) for seed in seeds]
    columns = []
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        slopes = (sum((p.grad * d[n].view(p.shape).to(dtype)).sum() for n, p in model.named_parameters() if n in d)
                  for d in deltas)  # fmt: skip
        columns.append(torch.stack(list(slopes)))
    return torch.stack(columns, dim=1).detach()


SEEDS = torch.tensor([11, -5, 2**40, 7, 0])


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_derivatives_are_those_of_autograd(kind, method):
    optimizer = make(kind, method)
    truth = through_autograd(optimizer, kind, SEEDS, torch.float64)
    other = through_autograd(optimizer, kind, SEEDS, torch.float32)
    got = derivatives(optimizer, batch(kind), SEEDS)
    assert got.dtype == torch.float64 and float(truth.abs().min()) > 1e-3
    assert_no_worse(got.float(), other.float(), truth, f"{kind}, {method}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_derivatives_in_16_bits(dtype, kind="decoder"):
    """No worse than torch's own tangents of a model whose weights are dual tensors of the same dtype."""
    optimizer = make(kind, "forward-gradient-dense", dtype)
    truth = through_autograd(optimizer, kind, SEEDS, torch.float64)
    model, own = weights_of(optimizer, kind)
    model, rows = model.to(dtype), []
    sigma = 2.0**-6  # a tangent along Z itself leaves the range of fp16
    for seed in SEEDS:
        deltas = direction(optimizer, seed)
        with torch.no_grad(), tangent.tangents(optimizer.model):
            duals = {n: forward_ad.make_dual(own[n].to(dtype), (sigma * d).view(own[n].shape).to(dtype))
                     for n, d in deltas.items()}  # fmt: skip
            caller = _Called(model, duals).eval()
            rows.append(forward_ad.unpack_dual(group_losses(caller, batch(kind))).tangent[0] / sigma)
    groups = len(SEEDS)
    swapped_ = optimizer.model
    with torch.no_grad(), tangent.tangents(swapped_), perturbed(swapped_, SEEDS, sigma * torch.eye(groups)):
        got = forward_ad.unpack_dual(group_losses(swapped_, batch(kind), groups)).tangent / sigma
    assert_no_worse(got.float(), torch.stack(rows).float(), truth, f"{kind}, {dtype}")


class _Called(nn.Module):
    """A model that runs with other parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.given = model, parameters

    def forward(self, **inputs: Any) -> Any:
        return functional_call(self.model, self.given, kwargs=inputs, tie_weights=True)


# --- a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_step(kind, method):
    """Weights are the derivatives over q, losses those of the clean model, and the update goes along the same Delta."""
    optimizer = make(kind, method, queries=3, lr=0.1, optimizer="sgd", sigma=2.0**-10)
    model = weights_of(optimizer, kind)[0]
    truth, other = (group_losses(model.to(dtype), batch(kind)) for dtype in (torch.float64, torch.float32))
    seeds = torch.tensor([rng.seed_for(0, 0, query) for query in range(3)])
    slopes = derivatives(optimizer, batch(kind), seeds)
    before = {name: t.value.detach().clone() for name, t in optimizer.trainables.items()}
    result = step(optimizer, batch(kind))
    assert torch.equal(result.seeds, seeds) and not result.skipped and result.losses.shape == (3, B)
    assert torch.equal(result.weights, (slopes.mean(1) / 3).float())
    assert all(torch.equal(row, result.losses[0]) for row in result.losses)
    assert_no_worse(result.losses[:1].float(), other.float(), truth)
    assert result.signal == 2.0**-10 * float(slopes.mean(1).abs().mean()) and math.isnan(result.floor)
    for name, t in optimizer.trainables.items():
        shape = t.value.shape if t.value.shape[1] > 1 or t.basis is not None else t.value.shape[::-1]
        z = [rng.noise("normal", int(s), int(t.param_id), *shape).view(t.value.shape) for s in seeds]
        paths = [before[name].to(d) - 0.1 * sum(w.to(d) * a.to(d) for w, a in zip(result.weights, z, strict=True))
                 for d in (torch.float32, torch.float64)]  # fmt: skip
        assert_no_worse(t.value.detach(), *paths, name)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_other_ways_of_the_same_step(kind, method):
    """Queries one after another, and another sigma (a power of two), change no bit."""
    results = []
    for changes in ({}, {"mode": "sequential"}, {"sigma": 2.0**-3}):
        optimizer = make(kind, method, **{"queries": 2, "lr": 0.05, "sigma": 2.0**-10, **changes})
        seen = [step(optimizer, batch(kind)) for _ in range(2)]
        results.append((seen, {name: t.value.detach().clone() for name, t in optimizer.trainables.items()}))
    for seen, values in results[1:]:
        assert all(torch.equal(a.weights, b.weights) for a, b in zip(seen, results[0][0], strict=True))
        assert all(torch.equal(a, results[0][1][name]) for name, a in values.items())


def test_micro_batches_and_closures():
    whole, parted, closed = toy(), toy(), toy()
    for model, parts in ((whole, 1), (parted, 3)):
        test_methods.run(methods.create("forward-gradient", model, queries=2), 3, parts)
    optimizer = methods.create("forward-gradient", closed, queries=2)
    for seed in range(3):
        x, target = data(seed=seed)
        given = optimizer.stack({"x": x, "target": target})
        optimizer.step(lambda given=given: test_methods.losses(closed, **given))
    assert same(coefficients(whole), coefficients(parted)) and same(coefficients(whole), coefficients(closed))


class Launches(TorchDispatchMode):
    """Rows that went through a weight, by its address, and rows that went without."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, list[int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("zoact::zo_linear", "zoact::zo_dense_linear"):
            key = 0 if args[1] is None else args[1].data_ptr()
            self.rows.setdefault(key, []).append(args[0].numel() // args[0].shape[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", FORMATS)
def test_a_weight_is_read_once(method):
    """Primal and tangent rows in one launch; where nothing before has a tangent yet, the primal rows alone."""
    optimizer = make("decoder", method, queries=2)
    with Launches() as launches:
        step(optimizer, batch("decoder"))
    layers = zo_layers(optimizer.model)
    first = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    for name, layer in layers.items():
        halves = 1 if method == "forward-gradient" and name in first else 2
        assert launches.rows[layer.weight.data_ptr()] == [halves * 2 * B * T], name
    heads = method == "forward-gradient-dense"  # the head, which is tied to the table, and no swapped layer
    assert len(launches.rows[0]) == len(layers) + heads


def test_estimates_follow_the_gradient():
    """The mean of weights Z is the gradient in C, and its mean squared error is (Dim + 1) |grad|^2 (methods 2.6)."""
    model = toy("dense")
    x, target = data()
    layers = zo_layers(model)
    loss = (model(x) - target).double().square().sum(1).mean()
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [a.coeff for a in layers.values()])]).double()
    optimizer = methods.create("forward-gradient", model, queries=64, lr=0.0, seed=4)
    kept = []
    for _ in range(8):
        result = optimizer.step_on(
            [lambda groups: (model(x.repeat(groups, 1)) - target.repeat(groups, 1)).square().sum(1)]
        )
        for seed, weight in zip(result.seeds, result.weights.double() * 64, strict=True):
            z = [rng.noise("normal", int(seed), int(a.param_id), *a.coeff.shape).flatten() for a in layers.values()]
            kept.append(weight * torch.cat(z).double())
    samples = torch.stack(kept)
    error = samples.std(0) / math.sqrt(len(samples))
    off = (samples.mean(0) - wanted).abs() / error
    assert float(off.max()) < 4.5 and float(off.square().mean()) < 2 and float(wanted.norm() / error.norm()) > 2
    squared = (samples - wanted).square().sum(1)
    truth = (wanted.numel() + 1) * float(wanted.square().sum())
    assert abs(float(squared.mean()) - truth) < 4 * float(squared.std()) / math.sqrt(len(samples))


@pytest.mark.parametrize("method", FORMATS)
def test_steps_descend_and_flipped_ascend(method):
    for sign in (1, -1):
        optimizer, run = small(method, queries=4, lr={"forward-gradient": 1e-2, "forward-gradient-dense": 5e-4}[method])
        optimizer.lr *= sign
        losses = [float(run(0).losses.mean()) for _ in range(25)]
        assert losses[-1] < 0.9 * losses[0] if sign > 0 else losses[-1] > 1.1 * losses[0]


def small(method: str, **arguments: Any) -> tuple[ZeroOrder, Any]:
    """An optimizer of a net without transformers, and its step on the batch of a seed."""
    if method == "forward-gradient":
        model = toy()
        evaluate = lambda seed: test_methods.evaluation(model, *data(seed=seed))  # noqa: E731
    else:
        model = test_methods_dense.swapped()
        evaluate = lambda seed: test_methods_dense.evaluation(model, test_methods_dense.ids(seed))  # noqa: E731
    optimizer = methods.create(method, model, **arguments)
    return optimizer, lambda seed: optimizer.step_on([evaluate(seed)])


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FORMATS)
def test_resume_and_replay_after_every_step(method):
    straight, run = small(method, queries=2, lr=0.02, seed=9)
    states, log = [straight.state_dict()], []
    for i in range(4):
        log.append(run(i))
        states.append(straight.state_dict())
    for after in range(5):
        resumed, run = small(method, queries=2, lr=0.02)
        resumed.load_state_dict(states[after])
        for row in log[after:]:
            assert torch.equal(run(resumed.iteration).weights, row.weights)
        assert all(torch.equal(a, states[4][key]) for key, a in resumed.state_dict().items() if key != "floor")
    replayed, _ = small(method, queries=2, lr=3.0, seed=9)
    replayed.replay(log)
    assert all(torch.equal(a, states[4][key]) for key, a in replayed.state_dict().items() if key != "floor")


def test_lost_losses_skip():
    model = toy()
    optimizer = methods.create("forward-gradient", model, queries=2)
    before, states = coefficients(model), (torch.get_rng_state(), np.random.get_state()[1].tolist())  # noqa: NPY002
    x, target = data()

    def evaluate(groups: int, bad: float = math.nan, only_slope: bool = False) -> Tensor:
        losses = (model(x.repeat(groups, 1)) - target.repeat(groups, 1)).square().sum(1).view(groups, -1)
        if not only_slope:
            return torch.where(torch.arange(losses.numel()).view_as(losses) == 3, bad, losses)
        clean, slope = forward_ad.unpack_dual(losses)
        return forward_ad.make_dual(clean.clone(), slope * bad)

    result = optimizer.step_on([evaluate])
    assert result.skipped and "losses of group 0 are not finite" in result.reason
    result = optimizer.step_on([functools.partial(evaluate, only_slope=True)])
    assert result.skipped and "derivative is not finite" in result.reason and torch.isfinite(result.losses).all()
    assert same(coefficients(model), before) and optimizer.rule.t == 0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002


def test_the_next_method_starts_afresh():
    """Outside a step the model is the clean one, and another method takes differences as if there had been no other."""
    optimizer = make("decoder", "forward-gradient-dense", lr=0.0)
    step(optimizer, batch("decoder"))
    assert torch.equal(group_losses(optimizer.model, batch("decoder")),
                       group_losses(swapped("decoder", "forward-gradient-dense"), batch("decoder")))  # fmt: skip
    results = [step(methods.create("mezo", model), batch("decoder"))
               for model in (optimizer.model, swapped("decoder", "forward-gradient-dense"))]  # fmt: skip
    assert torch.equal(results[0].losses, results[1].losses)
    model = toy()
    methods.create("forward-gradient", model, lr=0.0)
    others = toy(), model
    for other in others:
        test_methods.run(methods.create("zo-act", other), 2)
    assert same(*map(coefficients, others))


# --- tangents that would be lost --------------------------------------------------------------------------------------


@torch.library.custom_op("zoact_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


class NoFormula(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("lost", "error", "message"),
    [
        (twice, RuntimeError, "zoact_tests.twice.* drops tangents"),
        (NoFormula.apply, NotImplementedError, "jvp"),
        (lambda x: torch.ops.zoact.zo_linear(
            x, torch.eye(20), *[None] * 13, "dense", "row", -1, 20), RuntimeError, "zo_linear drops tangents"),
    ],
)  # fmt: skip
def test_a_dropped_tangent_raises(lost, error, message):
    model = toy()
    down = model.down
    before = [layer.coeff.detach().clone() for layer in (model.up, down)]
    model.lost = down  # still a part of the model
    model.down = nn.Sequential()
    model.down.forward = lambda x: down(lost(x))
    optimizer = methods.create("forward-gradient", model)
    x, target = data()
    with pytest.raises(error, match=message):
        optimizer.step_on([lambda groups: (model(x) - target).square().sum(1)])
    assert all(torch.equal(layer.coeff, c) for layer, c in zip((model.up, down), before, strict=True))
    assert optimizer.iteration == 0 and not optimizer._watched


def test_constants_are_no_lost_tangents():
    """What only takes a shape, or says detach, is as good as in autograd."""
    model = toy()
    optimizer = methods.create("forward-gradient", model)
    x, target = data()

    def evaluate(groups: int) -> Tensor:
        y = model(x)
        y = y + torch.zeros_like(y) + y.new_ones(()) + y.detach() * (y > 0) + y.data.round().sign()
        y = y * torch.ones(()).expand_as(y) + torch.ones(1, dtype=torch.float64).to(y)
        return (y.clamp(-9, 9).round() * 0 + y - target).square().sum(1)

    assert not optimizer.step_on([evaluate]).skipped


def test_losses_without_tangents_are_refused():
    model = toy()
    optimizer = methods.create("forward-gradient", model)
    x, _ = data()
    with pytest.raises(ValueError, match="carry no tangent"):
        optimizer.step_on([lambda groups: model(x).detach().sum(1)])


def test_attention_is_left_as_it_was():
    from torch.backends.cuda import flash_sdp_enabled, math_sdp_enabled, mem_efficient_sdp_enabled

    def chosen() -> list[bool]:
        return [flash_sdp_enabled(), math_sdp_enabled(), mem_efficient_sdp_enabled()]

    before = chosen()
    model = swapped("decoder", "forward-gradient")
    assert model.config._attn_implementation == "sdpa"
    optimizer = methods.create("forward-gradient", model)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(chosen()))
    step(optimizer, batch("decoder"))
    assert seen[0] == [False, True, False] and chosen() == before and model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyboardInterrupt), tangent.tangents(model):
        raise KeyboardInterrupt
    assert chosen() == before and not next(iter(zo_layers(model).values())).perturbation.tangent


def test_errors():
    model = swapped("decoder", "forward-gradient")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention by 'flash_attention_2'.*'eager' or 'sdpa'"):
        methods.create("forward-gradient", model)
    compiled = toy()
    compiled.down.compile()
    with pytest.raises(ValueError, match="down is compiled"):
        methods.create("forward-gradient", compiled)
    with pytest.raises(ValueError, match="sides is 'two-sided'; here it may be tangent"):
        methods.create("forward-gradient", toy(), sides="two-sided")
    with pytest.raises(ValueError, match="sides is 'tangent'; here it may be two-sided"):
        methods.create("zo-act", toy(), sides="tangent")
    bare = toy()
    optimizer = methods.create("forward-gradient", bare)
    bare.up.basis = None
    with pytest.raises(RuntimeError, match="'up' has no basis"):
        optimizer.step_on([lambda groups: bare(data()[0]).sum(1)])
    assert isinstance(bare.up, ZOLinear)
