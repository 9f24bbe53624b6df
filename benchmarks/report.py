"""Tables and figures from results files alone: `python -m benchmarks.report [FILES]`.

Without FILES: every .jsonl in benchmarks/results. Writes report.md and figures beside them, and puts the table into the
README between its two `benchmarks` comments. The latest row of a (case, provider) counts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoact_kernels.memory import human

from .cases import IDEAL
from .providers import EXACT_PEERS, OURS, UNFUSED
from .run import RESULTS

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
Row = dict[str, Any]


def load(files: Iterable[Path]) -> tuple[list[Row], list[Row], list[Row]]:
    """(runs, rows of kernels, rows of steps): the latest row of each case or contender and provider."""
    runs, rows, steps = [], {}, {}
    for file in files:
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            if "provider" in entry:
                rows[(*_case(entry), entry["provider"])] = entry
            elif "step" in entry:
                steps[entry["step"], entry["threads"]] = entry
            else:
                runs.append(entry)
    return runs, list(rows.values()), list(steps.values())


def _case(row: Row) -> tuple:
    keys = ("op", "shape", "format", "group_size", "residency", "threads", "rank", "groups", "M")
    return tuple(row[key] for key in keys)


def _by_case(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(_case(row), []).append(row)
    return cases


def _best(rows: list[Row], providers: Iterable[str]) -> Row | None:
    """The fastest of some providers on one case."""
    timed = [row for row in rows if row["provider"] in providers and row["status"] == "ok"]
    return min(timed, key=lambda row: row["seconds"]["p50"], default=None)


def _over(row: Row | None) -> str:
    if row is None or "over_ours" not in row:
        return "–"
    over = row["over_ours"]
    return f"{over['p50']:.2f} [{over['p20']:.2f}, {over['p80']:.2f}]"


def _share(ours: Row) -> str:
    """Of the nearer roof; fp32 multiply-adds, so integer products can pass 100 %."""
    flops, bandwidth = ours.get("flops_share", 0), ours.get("bandwidth_share", 0)
    return f"{flops:.0%} of fma" if flops >= bandwidth else f"{bandwidth:.0%} of bandwidth"


def table(rows: list[Row]) -> list[str]:
    """One line a case: our time and share of the roof, and how many times longer the others take."""
    lines = [
        "| case | ours, ms | reached | unfused PyTorch | dense fp32 | best exact peer | bitsandbytes |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = _by_case(rows)
    for case in sorted(cases):
        group = cases[case]
        ours = _best(group, [OURS])
        if ours is None:
            continue
        op, shape, format, size, residency, threads, rank, groups, M = case
        parts = ["" if op == "zo_linear" else op, shape, format if format == "dense" else f"{format} g{size}"]
        parts += [f"M={M} R={rank} G={groups}" if M else f"R={rank}" if rank else "", residency if M else ""]
        parts += [f"{threads} threads" if threads > 1 else ""]
        peer = _best(group, EXACT_PEERS)
        who = f" {peer['provider']}" if peer else ""
        lines.append(
            f"| {' '.join(filter(None, parts))} | {ours['seconds']['p50'] * 1e3:.3f} | {_share(ours)} | "
            f"{_over(_best(group, UNFUSED))} | {_over(_best(group, ['torch dense']))} | {_over(peer)}{who} | "
            f"{_over(_best(group, ['bitsandbytes']))} |"
        )
    return lines


def steps_table(steps: list[Row]) -> list[str]:
    """One line a contender: time of a step over ours, and memory."""
    lines = [
        "| step of the demo model | threads | seconds | over ours | peak above imports | of it above loaded |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(steps, key=lambda row: row["threads"]):
        held = row["bytes_above_imports"]
        above = None if held["step"] is None else held["step"] - held["loaded"]
        lines.append(
            f"| {row['step']} | {row['threads']} | {row['seconds']['p50']:.3f} | {_over(row)} | "
            f"{human(held['step'])} | {human(above)} |"
        )
    return lines


AIMS = {  # what the project set out to reach: claim -> {rows M: at least}
    "zo_linear R=8 over unfused PyTorch": {1: 15, 2: 15, 8: 15, 32: 5, 128: 2.5, 512: 1.5, 2048: 1.15},
    "zo_linear R=8 over dense fp32": {1: 3, 2: 3, 8: 3, 32: 1.3, 128: 1, 512: 1, 2048: 1},
    "zo_linear R=8 over the best exact peer": {1: 2.5, 2: 2.5, 8: 2.5, 32: 1.3, 128: 1.3, 512: 1.05, 2048: 1.05},
    "bare product over the best exact peer": {1: 1.7, 8: 1.3, 32: 1.08, 128: 1.08, 512: 1.08, 2048: 1},
    "bare product from memory over the best exact peer": {1: 1.3},
    "bare nf4 product over bitsandbytes": {1: 20, 32: 8, 512: 1.3},
    "bare product: share of the fma peak": {512: 0.85, 2048: 0.85},
    "bare time / time with R=8": {2: 1 / 1.25, 128: 1 / 1.05, 512: 1 / 1.05, 2048: 1 / 1.05},
    "zo_perturb_ over w.add_(sigma * torch.randn)": {0: 4},
    "two threads over one": {32: 1.8, 128: 1.8, 512: 1.8},
}


def aims(rows: list[Row], steps: list[Row]) -> list[str]:
    """Each aim on the ideal shape with what was measured, and the aims of a step; what was not measured is left out."""
    cases = _by_case(row for row in rows if row["shape"] == IDEAL)

    def group(M: int, rank: int, format: str = "int4", residency: str = "cache", threads: int = 1) -> list[Row]:
        groups = 2 if rank and M > 1 else 1
        return cases.get(("zo_linear", IDEAL, format, 64, residency, threads, rank, groups, M), [])

    def over(rows: list[Row], providers: Iterable[str]) -> float | None:
        best = _best(rows, providers)
        return best["over_ours"]["p50"] if best else None

    def seconds(rows: list[Row]) -> float | None:
        ours = _best(rows, [OURS])
        return ours["seconds"]["p50"] if ours else None

    def quotient(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    def measured(claim: str, M: int) -> float | None:
        if "unfused" in claim:
            return over(group(M, 8), UNFUSED)
        if "dense" in claim:
            return over(group(M, 8), ["torch dense"])
        if "nf4" in claim:
            return over(group(M, 0, "nf4"), ["bitsandbytes"])
        if "peer" in claim:
            rank, residency = 8 if "R=8" in claim else 0, "rotating" if "memory" in claim else "cache"
            return over(group(M, rank, residency=residency), EXACT_PEERS)
        if "peak" in claim:
            ours = _best(group(M, 0), [OURS])
            return ours.get("flops_share") if ours else None
        if "bare time" in claim:
            return quotient(seconds(group(M, 0)), seconds(group(M, 8)))
        if "threads" in claim:
            return quotient(seconds(group(M, 8)), seconds(group(M, 8, threads=2)))
        return over(cases.get(("zo_perturb_", IDEAL, "dense", 64, "cache", 1, 0, 2, 0), []), ["torch unfused"])

    lines = ["| aim, 4096 x 4096 int4 g64 unless said | M | at least | measured | |", "|---|---|---|---|---|"]

    def add(claim: str, M: int | str, wanted: float, value: float | None) -> None:
        if value is not None:
            lines.append(f"| {claim} | {M} | {wanted:.2f} | {value:.2f} | {'' if value >= wanted else 'missed'} |")

    for claim, wanted in AIMS.items():
        for M, least in wanted.items():
            add(claim, M or "–", least, measured(claim, M))
    unfused = [row for row in rows if row["provider"] == "torch unfused" and row["status"] == "ok"]
    worst = min((row["over_ours"]["p50"] for row in unfused if "over_ours" in row), default=None)
    add(f"the slowest of {len(unfused)} cases over unfused PyTorch", "all", 1, worst)
    took = {(row["step"], row["threads"]): row for row in steps}
    for threads in (1, 2):
        if ("mezo", threads) in took and ("forward", threads) in took:
            floor, mezo = took["forward", threads], took["mezo", threads]
            ours = took["zoact", threads]["bytes_above_imports"]["step"]
            add(f"floor / step, {threads} threads", "608", 1 / 1.05, floor["over_ours"]["p50"])
            add(f"MeZO in place / step, {threads} threads", "608", 1.5, mezo["over_ours"]["p50"])
            if threads == 1:
                add("memory of MeZO / ours", "608", 2, quotient(mezo["bytes_above_imports"]["step"], ours))
    return lines


def figures(rows: list[Row], steps: list[Row], roof: dict[str, float], folder: Path) -> list[Path]:
    """Speed-up over rows of each shape with at least three row counts, a roofline, and what a step is made of."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)

    series: dict[tuple, dict[int, list[Row]]] = {}
    for row in rows:
        if row["threads"] == 1 and row["residency"] == "cache" and row["op"] == "zo_linear":
            series.setdefault((row["shape"], row["format"], row["rank"]), {}).setdefault(row["M"], []).append(row)
    for (shape, format, rank), at in sorted(series.items()):
        if len(at) < 3:
            continue
        figure, axes = plt.subplots(figsize=(6, 4))
        for label, providers in (
            ("unfused PyTorch", UNFUSED),
            ("dense fp32", ("torch dense",)),
            ("best exact peer", EXACT_PEERS),
            ("bitsandbytes", ("bitsandbytes",)),
        ):
            points = [(M, best["over_ours"]["p50"]) for M in sorted(at) if (best := _best(at[M], providers))]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.axhline(1, color="black", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="rows M", ylabel="their time / ours")
        axes.set_title(f"{shape} {format} R={rank}")
        axes.legend()
        save(figure, f"{shape}.{format}.r{rank}")

    timed = [row for row in rows if row["op"] == "zo_linear" and row["threads"] == 1 and row["status"] == "ok"]
    if timed and roof:
        figure, axes = plt.subplots(figsize=(6, 4))
        for label, providers in ((OURS, (OURS,)), ("best exact peer", EXACT_PEERS), ("unfused PyTorch", UNFUSED)):
            best = [row for group in _by_case(timed).values() if (row := _best(group, providers))]
            axes.scatter([r["gflops"] / r["gbytes"] for r in best], [r["gflops"] for r in best], s=14, label=label)
        low, high = min(r["gflops"] / r["gbytes"] for r in timed), max(r["gflops"] / r["gbytes"] for r in timed)
        for label, key in (("cache", "cache_bandwidth"), ("memory", "memory_bandwidth")):
            grid = [low * (high / low) ** (i / 99) for i in range(100)]
            axes.plot(grid, [min(roof["flops"], roof[key] * x) / 1e9 for x in grid], label=f"roof: fma, {label}")
        axes.set(xscale="log", yscale="log", xlabel="flop / byte of packed weight, x, y, A and C", ylabel="GFLOP/s")
        axes.legend()
        save(figure, "roofline")

    single = [row for row in steps if row["threads"] == 1]
    if single:
        names = [row["step"] for row in single]
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        bottom = [0.0] * len(names)
        for kind in single[0]["shares"]:
            heights = [row["shares"][kind] * row["seconds"]["p50"] for row in single]
            left.bar(names, heights, bottom=bottom, label=kind)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        left.set(ylabel="seconds of one core", title=f"a step of {single[0]['rows']} rows")
        left.legend()
        loaded = [(row["bytes_above_imports"]["loaded"] or 0) / 1e6 for row in single]
        peak = [(row["bytes_above_imports"]["step"] or 0) / 1e6 for row in single]
        right.bar(names, loaded, label="loaded")
        right.bar(names, [b - a for a, b in zip(loaded, peak, strict=True)], bottom=loaded, label="a step, at its peak")
        right.set(ylabel="MB above the imports", title="memory")
        right.legend()
        save(figure, "step")
    return written


