"""The report of gpu_model.py: `make gpu-report`, `python -m benchmarks.gpu_report`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .cases import GPU_SHAPES
from .gpu_model import (
    BITS,
    CARDS,
    LATENCY,
    WAYS,
    Card,
    model,
    weight_bytes,
)
from .report import write_whole
from .run import RESULTS

APART = 1.2  # times from which on the report calls two lower bounds different: an assumption
# Kernels whose occupancy the report shows.
SHOWN = ("linear-int4-bf16-M", "product_kernel<bf16, int4, true", "finish_kernel<bf16", "project_kernel<bf16")


def report(data: dict[str, Any]) -> str:
    lines = [
        "# A GPU without a GPU",
        "",
        "**A model, not a measurement.** No kernel here has run on a GPU yet. Times are lower bounds from data",
        "sheets and from the machine code of the CUDA C++ and the Triton kernels; `benchmarks/gpu_model.py` holds the",
        "formulas, and its first lines what is left out. `make gpu-report` makes this file from",
        "`cuda_machine_code.json` and `machine_code.json` alone.",
        "",
        f"Machine code by nvcc {data['nvcc'].removeprefix('Build ')} and Triton {data['triton']}.",
        f"Latency of memory under load assumed: {LATENCY * 1e6:.1f} µs.",
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
        "µs of each way; the bound of its longest launch in brackets. cuda: the CUDA C++ kernels; panel: dequantise,",
        "GEMM, finish. Unfused: dequantise, GEMM, randn, C ± σZ, two skinny products, each by one ideal kernel; eager:",
        "the same, dequantised by PyTorch's six. Dispatch: what it chooses where the CUDA C++ kernels are built; a",
        "weight moved there has their layout, which those of Triton do not read. Gains: unfused and eager over that",
        "way; a quotient of two lower bounds is a hint, not a bound. Share of bandwidth: the weight's bytes at the",
        "card's bandwidth over the time of that way.",
        "",
    ]
    for card in CARDS:
        lines += [f"### {card.name}", "", *calls_table([c for c in data["calls"] if c["card"] == card.name], card), ""]
    lines += [
        "![time over rows](gpu_report.png)",
        "",
        "## Where to measure first",
        "",
        "Dispatch chooses by a coarser model of its own: `cost` of each implementation, of flops, bytes and decoding.",
        f"Here is where by the model above another of our ways is {APART} times as fast as the chosen one, or more. A",
        "model against a model: either may be wrong. Rows M after the shape, times in brackets.",
        "",
        "| card | dispatch | faster here | where |",
        "|---|---|---|---|",
        *disputes(data["calls"]),
        "",
        "What the costs of dispatch leave out and this model has: instructions of a K loop and latency; that int4 with",
        "offsets takes CUDA C++ twice the products (x with ones as well); the sums of split K, which CUDA C++ writes",
        "and reads again for any M; tiles that rows of x do not fill. Left out of this model too: the programs' ends,",
        "and instructions of `project` and `finish` of CUDA C++, which it counts for Triton. The K loops of CUDA C++",
        "are charged as their text stands, 2 to 7 % more than is executed.",
        "",
        "## Flops and bytes",
        "",
        "MB of one call by each way, flop / byte in brackets; they are those of the shapes, whatever the card.",
        "",
        f"| shape | M | GFLOP | {' | '.join(WAYS)} |",
        "|---" * (3 + len(WAYS)) + "|",
    ]
    for row in data["calls"]:
        if row["card"] == CARDS[0].name and row["M"] in (1, 32, 512, 4096):
            cells = (f"{row[way]['bytes'] / 1e6:.1f} ({row[way]['intensity']:.1f})" for way in WAYS)
            lines.append(f"| {row['shape']} | {row['M']} | {row['cuda']['flops'] / 1e9:.3f} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Occupancy",
        "",
        "Programs that a multiprocessor holds at once, what limits them, and warps of those that it could hold; of the",
        "kernels of this page. `gpu_report.json` has all others.",
        "",
        f"| kernel | {' | '.join(card.name for card in CARDS)} |",
        "|---" * (1 + len(CARDS)) + "|",
    ]
    by: dict[str, list[str]] = {}
    for row in data["occupancy"]:
        cell = f"{row['programs']} by {row['limit']}, {row['warps']} of {row['of']} warps"
        by.setdefault(row["kernel"], []).append(cell)
    lines += [f"| `{kernel}` | {' | '.join(cells)} |" for kernel, cells in by.items() if kernel.startswith(SHOWN)]
    return "\n".join(lines) + "\n"


def disputes(calls: Iterable[dict[str, Any]]) -> list[str]:
    """Rows of the table of where dispatch and the model part: by card, then the two ways."""
    found: dict[tuple[str, str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in calls:
        times = row[row["dispatch"]]["seconds"] / row[row["fastest"]]["seconds"]
        if times >= APART:
            shapes = found.setdefault((row["card"], row["dispatch"], row["fastest"]), {})
            shapes.setdefault(row["shape"], []).append((row["M"], times))
    return [
        f"| {' | '.join(key)} | "
        + "; ".join(f"{shape} {', '.join(f'{M} ({t:.1f})' for M, t in rows)}" for shape, rows in shapes.items())
        + " |"
        for key, shapes in found.items()
    ]


def calls_table(calls: Iterable[dict[str, Any]], card: Card) -> list[str]:
    lines = [
        f"| shape | M | {' | '.join(WAYS)} | dispatch | gains | share of bandwidth |",
        "|---" * (5 + len(WAYS)) + "|",
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
    data = model(
        *(json.loads((RESULTS / f"{name}.json").read_text()) for name in ("machine_code", "cuda_machine_code"))
    )
    write_whole(out / "gpu_report.json", told(data))
    write_whole(out / "gpu_report.md", report(data))
    try:
        figure(data, out / "gpu_report.png")
    except ImportError as error:
        print(f"no figure: {error}")
    print(out / "gpu_report.md")


if __name__ == "__main__":
    main()
