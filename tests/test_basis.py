"""The activation basis: exact vectors, padding that never matters, sharing by identity, energies, streaming."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from zoact_kernels import activations, basis
from zoact_kernels.basis import compute_basis
from zoact_kernels.layers import perturbed, zo_layers
from zoact_kernels.swap import ZOConfig, swap

V, T, D = 50, 9, 24
RANK = 3


class Block(nn.Module):
    """Attention-less transformer: q, k, v read one tensor, o another, up and gate a third, down a fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(D, 40), nn.Linear(D, 40), nn.Linear(40, D)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.layer_norm(x, (D,))
        x = x + self.o(self.q(h) * torch.sigmoid(self.k(h)) + self.v(h.view(h.shape)))
        h = self.dropout(nn.functional.layer_norm(x, (D,)))
        return x + self.down(torch.relu(self.gate(h)) * self.up(h))


class Toy(nn.Module):
    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.embed, self.flat = nn.Embedding(V, D), flat
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids) * torch.linspace(0.3, 3, D)  # a spectrum with gaps
        if self.flat:
            x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return x


GROUPS = [
    (f"blocks.{i}.{first}", *(f"blocks.{i}.{name}" for name in rest))
    for i in range(2)
    for first, *rest in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
]


def toy(rank: int = RANK, ranks: dict[str, int] | None = None, flat: bool = False) -> Toy:
    torch.manual_seed(0)
    model = Toy(flat)
    swap(model, ZOConfig(format="int4", group_size=8, rank=rank, ranks=ranks or {}), example=(tokens(),))
    return model


def tokens(seed: int = 0, examples: int = 4) -> Tensor:
    return torch.randint(0, V, (examples, T), generator=torch.Generator().manual_seed(seed))


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(seed), "attention_mask": torch.ones(4, T, dtype=torch.int64)} for seed in range(3)]


def padded(side: str) -> list[dict[str, Tensor]]:
    """The same tokens with 5 more columns of junk that the mask hides."""
    made = []
    for batch in batches():
        junk, zero = tokens(99)[:, :5], torch.zeros(4, 5, dtype=torch.int64)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        left = side == "left"
        made.append({
            "input_ids": torch.cat((junk, ids) if left else (ids, junk), 1),
            "attention_mask": torch.cat((zero, mask) if left else (mask, zero), 1),
        })  # fmt: skip
    return made


def inputs(model: nn.Module, name: str, runs: list[dict[str, Tensor]] | None = None) -> Tensor:
    """H [B T of all batches, K] of one layer, by an independent hook."""
    seen: list[Tensor] = []
    hook = zo_layers(model)[name].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model.eval()
    with torch.no_grad():
        for run in runs or batches():
            model(**run)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def bases(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.basis for name, layer in zo_layers(model).items()}


def sine(a: Tensor, b: Tensor) -> float:
    """Sine of the largest principal angle between two orthonormal bases; a cosine would not see small angles."""
    a, b = a.double(), b.double()
    return float(torch.linalg.matrix_norm(a - b @ (b.T @ a), ord=2))


BOUND = {"svd": 1e-6, "gram": 1e-6, "power": 1e-3}  # float32 entries; power: (gap)^(2 iterations)


