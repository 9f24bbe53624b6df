"""Measure a profile of the case table: `zoact bench`, or `python -m benchmarks.run`.

Each case passes a correctness gate, then all providers that serve it are timed interleaved. Results are appended as
JSON lines, one a (case, provider), so an interrupted run keeps what it measured: {case…, provider, status, relerr,
seconds: {p20, p50, p80}, ratio to ours round by round, peak bytes of a call, gflops, gbytes, roof shares, load}. The
first line of a run describes the machine and its measured roof.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import providers, updates
from .cases import PROFILES, Case
from .providers import BARE, EXTRA, OURS, Unsupported, make_data, without_side_path
from .timing import Times, captured, interleaved, machine, peak_bytes, ratio, roof, synchronize

RESULTS = Path(__file__).with_name("results")
# Relative error that a provider may show: a few units in the last place of x, at the scale of the largest output.
GATE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
EXACT = GATE["float32"]
LESS_EXACT = {"aten int4 bf16": 3e-2, "aten int4 product": 3e-2}
PROVIDERS = {"zo_linear": providers.PROVIDERS, **updates.PROVIDERS}
GATES = {"zo_linear": providers.gate, **updates.GATES}


def measure(
    case: Case,
    names: Sequence[str],
    limits: dict[str, float],
    graphs: bool = False,
    rounds: int | None = None,
    starting: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Rows of one case, ours first.

    starting(name) is told which provider is about to run for the first time, and when the "timing" of all begins.
    graphs, for GPUs: the time that counts is that of a replayed graph of one call for each weight of the ring, so of
    the device alone; `eager` is the same without a graph, so with what the host costs. A provider that can't be
    captured is eager in both, and its ratio to ours is that of the eager times.
    """
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    data = make_data(case)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[int], Any]] = {}
    replays: dict[str, Callable[[int], Any]] = {}
    with torch.inference_mode():
        for name in (name for name in names if name in PROVIDERS[case.op]):
            row: dict[str, Any] = {**asdict(case), "N": case.N, "K": case.K, "provider": name}
            rows[name] = row
            starting(name)
            gated = without_side_path(case, data) if name in BARE else (case, data)
            try:
                call = PROVIDERS[case.op][name](case, data)
                row["relerr"] = GATES[case.op](*gated, call)
            except Unsupported as reason:
                row.update(status="unsupported", note=str(reason))
                continue
            except Exception as error:  # a peer may raise anything; its row says what
                row.update(status="failed", note=f"{type(error).__name__}: {error}"[:500])
                synchronize(case.device)  # raises where the device itself has failed: nothing after that counts
                continue
            if not row["relerr"] <= LESS_EXACT.get(name, GATE[case.dtype]):
                row.update(status="wrong")
                continue
            row["status"] = "ok"
            if name == OURS and case.op == "zo_linear":
                row["chosen"] = providers.chosen(case, data)
            calls[name] = call
            row["peak_bytes"] = peak_bytes(call, case.device)
            if graphs:
                try:
                    replays[name] = captured(call, len(data.ring), case.device)
                except Exception as error:
                    row["note"] = f"not captured: {type(error).__name__}: {error}"[:300]
                    synchronize(case.device)
        starting("timing")
        eager = interleaved(calls, len(data.ring), case.threads, case.device, rounds)
        replayed = interleaved(replays, 1, case.threads, case.device, rounds)
        times = {name: taken.over(len(data.ring)) for name, taken in replayed.items()}
    load = os.getloadavg()[0]
    for name, row in rows.items():
        if name not in calls:
            continue
        same = times if name in times else eager
        row.update(_figures(case, same[name], same.get(OURS), limits), load=round(load, 2))
        if graphs:
            row["launch"] = "graph" if name in times else "eager"
            figures = _figures(case, eager[name], eager.get(OURS), {})
            row["eager"] = {key: figures[key] for key in ("seconds", "over_ours") if key in figures}
    return list(rows.values())


def _figures(case: Case, taken: Times, ours: Times | None, limits: dict[str, float]) -> dict[str, Any]:
    seconds = taken.median
    figures: dict[str, Any] = {
        "seconds": taken.spread(),
        "gflops": case.flops / seconds / 1e9,
        "gbytes": case.bytes / seconds / 1e9,
    }
    if ours is not None and len(ours.samples) == len(taken.samples):
        figures["over_ours"] = ratio(taken, ours).spread()
    if limits and case.threads == 1:
        resident = case.residency == "cache" and case.bytes < 2.5e7  # the probe's 4 MB and the weights of most layers
        bandwidth = limits["cache_bandwidth" if resident else "memory_bandwidth"]
        figures["flops_share"] = case.flops / seconds / limits["flops"]
        figures["bandwidth_share"] = case.bytes / seconds / bandwidth
    return figures


def track(cases: list[Case]) -> Iterable[Case]:
    """The cases, with a progress bar where rich is installed."""
    try:
        from rich.progress import track
    except ImportError:
        return cases
    return track(cases, description=f"{len(cases)} cases")


def main(arguments: Sequence[str] | None = None) -> None:
    everyone = list(providers.PROVIDERS)
    default = ",".join(name for name in everyone if name not in EXTRA)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=sorted(PROFILES), default="quick")
    parser.add_argument("--providers", default=default, help="comma-separated, of " + ", ".join(everyone))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="JSON lines to append to; default benchmarks/results/<profile>.jsonl")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device here")
    names = options.providers.split(",")
    if unknown := [name for name in names if name not in everyone]:
        parser.error(f"--providers: {unknown[0]!r} is not one of {', '.join(everyone)}")
    names = [OURS, *(name for name in names if name != OURS)]
    out = options.out or RESULTS / f"{options.profile}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    limits = roof(options.device)
    run = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    cases = [replace(case, device=options.device) for case in PROFILES[options.profile]()]
    with out.open("a") as file:
        file.write(json.dumps({"run": run, "profile": options.profile, "machine": machine(), "roof": limits}) + "\n")
        for case in track(cases):
            for row in measure(case, names, limits, graphs=options.device != "cpu"):
                file.write(json.dumps({"run": run, **row}) + "\n")
                if row["status"] == "ok":
                    over = row.get("over_ours", {}).get("p50", float("nan"))
                    print(f"{case}  {row['provider']:>15}  {row['seconds']['p50'] * 1e3:9.3f} ms  {over:6.2f} x ours")
                elif row["status"] != "unsupported":
                    why = row.get("note", row.get("relerr"))
                    print(f"{case}  {row['provider']:>15}  {row['status'].upper()} {why}")
            file.flush()
    print(f"results: {out}")


if __name__ == "__main__":
    main()
