"""Methods that train the weights themselves, against an independent dense materialisation of their formulas in float64.

`Net` has every kind of parameter: a table with a tied head, swapped linears with and without bias, one that was not
swapped, a norm. What a method perturbs and moves is written out below, tensor by tensor, from the generator's words.
"""

from __future__ import annotations

import copy
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_no_worse
from invariants import descends, resumes, same_in_parts
from torch import Tensor, nn
from torch.func import functional_call

from zoact_kernels import methods, parameters, rng, trainables
from zoact_kernels.embedding import PackedEmbedding
from zoact_kernels.layers import ZOLinear, perturbed
from zoact_kernels.methods import ZeroOrder
from zoact_kernels.swap import ZOConfig, dense_twin, swap

B, T, V = 3, 5, 53
DTYPES = (torch.float32, torch.float64)


class Net(nn.Module):
    """ids [B, T] -> logits [B, T, V]; odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, 23)
        self.up, self.norm = nn.Linear(23, 31), nn.LayerNorm(31)
        self.side, self.down = nn.Linear(31, 31), nn.Linear(31, 23, bias=False)
        self.head = nn.Linear(23, V, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = torch.tanh(self.norm(self.up(x)))
        return self.head(x + self.down(h + self.side(h)))


NAMES = [
    "table.weight", "up.weight", "up.bias", "norm.weight", "norm.bias", "side.weight", "side.bias", "down.weight",
]  # fmt: skip


def plain_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(5)
    net = Net().eval().requires_grad_(False)
    with torch.no_grad():
        net.norm.bias.normal_()
    return net.to(dtype)


def swapped(dtype: torch.dtype = torch.float32) -> Net:
    net = plain_net(dtype)
    swap(net, ZOConfig(format="dense", rank=0, layout="row"), where=["up", "down"], example=(ids(),))
    return net


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def values(net: nn.Module) -> dict[str, Tensor]:
    """The parameters by the names that they had before anything was swapped."""
    found = {}
    for name in NAMES:
        owner, _, key = name.rpartition(".")
        found[name] = getattr(net.get_submodule(owner), key).detach().clone()
    return found


def losses(net: nn.Module, x: Tensor) -> Tensor:
    """Row by row, so that a row's bits do not depend on the others."""
    return torch.stack([row[-1].double().log_softmax(-1)[7].neg() for row in net(x)])


def evaluation(net: nn.Module, x: Tensor) -> methods.Evaluation:
    return lambda groups: losses(net, x.repeat(groups, 1)).view(groups, -1)


def run(optimizer: ZeroOrder, steps: int, parts: int = 1) -> list[methods.StepResult]:
    results = []
    for _ in range(steps):
        pieces = ids(optimizer.iteration).chunk(parts)
        results.append(optimizer.step_on([evaluation(optimizer.model, piece) for piece in pieces]))
    return results


# --- the formulas, written out ----------------------------------------------------------------------------------------


