"""Peak memory of a piece of work: of the process, as Linux counts it (/proc; elsewhere None), or of a CUDA device's
tensors, as torch's allocator counts them.

    with peak_memory() as peak:
        forward()
    peak.bytes        # highest resident set inside the block minus the resident set just before it

The counter VmHWM is reset through /proc/self/clear_refs, so a peak before the block does not hide one inside it; freed
heap is returned to the system first, so a block cannot live in memory that an earlier one left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _field(name: str) -> int | None:
    """A kB field of /proc/self/status in bytes; None where there is no such file."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def resident(device: str = "cpu") -> int | None:
    """Bytes in memory now: of this process (VmRSS), or of tensors on a device such as "cuda:1"."""
    if device == "cpu":
        return _field("VmRSS")
    import torch

    return int(torch.cuda.memory_allocated(device))


def highest(device: str = "cpu") -> int | None:
    """Largest `resident(device)` since the process began or `reset_highest(device)` (VmHWM)."""
    if device == "cpu":
        return _field("VmHWM")
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def reset_highest(device: str = "cpu") -> bool:
    """Set `highest(device)` back to `resident(device)`; False where the system does not allow it."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Collect garbage and hand the allocator's free memory back to the system, where it can (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass
class Peak:
    """Result of `peak_memory`: bytes above the start, filled in when the block ends; None if not measurable."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: str = "cpu") -> Iterator[Peak]:
    peak = Peak()
    trim()
    start = resident(device) if reset_highest(device) else None
    try:
        yield peak
    finally:
        end = highest(device)
        if start is not None and end is not None:
            peak.bytes = end - start


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP libraries mapped into this process; more than one means two thread pools."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {line.split()[-1] for line in maps.splitlines() if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))


def human(count: int | float | None) -> str:
    """1_536_000 -> "1.5 MB"; None -> "not measured"."""
    if count is None:
        return "not measured"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
