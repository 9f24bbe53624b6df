"""What only a GPU can show: numbers of the compiled kernels, equal bits in tiles of every width, streams, devices,
graphs, memory. `make test-gpu` runs this first.

Every body runs without a GPU too, so that a slip of the pen shows today: a lane is a device and an implementation, and
there is one on the CPU (tests/interpreted/gpu.py: two, of Triton's interpreter), with few cases where others have many.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_script
import pytest
import test_zo_perturb as perturb
import test_zo_update as update
import torch
from cases import DENSE, DTYPES, LINEAR, WEIGHTS, cover, dense_arguments, linear_arguments, stored, weight_arguments
from close import assert_no_worse
from lanes import (
    CUDA,
    INVARIANT,
    arranged,
    crossed,
    each_lane,
    forced,
    in_some_layout,
    lanes,
    linear,
    moved,
    problem_on,
)
from test_zo_dense_linear import OPTIONAL as DENSE_OPTIONAL
from test_zo_linear import OPTIONAL, example, rows_of
from torch import Tensor

from benchmarks import gpu_step, timing
from zoact_kernels import ops, reference
from zoact_kernels.formats import PackedWeight

# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, name, case", crossed([c for c in cover(LINEAR) if c.weight != "none"]))
def test_zo_linear(device: str, name: str, case: Any) -> None:
    torch.manual_seed(0)
    arguments = linear_arguments(case)
    y = linear(name, device, **arguments)
    filled = dict.fromkeys(OPTIONAL) | arguments
    truth = reference.zo_linear(**filled, compute=torch.float64)
    assert_no_worse(y, reference.zo_linear(**filled), truth)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("device, name, M", crossed([1, 2, 17, 8, 16, 32, 64, 65, 128, 300]))
def test_zo_linear_of_a_real_layer(device: str, name: str, M: int, dtype: str) -> None:
    """K long enough to be split and for every stage of the pipelines, offsets and a mean of x that hurt."""
    N, K = (1100, 2560) if device == "cuda" else (70, 200)
    arguments = example(M, N, K, "int4-g64-sym", R=8, layout="row")
    arguments["x"] = arguments["x"].to(DTYPES[dtype])
    y = linear(name, device, **arguments)
    filled = dict.fromkeys(OPTIONAL) | arguments
    assert_no_worse(y, reference.zo_linear(**filled), reference.zo_linear(**filled, compute=torch.float64))


@pytest.mark.parametrize("device, name, case", crossed(cover(DENSE), "zo_dense_linear"))
def test_zo_dense_linear(device: str, name: str, case: Any) -> None:
    torch.manual_seed(0)
    filled = dict.fromkeys(DENSE_OPTIONAL) | dense_arguments(case)
    y = in_some_layout(name, moved(filled, device), ops.zo_dense_linear).cpu()
    truth = reference.zo_dense_linear(**filled, compute=torch.float64)
    assert_no_worse(y, reference.zo_dense_linear(**filled), truth)


@pytest.mark.parametrize("device, name, weight", crossed([w for w in WEIGHTS if w != "none"], "dequantize"))
def test_dequantize(device: str, name: str, weight: str) -> None:
    packed = stored(weight, 130, 257)
    assert packed is not None
    there = weight_arguments(packed.to(device)) | dict(x=torch.empty(0, 257, device=device), out_features=130)
    for dtype in DTYPES.values():

        def dequantized(x: Tensor, dtype: torch.dtype = dtype, **weight: Any) -> Tensor:
            return ops.dequantize(**weight, in_features=257, dtype=dtype)

        got = in_some_layout(name, there, dequantized)
        assert torch.equal(got.cpu().view(torch.uint8), packed.dequantize(dtype).view(torch.uint8))


@pytest.mark.parametrize("device, name, case", crossed(update.CASES, "zo_update_"))
def test_zo_update(device: str, name: str, case: Any) -> None:
    p = update.problem(case)
    want, got = update.run(p), problem_on(p, device)
    with forced(name):
        torch.ops.zoact.zo_update_(*got.arguments())
    for key in ("coeffs", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(getattr(got, key), getattr(want, key), strict=True):
            assert torch.equal(a.cpu(), b), key


@pytest.mark.parametrize("device, name, case", crossed(perturb.CASES, "zo_perturb_"))
def test_zo_perturb(device: str, name: str, case: Any) -> None:
    p = perturb.problem(case)
    want, got = perturb.run(p), problem_on(p, device)
    with forced(name):
        torch.ops.zoact.zo_perturb_(*got.arguments())
    assert perturb.same(got.w.cpu(), want.w).all()


def far_rows(device: str) -> tuple[int, int]:
    """(N, C) of a 16-bit matrix with more elements than an int32 counts (4.3 GB, and other processes test too), or a
    small one where that does not fit."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] > 20e9:
        return 2**16 + 2, 2**15
    return 130, 64