def noise(kind: str, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Z of one parameter, float64: an entry's address is its place in the flat tensor."""
    rows = shape[0] if len(shape) > 1 else 1
    return rng.noise(kind, seed, zlib.crc32(name.encode()), rows, math.prod(shape) // rows).view(shape).double()


def normal_noise(optimizer: ZeroOrder, theta: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    return {name: noise("normal", seed, name, tuple(w.shape)) for name, w in theta.items()}


def signs(optimizer: ZeroOrder, theta: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    return {name: noise("rademacher", seed, name, tuple(w.shape)) for name, w in theta.items()}


def small_alone(optimizer: ZeroOrder, theta: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Noise where |theta| is at most the smallest quarter's largest entry in the beginning."""
    z, masked = normal_noise(optimizer, theta, seed), {}
    for name, first in values(swapped()).items():
        magnitudes = first.abs().flatten().sort().values
        h = magnitudes[math.ceil(0.25 * len(magnitudes)) - 1]
        masked[name] = z[name] * (theta[name].abs() <= h)
    return masked


def random_part(optimizer: ZeroOrder, theta: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    z, masked = normal_noise(optimizer, theta, seed), {}
    slow = rng.seed_for(optimizer.seed, optimizer.iteration // 2)
    for name, w in theta.items():
        part = rng.mask(slow, zlib.crc32(name.encode()), 0.25, 1, w.numel())
        masked[name] = z[name] * part.view(w.shape)
    return masked


Delta = Callable[[ZeroOrder, dict[str, Tensor], int], dict[str, Tensor]]  # of one seed: name -> direction, float64
PRESETS: dict[str, tuple[str, Delta, dict[str, Any]]] = {
    "mezo": ("mezo", normal_noise, {}),
    "mezo-3": ("mezo", normal_noise, {"queries": 3}),
    "mezo-one-sided": ("mezo", normal_noise, {"queries": 2, "sides": "one-sided"}),
    "fzoo": ("fzoo", signs, {}),
    "sparse-mezo": ("sparse-mezo", small_alone, {"queries": 2}),
    "zo-sparse": ("zo-sparse", random_part, {"period": 2, "queries": 2}),
    "zo-sign": ("zo-sign", normal_noise, {"queries": 2}),
    "zo-momentum": ("zo-momentum", normal_noise, {}),
    "zo-adam": ("zo-adam", normal_noise, {"queries": 2}),
    "zo-finetuner": ("zo-finetuner", normal_noise, {}),
}
TORCH = {"sgd": torch.optim.SGD, "sign": torch.optim.SGD, "adam": torch.optim.Adam,
         "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)}  # fmt: skip
# Learning rates that descend here, where it is not 5e-4.
DESCENT = {
    "fzoo": 2e-2, "sparse-mezo": 4e-3, "zo-sparse": 2e-3, "zo-sign": 3e-2, "zo-momentum": 1e-4, "zo-adam": 1e-2,
}  # fmt: skip


def make(preset: str, net: nn.Module, **changes: Any) -> tuple[ZeroOrder, Delta]:
    method, delta, arguments = PRESETS[preset]
    return methods.create(method, net, **{"floor_every": 0, **arguments, **changes}), delta


def seeds_of(optimizer: ZeroOrder) -> list[int]:
    return [rng.seed_for(optimizer.seed, optimizer.iteration, query) for query in range(optimizer.queries)]


# --- probe and update -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_every_row_group_sees_its_weights(preset):
    """y of group g is that of a net at theta + sum_s sigmas[g, s] Delta_s; outside `perturbed` it is clean."""
    net = swapped()
    theta, clean = values(net), net(ids())
    optimizer, delta = make(preset, net, sigma=0.05, seed=3)
    seeds = seeds_of(optimizer)
    optimizer._prepare()
    deltas = [delta(optimizer, theta, seed) for seed in seeds]
    for table in (optimizer._table, optimizer._table + 0.02):  # the second: several seeds in a group
        with perturbed(net, torch.tensor(seeds), table, optimizer.noise, leading=(optimizer.groups * B,)):
            y = net(ids().repeat(optimizer.groups, 1))
        for row, part in zip(table.double(), y.chunk(optimizer.groups), strict=True):
            moved = {n: w.double() + sum(s * d[n] for s, d in zip(row, deltas, strict=True)) for n, w in theta.items()}
            truth = functional_call(plain_net(torch.float64), moved, ids())
            plain = functional_call(plain_net(), {n: w.float() for n, w in moved.items()}, ids())
            assert_no_worse(part, plain, truth, f"group at {row.tolist()}")
            if row.any():  # it is felt: far more than rounding
                assert (part - clean).abs().max() > 100 * (plain.double() - truth).abs().max()
    assert torch.equal(net(ids()), clean)


@pytest.mark.parametrize("preset", PRESETS)
def test_update_moves_along_what_was_probed(preset):
    """theta <- rule(theta, sum_s weights[s] Delta_s) for every parameter, a tied one once, the rules being torch's."""
    net = swapped()
    optimizer, delta = make(preset, net, sigma=1e-2, lr=0.1, seed=4)
    rule = PRESETS[preset][2].get("optimizer", methods.arguments(PRESETS[preset][0])["optimizer"])
    copies = {dtype: {n: nn.Parameter(w.to(dtype)) for n, w in values(net).items()} for dtype in DTYPES}
    torchs = {dtype: TORCH[rule](list(copied.values()), lr=0.1) for dtype, copied in copies.items()}
    for _ in range(3):
        theta, seeds = values(net), seeds_of(optimizer)
        deltas = [delta(optimizer, theta, seed) for seed in seeds]
        (result,) = run(optimizer, 1)
        assert result.seeds.tolist() == seeds and not result.skipped
        scalars = result.weights.sign() / len(seeds) if rule == "sign" else result.weights
        for dtype, copied in copies.items():
            for name, w in copied.items():
                w.grad = sum(s.to(dtype) * d[name].to(dtype) for s, d in zip(scalars, deltas, strict=True))
            torchs[dtype].step()
    for name, w in values(net).items():
        truth, plain = (copies[dtype][name].detach() for dtype in (torch.float64, torch.float32))
        assert_no_worse(w, plain, truth, name)
        assert not torch.equal(w, values(swapped())[name])
    assert net.head.weight is net.table.weight


def test_weights_of_fzoo_do_not_see_the_scale_of_the_loss():
    """Unchanged by loss <- a loss + b; no update where all queries saw the same (invariant 17)."""
    x, seen = ids(), []
    for a, b in ((1.0, 0.0), (7.5, 100.0)):
        net = swapped()
        optimizer, _ = make("fzoo", net)
        seen.append(optimizer.step_on([lambda groups, n=net, a=a, b=b: a * evaluation(n, x)(groups) + b]).weights)
    assert torch.allclose(*seen, rtol=1e-5)
    difference = seen[0].double() @ torch.ones(8, dtype=torch.float64)
    assert abs(difference) > 1e-3  # f_0 is the clean loss, not the mean
    net = swapped()
    optimizer, _ = make("fzoo", net, lr=1.0)
    before = values(net)
    result = optimizer.step_on([lambda groups: torch.full((groups, B), 2.5)])
    assert result.skipped and all(torch.equal(w, before[name]) for name, w in values(net).items())


def test_fzoo_weights():
    """(f_j - f_0) / (q std_pop(f_1 ... f_q)), written out; the std of a sample would be 7 % off at q = 8."""
    optimizer, _ = make("fzoo", swapped())
    result = run(optimizer, 1)[0]
    f = result.losses.mean(1)
    wanted = (f[1:] - f[0]) / (8 * ((f[1:] - f[1:].mean()) ** 2).mean().sqrt())
    assert torch.allclose(result.weights.double(), wanted, rtol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_step_descends_and_flipped_ascends(preset):
    method, _, arguments = PRESETS[preset]

    def fresh() -> tuple[ZeroOrder, methods.Evaluation]:
        net, queries = swapped(), max(4, arguments.get("queries", 1))
        return make(preset, net, lr=DESCENT.get(method, 5e-4), queries=queries)[0], evaluation(net, ids())

    descends(fresh)


# --- the noise of a step ----------------------------------------------------------------------------------------------


def test_noise_belongs_to_names():
    """Another order of modules, or fewer of them, and every parameter keeps its noise; equal shapes do not share it."""

    class Other(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.norm, self.down, self.up = net.norm, net.down, net.up

    all_of = {t.name: int(t.param_id) for t in make("mezo", swapped())[0].trainables.values()}
    assert all_of == {name: zlib.crc32(name.encode()) for name in NAMES}
    some = {t.name: int(t.param_id) for t in make("mezo", Other(swapped()))[0].trainables.values()}
    assert list(some) == ["norm.weight", "norm.bias", "down.weight", "up.weight", "up.bias"]
    assert all(all_of[name] == number for name, number in some.items())
    a, b = (noise("normal", 1, name, (31 * 31,)) for name in ("side.weight", "up.weight"))
    assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 4 / 31
    assert all_of["norm.weight"] != all_of["norm.bias"] != all_of["side.bias"]


def test_rows_of_noise():
    """What a lookup takes are the rows of the whole, widths that divide a block of the generator and that do not."""
    rows = torch.tensor([39, 0, 7, 7, 12])
    for cols in (8, 23):
        assert torch.equal(rng.mask_of_rows(9, 5, 0.3, rows, cols), rng.mask(9, 5, 0.3, 40, cols)[rows])
    for kind, cols in (("normal", 8), ("normal", 23), ("rademacher", 128), ("rademacher", 23)):
        whole = rng.noise(kind, 9, 5, 40, cols)
        assert torch.equal(rng.noise_of_rows(kind, 9, 5, rows, cols), whole[rows])
    assert rng.noise_of_rows("normal", 9, 5, torch.zeros(0, dtype=torch.int64), 8).shape == (0, 8)


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", methods.MODES)
def test_probes_leave_no_trace(preset, mode):
    """With lr = 0 every parameter keeps its bits: nothing is ever written for a probe."""
    net = swapped()
    before, states = values(net), (torch.get_rng_state(), np.random.get_state()[1].tolist())  # noqa: NPY002
    optimizer, _ = make(preset, net, lr=0.0, mode=mode, floor_every=1)
    run(optimizer, 3)
    assert all(torch.equal(a, before[name]) for name, a in values(net).items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002


@pytest.mark.parametrize("preset", PRESETS)
def test_sequential_and_micro_batches_are_the_same_step(preset):
    same_in_parts(lambda **changes: make(preset, swapped(), lr=0.05, **changes)[0], run, 3, look=values)


@pytest.mark.parametrize("preset", PRESETS)
def test_lost_losses_skip(preset):
    net = swapped()
    optimizer, _ = make(preset, net, lr=0.1)
    run(optimizer, 1)
    before = values(net)

    def poisoned(groups: int) -> Tensor:
        table = evaluation(net, ids())(groups)
        table[-1, 1] = math.nan
        return table

    assert optimizer.step_on([poisoned]).skipped
    assert all(torch.equal(w, before[name]) for name, w in values(net).items())
    assert not run(optimizer, 1)[0].skipped


@pytest.mark.parametrize("preset", PRESETS)
def test_resume_and_replay_after_every_step(preset):
    def fresh(seed: int = 9, lr: float = 0.05) -> ZeroOrder:
        net = swapped()
        for name in NAMES if seed != 9 else ():  # the state brings its own weights, and thresholds of weights
            owner, _, key = name.rpartition(".")
            getattr(net.get_submodule(owner), key).data.mul_(1.5)
        return make(preset, net, lr=lr, seed=seed)[0]

    resumes(fresh, run, 4, look=values)


def test_a_small_change_of_the_loss_is_seen():
    """1e-6 on a loss of 7 (invariant 20): differenced per example in float64."""
    net = swapped()
    optimizer, _ = make("mezo", net, lr=0.0)
    table = torch.full((2, B), 7.0, dtype=torch.float64)
    table[0] += 1e-6
    result = optimizer.step_on([lambda groups: table])
    assert float(result.weights) == pytest.approx(1e-6 / 2e-3, rel=1e-6)


# --- 16 bits ----------------------------------------------------------------------------------------------------------


def test_steps_below_an_ulp_are_not_lost_in_16_bits():
    """Stochastic rounding keeps the mean; to nearest, hardly an entry would move."""
    net = swapped(torch.bfloat16)
    optimizer, _ = make("mezo", net)
    before, small, steps = values(net), 2.0**-16, 300  # an ulp at 0.1 is 2^-11
    along = torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        optimizer.rule.update(torch.tensor([step]), torch.tensor([small]), lr=1.0)
        z = noise("normal", step, "up.weight", (31, 23))
        moved = net.up.weight.double() - before["up.weight"].double()
        along[step] = (moved * -z).sum() / (small * z * z).sum()
        assert 0.5 < float((moved == 0).double().mean()) < 1  # most entries wait for their turn
        for name, w in before.items():
            owner, _, key = name.rpartition(".")
            getattr(net.get_submodule(owner), key).data.copy_(w)
    assert abs(float(along.mean()) - 1) < 4 * float(along.std()) / math.sqrt(steps) < 0.5


def test_a_vector_in_16_bits_feels_the_probe():
    """A norm's weight of 1 has an ulp of 2^-7 in bf16; a probe of 3e-3 still arrives, rounded once, in y."""
    net = swapped(torch.bfloat16)
    make("mezo", net)
    x = torch.randn(B, T, 31, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad(), perturbed(net, torch.tensor([3]), torch.tensor([[0.0], [3e-3]])):
        y = net.norm(x.repeat(2, 1, 1)).chunk(2)
    for sigma, part in zip((0.0, 3e-3), y, strict=True):
        w, b = (getattr(net.norm, k).float() + sigma * noise("normal", 3, f"norm.{k}", (31,)).float()
                for k in ("weight", "bias"))  # fmt: skip
        assert torch.equal(part, torch.nn.functional.layer_norm(x.float(), (31,), w, b).bfloat16())
    assert not torch.equal(*y) and isinstance(net.norm, parameters.ZOVector)


# --- what it is put on ------------------------------------------------------------------------------------------------


def test_a_tied_packed_table_becomes_a_tied_dense_one():
    """As a GGUF has it: the table looks up rows in the head's packed storage; its twin is one parameter, once."""
    net = plain_net()
    swap(net, ZOConfig(format="int4", group_size=8, rank=0), where=["up", "down"], example=(ids(),))
    net.head = ZOLinear.from_linear(net.head, format="int8", group_size=8, name="head")
    net.head.perturbation = net.up.perturbation
    net.table = PackedEmbedding(net.head)
    before = net(ids())
    for method in ("lozo", "qzo"):  # which leave such a head alone
        trained = methods.create(method, copy.deepcopy(net)).trainables
        assert {"up", "down"} <= trained.keys() and "head" not in trained
    dense_twin(net)
    assert type(net.table) is nn.Embedding and net.head.weight is net.table.weight
    assert (net(ids()) - before).abs().max() < 1e-4
    optimizer, _ = make("mezo", net)
    assert sorted(optimizer.trainables) == sorted(NAMES)
    run(optimizer, 1)


def test_low_bit_weights_are_refused():
    net = plain_net()
    swap(net, ZOConfig(format="int4", group_size=8, rank=0), where=["up", "down"], example=(ids(),))
    with pytest.raises(ValueError, match="up is int4, frozen.*--dense"):
        methods.create("mezo", net)
    dense_twin(net)
    assert isinstance(net.up, ZOLinear) and net.up.format == "dense"
    run(methods.create("mezo", net), 1)


def test_layers_with_coefficients_are_refused():
    net = plain_net()
    swap(net, ZOConfig(format="dense", rank=1), where=["up"], example=(ids(),))
    with pytest.raises(ValueError, match="up has coefficients beside its weight"):
        methods.create("mezo", net)


def test_another_method_takes_over():
    """Class, names and attributes of a perturbed module are what they were, and the next method starts afresh."""
    net = swapped()
    names = list(net.state_dict())
    make("mezo", net)
    first = run(make("mezo", net, seed=2)[0], 1)
    assert list(net.state_dict()) == names and isinstance(net.table, nn.Embedding)
    again = swapped()
    assert torch.equal(run(make("mezo", again, seed=2)[0], 1)[0].losses, first[0].losses)
    from zoact_kernels.layers import release

    release(net)
    assert type(net.norm) is nn.LayerNorm and type(net.table) is nn.Embedding and type(net.side) is nn.Linear
    twin = copy.deepcopy(again)
    run(make("mezo", twin)[0], 1)
    assert not torch.equal(values(twin)["up.weight"], values(again)["up.weight"])


def test_the_worked_example_of_contributing(root):
    """The method that CONTRIBUTING writes down trains the vectors of a low-bit model, and perturbs nothing else."""
    code = re.search(r"```python\n(class VectorsOnly.*?)```", (root / "CONTRIBUTING.md").read_text(), re.DOTALL).group(
        1
    )
    names = {"MeZO": methods.MeZO, "weights": trainables.weights}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    net = plain_net()
    swap(net, ZOConfig(format="int4", group_size=8, rank=0), where=["up", "down"], example=(ids(),))
    optimizer = names["VectorsOnly"](net, lr=0.1)
    assert list(optimizer.trainables) == ["up.bias", "norm.weight", "norm.bias", "side.bias"]
    assert type(net.table) is nn.Embedding and "weight" not in net.side.zo_ids
    before = {name: t.value.clone() for name, t in optimizer.trainables.items()}
    assert run(optimizer, 1)[0].signal > 0
    assert all(not torch.equal(t.value, before[name]) for name, t in optimizer.trainables.items())


def test_regrouped_rows_are_refused():
    net = swapped()
    optimizer, _ = make("mezo", net)
    with pytest.raises(ValueError, match="layer 'table' got x of shape"):
        optimizer.step_on([lambda groups: losses(net, ids()[:1].repeat(3, 1))])


@pytest.mark.parametrize(
    ("method", "dtype", "arguments", "message"),
    [
        ("mezo", torch.bfloat16, {"weight_decay": 0.1}, "only float32 weights decay"),
        ("mezo", torch.bfloat16, {"optimizer": "adam"}, "16 bits lose small updates"),
        ("sparse-mezo", torch.float32, {"optimizer": "momentum"}, "takes no masks"),
        ("sparse-mezo", torch.float32, {"weight_decay": 0.1}, "takes no masks"),
        ("sparse-mezo", torch.float32, {"sparsity": 1.0}, "sparsity is 1.0"),
        ("zo-sparse", torch.float32, {"period": 0}, "period is 0"),
        ("zo-sparse", torch.float32, {"rank": 2}, "has no argument 'rank'"),
    ],
)
def test_errors(method, dtype, arguments, message):
    with pytest.raises(ValueError, match=message):
        methods.create(method, swapped(dtype), **arguments)
