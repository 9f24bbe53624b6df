"""Tables and figures from results files alone: `python -m benchmarks.report [FILES]`.

Without FILES: every .jsonl in benchmarks/results. Writes report.md and figures beside them, and puts the table into the
README between its two `benchmarks` comments. The latest row of a (case, provider) counts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from zoact_kernels.memory import human

from .cases import IDEAL, Case
from .providers import EXACT_PEERS, OURS, UNFUSED
from .run import RESULTS

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
Row = dict[str, Any]


class Results(NamedTuple):
    """Of results files: runs, and the latest row of each case or contender and provider."""

    runs: list[Row]
    rows: list[Row]  # of kernels
    steps: list[Row]  # of the demo model on the CPU
    gpu_steps: list[Row]


def load(files: Iterable[Path]) -> Results:
    runs: list[Row] = []
    rows: dict[tuple, Row] = {}
    steps: dict[tuple, Row] = {}
    gpu_steps: dict[tuple, Row] = {}
    for file in files:
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            if "provider" in entry:
                rows[(*_case(entry), entry["provider"])] = entry
            elif "gpu_step" in entry:
                gpu_steps[entry["gpu_step"], entry["B"], entry["T"]] = entry
            elif "step" in entry:
                steps[entry["step"], entry["threads"]] = entry
            elif "machine" in entry:
                runs.append(entry)
    return Results(runs, list(rows.values()), list(steps.values()), list(gpu_steps.values()))


# What a row says when its file is older than the key.
_DEFAULTS = {field.name: field.default for field in fields(Case)}
_KEYS = ("op", "shape", "format", "group_size", "residency", "threads", "rank", "groups", "M")


def _case(row: Row) -> tuple:
    return tuple(row.get(key, _DEFAULTS[key]) for key in (*_KEYS, "dtype", "device"))


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
        op, shape, format, size, residency, threads, rank, groups, M, *_ = case
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
        return cases.get(("zo_linear", IDEAL, format, 64, residency, threads, rank, groups, M, "float32", "cpu"), [])

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
        perturbed = cases.get(("zo_perturb_", IDEAL, "dense", 64, "cache", 1, 0, 2, 0, "float32", "cpu"), [])
        return over(perturbed, ["torch unfused"])

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


# --- GPUs -------------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A claim about a GPU run, the worst case that was measured for it, and how many there were; value None: none."""

    claim: str
    wanted: float
    value: float | None
    worst: str
    count: int
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "reached" if (self.value <= self.wanted if self.at_most else self.value >= self.wanted) else "missed"

    def __str__(self) -> str:
        value = "–" if self.value is None else f"{self.value:.3f}"
        worst = f", worst of {self.count}: {self.worst}" if self.value is not None else ""
        return f"{self.verdict}: {self.claim} {'<=' if self.at_most else '>='} {self.wanted}: {value}{worst}"


def gpu_targets(rows: list[Row], gpu_steps: list[Row]) -> list[Target]:
    """What the project set out to reach on a GPU, each judged by its worst case."""
    cases = {
        case: group
        for case, group in _by_case(row for row in rows if row["op"] == "zo_linear" and row["format"] == "int4").items()
        if group[0]["rank"]
    }
    speedups, shares = [], []
    for group in cases.values():
        ours = _best(group, [OURS])
        unfused = [row for row in group if row["provider"] in UNFUSED and "over_ours" in row]
        name = f"{group[0]['shape']} {group[0].get('dtype', '')} R={group[0]['rank']} M={group[0]['M']}"
        if unfused:
            speedups.append((min(row["over_ours"]["p50"] for row in unfused), group[0]["M"], name))
        elif ours is None:
            speedups.append((0.0, group[0]["M"], f"{name}, where ours is {_status(group)}"))
        if ours is not None and "bandwidth_share" in ours and group[0]["M"] <= 16:
            shares.append((ours["bandwidth_share"], group[0]["M"], name))

    def judged(claim: str, wanted: float, found: list[tuple[float, int, str]]) -> Target:
        value, _, worst = min(found, default=(None, 0, ""))
        return Target(claim, wanted, value, worst, len(found))

    def at_most(claim: str, wanted: float, found: list[tuple[float, str]]) -> Target:
        value, worst = max(found, default=(None, ""))
        return Target(claim, wanted, value, worst, len(found), True)

    took = {(row["gpu_step"], row["B"], row["T"]): row for row in gpu_steps}

    def named(row: Row) -> str:
        return f"{row['gpu_step']}, {row['rows']} rows of {row['model']}"

    times = [
        (row["over_floor"]["p50"], named(row))
        for (name, *_), row in took.items()
        if "over_floor" in row and name.startswith("step")
    ]
    peaks = []
    for (name, B, T), row in took.items():
        floor = took.get(("floor", B, T), {}).get("bytes", {}).get("peak")
        if name == "step" and floor and row["bytes"]["peak"]:
            peaks.append((row["bytes"]["peak"] / floor, named(row)))
    return [
        at_most("time of a step / its floor", 1.05, times),
        at_most("peak memory of a step / inference", 1.02, peaks),
        judged("unfused PyTorch / int4 zo_linear, M <= 32", 3.0, [x for x in speedups if x[1] <= 32]),
        judged("unfused PyTorch / int4 zo_linear, M = 4096", 1.2, [x for x in speedups if x[1] == 4096]),
        judged("unfused PyTorch / int4 zo_linear, anywhere", 1.0, speedups),
        judged("share of the measured copy bandwidth, M <= 16", 0.7, shares),
    ]


