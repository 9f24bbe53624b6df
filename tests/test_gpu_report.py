"""What a GPU would need, and its report: formulas against cases worked out by hand, the report against its table."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path

import pytest
import torch
from cuda_lane import CSRC, Lane

from benchmarks import gpu_model, gpu_report
from benchmarks.cases import GPU_ROWS, GPU_SHAPES, SHAPES
from benchmarks.gpu_model import BITS, CARDS, LATENCY, Card, Launch, crossover, occupancy
from zoact_kernels import dispatch, native
from zoact_kernels.cuda_ops import ZoLinear
from zoact_kernels.formats import PackedWeight
from zoact_kernels.layers import gpu_layout

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
H100, A100, RTX4090 = CARDS
TABLE = json.loads((RESULTS / "machine_code.json").read_text())
CUDA_TABLE = json.loads((RESULTS / "cuda_machine_code.json").read_text())
# 10 multiprocessors at 1 GHz, 1 TFLOP/s, 100 GB/s: numbers for the head.
SMALL = Card("small", "sm_90", 10, 1e12, 100e9, 1e9, 64, 32, 228 << 10, "none")


@pytest.mark.parametrize(
    "card, bits, rows",
    [
        (H100, "int4 g64", 78), (A100, "int4 g64", 41), (RTX4090, "int4 g64", 43),
        (H100, "bf16", 295), (A100, "bf16", 153), (RTX4090, "bf16", 164),
    ],
)  # fmt: skip
def test_crossover(card: Card, bits: str, rows: int) -> None:
    assert round(crossover(BITS[bits], card)) == rows


def test_the_clock_is_the_one_of_the_peak() -> None:
    """Products and sums of a multiprocessor and cycle: 4096 on Hopper, 2048 on Ampere, 512 on Ada with fp32 sums."""
    for card, flops in ((H100, 4096), (A100, 2048), (RTX4090, 512)):
        assert card.multiprocessors * flops * card.clock == pytest.approx(card.flops, rel=2e-3), card.name


@pytest.mark.parametrize(
    "registers, threads, shared, card, programs, limit",
    [
        (255, 128, 0, A100, 2, "registers"),  # 256 * 32 * 4 warps = 32768: twice
        (128, 128, 8192, A100, 4, "registers"),
        (129, 128, 8192, A100, 3, "registers"),  # rounded up to 136: 65536 / 17408
        (32, 256, 1024, A100, 8, "registers"),  # 8192 a program, and the 64 warps are full with as many
        (16, 128, 0, A100, 16, "threads"),
        (16, 32, 0, A100, 32, "programs"),
        (16, 32, 0, RTX4090, 24, "programs"),
        (64, 128, 50 << 10, A100, 3, "shared memory"),  # 51 of 164 kB
        (64, 128, 50 << 10, RTX4090, 1, "shared memory"),
    ],
)  # fmt: skip
def test_occupancy(registers: int, threads: int, shared: int, card: Card, programs: int, limit: str) -> None:
    assert occupancy(registers, threads, shared, card) == (programs, limit)


def test_bounds_of_a_launch() -> None:
    code = {"registers": 64, "threads": 128, "shared": 1024, "lines_of_k_loop": 300}
    launch = Launch("product", flops=2e6, bytes=1e6, programs=21, steps=40, stage=2048, stages=3, code=code)
    assert launch.bounds(SMALL) == pytest.approx({
        "bytes": 10e-6,  # 1 MB at 100 GB/s
        "flops": 2e-6,
        "issue": 36e-6,  # 3 programs on the busiest, 40 * 300 cycles each: 4 warps on 4 schedulers
        "latency": 20 * LATENCY,  # 40 steps, 2 under way; 3 programs side by side
    })  # fmt: skip
    assert launch.seconds(SMALL) == pytest.approx(36e-6)
    alone = Launch("GEMM", flops=2e6, bytes=1e6)
    assert set(alone.bounds(SMALL)) == {"bytes", "flops"}


def test_bytes_and_flops_of_a_call() -> None:
    """M = 8, N = K = 4096, R = 8: a weight of 4096 * 4096 * 17 / 32 bytes, x and y of 64 KiB, A and C of 128 KiB."""
    weight, row, factor = 4096 * 4096 * 17 // 32, 8 * 4096 * 2, 4096 * 8 * 4
    ours = {launch.name: launch for launch in gpu_model.triton(8, 4096, 4096, 8, H100, TABLE)}
    assert set(ours) == {"project", "product", "finish"}
    assert ours["project"].flops == 2 * 8 * 4096 * 8
    assert ours["project"].bytes == row + factor + 8 * 8 * 8 * 4  # h in 8 parts
    sums = 2 * 8 * 4096 * 4  # in two splits
    assert ours["product"].bytes == weight + row + sums and ours["product"].flops == 2 * 8 * 4096 * 4096
    assert ours["finish"].bytes == sums + factor + 8 * 8 * 4 + row
    assert (ours["product"].programs, ours["product"].steps, ours["product"].stage) == (128, 32, 2048)
    plain = {launch.name: launch for launch in gpu_model.unfused(8, 4096, 4096, 8)}
    assert plain["dequantise"].bytes == weight + 2 * 4096 * 4096
    assert plain["GEMM"].bytes == 2 * 4096 * 4096 + 2 * row
    assert plain["randn"].bytes == 2 * 4096 * 8 and plain["C + sigma Z"].bytes == 2 * 3 * 2 * 4096 * 8
    eager = {launch.name: launch for launch in gpu_model.unfused(8, 4096, 4096, 8, eager=True)}
    assert eager["dequantise"].bytes == 15 * 4096 * 4096
    panel = {launch.name: launch for launch in gpu_model.panel(512, 4096, 4096, 8, H100, TABLE)}
    assert panel["GEMM"].bytes == 2 * 4096 * 4096 + 2 * 512 * 4096 + 4 * 512 * 4096


def cuda(M: int, N: int, K: int, card: Card = A100) -> dict[str, Launch]:
    return {launch.name: launch for launch in gpu_model.cuda(M, N, K, 8, card, CUDA_TABLE)}


def test_bytes_and_flops_of_the_cuda_way() -> None:
    """The same call: one tile of eight rows, h in 8 parts, K in two splits of 32 blocks."""
    weight, row, factor = 4096 * 4096 * 17 // 32, 8 * 4096 * 2, 4096 * 8 * 4
    ours = cuda(8, 4096, 4096)
    assert set(ours) == {"project", "product", "finish"}
    project, product, finish = ours.values()
    assert project.bytes == row + factor + 8 * 8 * 8 * 4 and project.flops == project.fp32 == 2 * 8 * 4096 * 8
    sums = 2 * 8 * 4096 * 4
    assert product.bytes == weight + row + sums and product.flops == 2 * 8 * 4096 * 4096
    assert finish.bytes == sums + factor + 8 * 8 * 8 * 4 + row and finish.flops == 2 * 8 * 4096 * 8
    assert finish.fp32 == 2 * 8 * 4096 * (16 + 16)  # C and Z, 16 ranks at a time
    assert (product.programs, product.steps, product.stage, product.stages) == (128, 32, 2048, 4)
    assert (project.programs, finish.programs) == (2 * 8, 64)
    assert product.multiplied == 2 * product.flops  # x with ones, for the offsets
    assert cuda(8, 4096, 4096, H100)["product"].multiplied == pytest.approx(2 * product.flops * 4 / 3)
    assert sum(launch.flops for launch in ours.values()) == sum(
        launch.flops for launch in gpu_model.triton(8, 4096, 4096, 8, A100, TABLE)
    )


@pytest.mark.parametrize("M, tile", [(1, 8), (8, 8), (9, 32), (32, 32), (33, 64), (64, 64), (65, 64)])
def test_rows_that_fill_a_tile_are_multiplied(M: int, tile: int) -> None:
    product = cuda(M, 4096, 4096)["product"]
    blocks = 2 if M > 64 else 1
    assert product.multiplied == 2 * 2 * blocks * tile * 4096 * 4096 and product.programs == blocks * 64 * 2
    assert product.code and product.code["shared"] == 4 * (2048 + tile * 128) + 64  # stages, and a codebook


def test_whole_k_has_no_finish() -> None:
    """N = 14336: 224 blocks of W's rows. The low-rank terms and y are product's."""
    ours = cuda(512, 14336, 4096)
    assert list(ours) == ["project", "product"]
    product = ours["product"]
    assert (product.programs, product.steps) == (224 * 8, 64)
    ends = 4 * (8 * 512 + 14336) * 8 + 2 * 512 * 14336
    assert product.bytes == 14336 * 4096 * 17 // 32 + 2 * 512 * 4096 + ends
    assert product.flops == 2 * 512 * 14336 * (4096 + 8) and product.fp32 == 2 * 512 * 14336 * 32


def test_bounds_of_the_cuda_way() -> None:
    """A100, M = 8: 128 programs on 108 multiprocessors, two on the busiest, 32 stages each, 3 on their way."""
    code = CUDA_TABLE["kernels"]["product_kernel<bf16, int4, true, 1>"]["80"]
    product = cuda(8, 4096, 4096)["product"]
    assert product.code and product.code["registers"] == code[0] and product.code["shared"] == code[3]
    hmma, others = code[4], code[6]
    assert product.bounds(A100) == pytest.approx({
        "bytes": product.bytes / 2039e9,
        "flops": 4 * 8 * 4096 * 4096 / 312e12,
        "issue": 2 * 32 * round(hmma * (1 + others)) / 1.41e9,  # 4 warps on 4 schedulers
        "latency": 11 * LATENCY,  # both side by side
    })  # fmt: skip
    assert cuda(8, 4096, 4096)["finish"].bounds(A100)["fp32"] == 2 * 8 * 4096 * 32 / 19.5e12


def test_every_launch_of_ours_has_its_machine_code() -> None:
    for card in CARDS:
        for shape in GPU_SHAPES:
            for M in GPU_ROWS:
                N, K = SHAPES[shape]
                for launch in gpu_model.triton(M, N, K, 8, card, TABLE):
                    assert launch.code and "issue" in launch.bounds(card), f"{launch.name} {shape} M={M} {card.name}"
                for launch in gpu_model.cuda(M, N, K, 8, card, CUDA_TABLE):
                    bounds = launch.bounds(card)
                    assert launch.code, f"{launch.name} {shape} M={M} {card.name}"
                    assert ("issue" in bounds) == ("latency" in bounds) == (launch.name == "product")


def test_sizes_are_those_of_the_sources() -> None:
    text = "".join(
        (CSRC / "cuda" / name).read_text() for name in ("weight.cuh", "tile.cuh", "low_rank.cuh", "zo_linear.cu")
    )
    sizes = {name: int(value) for name, value in re.findall(r"\b([A-Z_]+) = (\d+)\b", text)}
    assert sizes["TILE_N"] * sizes["WARPS"] == gpu_model.BN and sizes["TILE_K"] == gpu_model.BK
    for name in ("STAGES", "CHUNK", "ROWS", "RANKS"):
        assert sizes[name] == getattr(gpu_model, name), name


def test_tiles_and_splits_are_those_of_the_launcher(tmp_path: Path) -> None:
    """By the workspace it asks for: h [chunks, M, R], and the sums of each split in whole tiles."""
    lane = Lane(tmp_path, stems=("zo_linear",))
    size = lane.host.kernels.zo_linear_workspace
    size.restype = ctypes.c_int64
    there = torch.zeros(4)
    shapes = [*SHAPES.values(), (64, 512), (65, 1023), (1, 1024), (8192, 8192), (8193, 8192), (300, 7777)]
    for N, K in shapes:
        for M in (1, 8, 9, 32, 33, 64, 65, 500):
            fields = dict(M=M, N=N, K=K, R=8, codes=there, basis=there, group_size=64)
            z = ZoLinear(**dict.fromkeys(ZoLinear.kinds) | fields)
            splits, blocks = gpu_model.splits_of(N, K)
            assert (splits - 1) * blocks * 64 < K <= splits * blocks * 64
            padded = gpu_model.filled(M, gpu_model.rows_of(M)) * gpu_model.filled(N, 64)
            expected = -(-K // gpu_model.CHUNK) * M * 8 + (splits * padded if splits > 1 else 0)
            assert size(ctypes.byref(z)) == expected, (M, N, K)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch):
    """This machine has the kernels of the table; choices made so are forgotten again."""
    pytest.importorskip("triton")
    archs = tuple(CUDA_TABLE["kernels"]["project_kernel<bf16>"])
    monkeypatch.setattr(native, "why_no_cuda", lambda: "")
    monkeypatch.setattr(native, "cuda_archs", lambda: archs)
    dispatch.choose.cache_clear()
    yield archs
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.target)
def test_dispatch_is_the_one_of_the_package(card: Card, shipped: tuple[str, ...]) -> None:
    """A weight moved to the card, then `explain`; cost of Triton: that of a weight in layout `row`."""
    for shape in GPU_SHAPES:
        N, K = SHAPES[shape]
        codes = torch.empty(N, K // 2, dtype=torch.uint8, device="meta")
        scale = torch.empty(N, K // 64, dtype=torch.bfloat16, device="meta")
        layout = gpu_layout(PackedWeight("int4", "row", 64, N, K, codes, scale), card.target)
        assert layout == "cuda"
        for M in GPU_ROWS:
            problem = dispatch.Problem(
                "zo_linear", "cuda", torch.bfloat16, M, N, K, "int4", layout, 64, codes.dtype, scale.dtype, 8, 0,
                2 if M > 1 else 1, 1, "normal", (), card.target,
            )  # fmt: skip
            told, row = dispatch.explain(problem), dispatch.explain(problem._replace(layout="row"))
            chosen, costs = gpu_model.dispatched(M, N, K, card, shipped)
            assert chosen == told.chosen and "layout" in told.refusals["triton"]
            seconds = {name: told.seconds.get(name, row.seconds.get(name)) for name in gpu_model.OURS}
            assert costs == pytest.approx(seconds, rel=1e-3)


def test_without_cuda_kernels_triton_may_run() -> None:
    """Of kernels for 8.0 alone none runs on 9.0 but by PTX; of none at all, none."""
    pytest.importorskip("triton")
    assert gpu_model.dispatched(8, 4096, 4096, H100, ())[0] == "triton"
    assert gpu_model.dispatched(8, 4096, 4096, H100, ("80",))[0] == "cuda"


def test_disputes_are_told_by_card_and_way() -> None:
    def call(M: int, dispatch: str, **times: float) -> dict:
        ways = {name: {"seconds": seconds} for name, seconds in times.items()}
        fastest = min(times, key=lambda name: times[name])
        return {"card": "C", "shape": "s", "M": M, "dispatch": dispatch, "fastest": fastest, **ways}

    calls = [
        call(1, "cuda", cuda=1.0, triton=2.0), call(2, "cuda", cuda=1.1, triton=1.0),
        call(4, "cuda", cuda=3.0, triton=2.0), call(8, "cuda", cuda=4.0, triton=2.0),
        call(16, "panel", panel=2.4, triton=2.0),
    ]  # fmt: skip
    assert gpu_report.disputes(calls) == [
        "| C | cuda | triton | s 4 (1.5), 8 (2.0) |",
        "| C | panel | triton | s 16 (1.2) |",
    ]


def test_the_committed_report_is_made_of_the_committed_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make gpu-report` renews it after a change of the kernels, of dispatch's costs or of the model."""
    pytest.importorskip("triton")
    monkeypatch.setattr("sys.argv", ["gpu_report", "--out", str(tmp_path)])
    gpu_report.main()
    for name in ("gpu_report.md", "gpu_report.json"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text(), f"{name}: run `make gpu-report`"
    assert (RESULTS / "gpu_report.png").stat().st_size > 10_000
    text = (RESULTS / "gpu_report.md").read_text()
    assert "A model, not a measurement." in text
    data = json.loads((RESULTS / "gpu_report.json").read_text())
    assert len(data["calls"]) == len(CARDS) * len(GPU_SHAPES) * len(GPU_ROWS)
