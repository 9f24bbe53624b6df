"""The model of benchmarks/gpu_report.py: formulas against cases worked out by hand, the report against its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.gpu_report import BITS, CARDS, LATENCY, Card, Launch, crossover, occupancy

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
H100, A100, RTX4090 = CARDS
TABLE = json.loads((RESULTS / "machine_code.json").read_text())
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
    ours = {launch.name: launch for launch in gpu_report.triton(8, 4096, 4096, 8, H100, TABLE)}
    assert set(ours) == {"project", "product", "finish"}
    assert ours["project"].flops == 2 * 8 * 4096 * 8
    assert ours["project"].bytes == row + factor + 8 * 8 * 8 * 4  # h in 8 parts
    sums = 2 * 8 * 4096 * 4  # in two splits
    assert ours["product"].bytes == weight + row + sums and ours["product"].flops == 2 * 8 * 4096 * 4096
    assert ours["finish"].bytes == sums + factor + 8 * 8 * 4 + row
    assert (ours["product"].programs, ours["product"].steps, ours["product"].stage) == (128, 32, 2048)
    plain = {launch.name: launch for launch in gpu_report.unfused(8, 4096, 4096, 8)}
    assert plain["dequantise"].bytes == weight + 2 * 4096 * 4096
    assert plain["GEMM"].bytes == 2 * 4096 * 4096 + 2 * row
    assert plain["randn"].bytes == 2 * 4096 * 8 and plain["C + sigma Z"].bytes == 2 * 3 * 2 * 4096 * 8
    eager = {launch.name: launch for launch in gpu_report.unfused(8, 4096, 4096, 8, eager=True)}
    assert eager["dequantise"].bytes == 15 * 4096 * 4096
    panel = {launch.name: launch for launch in gpu_report.panel(512, 4096, 4096, 8, H100, TABLE)}
    assert panel["GEMM"].bytes == 2 * 4096 * 4096 + 2 * 512 * 4096 + 4 * 512 * 4096


def test_every_launch_of_ours_has_its_machine_code() -> None:
    for card in CARDS:
        for shape in gpu_report.GPU_SHAPES:
            for M in gpu_report.GPU_ROWS:
                N, K = gpu_report.SHAPES[shape]
                for launch in gpu_report.triton(M, N, K, 8, card, TABLE):
                    assert launch.code and "issue" in launch.bounds(card), f"{launch.name} {shape} M={M} {card.name}"


def test_the_committed_report_is_made_of_the_committed_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make gpu-report` renews it after a change of the kernels or of the model."""
    monkeypatch.setattr("sys.argv", ["gpu_report", "--out", str(tmp_path)])
    gpu_report.main()
    for name in ("gpu_report.md", "gpu_report.json"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text(), f"{name}: run `make gpu-report`"
    assert (RESULTS / "gpu_report.png").stat().st_size > 10_000
    text = (RESULTS / "gpu_report.md").read_text()
    assert "A model, not a measurement." in text
    data = json.loads((RESULTS / "gpu_report.json").read_text())
    assert len(data["calls"]) == len(CARDS) * len(gpu_report.GPU_SHAPES) * len(gpu_report.GPU_ROWS)
