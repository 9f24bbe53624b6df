"""The benchmark harness: every provider that needs no peer library passes its gate, the gate catches a wrong one, and
the report is made from results files alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks import gpu, gpu_step, report, run, timing
from benchmarks.cases import PROFILES, Case, full
from benchmarks.providers import BARE, OURS, PROVIDERS, Unsupported, make_data, without_side_path
from benchmarks.timing import Times, interleaved, ratio
from zoact_kernels import native

SMALL = Case("smollm2-135m.k_proj", 4, "int4", rank=3)
CASES = [
    *(replace(SMALL, format=format, groups=G) for format in ("int4", "nf4", "int8", "dense") for G in (1, 4)),
    replace(SMALL, shape="awkward.thin", rank=0, groups=1),
    *(replace(SMALL, op="zo_dense_linear", rank=0, format=format) for format in ("dense", "int4")),
    replace(SMALL, op="zo_perturb_", rank=0, format="dense", M=0),
    replace(SMALL, op="zo_update_", format="dense", M=0),
    *(replace(SMALL, op="dequantize", rank=0, format=format, M=0) for format in ("int4", "nf4", "int8")),
]
HALF = [
    replace(SMALL, dtype="bfloat16"),
    replace(SMALL, dtype="float16", format="nf4"),
    *(replace(SMALL, op="zo_dense_linear", rank=0, format=format, dtype="bfloat16") for format in ("dense", "int4")),
    replace(SMALL, op="zo_perturb_", rank=0, format="dense", M=0, dtype="bfloat16"),
    replace(SMALL, op="dequantize", rank=0, M=0, dtype="float16"),
]
OWN = ("zoact", "zoact cpu", "torch unfused", "torch dense", "dense product")


@pytest.mark.parametrize("case", CASES + HALF, ids=str)
def test_providers_pass_their_gate(case: Case) -> None:
    data = make_data(case)
    for name in (name for name in OWN if name in run.PROVIDERS[case.op]):
        try:
            call = run.PROVIDERS[case.op][name](case, data)
        except Unsupported:
            continue
        gated = without_side_path(case, data) if name in BARE else (case, data)
        assert run.GATES[case.op](*gated, call) <= run.GATE[case.dtype], name


@pytest.mark.parametrize("case", [case for case in HALF if case.op != "dequantize"], ids=str)
def test_gate_feels_the_noise(case: Case) -> None:
    """16 bits round by more than a small sigma moves y: the sigma of these cases is one that shows."""
    data = make_data(case)
    forgetful = replace(data, sigmas=torch.zeros_like(data.sigmas)) if data.sigmas is not None else data
    call = run.PROVIDERS[case.op][OURS](case, forgetful)
    if case.op == "zo_linear":
        assert run.GATES[case.op](case, data, call) > run.GATE[case.dtype]
    else:
        nothing = {
            "zo_perturb_": lambda i: None,
            "zo_dense_linear": lambda i: data.x @ data.ring[0].dequantize(torch.bfloat16).T,
        }[case.op]
        assert run.GATES[case.op](case, data, nothing) > run.GATE[case.dtype]


@pytest.mark.parametrize("case", CASES + HALF, ids=str)
def test_gate_catches_a_wrong_provider(case: Case) -> None:
    data = make_data(case)
    right = run.PROVIDERS[case.op][OURS](case, data)

    def wrong(i: int) -> Any:
        y = right(i)
        changed = data.ring[0].weight if y is None else y[0] if isinstance(y, list) else y
        changed += (1e-2 if case.dtype == "float32" else 3e-2) * changed.abs().max()
        return y

    assert run.GATES[case.op](case, data, wrong) > run.GATE[case.dtype]


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


def test_measure_with_graphs() -> None:
    """The path of a GPU, where a graph of the whole ring is replayed: here a loop over it."""
    case = replace(SMALL, dtype="bfloat16", residency="rotating")
    names = ["zoact", "torch unfused", "dense product", "torch compiled peer that is not there"]
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_data", lambda case: make_data(case, ring_bytes=3e6))
        rows = run.measure(case, names, {}, True, 3, seen.append)
    assert seen == [*names[:3], "timing"] and [row["provider"] for row in rows] == names[:3]
    for row in rows:
        assert row["status"] == "ok" and row["launch"] == "graph" and row["eager"]["seconds"]["p50"] > 0
        # of one call, not of the ring
        assert 0.1 < row["seconds"]["p50"] / row["eager"]["seconds"]["p50"] < 10
    assert rows[0]["chosen"] == "cpu" or not native.module()


def test_a_failing_provider_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, data: Any) -> Any:
        raise ZeroDivisionError("of a peer")

    monkeypatch.setitem(run.PROVIDERS["zo_linear"], "torch dense", broken)
    ours, other = run.measure(SMALL, ["zoact", "torch dense"], {}, rounds=3)
    assert ours["status"] == "ok" and other["status"] == "failed" and other["note"] == "ZeroDivisionError: of a peer"


def test_aten_on_a_gpu() -> None:
    """The operators that are called only there: their shapes and dtypes, on tensors without memory."""
    case = replace(SMALL, shape="llama-3.2-1b.q_proj", dtype="bfloat16")
    real = make_data(case)
    with FakeTensorMode():

        def there(tensor: Any) -> Any:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        ring = [replace(w, weight=there(w.weight), scale=there(w.scale)) for w in real.ring]
        data = replace(real, x=there(real.x), ring=ring)
        y = PROVIDERS["aten int4 product"](replace(case, device="cuda"), data)(0)
    assert y.shape == (case.M, case.N) and y.dtype == torch.bfloat16 and y.device.type == "cuda"


class OnPaper(str):
    """A device that torch takes for the CPU and the harness for a GPU."""

    def __eq__(self, other: object) -> bool:
        return other == "cuda"

    def __ne__(self, other: object) -> bool:
        return other != "cuda"

    def __hash__(self) -> int:
        return hash("cuda")


class CudaOnPaper:
    """What the harness uses of torch.cuda: events by the clock of the CPU, streams and graphs that do nothing."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.time = 0.0

        def record(self) -> None:
            self.time = time.perf_counter()

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Any) -> float:
            return (other.time - self.time) * 1e3

    class Stream:
        def wait_stream(self, stream: Any) -> None: ...

    class CUDAGraph:
        def replay(self) -> None:
            time.sleep(1e-4)

    stream = graph = staticmethod(contextlib.nullcontext)
    current_stream = staticmethod(lambda: CudaOnPaper.Stream())
    synchronize = reset_peak_memory_stats = empty_cache = staticmethod(lambda *device: None)
    memory_allocated, max_memory_allocated = staticmethod(lambda *device: 100), staticmethod(lambda *device: 101)
    get_device_properties = staticmethod(
        lambda: SimpleNamespace(name="a card", major=9, minor=0, total_memory=1, multi_processor_count=2)
    )