@pytest.mark.parametrize("method", basis.METHODS)
@pytest.mark.parametrize("streaming", [False, True])
def test_compute_basis(method, streaming):
    model = toy()
    report = compute_basis(model, batches(), method=method, streaming=streaming, iterations=12)
    for row in report.layers:
        a = zo_layers(model)[row.name].basis
        h = inputs(model, row.name).double()
        _, values, vt = torch.linalg.svd(h, full_matrices=False)
        assert a.dtype == torch.float32 and a.is_contiguous() and a.shape == (h.shape[1], RANK)
        assert float((a.double().T @ a.double() - torch.eye(RANK)).abs().max()) < 3e-7
        assert bool((a.gather(0, a.abs().argmax(0, keepdim=True)) > 0).all())
        assert sine(a, vt[:RANK].T) < BOUND[method]
        for r in range(RANK):  # each vector, not only their span
            assert sine(a[:, r : r + 1], vt[r : r + 1].T) < BOUND[method]
        torch.testing.assert_close(torch.tensor(row.singular_values).double(), values[:RANK], rtol=1e-5, atol=0)
        first = torch.arange(len(h)) % T == 0
        for got, rows in ((row.energy, h), (row.energy_without_first, h[~first])):
            assert got == pytest.approx(float((rows @ a.double()).square().sum() / rows.square().sum()), rel=1e-9)
        assert row.rank == RANK and row.tokens == len(h)
    assert "energy captured" in str(report) and len(str(report).splitlines()) == 15


def test_compute_basis_shares_by_identity():
    model = toy()
    report = compute_basis(model, batches())
    found = [tuple(row.name for row in report.layers if row.group == g) for g in range(8)]
    assert [set(g) for g in found] == [set(g) for g in GROUPS]
    layers = zo_layers(model)
    for row in report.layers:
        assert set(row.shared_with) == set(found[row.group]) - {row.name}
        for other in layers:
            shared = layers[row.name].basis is layers[other].basis
            assert shared == (other in found[row.group])
    energies = {
        row.group: {(r.energy, r.tokens) for r in report.layers if r.group == row.group} for row in report.layers
    }
    assert all(len(values) == 1 for values in energies.values())


class Reuse(nn.Module):
    """Inputs of one shape that live one after the other: an allocator gives them one address."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        total = self.first(x * 2).sum()
        total = total + self.second(x * 3).sum()
        y = x * 4
        total = total + self.third(y).sum()
        y.mul_(2)  # the same tensor, but not the same data
        return total + self.fourth(y).sum()


def test_compute_basis_is_not_fooled_by_memory():
    model = Reuse()
    swap(model, ZOConfig(rank=1, group_size=8), example=(torch.randn(5, D),))
    report = compute_basis(model, [lambda: model(torch.randn(16, D))])
    assert sorted(row.group for row in report.layers) == [0, 1, 2, 3]
    assert all(row.shared_with == () for row in report.layers)


@pytest.mark.parametrize("method", basis.METHODS)
@pytest.mark.parametrize("exclude", [False, True])
def test_compute_basis_streaming_equals_whole(method, exclude):
    whole, streamed = toy(), toy()
    a = compute_basis(whole, batches(), method=method, exclude_first_token=exclude)
    b = compute_basis(streamed, batches(), method=method, exclude_first_token=exclude, streaming=True)
    assert a == b
    assert all(torch.equal(x, y) for x, y in zip(bases(whole).values(), bases(streamed).values(), strict=True))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_compute_basis_ignores_padding(side, flat):
    plain, filled = toy(flat=flat), toy(flat=flat)
    a = compute_basis(plain, batches())
    b = compute_basis(filled, padded(side))
    for x, y in zip(bases(plain).values(), bases(filled).values(), strict=True):
        assert sine(x, y) < 1e-6
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x.tokens == y.tokens
        assert x.energy == pytest.approx(y.energy, rel=1e-6)
        assert x.energy_without_first == pytest.approx(y.energy_without_first, rel=1e-6)
    careless = toy(flat=flat)
    compute_basis(careless, [{"input_ids": run["input_ids"]} for run in padded(side)])
    assert sine(bases(careless)["blocks.0.q"], bases(plain)["blocks.0.q"]) > 1e-2  # it would have mattered


class Outlier(nn.Module):
    """The first token of each sequence is huge, in one direction, as attention sinks are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(V, D), nn.Linear(D, D)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        first = (attention_mask.cumsum(1) == 1) & attention_mask.bool()
        return self.out(x + 1000.0 * first[..., None] * torch.eye(D)[7])


