"""What a GPU would need for our kernels, worked out without one; gpu_report.py tells it.

A model, not a measurement. From the machine code of the CUDA C++ and the Triton kernels (results/cuda_machine_code.json
and machine_code.json: registers, threads, shared memory, instructions in the K loop), the rules that pick tiles and
splits, and data sheets: flops and bytes of every launch, occupancy, and the time below which a launch cannot get. A
launch is bounded by the largest of

    bytes     operands and results once, over the memory bandwidth
    flops     over the dense half-precision peak: what tensor cores multiply, rows that only fill a tile and all
    fp32      what the CUDA C++ kernels multiply outside of them, over the fp32 peak
    issue     instructions of the K loop of the programs of the busiest multiprocessor, one a cycle and scheduler
    latency   weights streamed through the pipeline stages of the resident programs (Little's law), LATENCY each

and a sequence by the sum of its launches. Launch overhead, caches, clocks below boost and epilogues are left out, and
the vendor's GEMM is ideal. The unfused sequence is told twice: "unfused" with one ideal kernel that dequantises,
"eager" with the six that the expression of providers.py is in PyTorch, each of which reads and writes memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from zoact_kernels.cuda_ops import Cuda, Gpu, runs_on
from zoact_kernels.dispatch import ROOF, Problem, _seconds
from zoact_kernels.layouts import ceil_div
from zoact_kernels.triton_ops import Panel, Triton, tiles

from .cases import GPU_ROWS, GPU_SHAPES, SHAPES

LATENCY = 0.7e-6  # seconds from a load to its data from memory under load: an assumption, of the order all three show
RANK, GROUPS = 8, 2
OURS = ("cuda", "triton", "panel")
WAYS = (*OURS, "unfused", "eager")
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
    multiplied: the flops that tensor cores do for `flops`, as many as would take their time at the peak; 0: just those.
    fp32: flops of the other units.
    """

    name: str
    flops: float
    bytes: float
    programs: int = 0
    steps: int = 0
    stage: int = 0
    stages: int = 1
    code: dict[str, Any] | None = None
    multiplied: float = 0
    fp32: float = 0

    def bounds(self, card: Card) -> dict[str, float]:
        """Seconds, by what bounds."""
        found = {"bytes": self.bytes / card.bandwidth, "flops": (self.multiplied or self.flops) / card.flops}
        if self.fp32:
            found["fp32"] = self.fp32 / ROOF[card.target].fp32
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
    return tiles.linear_rule(tiles.Shape(card.target, "bfloat16", "int4", M, N, K))


def weight_bytes(N: int, K: int) -> float:
    return N * K * BITS["int4 g64"] / 8


def filled(rows: int, tile: int) -> int:
    """`rows` up to whole tiles."""
    return ceil_div(rows, tile) * tile


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
            multiplied=2.0 * filled(M, tile.BM) * filled(N, tile.BN) * K + (0 if beside else low_rank_flops),
        ),
    ]  # fmt: skip
    if beside:
        programs = math.ceil(M / (16 if M <= 16 else 32)) * math.ceil(N / 64)
        moved = 4.0 * count * M * N + low_rank_bytes
        steps = math.ceil(R / tiles.rank_tile(R))
        launches.append(Launch("finish", low_rank_flops, moved, programs, steps, 0, 1, codes["finish_kernel"]))
    return launches


# ---------------------------------------------------------------------------------------------------------------------
# The CUDA C++ way: csrc/cuda/tile.cuh and zo_linear.cu, which a test holds these against

BN, BK, STAGES = 64, 64, 4  # of a block: rows of W, k of a stage, stages, of which all but one are on their way
CHUNK, ROWS, RANKS = 512, 4, 16  # k of a partial sum of h, rows of x of its block; ranks at a time in a low-rank term
# Flops in the time of one: mma.sync reaches three quarters of what Hopper's tensor cores do for wgmma (Cuda.cost).
MMA_SYNC = {"sm_90": 4 / 3}
HMMA = 2 * 16 * 8 * 16  # flops of an instruction of a warp


def rows_of(M: int) -> int:
    """Rows of x of a block."""
    return 8 if M <= 8 else 32 if M <= 32 else 64


