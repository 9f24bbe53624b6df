"""Peaks as the kernel counts them."""

from __future__ import annotations

import sys

import pytest
import torch

from zoact_kernels.memory import human, openmp_runtimes, peak_memory, reset_highest, resident

linux = pytest.mark.xfail(sys.platform != "linux", reason="peaks are read from /proc")


@linux
def test_peak_memory_sees_what_comes_and_goes() -> None:
    held = torch.ones(4 << 20)
    with peak_memory() as peak:
        torch.ones(16 << 20).sum()  # 64 MB
    assert peak.bytes is not None and 60 << 20 < peak.bytes < 80 << 20
    with peak_memory() as peak:
        held.sum()
    assert peak.bytes is not None and peak.bytes < 8 << 20  # an earlier peak does not count


@linux
def test_reset_and_resident() -> None:
    assert reset_highest() and (resident() or 0) > 1 << 20


def test_openmp_runtimes() -> None:
    assert all("omp" in path for path in openmp_runtimes())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (7e12, "7000.0 GB"), (None, "not measured")],
)
def test_human(count: float | None, text: str) -> None:
    assert human(count) == text
