"""The benchmark harness: every provider that needs no peer library passes its gate, the gate catches a wrong one, and
the report is made from results files alone."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, run
from benchmarks.cases import PROFILES, Case, full
from benchmarks.providers import OURS, Unsupported, make_data
from benchmarks.timing import Times, interleaved, ratio

SMALL = Case("smollm2-135m.k_proj", 4, "int4", rank=3)
CASES = [
    *(replace(SMALL, format=format, groups=G) for format in ("int4", "nf4", "int8", "dense") for G in (1, 4)),
    replace(SMALL, shape="awkward.thin", rank=0, groups=1),
    *(replace(SMALL, op="zo_dense_linear", rank=0, format=format) for format in ("dense", "int4")),
    replace(SMALL, op="zo_perturb_", rank=0, format="dense", M=0),
    replace(SMALL, op="zo_update_", format="dense", M=0),
    *(replace(SMALL, op="dequantize", rank=0, format=format, M=0) for format in ("int4", "nf4", "int8")),
]
OWN = ("zoact", "torch unfused", "torch dense")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_providers_pass_their_gate(case: Case) -> None:
    data = make_data(case)
    for name in (name for name in OWN if name in run.PROVIDERS[case.op]):
        try:
            call = run.PROVIDERS[case.op][name](case, data)
        except Unsupported:
            continue
        assert run.GATES[case.op](case, data, call) <= run.EXACT, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gate_catches_a_wrong_provider(case: Case) -> None:
    data = make_data(case)
    right = run.PROVIDERS[case.op][OURS](case, data)

    def wrong(i: int) -> Any:
        y = right(i)
        changed = data.ring[0].weight if y is None else y[0] if isinstance(y, list) else y
        changed += 1e-2 * changed.abs().max()
        return y

    assert run.GATES[case.op](case, data, wrong) > run.EXACT


def test_table_covers_every_pair() -> None:
    columns = ("shape", "M", "format", "rank", "groups", "residency")

    def pairs(cases: Any) -> set[tuple]:
        return {
            (a, b, getattr(case, a), getattr(case, b)) for case in cases for a, b in itertools.combinations(columns, 2)
        }

    everything, chosen = [case for case in full() if case.flops < 3e10], list(PROFILES["table"]())
    assert pairs(chosen) == pairs(everything)
    assert len(chosen) < len(everything) / 20


def test_interleaved_and_ratio() -> None:
    order: list[str] = []
    calls = {name: (lambda i, name=name: order.append(f"{name}{i}") or torch.ones(1 << 16).sum()) for name in "ab"}
    times = interleaved(calls, ring=3, threads=1, rounds=3)
    assert {len(t.samples) for t in times.values()} == {3}
    assert {"a0", "a1", "a2", "b0", "b1", "b2"} <= set(order)
    assert ratio(Times((2.0, 6.0)), Times((1.0, 2.0))).samples == (2.0, 3.0)


def test_measure_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for three row counts become a table, figures and the README's block; the latest row of a case counts."""
    monkeypatch.setattr("benchmarks.timing.ROUNDS", 3)
    roof = {"flops": 1e11, "cache_bandwidth": 1e11, "memory_bandwidth": 1e10}
    rows: list[dict[str, Any]] = []
    for M in (1, 2, 4):
        rows += run.measure(replace(SMALL, M=M, groups=1), ["zoact", "torch unfused"], roof)
    assert all(row["status"] == "ok" and row["seconds"]["p20"] <= row["seconds"]["p80"] for row in rows)
    machine = {"cpu": "a CPU", "cores": 2, "flags": [], "versions": {}, "commit": None}
    step = {
        "step": "zoact", "threads": 1, "rows": 8, "seconds": {"p50": 1.0}, "shares": {"linear layers": 0.9},
        "over_ours": {"p20": 1.0, "p50": 1.0, "p80": 1.0}, "bytes_above_imports": {"loaded": 1, "step": 2},
    }  # fmt: skip
    old = {**rows[0], "seconds": {**rows[0]["seconds"], "p50": 123.0}}
    lines = [{"run": "1", "machine": machine, "roof": roof}, old, *rows, step]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr("sys.argv", ["report", str(file)])
    report.main()
    text = (tmp_path / "report.md").read_text()
    assert text.count("smollm2-135m.k_proj int4 g64") == 3
    assert "123000" not in text and "| zoact | 1 | 1.000 |" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "smollm2-135m.k_proj.int4.r3.png",
        "roofline.png",
        "step.png",
    }
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("after\n")
    assert "old" not in readme.read_text()
    with pytest.raises(ValueError, match="0 times"):
        report.replace_between("no marks", report.MARKS, "")
