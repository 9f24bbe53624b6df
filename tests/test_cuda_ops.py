"""The launcher of csrc/cuda and its place in dispatch: what it declines and why, what it makes of awkward tensors, what
it allocates and keeps. The kernels themselves: test_cuda.py.
"""

from __future__ import annotations

import copy
import ctypes
import re
from pathlib import Path
from unittest import mock

import pytest
import test_zo_update as update
import torch
from cases import BF16, F16, F32, activations, stored, weight_arguments
from close import assert_no_worse
from cuda_lane import Host, Lane
from support import Elsewhere
from torch import Tensor

from zoact_kernels import cuda_ops, dispatch, native, ops, reference
from zoact_kernels.cuda_ops import Cuda, Gpu, runs_on
from zoact_kernels.dispatch import Problem, choose

U8, F64 = torch.uint8, torch.float64
needs_module = pytest.mark.skipif(native.module() is None, reason=native.why_missing())


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Lane:
    return Lane(tmp_path_factory.mktemp("lane"))


# ---------------------------------------------------------------------------------------------------------------------
# The structs


@pytest.mark.parametrize("name", ["ZoUpdate", "ZoPerturb", "ZoLinear", "ZoDenseLinear", "Dequantize"])
def test_structs_are_those_of_the_header(root: Path, name: str) -> None:
    """Every field, its kind and its place: two languages, one truth."""

    def fields(name: str) -> list[tuple[str, str]]:
        header = re.sub(r"//.*", "", (root / "csrc/cuda/kernels.h").read_text())
        found = re.search(rf"struct {name} {{(.*?)\n}};", header, re.DOTALL)
        assert found
        out = []
        for statement in found[1].split(";")[:-1]:
            if "*" in statement:
                out.append((statement.rpartition("*")[2].strip(), "pointer"))
                continue
            kind, _, names = statement.strip().partition(" ")
            if kind == "ZoLinear":
                out += fields(kind)
            else:
                out += [(field.strip(), kind.removesuffix("_t")) for field in names.split(",")]
        return out

    assert list(getattr(cuda_ops, name).kinds.items()) == fields(name)


def test_structs_want_every_field() -> None:
    with pytest.raises(TypeError, match="ZoPerturb has .*basis"):
        cuda_ops.ZoPerturb(w=None)


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


def problem(**changes: object) -> Problem:
    plain = Problem(
        "zo_linear", "cuda", BF16, 8, 4096, 4096, "int4", "cuda", 64, U8, F16, 16, 0, 2, 1, "normal", (), "sm_90"
    )
    return plain._replace(**changes)


DENSE = dict(format="dense", layout="row", group_size=-1, code_dtype=BF16, scale_dtype=None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": F16}, None),
        ({"format": "nf4", "scale_dtype": U8}, None),
        ({"format": "fp4", "scale_dtype": F32}, None),
        ({"format": "int8"}, None),
        ({"group_size": -1}, None),
        ({"group_size": 40, "K": 40}, None),
        ({"format": "none", "layout": "row"}, None),
        (DENSE, None),
        ({"op": "zo_dense_linear", "features": ("magnitude mask", "noise_scale")}, None),
        ({"op": "dequantize", "dtype": F32, "group_size": 40}, None),
        ({"op": "dequantize", **DENSE, "dtype": F32, "K": 7}, None),
        ({"op": "zo_update_", "dtype": F32}, None),
        ({"op": "zo_perturb_", "dtype": F16, "features": ("random mask",)}, None),
        ({"device": "cpu"}, "tensors are on cpu"),
        ({"dtype": F32}, "float32 is not bfloat16 or float16"),
        ({"dtype": F64}, "float64 is not bfloat16 or float16"),
        ({"op": "dequantize", "dtype": F64}, "float64 is more than float32"),
        ({"format": "int8", "layout": "row"}, "in layout 'row'; these kernels read 'cuda'"),
        ({"layout": "row"}, "in layout 'row'; these kernels read 'cuda'"),  # flat blocks are in no other
        ({"layout": "cpu"}, "in layout 'cpu'; these kernels read 'cuda'"),
        ({"group_size": 40}, "group_size is 40, not a multiple of 32"),
        ({"scale_dtype": F64}, "scales are torch.float64"),
        ({**DENSE, "layout": "cpu"}, "in layout 'cpu'; these kernels read 'row'"),
        ({**DENSE, "code_dtype": F16}, "the dense weight is torch.float16, x is torch.bfloat16"),
        ({**DENSE, "op": "dequantize", "code_dtype": F64}, "the dense weight is torch.float64"),
        ({**DENSE, "K": 100}, "K is 100; rows of a dense weight have to be multiples of 8"),
        ({"op": "zo_dense_linear", "features": ("noise on the scales",)}, "noise on the scales"),
        ({"M": 4194241}, "a size is above"),
        ({"N": 16777217}, "a size is above"),
    ],
    ids=str,
)
def test_refusals_follow_from_the_problem(changes: dict, reason: str | None) -> None:
    told = Cuda(Elsewhere()).refusal(problem(**changes))
    assert told is None if reason is None else reason in (told or "")


