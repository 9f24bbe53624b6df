"""The tests of a GPU, unattended and within minutes: `make test-gpu`, or `python tests/gpu_lane.py`.

Needs torch, Triton and pytest. Kernels that never met a GPU may crash or hang on one, and after a fault of the device
every later call of its process fails: the tests are dealt out to a few processes, and where one dies, the test that it
was at is written down as crashed and another process goes on behind it. Compiling takes most of the time, so processes
share it. One file is written, whole at any moment: benchmarks/results/tests-gpu-<device>.json.

Each process runs pytest with this file as its plugin, which tells on a file of lines what is collected, begins, ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SECONDS = 500.0  # of the 540 that `make test-gpu` may take
STALL_SECONDS = 200.0  # for one test; compute-sanitizer takes the longest
OPS = ("test_zo_*.py", "test_dequantize.py", "test_ops.py")
LOST = re.compile(r"CUDA error|AcceleratorError|device-side assert|illegal memory access|misaligned address")


# --- the plugin -------------------------------------------------------------------------------------------------------


class Teller:
    """Writes what happens; leaves out what is done, and what belongs to other processes."""

    def __init__(self, lines: Path, share: int, shares: int) -> None:
        self.lines, self.share, self.shares = lines, share, shares
        self.done = {entry["id"] for entry in told(lines) if "id" in entry}

    def tell(self, **entry: Any) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    @pytest.hookimpl(trylast=True)  # what -m leaves out is not collected
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        items[:] = items[self.share :: self.shares]
        self.tell(collected=[item.nodeid for item in items])
        items[:] = [item for item in items if item.nodeid not in self.done]

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self.tell(id=f"collecting {report.nodeid}", outcome=report.outcome, seconds=0.0, why=_reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell(begins=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tell(id=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), why=_reason(report))
        if report.outcome == "failed" and LOST.search(str(report.longrepr)):
            os._exit(3)  # the device is lost to this process


def _reason(report: Any) -> str:
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return str(report.longrepr)[-2000:]


def pytest_configure(config: Any) -> None:
    lines, share, shares = os.environ["ZOACT_GPU_LANE"].split(":")
    config.pluginmanager.register(Teller(Path(lines), int(share), int(shares)))


# --- the one who deals out --------------------------------------------------------------------------------------------


def told(lines: Path) -> list[dict[str, Any]]:
    """What a process has written so far; a half line of one that was killed is left out."""
    if not lines.exists():
        return []
    entries = []
    for line in lines.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def chosen_files() -> list[Path]:
    """test_gpu.py, every other file with a test for GPUs, the op tests."""
    ops = sorted(file for pattern in OPS for file in TESTS.glob(pattern))
    marked = [file for file in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in file.read_text()]
    first = TESTS / "test_gpu.py"
    return [file for file in dict.fromkeys([first, *marked, *ops]) if file.exists() and file.name != "test_gpu_lane.py"]


def run_share(files: Sequence[Path], lines: Path, share: int, shares: int, deadline: float) -> None:
    """Processes one after another until every test of this share has an outcome or time is up."""
    while time.time() < deadline:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_lane", "-p", "no:cacheprovider", "--no-header",
                   "--continue-on-collection-errors", *map(str, files)]  # fmt: skip
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
            "ZOACT_GPU_LANE": f"{lines}:{share}:{shares}",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        before = len(told(lines))
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        why = _wait(process, lines, deadline)
        entries = told(lines)
        begun = next((entry["begins"] for entry in reversed(entries) if "begins" in entry), None)
        finished = {entry["id"] for entry in entries if "id" in entry}
        if why == "" or (begun is None and len(entries) == before):
            if why and why != "time is up":
                _write(lines, id="starting pytest", outcome="crashed", seconds=0.0, why=why)
            return
        if begun is not None and begun not in finished and why != "time is up":
            _write(lines, id=begun, outcome="crashed", seconds=0.0, why=why)


def _write(lines: Path, **entry: Any) -> None:
    with lines.open("a") as file:
        file.write("\n" + json.dumps(entry) + "\n")


def _wait(process: subprocess.Popen, lines: Path, deadline: float) -> str:
    """ "" when the process ended as pytest does, else why not."""
    size, heard = 0, time.time()
    try:
        while (code := process.poll()) is None:
            time.sleep(0.2)
            now = lines.stat().st_size if lines.exists() else 0
            if now != size:
                size, heard = now, time.time()
            if time.time() > deadline:
                return "time is up"
            if time.time() - heard > STALL_SECONDS:
                return f"no sign of life for {STALL_SECONDS:.0f} s"
        return "" if code in (0, 1, 2, 5) else f"exit {code}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def summary(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Outcomes of all tests; the last entry of a test counts (a failed teardown after a passed call)."""
    tests = {entry["id"]: entry for entry in entries if "id" in entry}
    collected = {nodeid for entry in entries for nodeid in entry.get("collected", ())}
    skipped = Counter(entry["why"] for entry in tests.values() if entry["outcome"] == "skipped")
    missing = sorted(collected - set(tests))
    return {
        "counts": {**Counter(entry["outcome"] for entry in tests.values()), "not run": len(missing)},
        "failed": [entry for entry in tests.values() if entry["outcome"] in ("failed", "crashed")],
        "skipped": dict(skipped.most_common()),
        "not_run": missing,
        "tests": {nodeid: [entry["outcome"], entry["seconds"]] for nodeid, entry in sorted(tests.items())},
    }


