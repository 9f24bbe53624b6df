"""Fair timing on a shared machine: interleaved rounds, medians with spread, ratios round by round."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SAMPLE_SECONDS = 0.01  # a sample repeats its call until it lasts this long: the clock's grain is far below
ROUNDS = 15
BUDGET_SECONDS = 20.0  # of one case and provider; fewer rounds, at least 3, where a call is slow


@dataclass(frozen=True)
class Times:
    """Seconds per call, one sample a round."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        ordered = sorted(self.samples)
        return ordered[round(q * (len(ordered) - 1))]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def interleaved(
    calls: Mapping[str, Callable[[int], Any]], ring: int, threads: int, rounds: int = ROUNDS
) -> dict[str, Times]:
    """Time the calls in turn, A B C A B C …, so that drift of the machine meets all of them.

    One thread is timed in CPU time, since a neighbour's load then hardly shows; more threads in wall-clock time. The
    index that a call gets walks around a ring of that size.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    repeats = {}
    for name, call in calls.items():
        for i in range(min(ring, 3)):
            call(i)  # libraries compile and allocate at the first call
        start = clock()
        call(0)
        once = max(clock() - start, 1e-6)
        repeats[name] = max(1, min(1000, round(SAMPLE_SECONDS / once)))
        rounds = max(3, min(rounds, int(BUDGET_SECONDS / (repeats[name] * once))))
    position = dict.fromkeys(calls, 0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            i, count = position[name], repeats[name]
            start = clock()
            for _ in range(count):
                call(i)
                i = i + 1 if i + 1 < ring else 0
            samples[name].append((clock() - start) / count)
            position[name] = i
    return {name: Times(tuple(values)) for name, values in samples.items()}


def ratio(a: Times, b: Times) -> Times:
    """a / b, round by round."""
    return Times(tuple(x / y for x, y in zip(a.samples, b.samples, strict=True)))


def roof() -> dict[str, float]:
    """Measured limits of one core here: flop/s, bytes/s from cache (4 MB) and from memory (512 MB); {} without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        source = Path(__file__).with_name("probe.cpp")
        subprocess.run(
            [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-mprefer-vector-width=512", "-shared", "-fPIC",
             str(source), "-o", str(library)],
            check=True,
        )  # fmt: skip
        probe = ctypes.CDLL(str(library))
        probe.fma_peak.restype = probe.read_bandwidth.restype = ctypes.c_double
        probe.read_bandwidth.argtypes = [ctypes.c_int64]
        return {
            "flops": probe.fma_peak(),
            "cache_bandwidth": probe.read_bandwidth(4 << 20),
            "memory_bandwidth": probe.read_bandwidth(512 << 20),
        }


def machine() -> dict[str, Any]:
    """Where and with what a result was measured."""
    from importlib.metadata import PackageNotFoundError, version

    def version_of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu = "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
        flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    else:
        flags = []
    wanted = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    packages = ("torch", "bitsandbytes", "onnxruntime", "openvino", "auto-round-lib")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "flags": [flag for flag in wanted if flag in flags],
        "python": platform.python_version(),
        "versions": {name: v for name in packages if (v := version_of(name))},
        "commit": commit.stdout.strip() or None,
        "torch_threads": torch.get_num_threads(),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