@pytest.mark.parametrize(
    ("arch", "archs", "runs"),
    [
        ("sm_80", "80 86", True), ("sm_87", "80 86", True), ("sm_75", "80 86", False), ("sm_90", "80 90a", True),
        ("sm_86", "80", True), ("sm_80", "86 90a", False), ("sm_89", "90a", False), ("sm_100", "90a", True),
        ("sm_103", "100 120", True), ("sm_121", "100 120", True), ("sm_110", "100 120", False), ("sm_110", "100", True),
        ("sm_120", "100f", True), ("sm_80", "", False),
    ],
)  # fmt: skip
def test_runs_on(arch: str, archs: str, runs: bool) -> None:
    """Machine code of the same major, PTX of the last one from there on."""
    assert runs_on(arch, tuple(archs.split())) is runs


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_no_cuda", lambda: "the CUDA kernels are not compiled: no nvcc")
    monkeypatch.setattr(native, "cuda_archs", lambda: ("80", "90a"))
    gpu = Gpu()
    assert gpu.missing("") == "torch finds no CUDA device"
    assert gpu.missing("gfx942") == "gfx942 is no NVIDIA GPU"
    assert Cuda(gpu).refusal(problem()) == "the CUDA kernels are not compiled: no nvcc"
    monkeypatch.setattr(native, "why_no_cuda", lambda: "")
    assert gpu.missing("sm_75") == "compiled for 80, 90a, not for sm_75: ZOACT_CUDA_ARCHS names others"
    assert Cuda(gpu).refusal(problem()) is None


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch):
    """Dispatch on a machine with kernels for every GPU: `chosen(**changes of problem())`."""
    pytest.importorskip("triton")
    others = tuple(i for i in dispatch.IMPLEMENTATIONS if i.name != "cuda")
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (Cuda(Elsewhere()), *others))
    return lambda forced=None, **changes: choose.__wrapped__(problem(**changes), forced).name


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_120"])
@pytest.mark.parametrize("format", ["int4", "nf4", "dense"])
def test_few_rows_are_its_own(elsewhere, arch: str, format: str) -> None:
    kind = DENSE if format == "dense" else {"format": format}
    for N, K in ((4096, 4096), (14336, 4096), (1024, 8192)):
        for M in (1, 8, 16, 33, 64):
            assert elsewhere(arch=arch, M=M, N=N, K=K, **kind) == "cuda"
        many = {elsewhere(arch=arch, M=M, N=N, K=K, **kind) for M in (1024, 8192)}
        assert many == ({"triton"} if format == "dense" else {"panel"})


def test_other_weights_go_elsewhere(elsewhere) -> None:
    assert elsewhere(layout="row") == "triton"
    assert elsewhere(format="int8", layout="row") == "triton"
    assert elsewhere(dtype=F32) == "panel"  # which asks the op for D(W)
    assert elsewhere(op="zo_update_", dtype=F32, N=1000, K=0, rank=1) == "cuda"
    assert elsewhere(op="zo_perturb_", **DENSE, rank=0) == "cuda"


def test_forcing_what_has_no_such_op_leaves_it_to_the_others(elsewhere) -> None:
    assert elsewhere("panel") == "panel"
    assert elsewhere("panel", op="zo_update_", dtype=F32, N=1000, K=0, rank=1) == "cuda"
    with pytest.raises(RuntimeError, match="triton: the weight is in layout 'cuda'"):
        elsewhere("triton")


# ---------------------------------------------------------------------------------------------------------------------
# Awkward tensors