@pytest.mark.parametrize("device, name", lanes("zo_perturb_"))
def test_far_addresses_of_zo_perturb(device: str, name: str) -> None:
    """The last rows of a matrix beyond 2^31 elements are those of a matrix of two rows at their address."""
    N, C = far_rows(device)
    w = torch.ones(N, C, dtype=torch.bfloat16, device=device)
    last = w[-2:].clone()
    scalars = [torch.tensor([v], device=device) for v in (7, 0.5, 77)]
    with forced(name):
        ops.zo_perturb_(w, *scalars)
        ops.zo_perturb_(last, *scalars, row_offset=N - 2)
    assert torch.equal(w[-2:], last)
    assert not torch.equal(last, torch.ones_like(last))


@each_lane
def test_far_addresses_of_zo_linear(device: str, name: str) -> None:
    N, K = far_rows(device)
    w = torch.zeros(N, K, dtype=torch.bfloat16, device=device)
    w[-2:] = 1
    x = torch.ones(1, K, dtype=torch.bfloat16, device=device)
    with forced(name):
        y = ops.zo_linear(
            x, **weight_arguments(PackedWeight("dense", "row", -1, N, K, w)), out_features=N,
            **dict.fromkeys(key for key in OPTIONAL if key not in ("weight", "scale", "offset", "nested")),
        )  # fmt: skip
    assert (y[0, :-2] == 0).all() and (y[0, -2:] == K).all()


# --- the same bits, whatever else happens -----------------------------------------------------------------------------


REPEATED = [("int4-g64-sym", 1), ("nf4-g64", 8), ("dense-bf16", 2)] + [
    (weight, M) for weight in ("int4-g32", "nf4-g64", "dense-bf16") for M in (1, 16, 40, 300)
]


@pytest.mark.parametrize("device, name, case", crossed(REPEATED))
def test_twenty_runs_give_the_same_bits(device: str, name: str, case: tuple[str, int]) -> None:
    """Between runs memory is filled with something else, and two streams compete."""
    weight, M = case
    N, K, repeats = (1100, 4160, 20) if device == "cuda" else (40, 130, 3)
    arguments = example(M, N, K, weight, R=16, layout="row")
    arguments["x"] = arguments["x"].to(torch.bfloat16)
    there = arranged(name, device, arguments)
    with forced(name):
        first = ops.zo_linear(**there).cpu()
        for i in range(repeats):
            noise = torch.full((N, K), float(i), device=device)  # the next y may lie where this was
            with side_stream(device):
                noise @ noise.T
            del noise
            assert torch.equal(ops.zo_linear(**there).cpu(), first), f"run {i}"


TILES = [("int4-g32", 70, "f32"), ("nf4-g64-flat", 70, "bf16"), ("int8-row", 70, "f16")] + [
    (weight, N, dtype)
    for weight in ("int4-g32", "int4-g64-sym", "nf4-g64", "dense-bf16", "dense-f16")
    for N in (70, 9000)
    for dtype in DTYPES
]