@pytest.mark.parametrize("side", ["left", "right"])
def test_compute_basis_first_token(side):
    torch.manual_seed(0)
    model = Outlier()
    swap(model, ZOConfig(rank=1, group_size=8), example=padded(side)[0])
    (row,) = compute_basis(model, padded(side)).layers
    assert row.energy > 0.99 and row.energy_without_first < 0.3
    assert model.out.basis.argmax() == 7 and float(model.out.basis.max()) > 0.999
    model.out.set_basis(model.out.basis)
    (row,) = compute_basis(model, padded(side), exclude_first_token=True).layers
    assert row.tokens == 3 * 4 * (T - 1)
    h = inputs(model, "out", padded(side)).view(-1, D)
    mask = torch.cat([run["attention_mask"].flatten() for run in padded(side)]).bool()
    kept = h[mask & (h.abs().amax(1) < 500)].double()
    assert len(kept) == row.tokens
    assert sine(model.out.basis, torch.linalg.svd(kept, full_matrices=False)[2][:1].T) < 1e-6
    assert row.energy_without_first > row.energy


def test_compute_basis_ranks_of_their_own():
    model = toy(ranks={"*.v": 5, "*.o": 0, "*.k": 1})
    report = compute_basis(model, batches())
    layers = zo_layers(model)
    assert layers["blocks.0.o"].basis is None and len(report.layers) == 12
    q, k, v = (layers[f"blocks.0.{name}"].basis for name in "qkv")
    assert (q.shape[1], k.shape[1], v.shape[1]) == (3, 1, 5)
    assert torch.equal(v[:, :3], q) and torch.equal(v[:, :1], k)
    energy = {row.name: row.energy for row in report.layers}
    assert energy["blocks.0.k"] < energy["blocks.0.q"] < energy["blocks.0.v"]


def test_compute_basis_is_deterministic():
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        model = toy()
        report = compute_basis(model, batches(), method="gram")
        results.append((report, bases(model)))
    assert results[1][0] == results[2][0]
    for name in results[0][1]:
        assert torch.equal(results[1][1][name], results[2][1][name])
        assert float((results[0][1][name] - results[1][1][name]).abs().max()) < 1e-6