def run_all(files: Sequence[Path], shares: int, deadline: float, out: Path, head: dict[str, Any]) -> dict[str, Any]:
    """All shares beside one another; `out` is renewed every few seconds."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        lines = [Path(folder) / f"share-{i}.jsonl" for i in range(shares)]
        threads = [
            threading.Thread(target=run_share, args=(files, file, i, shares, deadline)) for i, file in enumerate(lines)
        ]
        for thread in threads:
            thread.start()
        while True:
            over = not any(thread.is_alive() for thread in threads)
            found = summary([entry for file in lines for entry in told(file)])
            result = {**head, "complete": over, "seconds": round(time.time() - start, 1), **found}
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = out.with_name(f".{out.name}.{os.getpid()}")
            temporary.write_text(json.dumps(result, indent=1) + "\n")
            temporary.replace(out)
            if over:
                return result
            threads[0].join(timeout=5) if threads[0].is_alive() else time.sleep(1)


def main(arguments: Sequence[str] | None = None) -> int:
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks import gpu
    from benchmarks.timing import machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: what of it needs no GPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/tests-gpu-<device>.json")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--shares", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--no-build", action="store_true", help="take the compiled kernels as they are")
    parser.add_argument("files", nargs="*", type=Path, help="default: test_gpu.py, other tests for GPUs, the op tests")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device here")
    start = time.time()
    beside = gpu.results_file(options.device)
    out = (options.out or beside.with_name(f"tests-{beside.stem}.json")).absolute()
    head = {"machine": machine(), "device": options.device}
    if not options.no_build:
        head["build"] = gpu.build_kernels(options.device, gpu.BUILD_SECONDS)
    files = [file.absolute() for file in options.files] or chosen_files()
    result = run_all(files, options.shares, start + options.seconds, out, head)
    for entry in result["failed"]:
        print(f"{entry['outcome'].upper()} {entry['id']}: {entry['why'].strip().splitlines()[-1:]}")
    for reason, count in result["skipped"].items():
        print(f"skipped {count}: {reason}")
    print(", ".join(f"{count} {outcome}" for outcome, count in result["counts"].items()), f"in {result['seconds']} s")
    print(f"results: {out}")
    return 1 if result["failed"] or not result["counts"].get("passed") else 0


if __name__ == "__main__":
    sys.exit(main())
