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

from .providers import EXACT_PEERS, OURS, UNFUSED
from .run import RESULTS

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
Row = dict[str, Any]


def load(files: Iterable[Path]) -> tuple[list[Row], list[Row]]:
    """(runs, rows), the latest row of each case and provider."""
    runs, rows = [], {}
    for file in files:
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            if "provider" in entry:
                rows[(*_case(entry), entry["provider"])] = entry
            else:
                runs.append(entry)
    return runs, list(rows.values())


def _case(row: Row) -> tuple:
    keys = ("shape", "format", "group_size", "residency", "threads", "rank", "groups", "M")
    return tuple(row[key] for key in keys)


def _best(rows: list[Row], providers: Iterable[str]) -> Row | None:
    """The fastest of some providers on one case."""
    timed = [row for row in rows if row["provider"] in providers and row["status"] == "ok"]
    return min(timed, key=lambda row: row["seconds"]["p50"], default=None)


def _over(row: Row | None) -> str:
    if row is None or "over_ours" not in row:
        return "–"
    over = row["over_ours"]
    return f"{over['p50']:.2f}× [{over['p20']:.2f}, {over['p80']:.2f}]"


def table(rows: list[Row]) -> list[str]:
    """One line a case: our time and share of the roof, and how many times longer the others take."""
    lines = [
        "| case | ours, ms | of the roof | unfused PyTorch | dense fp32 | best exact peer | bitsandbytes |",
        "|---|---|---|---|---|---|---|",
    ]
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(_case(row), []).append(row)
    for case in sorted(cases):
        group = cases[case]
        ours = _best(group, [OURS])
        if ours is None:
            continue
        shape, format, size, residency, threads, rank, groups, M = case
        share = max(ours.get("flops_share", 0), ours.get("bandwidth_share", 0))
        name = f"{shape} {format} g{size}, M={M} R={rank} G={groups}, {residency}" + (
            f", {threads} threads" if threads > 1 else ""
        )
        lines.append(
            f"| {name} | {ours['seconds']['p50'] * 1e3:.3f} | {share:.0%} | {_over(_best(group, UNFUSED))} | "
            f"{_over(_best(group, ['torch dense']))} | {_over(_best(group, EXACT_PEERS))} | "
            f"{_over(_best(group, ['bitsandbytes']))} |"
        )
    return lines


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Speed-up over rows, and our share of the roof over rows, for each shape that has at least three row counts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    by_series: dict[tuple, dict[int, list[Row]]] = {}
    for row in rows:
        case = _case(row)
        if row["threads"] == 1 and row["residency"] == "cache":
            key = (row["shape"], row["format"], row["rank"])
            by_series.setdefault(key, {}).setdefault(case[-1], []).append(row)
    for (shape, format, rank), at in sorted(by_series.items()):
        if len(at) < 3:
            continue
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        counts = sorted(at)
        for label, providers in (
            ("unfused PyTorch", UNFUSED),
            ("dense fp32", ("torch dense",)),
            ("best exact peer", EXACT_PEERS),
            ("bitsandbytes", ("bitsandbytes",)),
        ):
            points = [(M, best["over_ours"]["p50"]) for M in counts if (best := _best(at[M], providers))]
            if points:
                left.plot(*zip(*points, strict=True), marker="o", label=label)
        left.axhline(1, color="black", linewidth=1)
        left.set(
            xscale="log", yscale="log", xlabel="rows M", ylabel="their time / ours", title=f"{shape} {format} R={rank}"
        )
        left.legend()
        for label, key in (("of the FMA peak", "flops_share"), ("of the bandwidth", "bandwidth_share")):
            points = [(M, ours[key]) for M in counts if (ours := _best(at[M], [OURS])) and key in ours]
            if points:
                right.plot(*zip(*points, strict=True), marker="o", label=label)
        right.set(xscale="log", ylim=(0, 1.05), xlabel="rows M", ylabel="share of the measured roof, one core")
        right.legend()
        figure.tight_layout()
        path = folder / f"{shape}.{format}.r{rank}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
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
    runs, rows = load(files)
    lines = []
    for run in runs[-1:]:
        machine, roof = run["machine"], run["roof"]
        versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
        lines.append(
            f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags'])}; {versions}; commit "
            f"{machine['commit']}. Roof of one core, measured in the run: {roof.get('flops', 0) / 1e9:.0f} GFLOP/s, "
            f"{roof.get('cache_bandwidth', 0) / 1e9:.0f} GB/s from cache, {roof.get('memory_bandwidth', 0) / 1e9:.0f} "
            "GB/s from memory. One thread, CPU time; the others as multiples of ours: median [p20, p80] of the ratio "
            "round by round."
        )
    body = "\n".join([*lines, "", *table(rows)])
    write_whole(RESULTS / "report.md", f"# Benchmarks\n\n{body}\n")
    for path in figures(rows, RESULTS):
        print(path)
    if all(mark in README.read_text() for mark in MARKS):
        ideal = [row for row in rows if row["shape"] == "llama-3-8b.q_proj" and row["provider"] in _SHOWN]
        short = "\n".join([*lines, "", *table(ideal)])
        write_whole(README, replace_between(README.read_text(), MARKS, short))
    print(RESULTS / "report.md")


_SHOWN = (OURS, *UNFUSED, "torch dense", *EXACT_PEERS, "bitsandbytes")

if __name__ == "__main__":
    main()