def test_compute_basis_power_reads_no_generator():
    found = []
    for seed in (0, 0, 1):
        model = toy()
        state = torch.get_rng_state()
        compute_basis(model, batches(), method="power", seed=seed, iterations=2)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(bases(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(torch.equal(found[0][name], found[2][name]) for name in found[0])


@pytest.mark.parametrize("method", basis.METHODS)
def test_compute_basis_streaming_holds_one_group(monkeypatch, method):
    """One group's H, Gram or sketch is alive at a time, counted when one is made and after every forward."""
    captures: weakref.WeakSet = weakref.WeakSet()
    init = basis._Svd.__init__
    alive: list[int] = []

    def made(self: basis._Svd, group: activations.Group) -> None:
        captures.add(self)
        alive.append(len(captures))
        init(self, group)

    def count(done: int, total: int, what: str) -> None:
        alive.append(len(captures))

    monkeypatch.setattr(basis._Svd, "__init__", made)

    compute_basis(toy(), batches(), method=method, streaming=True, iterations=1, progress=count)
    assert max(alive) == 1
    alive.clear()
    compute_basis(toy(), batches(), method=method, iterations=1, progress=count)
    assert max(alive) == 8 and not captures


def test_compute_basis_progress_and_modes():
    model = toy().train()
    seen: list[tuple[int, int, str]] = []
    compute_basis(model, iter(batches()), method="power", iterations=2, progress=lambda *a: seen.append(a))
    assert [s[0] for s in seen] == list(range(1, 14)) and seen[-1][:2] == (13, 13)  # 1 + 3 * (2 + 1) + 3
    assert model.training and model.blocks[0].dropout.training
    quiet = toy().eval()
    compute_basis(quiet, batches(), method="power", iterations=2)
    assert all(torch.equal(a, b) for a, b in zip(bases(model).values(), bases(quiet).values(), strict=True))
    streamed: list[tuple[int, int, str]] = []
    compute_basis(toy(), batches(), streaming=True, progress=lambda *a: streamed.append(a))
    assert streamed[-1][:2] == (28, 28) and streamed[1][2] == "blocks.0.q"  # 1 + 3 * 8 + 3
    assert all(not layer._forward_pre_hooks for layer in zo_layers(model).values())


def test_compute_basis_streaming_ends_forwards_early():
    model = toy()
    ends: list[int] = []
    model.blocks[1].down.register_forward_hook(lambda *_: ends.append(1))
    compute_basis(model, batches(), streaming=True)
    assert len(ends) == 1 + 3  # finding groups and energies; the eight captures of each batch stop before


def test_compute_basis_functions_as_batches():
    a, b = toy(), toy()
    compute_basis(a, batches())
    runs = [lambda run=run: b(run["input_ids"]) for run in batches()]
    report = compute_basis(b, runs)
    assert all(torch.equal(x, y) for x, y in zip(bases(a).values(), bases(b).values(), strict=True))
    assert all(row.energy != row.energy_without_first for row in report.layers)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "qr"}, ValueError, "method is 'qr'"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": [{"input_ids": tokens()[:1, :2]}]}, ValueError, "saw 2 tokens; .* at least as many"),
        ({"batches": [{"input_ids": tokens(), "attention_mask": torch.ones(4, 3)}]}, ValueError, "regroups tokens"),
        ({"batches": [{"input_ids": tokens(), "attention_mask": torch.ones(4)}]}, ValueError, "attention_mask has"),
    ],
)
def test_compute_basis_errors(arguments, error, message):
    model = toy()
    with pytest.raises(error, match=message):
        compute_basis(model, **{"batches": batches(), **arguments})
    assert all(a is None for a in bases(model).values())
    assert all(not layer._forward_pre_hooks for layer in zo_layers(model).values())


def test_compute_basis_refuses_what_it_would_spoil():
    model = toy()
    with perturbed(model, torch.tensor([1]), torch.tensor([[0.1]])), pytest.raises(RuntimeError, match="perturbed"):
        compute_basis(model, batches())
    with torch.no_grad():
        model.embed.weight[:, 3] = math.nan
    with pytest.raises(ValueError, match=r"inputs of blocks\.0\.q hold NaN"):
        compute_basis(model, batches())
    model = toy()
    compute_basis(model, batches())
    with torch.no_grad():
        model.blocks[1].o.coeff[0, 0] = 1e-3
    with pytest.raises(ValueError, match=r"coeff of blocks\.1\.o is not zero"):
        compute_basis(model, batches())
    rankless = toy(rank=0)
    with pytest.raises(ValueError, match="rank=1"):
        compute_basis(rankless, batches())


class Fickle(nn.Module):
    """Shares an input, or does not, and calls a layer, or does not, as the data want."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor, share: bool = True, all: bool = True) -> Tensor:
        y = self.a(x) + self.b(x if share else x.clone())
        return self.c(y) if all else y


def test_compute_basis_of_a_fickle_model():
    model = Fickle()
    x = torch.randn(16, D)
    swap(model, ZOConfig(rank=1, group_size=8), example=(x,))
    with pytest.raises(RuntimeError, match="not reached by the first batch: c"):
        compute_basis(model, [{"x": x, "all": False}])
    with pytest.raises(RuntimeError, match="batch 1 feeds the layers in other groups"):
        compute_basis(model, [{"x": x}, {"x": x, "share": False}])
    assert all(a is None for a in bases(model).values())
    (a, b, c) = compute_basis(model, [{"x": x}]).layers
    assert a.shared_with == (b.name,) and c.shared_with == () and math.isfinite(a.energy_without_first)
