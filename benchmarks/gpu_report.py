"""What a GPU would need for our kernels, worked out without one: `make gpu-report`, `python -m benchmarks.gpu_report`.

A model, not a measurement. From the machine code of the Triton kernels (results/machine_code.json: registers, threads,
shared memory, instructions in the K loop), the rules that pick tiles and splits, and data sheets: flops and bytes of
every launch, occupancy, and the time below which a launch cannot get. A launch is bounded by the largest of

    bytes     operands and results once, over the memory bandwidth
    flops     over the dense half-precision peak
    issue     instructions of the K loop of the programs of the busiest multiprocessor, one a cycle and scheduler
    latency   weights streamed through the pipeline stages of the resident programs (Little's law), LATENCY each

and a sequence by the sum of its launches. Launch overhead, caches, clocks below boost and epilogues are left out, and
the vendor's GEMM is ideal. The unfused sequence is told twice: "unfused" with one ideal kernel that dequantises,
"eager" with the six that the expression of providers.py is in PyTorch, each of which reads and writes memory.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoact_kernels.triton_ops import Panel, Triton, tiles

from .cases import GPU_ROWS, GPU_SHAPES, SHAPES
from .report import write_whole
from .run import RESULTS

LATENCY = 0.7e-6  # seconds from a load to its data from memory under load: an assumption, of the order all three show
RANK, GROUPS = 8, 2
WAYS = ("triton", "panel", "unfused", "eager")
BITS = {"bf16": 16.0, "int4 g64": 4.25}  # of a weight: codes, and a 16-bit scale for 64 of them
HALF = 2  # bytes


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet. Limits of a multiprocessor: CUDA programming guide, compute capabilities."""

    name: str
    target: str
    multiprocessors: int
    flops: float  # dense fp16 / bf16 products, fp32 sums
    bandwidth: float
    clock: float  # boost, Hz: the one at which the peak is stated
    warps: int
    blocks: int
    shared: int  # bytes
    source: str

    @property
    def registers(self) -> int:
        return 65536


CARDS = (
    Card("H100 SXM", "sm_90", 132, 989e12, 3350e9, 1.83e9, 64, 32, 228 << 10, "NVIDIA H100 data sheet"),
    Card("A100 80 GB", "sm_80", 108, 312e12, 2039e9, 1.41e9, 64, 32, 164 << 10, "NVIDIA A100 data sheet"),
    Card("RTX 4090", "sm_89", 128, 165e12, 1008e9, 2.52e9, 48, 24, 100 << 10, "NVIDIA Ada whitepaper"),
)


def crossover(bits: float, card: Card) -> float:
    """M*: rows at which reading a weight of so many bits and multiplying by it take equal time."""
    return bits / 16 * card.flops / card.bandwidth