def awkward(x: Tensor) -> dict[str, Tensor]:
    """x again, in memory as a caller may have it."""
    M, K = x.shape
    room = torch.full((M * K + 1,), float("nan"), dtype=x.dtype)
    offset = room[1:].view(M, K)
    offset.copy_(x)
    wide = torch.full((M, K + 5), float("nan"), dtype=x.dtype)
    wide[:, 2 : K + 2] = x
    return {
        "contiguous": x, "offset by one": offset, "columns of a wider one": wide[:, 2 : K + 2],
        "transposed": x.T.contiguous().T, "one row in two": torch.stack((x, x), 1)[:, 0],
    }  # fmt: skip


@pytest.mark.parametrize("K", [100, 128])
@pytest.mark.parametrize("op", ["zo_linear", "zo_dense_linear"])
def test_x_of_any_strides(lane: Lane, op: str, K: int) -> None:
    """A copy where rows are not on 16 bytes: the same bits."""
    x, packed = activations(5, K, BF16), stored("int4-g32", 20, K)
    assert packed is not None
    arguments = weight_arguments(packed.to_layout("cuda")) | dict(out_features=20)
    run = getattr(lane.cuda, op)
    rest = dict.fromkeys(
        "bias base_basis base_coeff basis coeff coeff_groups projected seeds sigmas param_id".split()
        if op == "zo_linear"
        else "bias seeds sigmas param_id noise_scale mask_value mask_seed".split()
    )
    want = run(x, **arguments, **rest)
    for how, given in awkward(x).items():
        before = given.clone()
        assert torch.equal(run(given, **arguments, **rest), want), how
        assert torch.equal(given, before)
    whole = run(x[:1].expand(3, 2, K), **arguments, **rest)
    assert whole.shape == (3, 2, 20) and (whole == want[0]).all()
    cube = torch.stack((x, x)).transpose(0, 1)  # [5, 2, K]
    assert torch.equal(run(cube, **arguments, **rest)[:, 1], want)
    assert torch.equal(run(x[2], **arguments, **rest), want[2])
    for shape in ((0, K), (2, 0, K), (0, 3, K)):
        assert run(x.new_empty(shape), **arguments, **rest).shape == (*shape[:-1], 20)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64, torch.int32], ids=str)
def test_bias_of_any_dtype(lane: Lane, dtype: torch.dtype) -> None:
    x, packed = activations(3, 64, F16), stored("nf4-g64", 17, 64)
    arguments = dict(x=x, **weight_arguments(packed), out_features=17)
    bias = torch.randint(-4, 5, (34,)).to(dtype)[::2]
    got = lane.zo_linear(**arguments, bias=bias)
    assert torch.equal(got, lane.zo_linear(**arguments, bias=bias.float().contiguous()))
    assert not torch.equal(got, lane.zo_linear(**arguments))


def test_a_weight_off_its_address(lane: Lane) -> None:
    """A slice of a larger storage, as a file has it, is copied: codes go in 16 bytes at a time."""
    x, packed = activations(3, 64, F16), stored("int4-g32", 17, 64)
    assert packed is not None
    packed = packed.to_layout("cuda")
    room = torch.empty(packed.weight.numel() + 1, dtype=U8)
    moved = room[1:].view(packed.weight.shape).copy_(packed.weight)
    none = dict.fromkeys("bias seeds sigmas param_id noise_scale mask_value mask_seed".split())
    arguments = weight_arguments(packed) | none | dict(out_features=17)
    want = lane.cuda.zo_dense_linear(x, **arguments)
    assert torch.equal(lane.cuda.zo_dense_linear(x, **arguments | dict(weight=moved)), want)
    stored_as = (packed.scale, packed.offset, None, "int4", "cuda", 32, 17, 64, F32)
    assert torch.equal(lane.cuda.dequantize(moved, *stored_as), packed.dequantize())
    assert torch.equal(lane.cuda.dequantize(moved, *stored_as, 3, 5), packed.dequantize(F32, 3, 5))
    assert torch.equal(lane.cuda.dequantize(moved, *stored_as, 3), packed.dequantize(F32, 3))


def test_perturb_of_any_strides(lane: Lane) -> None:
    seeds, weights, param_id = torch.tensor([3]), torch.tensor([0.5]), torch.tensor([7])
    w = torch.randn(6, 10)
    want = w.clone()
    reference.zo_perturb_(want, seeds, weights, param_id)
    for given in (w.T.contiguous().T, torch.stack((w, w), 2)[..., 1], torch.cat((w, w), 1)[:, 10:]):
        lane.cuda.zo_perturb_(given, seeds, weights, param_id)
        assert torch.equal(given, want)


