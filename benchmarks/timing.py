"""Fair timing on a shared machine: interleaved rounds, medians with spread, ratios round by round."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoact_kernels import memory

# A sample repeats its call until it lasts this long: the clock's grain is far below. A GPU's clocks are events, and its
# run is to fit into minutes.
SAMPLE_SECONDS = {"cpu": 0.01, "cuda": 0.0015}
ROUNDS = {"cpu": 15, "cuda": 25}
BUDGET_SECONDS = {"cpu": 20.0, "cuda": 0.5}  # of one case and provider; fewer rounds, at least 3, where a call is slow


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

    def over(self, calls: int) -> Times:
        """Seconds of one of the `calls` that a sample made."""
        return Times(tuple(sample / calls for sample in self.samples))

    def spread(self) -> dict[str, float]:
        """What a results file holds of it."""
        return {"p20": self.quantile(0.2), "p50": self.median, "p80": self.quantile(0.8), "n": len(self.samples)}


def clock_of(device: str, threads: int) -> Callable[[], float]:
    """A clock in seconds.

    CPU time for one thread, since a neighbour's load then hardly shows, wall-clock time for more; on a GPU the time of
    an event recorded now, after all work before it.
    """
    if device == "cpu":
        return time.process_time if threads == 1 else time.perf_counter
    start = torch.cuda.Event(enable_timing=True)
    start.record()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return start.elapsed_time(event) / 1e3

    return now


def interleaved(
    calls: Mapping[str, Callable[[int], Any]],
    ring: int,
    threads: int,
    device: str = "cpu",
    rounds: int | None = None,
    budget: float | None = None,
) -> dict[str, Times]:
    """Time the calls in turn, A B C A B C …, so that drift of the machine meets all of them.

    The index that a call gets walks around a ring of that size.
    """
    clock = clock_of(device, threads)
    rounds, budget = rounds or ROUNDS[device], budget or BUDGET_SECONDS[device]
    repeats = {}
    for name, call in calls.items():
        for i in range(min(ring, 3)):
            call(i)  # libraries compile and allocate at the first call
        start = clock()
        call(0)
        once = max(clock() - start, 1e-6)
        repeats[name] = max(1, min(1000, round(SAMPLE_SECONDS[device] / once)))
        rounds = max(3, min(rounds, int(budget / (repeats[name] * once))))
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


def synchronize(device: str) -> None:
    """Wait for the device; errors of work before show here."""
    if device != "cpu":
        torch.cuda.synchronize()


def captured(call: Callable[[int], Any], ring: int, device: str) -> Callable[[int], Any]:
    """A CUDA graph of call(0) … call(ring - 1), as a function that replays it: no time of the host, no idle GPU.

    On the CPU, where there are no graphs, a function that makes the calls.
    """
    if device == "cpu":
        return lambda i: [call(j) for j in range(ring)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)  # libraries allocate their workspaces for a stream
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(ring):
            call(i)
    return lambda i: graph.replay()


def ratio(a: Times, b: Times) -> Times:
    """a / b, round by round."""
    return Times(tuple(x / y for x, y in zip(a.samples, b.samples, strict=True)))


def peak_bytes(call: Callable[[int], Any], device: str) -> int | None:
    """Of one call above what is held before it, its result included; None where it can't be measured.

    On the CPU in a thread of its own, so that workspace which a thread keeps from call to call counts.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        return torch.cuda.max_memory_allocated() - before

    @torch.inference_mode()
    def alone() -> None:
        call(0)

    thread = threading.Thread(target=alone)
    with memory.peak_memory() as peak:
        thread.start()
        thread.join()
    return peak.bytes


def roof(device: str = "cpu", side: int = 8192, elements: int = 1 << 28) -> dict[str, float]:
    """Measured limits: flop/s and bytes/s.

    CPU: of one core, by fp32 fma, from cache (4 MB) and from memory (512 MB); {} without g++. GPU: by an fp16
    product of matrices of `side` and a copy of so many fp32 elements.
    """
    if device != "cpu":
        a = torch.randn(side, side, device=device, dtype=torch.float16)
        big = torch.empty(elements, device=device)
        taken = interleaved({"product": lambda i: a @ a, "copy": lambda i: big.clone()}, 1, 1, device)
        bandwidth = 8.0 * big.numel() / taken["copy"].quantile(0)
        return {
            "flops": 2.0 * side**3 / taken["product"].quantile(0),
            "cache_bandwidth": bandwidth,
            "memory_bandwidth": bandwidth,
        }
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


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,utilization.gpu"
    state = []
    with contextlib.suppress(OSError):
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        state = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return {
        "gpu": properties.name,
        "arch": f"{properties.major}.{properties.minor}",
        "gpu_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda or torch.version.hip,
        "state": state,
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
    commit = None
    with contextlib.suppress(OSError):  # no git
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    packages = ("torch", "triton", "transformers", "bitsandbytes", "onnxruntime", "openvino", "auto-round-lib")
    return {
        "cpu": cpu,
        **(_gpu() if torch.cuda.is_available() else {}),
        "cores": os.cpu_count(),
        "flags": [flag for flag in wanted if flag in flags],
        "python": platform.python_version(),
        "versions": {name: v for name in packages if (v := version_of(name))},
        "commit": commit,
        "torch_threads": torch.get_num_threads(),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
