"""csrc/cuda on the CPU: the kernels' own text in the fiber shim (cuda_shim.h) against reference.py, and against itself
with planted faults, which the shim has to catch.
"""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path

import pytest
import test_zo_perturb as perturb
import test_zo_update as update
import torch
from cases import (
    BF16,
    DENSE,
    DTYPES,
    F16,
    LINEAR,
    SHAPES,
    WEIGHTS,
    Case,
    activations,
    cover,
    dense_arguments,
    linear_arguments,
    stored,
    weight_arguments,
)
from close import assert_no_worse
from cuda_lane import CSRC, MODES, PADDING, Lane, planted, sanitized, takes
from test_dequantize import same_bits
from torch import Tensor

from zoact_kernels import layouts, reference

OPTIONAL = dict.fromkeys(
    "weight scale offset nested bias base_basis base_coeff basis coeff coeff_groups projected".split()
) | dict.fromkeys(("seeds", "sigmas", "param_id"))
DENSE_OPTIONAL = dict.fromkeys(
    "weight scale offset nested bias seeds sigmas param_id noise_scale mask_value mask_seed".split()
)


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Lane:
    return Lane(tmp_path_factory.mktemp("lane"))


# ---------------------------------------------------------------------------------------------------------------------
# zo_perturb and zo_update: the bits of the reference


@pytest.mark.parametrize("number, case", list(enumerate(perturb.CASES)), ids=str)
def test_zo_perturb(lane: Lane, number: int, case: perturb.Case) -> None:
    p = perturb.problem(case)
    got = copy.deepcopy(p)
    lane.mode(*MODES[number % len(MODES)]).zo_perturb_(*got.arguments())
    perturb.assert_same(got, perturb.run(p))


@pytest.mark.parametrize("number, case", list(enumerate(update.CASES)), ids=str)
def test_zo_update(lane: Lane, number: int, case: update.Case) -> None:
    p = update.problem(case)
    got = copy.deepcopy(p)
    lane.mode(*MODES[number % len(MODES)]).zo_update_(*got.arguments())
    update.assert_same(got, update.run(p))
    got, p.skip = copy.deepcopy(p), torch.tensor([True])
    lane.zo_update_(*p.arguments())
    update.assert_same(p, got)  # nothing happened


