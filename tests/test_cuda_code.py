"""csrc/cuda as machine code, compiled without a GPU: no spills, tensor cores in the K loop, wide accesses.

`make test` compiles for one architecture, `make soak` the library as setup.py builds it. What was reached stands in
benchmarks/results/cuda_machine_code.json: `python tests/cuda_code.py` writes it anew.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cuda_code as code
import pytest
from cuda_lane import CSRC, Lane, planted

TABLE = json.loads(code.TABLE.read_text(encoding="utf-8"))
ROWS = {(kernel, arch): code.Code(*row) for kernel, archs in TABLE["kernels"].items() for arch, row in archs.items()}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile csrc/cuda for a GPU")
needs_disassembler = pytest.mark.skipif(
    None in (code.tool("nvdisasm"), code.tool("cuobjdump")), reason="no nvdisasm or cuobjdump to read machine code"
)


def assert_as_listed(built: dict[str, code.Code], arch: str) -> None:
    """No faults, and nothing worse than in the table, which `python tests/cuda_code.py` writes."""
    for kernel, found in built.items():
        listed = ROWS[kernel, arch]
        found = found._replace(shared=listed.shared)
        assert not code.faults(kernel, found, arch), f"{kernel} for {arch}: {found}"
        if TABLE["nvcc"] == code.compiler():
            assert found.registers <= listed.registers, f"{kernel} for {arch}: {found}"
            assert found.others <= listed.others, f"{kernel} for {arch}: {found}"
            assert found.hmma == listed.hmma, f"{kernel} for {arch}: {found}"


@needs_nvcc
@needs_disassembler
def test_machine_code(tmp_path: Path) -> None:
    """No stack, no spills, few registers; products on tensor cores in the K loop, every copy of 16 bytes."""
    built = code.build("90a", tmp_path)
    assert built.keys() == TABLE["kernels"].keys()
    assert_as_listed(built, "90a")


@pytest.mark.soak
@needs_nvcc
@needs_disassembler
def test_machine_code_of_the_library(tmp_path: Path) -> None:
    """The same of what setup.py builds, for all architectures."""
    built = code.build_all(tmp_path)
    assert built.keys() >= set(code.ARCHS)
    for arch in code.ARCHS:
        assert built[arch].keys() == TABLE["kernels"].keys()
        assert_as_listed(built[arch], arch)


def test_table_is_whole_and_faultless(tmp_path: Path) -> None:
    """Every kernel for every architecture, within all limits; shared memory is what the launchers ask for."""
    assert all(tuple(archs) == code.ARCHS for archs in TABLE["kernels"].values())
    assert {row: found for row, row_code in ROWS.items() if (found := code.faults(row[0], row_code, row[1]))} == {}
    shared = code.shared_memory(Lane(tmp_path))
    assert {k: v for (k, _), row in ROWS.items() if (v := row.shared)} == {k: v for k, v in shared.items() if v}
    assert {"product_kernel", "noise_kernel"} <= {name.partition("<")[0] for name in shared}


@needs_nvcc
@needs_disassembler
def test_a_spill_is_seen(tmp_path: Path) -> None:
    """The gate itself: with 16 blocks to a multiprocessor, hence 32 registers, Adam spills, and is told so."""
    tight = planted(CSRC, tmp_path, "cuda/zo_update.cu", "(THREADS) update", "(THREADS, 16) update")
    built = code.build("80", tmp_path, ("zo_update",), tight)
    faults = code.faults("update_kernel<adamw, normal>", built["update_kernel<adamw, normal>"], "80")
    assert any("stack" in fault for fault in faults), faults


def test_faults_are_named() -> None:
    good = ROWS["product_kernel<bf16, int4, false, 8>", "90a"]
    for fields, words in (
        (dict(registers=256), "256 registers"), (dict(hmma=0, others=0.0), "no tensor-core"), (dict(outside=2), "2 of"),
        (dict(others=24.1), "24.1 other"), (dict(narrow=1), "fewer than 16"), (dict(wide=0), "no access of 16"),
        (dict(shared=228 * 1024), "shared memory"), (dict(local=3), "3 accesses"),
    ):  # fmt: skip
        (fault,) = code.faults("product_kernel<bf16, int4, false, 8>", good._replace(**fields), "90a")
        assert words in fault
