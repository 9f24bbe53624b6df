"""The Triton kernels against the reference, in Triton's interpreter, and where dispatch takes them.

Half of what the interpreter takes is in test_triton_dense.py, for another worker of `make test`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import interpreting
import pytest
import test_triton_dense
import torch

from zoact_kernels.dispatch import Problem, explain
from zoact_kernels.triton_ops import host, tiles

pytest.importorskip("triton")
FILES = [stem for stem in interpreting.FILES if stem not in test_triton_dense.FILES]


@pytest.mark.parametrize("stem", FILES)
def test_interpreted(stem: str) -> None:
    interpreting.run(stem, "not soak")


@pytest.mark.soak
def test_interpreted_grid() -> None:
    interpreting.run("zo_linear", "soak")


def test_refuses_the_cpu() -> None:
    told = explain(Problem("zo_linear", "cpu", torch.float32, 1, 8, 8))
    assert told.refusals["triton"] == "tensors are on cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it has a device")
def test_refuses_without_a_device() -> None:
    told = explain(Problem("zo_linear", "cuda", torch.float32, 1, 8, 8))
    assert told.refusals["triton"] == "torch finds no CUDA or ROCm device"
    assert told.chosen == "reference"


@pytest.mark.parametrize(("arch", "chosen"), [("sm_75", "reference"), ("sm_80", "triton"), ("gfx942", "triton")])
def test_takes_a_device_that_is_elsewhere(arch: str, chosen: str) -> None:
    """Dispatch looks at the problem alone, so it tells what another machine would run."""
    problem = Problem("zo_linear", "cuda", torch.bfloat16, 1, 8, 8, arch=arch)
    told = explain(problem)
    assert told.chosen == chosen
    assert "below sm_80" in told.refusals.get("triton", "below sm_80")


@pytest.fixture
def precision() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"  # else the older switches raise from now on
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    ("ask", "tf32"),
    [
        (lambda: None, False),
        (lambda: torch.set_float32_matmul_precision("high"), True),
        (lambda: torch.set_float32_matmul_precision("highest"), False),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), True),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), True),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"), False),
    ],
)
def test_tf32_as_torch_is_set(ask: Callable[[], None], tf32: bool) -> None:
    """Only of an fp32 x on "cuda", without a warning, whichever of torch's switches was used."""
    ask()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device, dtype, expected in (("cuda", torch.float32, tf32), ("cuda", torch.bfloat16, False),
                                        ("cpu", torch.float32, False)):  # fmt: skip
            x = SimpleNamespace(dtype=dtype, device=torch.device(device))
            assert host.tf32(x) is expected  # type: ignore[arg-type]


def test_tf32_is_told() -> None:
    problem = Problem("zo_linear", "cuda", torch.float32, 8, 8, 8, arch="sm_90")
    assert explain(problem).products == "float32"
    assert explain(problem._replace(tf32=True)).products == "float32 as tf32"


@pytest.mark.parametrize("N", [1, 64, 1000, 4096, 11008, 128256])
@pytest.mark.parametrize("K", [1, 100, 512, 1024, 4096, 14336])
def test_splits_cover_k(N: int, K: int) -> None:
    """No empty split, none missing, each a whole number of steps: what a row's bits depend on."""
    count, size = tiles.splits(N, K)
    assert (count - 1) * size < K <= count * size
    assert size % tiles.K_STEP == 0
    assert count == 1 or size >= tiles.CHUNK