def occupancy(registers: int, threads: int, shared: int, card: Card) -> tuple[int, str]:
    """(programs that a multiprocessor holds at once, what limits them).

    Registers are given out to warps in units of 256, shared memory with 1 kB of the system's for each program.
    """
    warps = threads // 32
    limits = {
        "registers": card.registers // (math.ceil(registers * 32 / 256) * 256 * warps),
        "threads": card.warps // warps,
        "programs": card.blocks,
        "shared memory": card.shared // (shared + 1024),
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


@dataclass(frozen=True)
class Launch:
    """One kernel launch: totals, and for ours its grid and the machine code of its program.

    steps: passes of the K loop of one program. stage: bytes of weights in a stage of the pipeline, `stages` of them.
    """

    name: str
    flops: float
    bytes: float
    programs: int = 0
    steps: int = 0
    stage: int = 0
    stages: int = 1
    code: dict[str, Any] | None = None

    def bounds(self, card: Card) -> dict[str, float]:
        """Seconds, by what bounds."""
        found = {"bytes": self.bytes / card.bandwidth, "flops": self.flops / card.flops}
        if self.code and self.steps and loop_length(self.code):
            busiest = math.ceil(self.programs / card.multiprocessors)
            cycles = busiest * self.steps * loop_length(self.code) * self.code["threads"] / 32 / 4
            found["issue"] = cycles / card.clock
            if self.stage:
                held, _ = occupancy(self.code["registers"], self.code["threads"], self.code["shared"], card)
                rounds = math.ceil(busiest / held)
                found["latency"] = rounds * math.ceil(self.steps / max(1, self.stages - 1)) * LATENCY
        return found

    def seconds(self, card: Card) -> float:
        return max(self.bounds(card).values())


def loop_length(code: dict[str, Any]) -> int:
    """Instructions of the K loop; a table that counted lines of it has its few labels too."""
    return code.get("instructions_of_k_loop", code.get("lines_of_k_loop", 0))


def tile_of(M: int, N: int, K: int, card: Card) -> tiles.Tile:
    """The tile of an int4 product with bf16 x."""
    return tiles.linear_tile(tiles.Shape(card.target, "bfloat16", "int4", M, N, K))


def weight_bytes(N: int, K: int) -> float:
    return N * K * BITS["int4 g64"] / 8


def project(M: int, K: int, R: int, codes: dict[str, Any]) -> Launch:
    """h = x A in chunks of K, as triton_ops/zo_linear.py launches it."""
    parts, chunks = tiles.chunk_parts(M, K)
    BM, BR = 16 if M <= 16 else 32, tiles.rank_tile(R)
    programs = math.ceil(M / BM) * math.ceil(R / BR) * parts
    moved = HALF * M * K + 4.0 * K * R + 4.0 * parts * M * R
    return Launch(
        "project", 2.0 * M * K * R, moved, programs, chunks * tiles.CHUNK // 32, 0, 1,
        codes["project_kernel"],
    )  # fmt: skip


def triton(M: int, N: int, K: int, R: int, card: Card, table: dict[str, Any]) -> list[Launch]:
    """The launches of the Triton zo_linear, int4 and bf16."""
    tile = tile_of(M, N, K, card)
    count, size = tiles.splits(N, K)
    codes = machine_code(table, tile.BM, count > 1, card.target)
    beside = count > 1 and M <= tile.BM
    low_rank_bytes, low_rank_flops = 4.0 * (M + N) * R + HALF * M * N, 2.0 * M * N * R
    product_bytes = weight_bytes(N, K) + HALF * M * K + (4.0 * count * M * N if beside else low_rank_bytes)
    launches = [
        project(M, K, R, codes),
        Launch(
            "product", 2.0 * M * N * K + (0 if beside else low_rank_flops), product_bytes,
            math.ceil(M / tile.BM) * math.ceil(N / tile.BN) * (count if beside else 1),
            math.ceil((size if beside else K) / tile.BK), tile.BN * tile.BK // 2, tile.stages, codes["product_kernel"],
        ),
    ]  # fmt: skip
    if beside:
        programs = math.ceil(M / (16 if M <= 16 else 32)) * math.ceil(N / 64)
        moved = 4.0 * count * M * N + low_rank_bytes
        steps = math.ceil(R / tiles.rank_tile(R))
        launches.append(Launch("finish", low_rank_flops, moved, programs, steps, 0, 1, codes["finish_kernel"]))
    return launches


def panel(M: int, N: int, K: int, R: int, card: Card, table: dict[str, Any]) -> list[Launch]:
    """Dequantise, the vendor's GEMM to fp32 sums, finish."""
    codes = machine_code(table, tile_of(M, N, K, card).BM, True, card.target)
    return [
        project(M, K, R, codes),
        Launch("dequantise", 0, weight_bytes(N, K) + HALF * N * K),
        Launch("GEMM", 2.0 * M * N * K, HALF * (N * K + M * K) + 4.0 * M * N),
        Launch("finish", 2.0 * M * N * R, 4.0 * M * N + 4.0 * (M + N) * R + HALF * M * N),
    ]


# Bytes a weight that the expression reads and writes: & and >> (each 1/2 + 1/2), stack (1 + 1), to 16 bits (1 + 2),
# - 8 and * scale (each 2 + 2).
EAGER_BYTES = 2 * (0.5 + 0.5) + (1 + 1) + (1 + 2) + 2 * (2 + 2)


def unfused(M: int, N: int, K: int, R: int, eager: bool = False) -> list[Launch]:
    """A kernel each, everything in 16 bits, + and - as two row groups."""
    signs = GROUPS if M > 1 else 1
    return [
        Launch("dequantise", 0, EAGER_BYTES * N * K if eager else weight_bytes(N, K) + HALF * N * K),
        Launch("GEMM", 2.0 * M * N * K, HALF * (N * K + M * K + M * N)),
        Launch("randn", 0, HALF * N * R),
        Launch("C + sigma Z", 0, signs * 3 * HALF * N * R),
        Launch("h = x A", 2.0 * M * K * R, HALF * (M * K + K * R + M * R)),
        Launch("y += h C^T", 2.0 * M * N * R, HALF * (2 * M * N + M * R + signs * N * R)),
    ]


def machine_code(table: dict[str, Any], BM: int, split: bool, target: str) -> dict[str, Any]:
    """Kernel name -> what the committed table says of it, for int4 with offsets, bf16, tiles of BM rows.

    The K loop of a tile that the table has only with split K is the same without.
    """
    names = [f"linear-int4-bf16-M{BM}-split", f"linear-int4-bf16-M{BM}"]
    found: dict[str, Any] = {}
    for name in names if not split else names[::-1]:
        for row, targets in table["cases"].items():
            case, kernel = row.split()
            if case == name:
                found[kernel] = targets[target]
    return found


def model(table: dict[str, Any]) -> dict[str, Any]:
    """Everything that the report shows, as plain data."""
    crossovers = {card.name: {name: round(crossover(bits, card), 2) for name, bits in BITS.items()} for card in CARDS}
    held = []
    for row, targets in table["cases"].items():
        for card in CARDS:
            code = targets[card.target]
            programs, limit = occupancy(code["registers"], code["threads"], code["shared"], card)
            held.append(
                {
                    "kernel": row, "card": card.name, **{key: code[key] for key in ("registers", "threads", "shared")},
                    "programs": programs, "limit": limit,
                    "warps": programs * code["threads"] // 32, "of": card.warps,
                }
            )  # fmt: skip
    calls = []
    for card in CARDS:
        for shape in GPU_SHAPES:
            N, K = SHAPES[shape]
            for M in GPU_ROWS:
                calls.append(call(card, shape, M, N, K, table))
    return {"crossover": crossovers, "occupancy": held, "calls": calls, "triton": table["triton"]}


def call(card: Card, shape: str, M: int, N: int, K: int, table: dict[str, Any]) -> dict[str, Any]:
    """One zo_linear by each way: flops, bytes, seconds, what bounds its longest launch."""
    ways = {
        "triton": triton(M, N, K, RANK, card, table),
        "panel": panel(M, N, K, RANK, card, table),
        "unfused": unfused(M, N, K, RANK),
        "eager": unfused(M, N, K, RANK, eager=True),
    }
    row: dict[str, Any] = {"card": card.name, "shape": shape, "M": M, "N": N, "K": K}
    for way, launches in ways.items():
        longest = max(launches, key=lambda launch: launch.seconds(card))
        bounds = longest.bounds(card)
        flops, moved = sum(launch.flops for launch in launches), sum(launch.bytes for launch in launches)
        row[way] = {
            "flops": rounded(flops), "bytes": rounded(moved), "intensity": rounded(flops / moved),
            "seconds": rounded(sum(launch.seconds(card) for launch in launches)),
            "longest": longest.name, "bound": max(bounds, key=lambda name: bounds[name]),
            "launches": {
                launch.name: {name: rounded(value) for name, value in launch.bounds(card).items()}
                for launch in launches
            },
        }  # fmt: skip
    row["dispatch"] = dispatched(M, N, K, card)
    return row


def dispatched(M: int, N: int, K: int, card: Card) -> str:
    """Which of the Triton ways their costs choose, were there a device."""
    from zoact_kernels.dispatch import Problem, _seconds

    problem = Problem(
        "zo_linear", "cuda", torch.bfloat16, M, N, K, "int4", "row", 64, torch.uint8, torch.bfloat16, RANK, 0,
        GROUPS if M > 1 else 1, 1, "normal", (), card.target,
    )  # fmt: skip
    return min((Triton(), Panel()), key=lambda implementation: _seconds(implementation, problem)).name


def rounded(value: float) -> float:
    """Four digits: no more is meant, and no machine computes others."""
    return float(f"{value:.4g}")


def report(data: dict[str, Any]) -> str:
    lines = [
        "# A GPU without a GPU",
        "",
        "**A model, not a measurement.** No kernel here has run on a GPU yet. Times are lower bounds from data",
        "sheets and from the machine code of the Triton kernels; `benchmarks/gpu_report.py` holds the formulas, and",
        "its first lines what is left out. `make gpu-report` makes this file from `machine_code.json` alone.",
        "",
        f"Machine code by Triton {data['triton']}. Latency of memory under load assumed: {LATENCY * 1e6:.1f} µs.",
        "",
        "| card | multiprocessors | boost, GHz | TFLOP/s, half precision | GB/s | source |",
        "|---|---|---|---|---|---|",
        *(
            f"| {card.name} | {card.multiprocessors} | {card.clock / 1e9} | {card.flops / 1e12:.0f} | "
            f"{card.bandwidth / 1e9:.0f} | {card.source} |"
            for card in CARDS
        ),
        "",
        "## Crossover",
        "",
        "Rows M* at which reading the weights and multiplying take equal time; all stacked rows count.",
        "",
        f"| card | {' | '.join(BITS)} |",
        "|---" * (1 + len(BITS)) + "|",
        *(
            f"| {card} | {' | '.join(f'{rows:.0f}' for rows in by.values())} |"
            for card, by in data["crossover"].items()
        ),
        "",
        "## zo_linear, int4 g64, bf16, R = 8",
        "",
        "µs of each way; the bound of its longest launch in brackets. Unfused: dequantise, GEMM, randn, C ± σZ, two",
        "skinny products, each by one ideal kernel; eager: the same, dequantised by PyTorch's six. Gains: unfused and",
        "eager over the way that dispatch chooses; a quotient of two lower bounds is a hint, not a bound. Share of",
        "bandwidth: the weight's bytes at the card's bandwidth over the time of that way.",
        "",
    ]
    for card in CARDS:
        lines += [f"### {card.name}", "", *calls_table([c for c in data["calls"] if c["card"] == card.name], card), ""]
    lines += [
        "![time over rows](gpu_report.png)",
        "",
        "## Flops and bytes",
        "",
        "Of one call, by each way; they are those of the shapes, whatever the card.",
        "",
        "| shape | M | way | GFLOP | MB | flop / byte |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["calls"]:
        if row["card"] == CARDS[0].name and row["M"] in (1, 32, 512, 4096):
            for way in WAYS:
                cell = row[way]
                lines.append(
                    f"| {row['shape']} | {row['M']} | {way} | {cell['flops'] / 1e9:.3f} | {cell['bytes'] / 1e6:.2f} | "
                    f"{cell['intensity']:.1f} |"
                )
    lines += [
        "",
        "## Occupancy",
        "",
        "Programs that a multiprocessor holds at once, what limits them, and warps of those that it could hold.",
        "",
        f"| kernel | {' | '.join(card.name for card in CARDS)} |",
        "|---" * (1 + len(CARDS)) + "|",
    ]
    by: dict[str, list[str]] = {}
    for row in data["occupancy"]:
        cell = f"{row['programs']} by {row['limit']}, {row['warps']} of {row['of']} warps"
        by.setdefault(row["kernel"], []).append(cell)
    lines += [f"| {kernel} | {' | '.join(cells)} |" for kernel, cells in by.items()]
    return "\n".join(lines) + "\n"


def calls_table(calls: Iterable[dict[str, Any]], card: Card) -> list[str]:
    lines = [
        "| shape | M | triton | panel | unfused | eager | dispatch | gains | share of bandwidth |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in calls:
        cells = [f"{row[way]['seconds'] * 1e6:.1f} [{row[way]['bound']}]" for way in WAYS]
        ours = row[row["dispatch"]]["seconds"]
        share = weight_bytes(row["N"], row["K"]) / card.bandwidth / ours
        lines.append(
            f"| {row['shape']} | {row['M']} | {' | '.join(cells)} | {row['dispatch']} | "
            f"{row['unfused']['seconds'] / ours:.2f}, {row['eager']['seconds'] / ours:.2f} | {share:.0%} |"
        )
    return lines


def told(data: dict[str, Any]) -> str:
    """JSON, a line for each row of a list."""
    parts = []
    for key, value in data.items():
        rows = ",\n".join(json.dumps(row) for row in value) if isinstance(value, list) else json.dumps(value)
        parts.append(f"{json.dumps(key)}: " + (f"[\n{rows}\n]" if isinstance(value, list) else rows))
    return "{" + ",\n".join(parts) + "}\n"


def figure(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(1, len(CARDS), figsize=(15, 4), sharey=True)
    for card, plot in zip(CARDS, axes, strict=True):
        rows = [row for row in data["calls"] if row["card"] == card.name and row["shape"] == GPU_SHAPES[0]]
        for way in WAYS:
            plot.plot([row["M"] for row in rows], [row[way]["seconds"] * 1e6 for row in rows], marker="o", label=way)
        crossing = data["crossover"][card.name]["int4 g64"]
        plot.axvline(crossing, color="black", linewidth=1, linestyle=":", label=f"M* = {crossing:.0f}")
        plot.set(xscale="log", yscale="log", xlabel="rows M", title=f"{card.name}: model, not measured")
        plot.legend()
    axes[0].set_ylabel("µs, 4096 x 4096 int4 g64 R=8")
    drawing.tight_layout()
    drawing.savefig(path, dpi=100)
    plt.close(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default benchmarks/results")
    out = parser.parse_args().out
    data = model(json.loads((RESULTS / "machine_code.json").read_text()))
    write_whole(out / "gpu_report.json", told(data))
    write_whole(out / "gpu_report.md", report(data))
    try:
        figure(data, out / "gpu_report.png")
    except ImportError as error:
        print(f"no figure: {error}")
    print(out / "gpu_report.md")


if __name__ == "__main__":
    main()