def splits_of(N: int, K: int) -> tuple[int, int]:
    """(splits of K, blocks of BK in each)."""
    blocks = ceil_div(K, BK)
    size = ceil_div(blocks, max(1, min(128 * BN // N, K // 512, 16)))
    return ceil_div(blocks, size), size


def cuda_code(table: dict[str, Any], kernel: str, target: str) -> dict[str, Any]:
    """What cuda_machine_code.json says of a kernel, in the words of machine_code.json.

    The text of the K loop is charged once for a stage. Half of a stage, 32 k, is in it once and runs twice; the copies
    of a last, shorter stage and the scales of other dtypes are in it and do not run. With int4 g64 that comes out even:
    for sm_90 it is 266, 341 and 433 instructions at 8, 32 and 64 rows, and 249, 328 and 423 are executed.
    """
    arch = next(arch for arch in table["kernels"][kernel] if "sm_" + arch.rstrip("a") == target)
    code = dict(zip(table["columns"], table["kernels"][kernel][arch], strict=True))
    loop = round(code["hmma"] * (1 + code["others"]))
    return {**code, "threads": table["threads"], "instructions_of_k_loop": loop}


def cuda(M: int, N: int, K: int, R: int, card: Card, table: dict[str, Any]) -> list[Launch]:
    """The launches of the CUDA C++ zo_linear, int4 with offsets and bf16.

    K is split whatever M is. An offset costs as many products again, of x with ones; they stand in the K loop. project
    and finish have none in the table, so that bytes and fp32 alone bound them.
    """
    rows, parts = rows_of(M), ceil_div(K, CHUNK)
    splits, steps = splits_of(N, K)
    code = cuda_code(table, f"product_kernel<bf16, int4, true, {rows // 8}>", card.target)
    blocks = ceil_div(M, rows) * ceil_div(N, BN)
    halves = blocks * ceil_div(K, BK) * 2  # of a stage: each runs the text's products once
    multiplied = halves * code["threads"] / 32 * code["hmma"] * HMMA * MMA_SYNC.get(card.target, 1)
    padded = blocks * rows * BN
    sums = 4.0 * splits * padded if splits > 1 else 0.0  # of the splits, in a workspace
    low_rank_flops = 2.0 * M * N * R
    low_rank_fp32 = 2 * 2.0 * padded * filled(R, RANKS)  # C and Z each
    ends = 4.0 * (parts * M + N) * R + HALF * M * N
    whole = splits == 1
    launches = [
        Launch(
            "project", 2.0 * M * K * R, HALF * M * K + 4.0 * K * R + 4.0 * parts * M * R,
            ceil_div(M, ROWS) * parts, code=cuda_code(table, "project_kernel<bf16>", card.target),
            fp32=2.0 * filled(M, ROWS) * K * filled(R, 4),
        ),
        Launch(
            "product", 2.0 * M * N * K + (low_rank_flops if whole else 0),
            weight_bytes(N, K) + HALF * M * K + (ends if whole else sums),
            blocks * splits, steps, BN * BK // 2, STAGES, code, multiplied, fp32=low_rank_fp32 if whole else 0,
        ),
    ]  # fmt: skip
    if not whole:
        code = cuda_code(table, f"finish_kernel<bf16, {rows // 8}>", card.target)
        launches.append(Launch("finish", low_rank_flops, sums + ends, blocks, code=code, fp32=low_rank_fp32))
    return launches


# ---------------------------------------------------------------------------------------------------------------------
# The vendor's GEMM: panel and the unfused sequence


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


def model(table: dict[str, Any], cuda_table: dict[str, Any]) -> dict[str, Any]:
    """Everything that the report shows, as plain data, from the machine code by Triton and that by nvcc."""
    crossovers = {card.name: {name: round(crossover(bits, card), 2) for name, bits in BITS.items()} for card in CARDS}
    codes = [(row, card, targets[card.target]) for row, targets in table["cases"].items() for card in CARDS]
    for name in cuda_table["kernels"]:
        codes += [(name, card, cuda_code(cuda_table, name, card.target)) for card in CARDS]
    held = []
    for kernel, card, code in codes:
        programs, limit = occupancy(code["registers"], code["threads"], code["shared"], card)
        held.append(
            {
                "kernel": kernel, "card": card.name, **{key: code[key] for key in ("registers", "threads", "shared")},
                "programs": programs, "limit": limit, "warps": programs * code["threads"] // 32, "of": card.warps,
            }
        )  # fmt: skip
    calls = []
    for card in CARDS:
        for shape in GPU_SHAPES:
            N, K = SHAPES[shape]
            for M in GPU_ROWS:
                calls.append(call(card, shape, M, N, K, table, cuda_table))
    return {
        "crossover": crossovers, "occupancy": held, "calls": calls,
        "triton": table["triton"], "nvcc": cuda_table["nvcc"],
    }  # fmt: skip


def call(
    card: Card, shape: str, M: int, N: int, K: int, table: dict[str, Any], cuda_table: dict[str, Any]
) -> dict[str, Any]:
    """One zo_linear by each way: flops, bytes, seconds, what bounds its longest launch; and what dispatch says."""
    ways = {
        "cuda": cuda(M, N, K, RANK, card, cuda_table),
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
    row["dispatch"], row["costs"] = dispatched(M, N, K, card, tuple(cuda_table["kernels"]["project_kernel<bf16>"]))
    row["fastest"] = min(OURS, key=lambda way: row[way]["seconds"])
    return row


class Shipped(Gpu):
    """The CUDA C++ kernels as setup.py builds them where it finds nvcc, whatever was built here."""

    def __init__(self, archs: tuple[str, ...]) -> None:
        self.archs = archs

    def missing(self, arch: str) -> str | None:
        return None if runs_on(arch, self.archs) else f"not compiled for {arch}"


def dispatched(M: int, N: int, K: int, card: Card, archs: tuple[str, ...]) -> tuple[str, dict[str, float]]:
    """What dispatch chooses on such a card, and what each of our ways costs by it, in seconds.

    A weight is moved into the layout that the CUDA C++ kernels read, where they take it; Triton's then decline, and
    their cost is that of a weight in layout `row`.

    Raises:
        RuntimeError: Triton or this torch cannot run panel.
    """
    problem = Problem(
        "zo_linear", "cuda", torch.bfloat16, M, N, K, "int4", "cuda", 64, torch.uint8, torch.bfloat16, RANK, 0,
        GROUPS if M > 1 else 1, 1, "normal", (), card.target,
    )  # fmt: skip
    ways = Cuda(Shipped(archs)), Triton(), Panel()
    if (reason := ways[2].refusal(problem)) is not None:
        raise RuntimeError(f"dispatch on a {card.name} cannot be foretold here: {reason}")
    if ways[0].refusal(problem) is not None:
        problem = problem._replace(layout="row")
    taken = [way for way in ways if way.refusal(problem) is None]
    costs = {way.name: _seconds(way, problem) for way in ways}
    return min(taken, key=lambda way: costs[way.name]).name, {name: rounded(cost) for name, cost in costs.items()}


def rounded(value: float) -> float:
    """Four digits: no more is meant, and no machine computes others."""
    return float(f"{value:.4g}")