def test_refusals(lane: Lane) -> None:
    p = perturb.problem(perturb.Case(5, 7, rank=2))
    with pytest.raises(RuntimeError, match="`basis` does not go with a mask"):
        lane.zo_perturb_(p.w, p.seeds, p.weights, p.param_id, p.basis, mask="random")
    x = activations(3, 64, F16)
    with pytest.raises(RuntimeError, match="`x` is not float16 or bfloat16"):
        lane.zo_linear(x=x.float(), out_features=4)
    for name, K, message in (
        ("int4-g40-bf16", 64, "`group_size` is not a multiple of 32"),
        ("dense-f16", 63, "K to be a multiple of 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            lane.zo_linear(x=x[:, :K], **weight_arguments(stored(name, 4, K)), out_features=4)


# ---------------------------------------------------------------------------------------------------------------------
# dequantize: the bits of formats.py

HELD = tuple(name for name in WEIGHTS if name != "none" and "flat" not in name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", HELD)
def test_dequantize(lane: Lane, weight: str, dtype: str) -> None:
    """Out of one allocation, at any address, its neighbours untouched."""
    lane.mode()
    for number, (N, K) in enumerate((*SHAPES, (130, 200))):
        packed = stored(weight, N, K)
        for start, rows in ((0, N), (N // 3, N // 2), (N - 1, 1), (1, 0)):
            room = torch.full((N * K + 32,), float("nan"), dtype=DTYPES[dtype])
            first = 8 if number % 2 else 3  # aligned to 16 bytes, and to none
            out = room[first : first + rows * K].view(rows, K)
            lane.dequantize(packed, out, start)
            expected = packed.dequantize(DTYPES[dtype])[start : start + rows]
            assert same_bits(out, expected), f"N={N} K={K} rows {start} .. {start + rows - 1}"
            assert room[:first].isnan().all()
            assert room[first + rows * K :].isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# zo_linear


@pytest.mark.parametrize("N, K", [(1, 1), (16, 64), (33, 100), (130, 257)])
@pytest.mark.parametrize("format", PADDING)
def test_layout_round_trip(format: str, N: int, K: int) -> None:
    padding = PADDING[format]
    packed = layouts.pack_nibbles(torch.randint(0, 16, (N, K), dtype=torch.uint8), padding)
    tiles = layouts.to_fragments(packed, K, padding)
    assert torch.equal(layouts.from_fragments(tiles, N, K, padding), packed)
    codes = layouts.unpack_nibbles(packed)
    n, k = N - 1, K - 1  # one element by the formula
    row, column = n % 16, k % 64
    lane, word, step = row % 8 * 4 + column % 8 // 2, column // 16, column % 16
    nibble = row // 8 + step // 8 * 2 + column % 2 * 4
    byte = tiles[n // 16, k // 64, lane * 16 + word * 4 + nibble // 2]
    assert byte >> 4 * (nibble % 2) & 15 == codes[n, k]


@pytest.mark.parametrize("N, K", [(1, 1), (16, 64), (33, 100), (130, 257)])
def test_byte_layout_round_trip(N: int, K: int) -> None:
    codes = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    tiles = layouts.to_byte_fragments(codes)
    assert torch.equal(layouts.from_byte_fragments(tiles, N, K), codes)
    n, k = N - 1, K - 1  # one element by the formula
    lane, column = n % 8 * 4 + k % 8 // 2, k % 64
    byte = column % 32 // 16 * 8 + column % 16 // 8 * 4 + n % 16 // 8 * 2 + k % 2
    assert tiles[n // 16, k // 64, column // 32 * 512 + lane * 16 + byte] == codes[n, k]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_zo_linear_int8_codes_are_exact(lane: Lane, dtype: torch.dtype) -> None:
    """Each of the 256 codes by itself: x is the unit matrix, the scale one."""
    codes = torch.arange(-128, 128).to(torch.int8).view(4, 64)
    y = lane.mode().zo_linear(
        x=torch.eye(64, dtype=dtype), weight=codes, scale=torch.ones(4, 1), format="int8", out_features=4,
    )  # fmt: skip
    assert torch.equal(y.T, codes.to(dtype))


def fits(case: Case) -> bool:
    dtype = DTYPES[case.dtype]
    if dtype not in (F16, BF16) or not takes(stored(case.weight, *case.shape), case.shape[1]):
        return False
    return not case.weight.startswith("dense") or case.weight == f"dense-{case.dtype}"


def check(lane: Lane, arguments: dict, what: str = "", op: str = "zo_linear") -> Tensor:
    y = getattr(lane, op)(**arguments)
    arguments = (OPTIONAL if op == "zo_linear" else DENSE_OPTIONAL) | arguments
    expected = getattr(reference, op)
    assert_no_worse(y, expected(**arguments), expected(**arguments, compute=torch.float64), what)
    return y


@pytest.mark.parametrize("case", [case for case in cover(LINEAR) if fits(case)], ids=str)
def test_zo_linear(lane: Lane, case: Case) -> None:
    torch.manual_seed(0)
    check(lane.mode(*MODES[len(str(case)) % len(MODES)]), linear_arguments(case))


def example(M: int, N: int, K: int, dtype: torch.dtype, weight: str = "int4-g32", R: int = 3, G: int = 1) -> dict:
    """A call with every term that a training step has."""
    return dict(
        x=activations(M, K, dtype), **weight_arguments(stored(weight, N, K)), out_features=N, bias=torch.randn(N),
        basis=torch.randn(K, R) / K**0.5, coeff=torch.randn(N, R), seeds=torch.tensor([5, -1]),
        sigmas=torch.randn(G, 2), param_id=torch.tensor([77]), groups=G,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [("int4-g32", F16), ("int4-g64-sym", BF16), ("int8-g32", BF16), ("nf4-g64", F16), ("dense-bf16", BF16)],
)
def test_zo_linear_modes_and_splits(lane: Lane, dtype: torch.dtype, weight: str) -> None:
    """K in three splits; no order of fibers and no delivery of copies changes a bit."""
    arguments = example(9, 33, 1672, dtype, weight)
    results = [check(lane.mode(*mode), arguments, str(mode)) for mode in MODES]
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("weight", ["int4-g32", "int4-g64-sym", "int8-row", "nf4-g64", "none"])
@pytest.mark.parametrize("K", [200, 1100])
def test_zo_linear_row_depends_on_nothing_else(lane: Lane, weight: str, K: int) -> None:
    """Law 2.4: neither on the number of rows, nor on other rows, nor on the groups beside it."""
    lane.mode()
    arguments = example(66, 20, K, BF16, weight, R=5, G=2)
    y = lane.zo_linear(**arguments)
    for first, last in ((0, 1), (3, 12), (0, 31), (33, 66), (40, 47)):
        g = first // 33
        part = arguments | dict(x=arguments["x"][first:last], sigmas=arguments["sigmas"][g : g + 1], groups=1)
        assert torch.equal(lane.zo_linear(**part), y[first:last]), f"rows {first} .. {last - 1}"


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_zo_linear_probe_survives(lane: Lane, dtype: torch.dtype) -> None:
    """Law 2.5 behind a 16-bit y: two signs of a small sigma around a zero sum differ by what they should."""
    lane.mode()
    x = torch.ones(2, 64, dtype=dtype)
    arguments = dict(
        x=x, **weight_arguments(None), out_features=40, basis=torch.ones(64, 4) / 64, seeds=torch.tensor([3]),
        sigmas=torch.tensor([[2.0**-14], [-(2.0**-14)]]), param_id=torch.tensor([9]), groups=2,
    )  # fmt: skip
    y = check(lane, arguments)
    assert (y[0] == -y[1]).all() and (y[0] != 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# zo_dense_linear


@pytest.mark.parametrize("case", [case for case in cover(DENSE) if fits(case)], ids=str)
def test_zo_dense_linear(lane: Lane, case: Case) -> None:
    torch.manual_seed(0)
    check(lane.mode(*MODES[len(str(case)) % len(MODES)]), dense_arguments(case), op="zo_dense_linear")


def dense_example(M: int, N: int, K: int, dtype: torch.dtype, weight: str = "int4-g32", G: int = 1, **more) -> dict:
    return dict(
        x=activations(M, K, dtype), **weight_arguments(stored(weight, N, K)), out_features=N, bias=torch.randn(N),
        seeds=torch.tensor([5, -1]), sigmas=torch.randn(G, 2), param_id=torch.tensor([77]), groups=G, **more,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "noise"), [(F16, "normal"), (BF16, "rademacher")])
def test_zo_dense_linear_modes_and_splits(lane: Lane, dtype: torch.dtype, noise: str) -> None:
    """K in two splits; no order of fibers and no delivery of copies changes a bit."""
    arguments = dense_example(9, 33, 1100, dtype, noise=noise)
    results = [check(lane.mode(*mode), arguments, str(mode), "zo_dense_linear") for mode in MODES]
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("size", [1e-9, 1e9])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_zo_dense_linear_noise_scale_of_any_size(lane: Lane, dtype: torch.dtype, size: float) -> None:
    """Far outside of what fp16 holds."""
    arguments = dense_example(9, 33, 200, dtype, noise_scale=size * torch.rand(33, 200))
    check(lane.mode(), arguments | dict(sigmas=torch.randn(1, 2) / size), op="zo_dense_linear")


@pytest.mark.parametrize(("weight", "mask"), [("int4-g32", "magnitude"), ("nf4-g64", "random"), ("none", "none")])
def test_zo_dense_linear_row_depends_on_nothing_else(lane: Lane, weight: str, mask: str) -> None:
    """Law 2.4: neither on the number of rows, nor on other rows, nor on the groups beside it."""
    lane.mode()
    more = dict(mask=mask, mask_value=torch.tensor([0.02]), mask_seed=torch.tensor([3]), noise="rademacher")
    arguments = dense_example(66, 20, 1100, BF16, weight, G=2, **more)
    y = lane.zo_dense_linear(**arguments)
    for first, last in ((0, 1), (3, 12), (0, 31), (33, 66), (40, 47)):
        g = first // 33
        part = arguments | dict(x=arguments["x"][first:last], sigmas=arguments["sigmas"][g : g + 1], groups=1)
        assert torch.equal(lane.zo_dense_linear(**part), y[first:last]), f"rows {first} .. {last - 1}"


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_zo_dense_linear_probe_survives(lane: Lane, dtype: torch.dtype) -> None:
    """Law 2.5: Z is not rounded to the dtype of x. Products that cancel leave what a rounded Z has lost."""
    lane.mode()
    z = reference.perturbation("normal", torch.tensor([3]), torch.ones(1, 1), torch.tensor([9]), 40, 8, 0, 8)[0]
    x = torch.zeros(40, 8, dtype=dtype)
    for row in range(40):  # x . z of row `row` is close to zero: the last of eight values undoes the others
        x[row] = torch.randn(8).to(dtype)
        x[row, 7] = (-(x[row, :7].double() @ z[row, :7].double()) / z[row, 7]).to(dtype)
    arguments = dict(
        x=x, **weight_arguments(None), out_features=40, seeds=torch.tensor([3]),
        sigmas=torch.tensor([[1.0]]), param_id=torch.tensor([9]),
    )  # fmt: skip
    y = check(lane, arguments, op="zo_dense_linear")
    truth = x.double() @ z.double().T
    close, rounded = y.double() - truth, x.double() @ z.to(dtype).double().T - truth
    error, lost = (e.diagonal().abs() / truth.diagonal().abs() for e in (close, rounded))
    assert error.median() < torch.finfo(dtype).eps < lost.median() / 8


# ---------------------------------------------------------------------------------------------------------------------
# Planted faults

PERTURB, LINEAR_FILE, TILE = "cuda/zo_perturb.cu", "cuda/zo_linear.cu", "cuda/tile.cuh"
DENSE_FILE = "cuda/zo_dense_linear.cu"
BARRIER = "__syncthreads();"
FAULTS = {
    "the barrier behind the noise of a basis": (PERTURB, f"{BARRIER}\n    for (int r = 0;", "for (int r = 0;"),
    "the barrier before it is made anew": (PERTURB, f"{BARRIER}  // before g is made anew", ""),
    "a barrier that some threads skip": (PERTURB, f"{BARRIER}\n    for (int r", f"if (left > 0) {BARRIER} for (int r"),
    "a mask of columns off by one": (PERTURB, "i < left ? p.basis", "i < left - 1 ? p.basis"),
    "the wait for a copy": (TILE, "async_wait<STAGES - 2>();", ""),
    "a wait that leaves one copy too many": (TILE, "async_wait<STAGES - 2>();", "async_wait<STAGES - 1>();"),
    "the barrier behind the wait": (TILE, f"{BARRIER}  // the block's copies are there", "// nothing"),
    "the barrier before own is filled": ("cuda/low_rank.cuh", f"{BARRIER}\n      stage_noise", "stage_noise"),
    "a mask of K off by one": (TILE, "2 * left - 16", "2 * left - 2 - 16"),
    "a swapped fragment": (LINEAR_FILE, "a[1], b[2], b[3]", "a[1], b[3], b[2]"),
    "an address of ldmatrix off by a row": (LINEAR_FILE, "8 * j + at.lane % 8, 4", "8 * j + (at.lane + 1) % 8, 4"),
    "a misaligned copy": (LINEAR_FILE, "stage + to, tile", "stage + to + 8, tile"),
    "a collective of half a warp": (LINEAR_FILE, "mma<T>(sum, a[1]", "if (at.lane < 16) mma<T>(sum, a[1]"),
    "slots of noise in another order than x": (DENSE_FILE, "at.t % 2 * 8", "(1 - at.t % 2) * 8"),
    "a part of Z left out": (DENSE_FILE, "NARROW ? 3 : 2", "NARROW ? 2 : 1"),
    "a split of the noise over that of the product": (
        DENSE_FILE,
        "noisy.call.partial += ",
        "noisy.call.partial += 0 *",
    ),
    "signs that do not run into the next block": ("cuda/noise.cuh", "if (bit > 64) {", "if (bit > 99) {"),
    "the mask of the row beside it": (DENSE_FILE, "e[row] + k, z[row]);\n        }", "e[1] + k, z[row]);\n        }"),
    "a scale of a row that is not there": ("cuda/weight.cuh", "if (n >= w.N || group", "if (group"),
    "a basis read past its end": (LINEAR_FILE, "r0 + i < p.R ? basis[r0 + i] : 0.0f", "basis[r0 + i]"),
    "noise_scale past its end": (DENSE_FILE, "const bool there = n < w.N &&", "const bool there ="),
    "shared memory that is too small": (LINEAR_FILE, "return STAGES * stage_bytes", "return 3 * stage_bytes"),
}
FEW = ("a barrier that some threads skip", "the wait for a copy", "a swapped fragment", "a basis read past its end")


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f in FEW else pytest.mark.soak) for f in FAULTS])
def test_planted_faults_are_caught(lane: Lane, tmp_path: Path, fault: str) -> None:
    """A kernel with a fault is wrong in some mode, or stops with a message; without, it is right in all: see above."""
    file, text, replacement = FAULTS[fault]
    stems = ("zo_perturb",) if file == PERTURB else ("zo_linear",)
    if dense := file in (DENSE_FILE, "cuda/noise.cuh"):
        stems = ("zo_linear", "zo_dense_linear")
    broken = Lane(tmp_path, planted(CSRC, tmp_path, file, text, replacement), stems)
    if file == PERTURB:
        p = perturb.problem(perturb.Case(11, 101, rank=70))
        want = perturb.run(p).memory

        def run(which: Lane) -> bool:
            got = copy.deepcopy(p)
            which.zo_perturb_(*got.arguments())
            return torch.equal(got.memory, want)
    elif dense:
        plain = dense_example(9, 33, 600, F16)
        masked = plain | dict(
            mask="random", mask_value=torch.tensor([0.5]), mask_seed=torch.tensor([3]), noise="rademacher",
            noise_scale=torch.rand(33, 600),
        )  # fmt: skip

        def results(which: Lane) -> Tensor:
            return torch.stack([which.zo_dense_linear(**arguments) for arguments in (plain, masked)])

        want = results(lane.mode())

        def run(which: Lane) -> bool:
            return torch.equal(results(which), want)
    else:
        arguments = example(9, 33, 600, F16)
        want = lane.mode().zo_linear(**arguments)

        def run(which: Lane) -> bool:
            return torch.equal(which.zo_linear(**arguments), want)

    assert run(lane.mode())
    outcomes = []
    for mode in MODES:
        try:
            outcomes.append(run(broken.mode(*mode)))
        except RuntimeError as error:
            outcomes.append(False)
            assert re.search("barrier|wait|NaN|shared|aligned|multiple|warp|outside of a tensor", str(error))
    assert not all(outcomes), f"{fault}: not noticed in any mode"


# ---------------------------------------------------------------------------------------------------------------------
# Sanitizers


@pytest.mark.soak
def test_sanitized(lane: Lane, tmp_path: Path) -> None:
    """A few calls of every op without Python, under AddressSanitizer and UBSan; and a fault that they see."""
    calls = tmp_path / "calls"
    calls.mkdir()
    lane.mode().host.record = calls
    try:
        for weight in ("int4-g32", "nf4-g64-nested", "dense-f16", "none"):
            lane.zo_linear(**example(5, 33, 200, F16, weight))
            lane.zo_dense_linear(**dense_example(5, 33, 200, F16, weight, mask="magnitude", mask_value=torch.ones(1)))
        lane.zo_linear(**example(2, 20, 1100, BF16))
        lane.zo_dense_linear(**dense_example(2, 20, 1100, BF16, noise="rademacher"))
        lane.dequantize(stored("int4-g32", 33, 100), torch.empty(20, 100), 7)
        for case in perturb.CASES[::7]:
            p = perturb.problem(case)
            lane.zo_perturb_(*p.arguments())
        for case in update.CASES[::7]:
            lane.zo_update_(*update.problem(case).arguments())
    finally:
        lane.host.record = None
    files = sorted(map(str, calls.iterdir()))
    run = subprocess.run([sanitized(tmp_path), *files], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == f"{len(files)} calls"
    broken = sanitized(tmp_path, planted(CSRC, tmp_path, *FAULTS["a scale of a row that is not there"]))
    run = subprocess.run([broken, *files], text=True, capture_output=True)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