# ---------------------------------------------------------------------------------------------------------------------
# What it allocates and keeps


def test_tables_are_made_once_and_never_while_a_graph_is_captured(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Host(lane.host.kernels)
    cuda, p = Cuda(gpu), update.problem(update.CASES[0])
    got = copy.deepcopy(p)
    gpu.is_capturing = True
    with pytest.raises(RuntimeError, match="run the step once before it is captured"):
        cuda.zo_update_(*got.arguments())
    gpu.is_capturing = False
    cuda.zo_update_(*got.arguments())
    update.assert_same(got, update.run(p))
    gpu.is_capturing = True
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **named: pytest.fail("a host copy inside a capture"))
    cuda.zo_update_(*got.arguments())
    monkeypatch.setattr(torch, "tensor", made)
    update.assert_same(got, update.run(update.run(p)))
    gpu.is_capturing = False
    other = copy.deepcopy(p)  # elsewhere in memory
    cuda.zo_update_(*other.arguments())
    update.assert_same(other, update.run(p))
    assert cuda._table.cache_info().misses == 3  # the refused one made none
    assert Cuda(gpu)._table is not cuda._table


def test_a_call_allocates_y_and_nothing_else(lane: Lane) -> None:
    x, packed = activations(9, 1672, F16), stored("int4-g32", 33, 1672)
    arguments = dict(x=x, **weight_arguments(packed), out_features=33, basis=torch.randn(1672, 3))
    sizes = []
    empty = lane.host.empty
    with mock.patch.object(lane.host, "empty", lambda *s, **named: sizes.append(s) or empty(*s, **named)):
        lane.zo_linear(**arguments)
    assert sizes == [(9, 33)]
    assert {name for name in vars(lane.cuda) if isinstance(getattr(lane.cuda, name), Tensor)} == set()


def test_errors_name_the_op(lane: Lane) -> None:
    with pytest.raises(RuntimeError, match="zo_linear: `group_size` is not a multiple of 32"):
        lane.zo_linear(x=activations(3, 64, F16), **weight_arguments(stored("int4-g40-bf16", 4, 64)), out_features=4)


@needs_module
def test_the_ops_reach_it(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch.ops through dispatch to the kernels, all five."""
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (lane.cuda, *dispatch.IMPLEMENTATIONS[1:]))
    choose.cache_clear()
    packed = stored("int4-g32", 20, 64)
    assert packed is not None
    packed = packed.to_layout("cuda")
    x, seeds, sigmas, param_id = activations(4, 64, F16), torch.tensor([3]), torch.ones(2, 1), torch.tensor([5])
    try:
        with dispatch.using("cuda"):
            W = ops.dequantize(packed.weight, packed.scale, packed.offset, None, "int4", "cuda", 32, 20, 64, F32)
            assert torch.equal(W, packed.dequantize())
            kind = ("int4", "cuda", 32, 20, "normal")
            linear = (x, packed.weight, packed.scale, packed.offset, None, None, None, None, torch.randn(64, 2),
                      torch.randn(20, 2), None, None, seeds, sigmas, param_id, *kind, 2)  # fmt: skip
            truth = reference.zo_linear(*linear, compute=F64)
            assert_no_worse(ops.zo_linear(*linear), reference.zo_linear(*linear), truth, "zo_linear")
            dense = (x, packed.weight, packed.scale, packed.offset, None, None, seeds, sigmas, param_id, None, None,
                     None, *kind, "weight", "none", 2)  # fmt: skip
            truth = reference.zo_dense_linear(*dense, compute=F64)
            assert_no_worse(ops.zo_dense_linear(*dense), reference.zo_dense_linear(*dense), truth, "zo_dense_linear")
            p = update.problem(update.CASES[1])
            got = copy.deepcopy(p)
            ops.zo_update_(*got.arguments())
            update.assert_same(got, update.run(p))
            w = torch.randn(5, 7)
            want = w.clone()
            reference.zo_perturb_(want, seeds, torch.ones(1), param_id)
            ops.zo_perturb_(w, seeds, torch.ones(1), param_id)
            assert torch.equal(w, want)
    finally:
        choose.cache_clear()
    assert isinstance(lane.host.kernels, ctypes.CDLL)
