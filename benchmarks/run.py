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
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from . import providers, updates
from .cases import PROFILES, Case
from .providers import OURS, Unsupported, make_data
from .timing import Times, interleaved, machine, peak_bytes, ratio, roof

RESULTS = Path(__file__).with_name("results")
GATE = {"aten int4 bf16": 3e-2}  # relative error that a provider may show; the exact ones 1e-4
EXACT = 1e-4
PROVIDERS = {"zo_linear": providers.PROVIDERS, **updates.PROVIDERS}
GATES = {"zo_linear": providers.gate, **updates.GATES}


def measure(case: Case, names: list[str], limits: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of one case, ours first."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    data = make_data(case)
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    with torch.inference_mode():
        for name in (name for name in names if name in PROVIDERS[case.op]):
            row: dict[str, Any] = {**asdict(case), "N": case.N, "K": case.K, "provider": name}
            rows[name] = row
            try:
                call = PROVIDERS[case.op][name](case, data)
                row["relerr"] = GATES[case.op](case, data, call)
            except Unsupported as reason:
                row.update(status="unsupported", note=str(reason))
                continue
            if not row["relerr"] <= GATE.get(name, EXACT):
                row.update(status="wrong")
                continue
            row["status"] = "ok"
            calls[name] = call
            row["peak_bytes"] = peak_bytes(call, case.device)
        times = interleaved(calls, len(data.ring), case.threads, case.device)
    load = os.getloadavg()[0]
    for name, taken in times.items():
        rows[name].update(_figures(case, taken, times.get(OURS), limits), load=round(load, 2))
    return list(rows.values())


def _figures(case: Case, taken: Times, ours: Times | None, limits: dict[str, float]) -> dict[str, Any]:
    seconds = taken.median
    figures: dict[str, Any] = {
        "seconds": {"p20": taken.quantile(0.2), "p50": seconds, "p80": taken.quantile(0.8), "n": len(taken.samples)},
        "gflops": case.flops / seconds / 1e9,
        "gbytes": case.bytes / seconds / 1e9,
    }
    if ours is not None:
        over = ratio(taken, ours)
        figures["over_ours"] = {"p20": over.quantile(0.2), "p50": over.median, "p80": over.quantile(0.8)}
    if limits and case.threads == 1:
        resident = case.residency == "cache" and case.bytes < 2.5e7  # the probe's 4 MB and the weights of most layers
        bandwidth = limits["cache_bandwidth" if resident else "memory_bandwidth"]
        figures["flops_share"] = case.flops / seconds / limits["flops"]
        figures["bandwidth_share"] = case.bytes / seconds / bandwidth
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    everyone = list(providers.PROVIDERS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=sorted(PROFILES), default="quick")
    parser.add_argument("--providers", default=",".join(everyone), help="comma-separated, of " + ", ".join(everyone))
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
        for case in track(cases, description=f"{len(cases)} cases"):
            for row in measure(case, names, limits):
                file.write(json.dumps({"run": run, **row}) + "\n")
                if row["status"] == "ok":
                    over = row.get("over_ours", {}).get("p50", float("nan"))
                    print(f"{case}  {row['provider']:>15}  {row['seconds']['p50'] * 1e3:9.3f} ms  {over:6.2f} x ours")
                elif row["status"] == "wrong":
                    print(f"{case}  {row['provider']:>15}  WRONG by {row['relerr']:.1e}")
            file.flush()
    print(f"results: {out}")


if __name__ == "__main__":
    main()