def test_the_branches_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run here but for the GPU itself, so that no slip of the pen waits for one."""
    for name in (name for name in vars(CudaOnPaper) if not name.startswith("_")):
        monkeypatch.setattr(torch.cuda, name, getattr(CudaOnPaper, name))
    monkeypatch.setattr(
        gpu_step, "StepGraph", lambda optimizer, batch: SimpleNamespace(step=lambda batch: time.sleep(1e-4))
    )
    device = OnPaper("cpu")
    names = ["zoact", "torch unfused", "dense product"]
    rows = run.measure(replace(SMALL, device=device, dtype="bfloat16"), names, {}, True)
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert all(row["launch"] == "graph" and row["peak_bytes"] == 1 and "over_ours" in row for row in rows)
    steps = gpu_step.measure(gpu_step.SIZES["cpu"][0], device, rounds=3, plain=True)
    assert [row["gpu_step"] for row in steps] == ["step", "floor", "step graph", "floor graph"]
    assert all(row["over_floor"]["p50"] > 0 for row in steps) and steps[0]["bytes"] == {"before": 100, "peak": 101}
    assert timing._gpu()["gpu"] == "a card" and timing._gpu()["arch"] == "9.0"
    assert timing.roof(device, 32, 4096)["memory_bandwidth"] > 0

    def refuses(*arguments: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    ours, theirs = run.measure(replace(SMALL, device=device), names[:2], {}, True)
    assert ours["launch"] == theirs["launch"] == "eager" and "not captured: RuntimeError" in ours["note"]
    assert theirs["over_ours"] == theirs["eager"]["over_ours"]
    assert "not captured" in gpu_step.measure(gpu_step.SIZES["cpu"][0], device, rounds=3, plain=True)[3]["note"]


# --- bench-gpu --------------------------------------------------------------------------------------------------------


def plan_to(file: Path, *more: str) -> list[dict[str, Any]]:
    gpu.main(["--plan", "smoke", "--device", "cpu", "--no-build", "--out", str(file), *more])
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_bench_gpu_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run itself, on another device: one file, every job in it, a verdict on every target, readable by report."""
    lines = plan_to(tmp_path / "gpu-none.jsonl")
    assert lines[0]["roof"] is not None and lines[0]["machine"]["cores"]
    assert lines[-1]["skipped"] == [] and len({line["run"] for line in lines}) == 1
    ok = {(line["op"], line["provider"]) for line in lines if line.get("status") == "ok"}
    assert ok >= {(op, "zoact") for op in run.PROVIDERS} | {(op, "torch unfused") for op in run.PROVIDERS}
    assert not [line for line in lines if line.get("status") in ("wrong", "failed", "crashed")]
    assert {line["gpu_step"] for line in lines if "gpu_step" in line} == {"step", "floor", "step graph", "floor graph"}
    claims = {target["claim"]: target["verdict"] for target in lines[-1]["targets"]}
    assert claims.pop("unfused PyTorch / int4 zo_linear, M = 4096") == "not measured"
    roofless = {} if lines[0]["roof"] else {"share of the measured copy bandwidth, M <= 16": "not measured"}
    assert all(verdict in ("reached", "missed") for claim, verdict in claims.items() if claim not in roofless)
    text = "\n".join(report.gpu_section(tmp_path / "gpu-none.jsonl"))
    assert "zo_linear smollm2-135m.k_proj int4 bfloat16 M=4 R=8 G=2" in text and "step graph" in text
    assert "time of a step / its floor" in capsys.readouterr().out