def replace_between(text: str, marks: tuple[str, str], body: str) -> str:
    """`text` with what stands between two marks replaced; raises ValueError where a mark is missing."""
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(f"the text holds {mark!r} {text.count(mark)} times; it has to hold it once")
    before, rest = text.split(marks[0])
    return before + marks[0] + "\n" + body + "\n" + marks[1] + rest.split(marks[1])[1]


def write_whole(path: Path, text: str) -> None:
    """To a temporary name, then moved: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    files = parser.parse_args().files or sorted(RESULTS.glob("*.jsonl"))
    if not files:
        parser.error("no results yet; run `make bench` first")
    runs, rows, steps = load(files)
    kernels = [run for run in runs if run.get("roof")]
    roof = kernels[-1]["roof"] if kernels else {}
    head = []
    if kernels:
        machine = kernels[-1]["machine"]
        versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
        head.append(
            f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, {' '.join(machine['flags'])}; "
            f"{versions}; commit {machine['commit']}. Roof of one core, measured in the run: "
            f"{roof['flops'] / 1e9:.0f} GFLOP/s by fma, {roof['cache_bandwidth'] / 1e9:.0f} GB/s from cache, "
            f"{roof['memory_bandwidth'] / 1e9:.0f} GB/s from memory. One thread in CPU time unless said; the others as "
            "multiples of our time: median [p20, p80] of the ratio round by round."
        )
    body = "\n".join([*head, "", *aims(rows, steps), "", *table(rows), "", *(steps_table(steps) if steps else [])])
    write_whole(RESULTS / "report.md", f"# Benchmarks\n\n{body}\n")
    for path in figures(rows, steps, roof, RESULTS):
        print(path)
    if all(mark in README.read_text() for mark in MARKS):
        ideal = [row for row in rows if row["provider"] in _SHOWN and _in_readme(row)]
        short = "\n".join([*head, "", *table(ideal), "", *(steps_table(steps) if steps else [])])
        write_whole(README, replace_between(README.read_text(), MARKS, short))
    print(RESULTS / "report.md")


def _in_readme(row: Row) -> bool:
    """The ideal shape: the ZO linear (R = 8) and the bare product."""
    keys, wanted = ("op", "shape", "format", "threads", "residency"), ("zo_linear", IDEAL, "int4", 1, "cache")
    return row["rank"] in (0, 8) and tuple(row[key] for key in keys) == wanted


_SHOWN = (OURS, *UNFUSED, "torch dense", *EXACT_PEERS, "bitsandbytes")

if __name__ == "__main__":
    main()