@pytest.mark.parametrize("device, name, case", crossed(TILES, names=INVARIANT))
def test_rows_have_the_same_bits_in_every_tile(device: str, name: str, case: tuple[str, int, str]) -> None:
    """K is split for the small N; M runs through all widths of tiles."""
    weight, N, dtype = case
    most, counts = (200, (1, 2, 16, 17, 32, 33, 64, 65, 128)) if device == "cuda" else (10, (1, 7))
    arguments = example(most, N, 1300 if device == "cuda" else 130, weight, R=20, layout="row")
    arguments["x"] = arguments["x"].to(DTYPES[dtype])
    y = linear(name, device, **arguments)
    for count in counts:
        assert torch.equal(linear(name, device, **rows_of(arguments, 0, count)), y[:count]), f"M = {count}"
    half = most // 2  # beside other groups
    grouped = arguments | dict(groups=2, sigmas=arguments["sigmas"].repeat(2, 1))
    assert torch.equal(linear(name, device, **grouped), y)
    assert torch.equal(linear(name, device, **rows_of(arguments, half, most)), y[half:])


# --- streams, devices, graphs -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def side_stream(device: str) -> Iterator[Any]:
    """A stream of its own that begins with what the current one has done; on the CPU there is but one."""
    if device == "cpu":
        yield None
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream


def spin(device: str) -> None:
    """Keep the current stream busy for about half a second."""
    if device != "cpu":
        torch.cuda._sleep(10**9)


def without_host_waits(device: str, call: Callable[[], Any]) -> Any:
    """An error where the host waits for the device: `.item()`, a copy from pageable memory, a nonzero."""
    if device == "cpu":
        return call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


Call = tuple[Callable[[], Tensor], Callable[[], None]]  # runs the op, gives what it wrote; changes what it reads


def calls(name: str, device: str) -> dict[str, Call]:
    """Every op as a function that runs it on tensors that stay where they are, and another that changes its input."""
    N, K = (70, 1300) if device != "cpu" else (40, 130)
    arguments = example(6, N, K, R=20, G=2, layout="row")
    arguments["x"] = arguments["x"].to(torch.bfloat16)
    there = arranged(name, device, arguments)
    x, seeds = there["x"], there["seeds"]
    seed, weight, param_id = (torch.tensor([v], device=device) for v in (7, 0.5, 77))
    w = torch.zeros(70, 130, device=device)
    coeff, first, second = (torch.zeros(70, 20, device=device) for _ in range(3))
    hyper, skip = update.hyper_of().to(device), torch.tensor([False], device=device)
    packed = PackedWeight("dense", "row", -1, N, K, torch.randn(N, K).to(torch.bfloat16).to(device))

    def change() -> None:
        x.mul_(1.5)
        seeds.add_(1)
        seed.add_(1)

    def linear_call() -> Tensor:
        return ops.zo_linear(**there)

    def dense_call() -> Tensor:
        sigmas = there["sigmas"]
        filled = dict.fromkeys(DENSE_OPTIONAL) | weight_arguments(packed)
        return ops.zo_dense_linear(
            x=x, **filled | dict(seeds=seeds, sigmas=sigmas, param_id=param_id), out_features=N, groups=2
        )

    def perturb_call() -> Tensor:
        w.zero_()
        ops.zo_perturb_(w, seed, weight, param_id)
        return w

    def update_call() -> Tensor:
        for tensor in (coeff, first, second):
            tensor.zero_()
        ops.zo_update_([coeff], [first], [second], param_id, seed, weight, hyper, skip, "adam")
        return coeff

    found: dict[str, Call] = {}
    for op, call in (
        ("zo_linear", linear_call), ("zo_dense_linear", dense_call), ("zo_perturb_", perturb_call),
        ("zo_update_", update_call),
    ):  # fmt: skip
        try:
            with ops.using(name):
                call()  # compiles, and makes what it keeps
        except RuntimeError as error:
            if not str(error).startswith("no implementation takes"):
                raise
            continue
        found[op] = call, change
    return found