def test_bench_gpu_out_of_time(tmp_path: Path) -> None:
    lines = plan_to(tmp_path / "gpu-none.jsonl", "--seconds", "0")
    assert len(lines) == 1 and len(lines[0]["skipped"]) == len(gpu.jobs("smoke", "cpu"))
    assert {target["verdict"] for target in lines[0]["targets"]} == {"not measured"}


def test_bench_gpu_goes_on_behind_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that kills the worker loses its row, then all its rows; the others keep theirs."""
    told: list[list[str]] = []
    answers = [
        (0, "torch dense", "exit -11: "), (2, "torch dense", "no sign of life"), (3, "step", "exit 1: "),
        (4, "timing", None),
    ]  # fmt: skip

    def worker(command: list[str], deadline: float) -> tuple[int, str, str | None]:
        told.append(command)
        return answers[len(told) - 1]

    monkeypatch.setattr(gpu, "_one_worker", worker)
    lines = plan_to(tmp_path / "gpu-none.jsonl")
    first = [command[command.index("--first") + 1] for command in told]
    without = [{command[i + 1] for i, word in enumerate(command) if word == "--without"} for command in told]
    assert first == ["0", "0", "2", "4"]
    assert without[:3] == [set(), {"0:torch dense"}, {"0:torch dense", "2:torch dense", "torch dense"}]
    assert [line["status"] for line in lines if "provider" in line] == ["crashed", "crashed"]


def test_a_worker_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def says(code: str, deadline: float = 1e12) -> tuple[int, str, str | None]:
        return gpu._one_worker([sys.executable, "-c", f"import os, time\n{code}"], deadline)

    assert says("print('@ 3 some kernel', flush=True); print('last words', flush=True); os._exit(7)") == (
        3, "some kernel", "exit 7: last words",
    )  # fmt: skip
    assert says("print('@ 4 fine', flush=True)") == (4, "fine", None)
    monkeypatch.setattr(gpu, "STALL_SECONDS", 1)
    assert says("print('@ 5 hung', flush=True); time.sleep(60)")[2] == "no sign of life for 1 s"


def test_build_kernels_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler at all')")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    told = gpu.build_kernels("cpu", 60)
    assert told["exit"] == 1 and "no compiler at all" in told["error"]
    (tmp_path / "setup.py").write_text("import subprocess; subprocess.run(['sleep', '60'])")
    assert "not done within" in gpu.build_kernels("cpu", 1)["error"]


def test_the_plan_answers_the_targets_first() -> None:
    jobs = gpu.jobs("gpu", "cuda")
    assert len(set(jobs)) == len(jobs) > 200
    early = jobs[:12]
    assert {job.case.M for job in early if job.case} == set(gpu.GPU_ROWS)
    assert [job.size for job in early if job.size] == list(gpu_step.SIZES["cuda"])
    every = {(job.case.shape, job.case.dtype, job.case.rank, job.case.M) for job in jobs if job.case}
    assert every >= set(itertools.product(gpu.GPU_SHAPES, ("bfloat16", "float16"), (8, 16), gpu.GPU_ROWS))
    assert {job.case.op for job in jobs if job.case} == set(run.PROVIDERS)
    assert {"zoact", "zoact triton", "zoact panel", "torch unfused", "torch dense", "dense product"} <= set(
        jobs[0].names
    )
    assert "zoact cpu" not in jobs[0].names and "zoact cpu" in gpu.jobs("smoke", "cpu")[0].names


def test_targets_are_judged_by_the_worst_case() -> None:
    def row(M: int, provider: str, over: float, **more: Any) -> dict[str, Any]:
        figures = {"p20": over, "p50": over, "p80": over}
        return {**vars(replace(SMALL, M=M)), "provider": provider, "status": "ok", "over_ours": figures,
                "seconds": figures, **more}  # fmt: skip

    rows = [
        row(1, "zoact", 1.0, bandwidth_share=0.8), row(1, "torch unfused", 9.0), row(1, "torch compiled", 4.0),
        row(16, "zoact", 1.0, bandwidth_share=0.5), row(16, "torch unfused", 2.9),
        row(4096, "zoact", 1.0), row(4096, "torch unfused", 1.3),
    ]  # fmt: skip
    common = {"B": 1, "T": 2, "rows": 4, "model": "m"}
    steps = [
        {**common, "gpu_step": name, "over_floor": {"p50": over}, "bytes": {"peak": peak}}
        for name, over, peak in (("step", 1.04, 103), ("floor", 1.0, 100))
    ]
    found = {target.claim: (target.verdict, target.value) for target in report.gpu_targets(rows, steps)}
    assert list(found.values()) == [
        ("reached", 1.04), ("missed", 1.03), ("missed", 2.9), ("reached", 1.3), ("reached", 1.3), ("missed", 0.5),
    ]  # fmt: skip
    broken = [{**rows[0], "status": "wrong"}]
    assert report.gpu_targets(broken, [])[4].verdict == "missed"  # ours gave wrong numbers: no speed at all


def test_measure_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for three row counts become a table, figures and the README's block; the latest row of a case counts."""
    roof = {"flops": 1e11, "cache_bandwidth": 1e11, "memory_bandwidth": 1e10}
    rows: list[dict[str, Any]] = []
    for M in (1, 2, 4):
        rows += run.measure(replace(SMALL, M=M, groups=1), ["zoact", "torch unfused"], roof, rounds=3)
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
