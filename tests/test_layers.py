"""ZOLinear and Perturbation: one layer, its storage, its manners."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from support import Elsewhere
from torch import nn

from zoact_kernels import layers, native, reference
from zoact_kernels.cuda_ops import Cuda
from zoact_kernels.embedding import PackedEmbedding
from zoact_kernels.layers import ZOLinear, perturbation_of, perturbed, zo_layers
from zoact_kernels.trainer import base_hash

SEEDS = torch.tensor([5, -6])
SIGMAS = torch.tensor([[0.1, 0.0], [-0.1, 0.0], [0.0, 0.2]])


def make_layer(N=24, K=40, R=2, format="int4", bias=True, name="block.proj", seed=0) -> ZOLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(K, N, bias=bias)
    layer = ZOLinear.from_linear(linear, format=format, group_size=None if format == "dense" else 32, rank=R, name=name)
    if R:
        layer.set_basis(torch.linalg.qr(torch.randn(K, R))[0].contiguous(), torch.randn(N, R))
    return layer


@pytest.mark.parametrize("format", ["dense", "int8", "int4", "nf4", "fp4"])
def test_forward_is_the_formula(format):
    layer = make_layer(format=format)
    x = torch.randn(6, 40)
    with torch.no_grad():
        clean = layer(x)
        with perturbed(layer, SEEDS, SIGMAS):
            y = layer(x)
    W = layer.dequantize(torch.float64)
    for g in range(3):
        moved = (
            layer.coeff.double()
            + reference.perturbation("normal", SEEDS, SIGMAS.double(), layer.param_id, 24, 2, 0, 0)[g]
        )
        rows = x[2 * g : 2 * g + 2].double()
        want = rows @ W.T + (rows @ layer.basis.double()) @ moved.T + layer.bias.double()
        assert (y[2 * g : 2 * g + 2] - want).abs().max() < 1e-5
    want = x.double() @ (W + layer.delta().double()).T + layer.bias.double()
    assert (clean - want).abs().max() < 1e-5


def test_param_id_is_that_of_the_weight_name():
    from zoact_kernels.rng import param_id

    assert int(make_layer(name="a.b").param_id) == param_id("a.b.weight")
    assert int(make_layer(name="module.a.b").param_id) == param_id("a.b.weight")


def test_outside_the_block_the_layer_is_clean_even_after_an_error():
    layer = make_layer()
    x = torch.randn(6, 40)
    clean = layer(x)
    with pytest.raises(KeyError), perturbed(layer, SEEDS, SIGMAS):
        raise KeyError
    assert torch.equal(layer(x), clean)
    with (
        perturbed(layer, SEEDS, SIGMAS),
        pytest.raises(RuntimeError, match="do not nest"),
        perturbed(layer, SEEDS, SIGMAS),
    ):
        pass


def test_a_regrouping_model_is_named():
    layer = make_layer(name="experts.3")
    with perturbed(layer, SEEDS, SIGMAS, leading=(6, 18)):
        layer(torch.randn(6, 40)), layer(torch.randn(18, 40))
        for rows in (9, 7):
            with pytest.raises(ValueError, match=r"'experts.3' got x of shape .* has to be 6 or 18"):
                layer(torch.randn(rows, 40))
    with perturbed(layer, SEEDS, SIGMAS):
        with pytest.raises(ValueError, match="a multiple of 3"):
            layer(torch.randn(7, 40))
        third = layer(torch.randn(7, 40).fill_(1.0), row_group=2)
        stacked = layer(torch.ones(3, 40))
        assert torch.equal(third[0], stacked[2])


def test_bad_perturbations_are_named():
    layer = make_layer()
    for seeds, sigmas, noise, message in (
        (SEEDS.int(), SIGMAS, "normal", "`seeds` is torch.int32"),
        (SEEDS, SIGMAS.double(), "normal", "`sigmas` is torch.float64"),
        (SEEDS, SIGMAS[:, :1], "normal", "with S = 2"),
        (SEEDS, SIGMAS.to("meta"), "normal", "`sigmas` is on meta"),
        (SEEDS, SIGMAS, "cauchy", "`noise` is 'cauchy'"),
    ):
        with pytest.raises(ValueError, match=message), perturbed(layer, seeds, sigmas, noise):
            pass
    assert not perturbation_of(layer).active
    with pytest.raises(ValueError, match="no ZOLinear"):
        perturbation_of(nn.Linear(2, 2))
    fresh = ZOLinear.from_linear(nn.Linear(8, 8), rank=1, name="fresh")
    with perturbed(fresh, SEEDS, SIGMAS), pytest.raises(RuntimeError, match="'fresh' has no basis yet"):
        fresh(torch.ones(3, 8))


def test_rank_basis_and_x_are_checked():
    with pytest.raises(ValueError, match=r"`x` has shape \(2, 39\); layer 'block.proj' has in_features=40"):
        make_layer()(torch.randn(2, 39))
    with pytest.raises(ValueError, match="`rank` is 41"):
        make_layer(R=41)
    layer = make_layer()
    for basis, coeff, message in (
        (torch.randn(39, 2), None, r"`basis` has shape \(39, 2\)"),
        (torch.randn(40, 41), None, r"`basis` has shape \(40, 41\)"),
        (torch.randn(40, 2).double(), None, "`basis` is torch.float64"),
        (torch.randn(40, 2), torch.randn(24, 3), "`coeff` is"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.set_basis(basis, coeff)


def test_dtype_moves_leave_what_is_packed_and_trained_alone():
    layer = make_layer().to(torch.bfloat16)
    assert layer.scale.dtype == torch.float16 and layer.coeff.dtype == layer.basis.dtype == torch.float32
    assert layer(torch.randn(3, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.half()(torch.randn(3, 40, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("format", ["dense", "int8", "int4", "nf4"])
def test_state_dict_is_in_row_layout_and_round_trips(format, tmp_path):
    layer, x = make_layer(format=format), torch.randn(4, 40)
    state = layer.state_dict()
    row = layer.packed().to_layout("row")
    assert torch.equal(state["weight"], row.weight)
    other = make_layer(format=format, seed=9)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    save_model(layer, str(tmp_path / "layer.safetensors"))
    bare = ZOLinear.from_linear(nn.Linear(40, 24), format=format, group_size=None if format == "dense" else 32)
    load_model(bare, str(tmp_path / "layer.safetensors"))
    assert torch.equal(bare(x), layer(x))
    with pytest.raises(RuntimeError, match="the file holds"):
        make_layer(K=48, format=format).load_state_dict(state)


def test_a_deep_copy_lives_on_its_own():
    model = nn.Sequential(make_layer(N=40, name="0"), make_layer(N=40, name="1"))
    handle = perturbation_of(model[0])
    model[1].perturbation = handle
    model[1].basis = model[0].basis
    twin = copy.deepcopy(model)
    assert perturbation_of(twin) is not handle and perturbation_of(twin) is twin[0].perturbation
    assert twin[0].basis is twin[1].basis and twin[0].basis is not model[0].basis
    x = torch.randn(3, 40)
    clean = model(x)
    with perturbed(twin, SEEDS, SIGMAS):
        assert torch.equal(model(x), clean)
        assert not torch.equal(twin(x), clean)
    with torch.no_grad():
        twin[0].coeff.add_(1)
    assert torch.equal(model(x), clean)


def test_equal_shapes_get_different_noise():
    a, b = make_layer(name="a"), make_layer(name="b")
    b.perturbation = a.perturbation
    x = torch.randn(3, 40)
    model = nn.ModuleList([a, b])
    clean = a(x)
    assert torch.equal(b(x), clean)
    with perturbed(model, SEEDS, SIGMAS):
        assert not torch.equal(a(x), b(x))
    assert list(zo_layers(model)) == ["0", "1"]


def test_it_trains_by_autograd_too():
    layer, x = make_layer(), torch.randn(8, 40)
    target = torch.randn(8, 24)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    first = None
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["coeff"]


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    """Layers on the CPU get the layout that those on a GPU get where csrc/cuda is compiled."""
    monkeypatch.setattr(layers, "best_layout", lambda device: "cuda" if device.type == "cpu" else "row")
    monkeypatch.setattr(layers, "Cuda", lambda: Cuda(Elsewhere()))


@pytest.mark.parametrize(
    ("format", "group_size", "N", "K", "layout"),
    [
        ("int4", 32, 32, 64, "cuda"), ("nf4", 64, 33, 100, "cuda"), ("fp4", -1, 24, 40, "cuda"),
        ("int4", 40, 24, 80, "row"), ("int8", 32, 24, 64, "cuda"), ("int8", -1, 32, 64, "cuda"),
        ("dense", None, 24, 64, "row"),
    ],
)  # fmt: skip
def test_a_layer_on_a_gpu_is_stored_as_its_kernels_want(cpu_as_gpu, tmp_path, format, group_size, N, K, layout):
    """Everything works on it, it is saved in layout `row`, and a move elsewhere leaves the layout behind."""
    linear = nn.Linear(K, N)
    layer = ZOLinear.from_linear(linear, format=format, group_size=group_size, rank=2, name="a")
    assert layer.layout == layout
    row = layer.packed().to_layout("row")
    x = torch.randn(3, K)
    assert torch.equal(layer.dequantize(), row.dequantize())
    assert (layer(x) - x @ row.dequantize().T - linear.bias).abs().max() < 1e-5
    state = layer.state_dict()
    assert torch.equal(state["weight"], row.weight)
    save_model(layer, str(tmp_path / "layer.safetensors"))
    other = ZOLinear.from_linear(nn.Linear(K, N), format=format, group_size=group_size, rank=2, name="a")
    load_model(other, str(tmp_path / "layer.safetensors"))
    assert torch.equal(other.packed().weight, layer.packed().weight)
    assert base_hash(layer) == base_hash(ZOLinear(row, linear.bias, rank=2, param_id=int(layer.param_id)))
    ids = torch.tensor([[0, N - 1], [7, 3]])
    assert torch.equal(PackedEmbedding(layer)(ids), row.dequantize()[ids])
    twin = copy.deepcopy(layer).to("meta")
    assert twin.layout == "row" and twin.weight.shape == row.weight.shape
    twin.to_empty(device="cpu")  # as a move to a GPU: its storage is new, what is in it does not matter here
    assert twin.layout == layout
    twin.load_state_dict(state)
    assert torch.equal(twin(x), layer(x))


def test_a_move_puts_codes_in_order_where_they_are(cpu_as_gpu):
    layer = make_layer(N=32, K=64)
    assert layer.layout == "cuda"
    want = layer.weight.clone()
    moved = layer.packed().to_layout("row")
    where = moved.weight.data_ptr()
    settled = layers.settled(moved, reuse=True)
    assert settled.weight.data_ptr() == where and torch.equal(settled.weight, want)
    kept = settled.to_layout("row")
    assert layers.settled(kept).weight.data_ptr() != kept.weight.data_ptr()  # a caller's tensors are left alone
    assert torch.equal(kept.to_layout("cuda").weight, want)


def test_a_model_moves_to_a_fake_gpu_and_nothing_is_loaded(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(native, "_load_cuda", lambda: pytest.fail("the library was asked for"))
    model = nn.Sequential(make_layer(N=32, K=64, R=0), make_layer(N=24, K=32, R=0, name="b", format="nf4"))
    mode = FakeTensorMode()
    for layer in model:
        for name, tensor in list(layer.named_buffers(recurse=False)):
            setattr(layer, name, mode.from_tensor(tensor))

    def to(device: str) -> None:  # Module.to, past a method that a torch without CUDA refuses
        model._apply(lambda t: torch.ops.aten._to_copy.default(t, device=device))

    with mode:
        to("cuda")
        assert {t.device.type for t in model.buffers()} == {"cuda"}
        assert [layer.layout for layer in model] == ["row", "row"]
        y = model(torch.empty(6, 64, device="cuda"))
        assert y.shape == (6, 24) and y.device.type == "cuda"
        to("cpu")
    assert [layer.weight.device.type for layer in model] == ["cpu", "cpu"]
