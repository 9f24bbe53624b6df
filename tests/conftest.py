"""What every test starts from: few threads, no network, seeds at zero, memory that shows when nobody wrote it.

`--strict-prerequisites` (`make test STRICT=1`, CI) turns a skip into a failure: there every prerequisite is installed,
so a skip would be a test that silently ran nothing. Only tests marked `gpu` may still skip.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Two cores: one process takes both, two pytest-xdist workers take one each (spinning OpenMP threads would fight).
THREADS = min(1 if "PYTEST_XDIST_WORKER" in os.environ else 2, os.cpu_count() or 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-prerequisites", action="store_true", help="a skipped test is a failed test")
    parser.addoption("--dump-calls", metavar="DIR", help="write the kernel calls of the tests there (`make sanitize`)")


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--dump-calls"):
        from dump_calls import CallDump, native

        if native.module() is None:
            raise pytest.UsageError(f"--dump-calls: {native.why_missing()}")
        config.pluginmanager.register(CallDump(Path(folder)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Every test sees the same generators and threads, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  for libraries that use the global generator
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def one_thread(clean_slate: None) -> None:
    """For bits of torch's own kernels, whose sums may follow the threads, and for forked children, without a pool."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN (integers: the largest value): an output that nobody wrote passes no comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # what fill_uninitialized_memory (default True) hangs on
    yield
    torch.use_deterministic_algorithms(False)


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"--strict-prerequisites: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    excused = hasattr(report, "wasxfail") or item.get_closest_marker("gpu")
    if report.skipped and not excused and item.config.getoption("--strict-prerequisites"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield  # of a whole file: pytest.importorskip at its top
    if report.skipped and collector.config.getoption("--strict-prerequisites"):
        _fail(report)
    return report