@each_lane
def test_ops_run_on_the_current_stream(device: str, name: str) -> None:
    """On a busy stream an op returns at once, and reads what that stream writes before it, not what is there now."""
    for op, (call, change) in calls(name, device).items():
        with ops.using(name):
            before = call().clone()
            with side_stream(device) as stream:
                spin(device)
                change()  # comes after the half second, in the stream's order
                late = without_host_waits(device, call)
                assert stream is None or not stream.query(), f"{op} waited for the device"
            timing.synchronize(device)
            seen = late.cpu()
            assert torch.equal(seen, call().cpu()), f"{op} did not see what its stream had written"
            assert not torch.equal(seen, before.cpu()), op


@each_lane
def test_a_replayed_graph_reads_new_seeds(device: str, name: str) -> None:
    for op, (call, change) in calls(name, device).items():
        held: list[Tensor] = []

        def keep(i: int, call: Callable[[], Tensor] = call, held: list[Tensor] = held) -> None:
            held[:] = [call()]

        with ops.using(name):
            replay = timing.captured(keep, 1, device)
            for _ in range(2):
                change()
                replay(0)
                timing.synchronize(device)
                got = held[0].cpu()
                assert torch.equal(got, call().cpu()), op


@each_lane
def test_tensors_of_another_device(device: str, name: str) -> None:
    """Ops follow their tensors, whatever the current device is, and leave it as it was."""
    other = device
    if device == "cuda":
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU")
        other = "cuda:1"
    ours, there = calls(name, device), calls(name, other)
    current = torch.cuda.current_device() if device == "cuda" else None
    for op, (call, _) in ours.items():
        with ops.using(name):
            y = there[op][0]()
            if op in ("zo_perturb_", "zo_update_"):  # the others draw their operands
                assert torch.equal(y.cpu(), call().cpu()), op
            assert y.device == torch.device(other) and torch.isfinite(y).all(), op
        assert current is None or torch.cuda.current_device() == current


# --- a whole step -----------------------------------------------------------------------------------------------------

DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


def subject(device: str, plain: bool = True) -> gpu_step.Subject:
    with torch.no_grad():
        return gpu_step.Subject(gpu_step.SIZES[device][-1], device, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_are_repeatable_and_leave_the_weights(device: str) -> None:
    results = []
    for _ in range(2):
        s = subject(device)
        before = {name: layer.packed().weight.clone() for name, layer in s.layers.items()}
        for _ in range(3):
            assert not s.step().skipped
        assert all(torch.equal(layer.packed().weight, before[name]) for name, layer in s.layers.items())
        results.append({name: layer.coeff.detach().clone() for name, layer in s.layers.items()})
    assert all(torch.isfinite(c).all() and c.abs().max() > 0 for c in results[0].values())
    assert all(torch.equal(c, results[1][name]) for name, c in results[0].items())


@pytest.mark.parametrize("plain", [True, False], ids=["torch", "transformers"])
@pytest.mark.parametrize("device", DEVICES)
def test_peak_of_a_step(device: str, plain: bool) -> None:
    """At most 1.02 of what inference over the same rows takes, weights included (law 1.1)."""
    if not plain:
        pytest.importorskip("transformers")
    size = gpu_step.SIZES[device][0]
    with torch.no_grad():
        s = gpu_step.Subject(size, device, plain)
        for call in (s.step, s.floor):
            call()
        peaks = {name: gpu_step.held_and_peak(call, device)[1] for name, call in (("step", s.step), ("floor", s.floor))}
    if peaks["step"] is None or peaks["floor"] is None:
        pytest.skip("no counter of peak memory here")
    assert peaks["step"] <= 1.02 * peaks["floor"]


# --- compute-sanitizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_script_of_the_sanitizer(device: str) -> None:
    assert gpu_script.run(device) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    script = Path(gpu_script.__file__)
    told = subprocess.run(
        [*command, sys.executable, str(script), "cuda"], cwd=script.parents[1], text=True, capture_output=True
    )
    assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-2000:]