def _status(group: list[Row]) -> str:
    return next((row["status"] for row in group if row["provider"] == OURS), "missing")


def gpu_table(rows: list[Row]) -> list[str]:
    """One line a case: our time, share of the roof, who ran; how many times longer each of the others takes."""
    others = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS))
    lines = [f"| case | ours, µs | reached | chosen | {' | '.join(others)} |", "|---" * (4 + len(others)) + "|"]
    for case, group in _by_case(rows).items():
        op, shape, format, _, _, _, rank, groups, M, dtype, _ = case
        by = {row["provider"]: row for row in group}
        ours = by.get(OURS, {})
        time = f"{ours['seconds']['p50'] * 1e6:.1f}" if "seconds" in ours else ours.get("status", "–")
        share = max(ours.get("flops_share", 0), ours.get("bandwidth_share", 0))
        cells = [_over(by[name]) if "seconds" in by.get(name, {}) else by.get(name, {}).get("status", "–")
                 for name in others]  # fmt: skip
        label = f"{op} {shape} {format} {dtype}" + (f" M={M} R={rank} G={groups}" if M else f" R={rank}")
        lines.append(f"| {label} | {time} | {share:.0%} | {ours.get('chosen', '–')} | {' | '.join(cells)} |")
    return lines


def gpu_section(file: Path) -> list[str]:
    """Everything of one results file of a GPU."""
    found = load([file])
    lines = [f"## {file.stem}", ""]
    for run in found.runs[-1:]:
        versions = ", ".join(f"{name} {v}" for name, v in run["machine"]["versions"].items())
        roof = run["roof"]
        lines += [
            f"{run['machine'].get('gpu', run['machine']['cpu'])}; {versions}; commit {run['machine']['commit']}. "
            f"Measured roof: {roof['flops'] / 1e12:.1f} TFLOP/s, {roof['memory_bandwidth'] / 1e9:.0f} GB/s.", "",
        ]  # fmt: skip
    lines += [f"* {target}" for target in gpu_targets(found.rows, found.gpu_steps)]
    lines += ["", "| step | model | rows | ms | over its floor | peak |", "|---|---|---|---|---|---|"]
    for row in found.gpu_steps:
        time = f"{row['seconds']['p50'] * 1e3:.3f}" if "seconds" in row else row.get("note", "–")
        over = f"{row['over_floor']['p50']:.3f}" if "over_floor" in row else "–"
        peak = human(row["bytes"]["peak"]) if "bytes" in row else "–"
        lines.append(f"| {row['gpu_step']} | {row['model']} | {row['rows']} | {time} | {over} | {peak} |")
    return [*lines, "", *gpu_table(found.rows), ""]


# --- figures and files ------------------------------------------------------------------------------------------------


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
    gpu_files = [file for file in files if file.name.startswith("gpu-")]
    runs, rows, steps, _ = load(file for file in files if file not in gpu_files)
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
    body += "".join("\n" + "\n".join(gpu_section(file)) for file in gpu_files)
    write_whole(RESULTS / "report.md", f"# Benchmarks\n\n{body}\n")
    try:
        for path in figures(rows, steps, roof, RESULTS):
            print(path)
    except ImportError as error:
        print(f"no figures: {error}")
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
