"""The machine code of the Triton kernels, compiled without a GPU: no spills, tensor cores in the K loop, wide accesses.

`make test` compiles a few launches for one architecture, `make soak` every kernel in every shipped configuration for
all. What was reached stands in benchmarks/results/machine_code.json: `python tests/machine_code.py` writes it anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton interprets here (TRITON_INTERPRET); it compiles nothing", allow_module_level=True)

import machine_code as code  # noqa: E402  needs Triton

TABLE: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "benchmarks/results/machine_code.json").read_text(encoding="utf-8")
)
ROWS = {(row, target): found for row, targets in TABLE["cases"].items() for target, found in targets.items()}


def check(case: str, target: str) -> None:
    for launch in code.launches(case, target):
        built = code.build(launch, target)
        found = code.unexcused(code.faults(case, launch, built, target), target)
        assert not found, f"{launch.kernel.__name__} for {target}: {found}"
        if triton.__version__ == TABLE["triton"]:
            found = ROWS[f"{case} {launch.kernel.__name__}", target]
            assert built.registers <= found["registers"], "more registers than the table says: write it anew"


@pytest.mark.parametrize("case", code.QUICK)
def test_machine_code(case: str) -> None:
    check(case, "sm_90")


@pytest.mark.soak
@pytest.mark.parametrize("case", code.CASES)
@pytest.mark.parametrize("target", code.TARGETS)
def test_machine_code_everywhere(case: str, target: str) -> None:
    check(case, target)


def test_table_is_whole_and_faultless() -> None:
    """Every case for every target, nothing spilt, nothing missing."""
    assert {row.split()[0] for row in TABLE["cases"]} == set(code.CASES)
    assert all(set(targets) == set(code.TARGETS) for targets in TABLE["cases"].values())
    assert not {row: found["faults"] for row, found in ROWS.items() if code.unexcused(found["faults"], row[1])}


def test_exceptions_are_needed() -> None:
    for target, (fault, reason) in code.EXCEPTIONS.items():
        assert reason
        assert any(fault in found["faults"] for row, found in ROWS.items() if row[1] == target), f"{target}: {fault}"


@pytest.mark.parametrize("target", [target for target, core in code.TENSOR_CORE.items() if core in code.BUDGET])
def test_the_k_loop_keeps_its_budget(target: str) -> None:
    """int4, 64 rows of x: what stands beside each tensor-core instruction, and how x and w are loaded."""
    rows = {
        row: found
        for (row, t), found in ROWS.items()
        if t == target and re.match(r"linear-int4\S*-b?f16-M64\S* product_kernel", row)
    }
    assert len(rows) == 5
    for row, found in rows.items():
        assert found["tensor_core_in_k_loop"], row
        assert found["others_per_tensor_core"] <= code.BUDGET[code.TENSOR_CORE[target]], row
        assert found["wide_loads_in_k_loop"] >= 5, row  # of a thread: 4 of x, 1 of codes


@pytest.mark.parametrize("target", code.TARGETS)
def test_tensor_cores_multiply_at_one_depth(target: str) -> None:
    """A tile for few rows and one for many step through k alike, or the bits of a row would depend on M (law 2.4).

    Half precision: 16, tf32: 8. fp32 is multiplied without tensor cores, on CDNA 3 by fp32 matrix instructions of depth
    4. Of sm_100 the name of the instruction does not tell.
    """
    depths = {row: found["depth"] for (row, t), found in ROWS.items() if t == target and row.endswith("product_kernel")}
    assert all(
        depth in ([], ["8" if "-tf32-M" in row else "4" if "-f32-M" in row else "16"]) for row, depth in depths.items()
    )
    assert any(depths.values()) or target == "sm_100"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tf32_only_where_asked(target: str) -> None:
    """Of an fp32 x: tensor cores in the K loop where torch is set to tf32, none anywhere else or without that."""
    core = code.TENSOR_CORE[target]
    for launch in code.launches("linear-int4-tf32-M64-split", target):
        built = code.build(launch, target)
        loop = "\n".join(built.k_loop(core))
        assert built.text.count(core) == loop.count(core) == loop.count("TF32")
        assert ("TF32" in loop) == (launch.kernel.__name__ == "product_kernel")
    for launch in code.launches("linear-int4-f32-M64-split", target):
        assert core not in code.build(launch, target).text


def test_a_slow_k_loop_is_seen() -> None:
    """The budget and the width of loads: blocks across rows address every element, and would not do as int4."""
    launch = next(
        x for x in code.launches("linear-fp4-flat-bf16-M64", "sm_90") if x.kernel.__name__ == "product_kernel"
    )
    found = code.faults("linear-int4-bf16-M64", launch, code.build(launch, "sm_90"), "sm_90")
    assert any("instructions beside each HGMMA" in fault for fault in found)
    assert "not all of x and w in 16-byte loads" in found


def test_a_spill_is_seen() -> None:
    """The gate itself: a kernel held to 64 registers spills, and is told so."""
    (launch,) = [x for x in code.launches("linear-nf4-bf16-M64", "sm_80") if x.kernel.__name__ == "product_kernel"]
    tight = launch._replace(options=launch.options | {"maxnreg": 64})
    assert any(
        "stack" in fault for fault in code.faults("linear-nf4-bf16-M64", tight, code.build(tight, "sm_80"), "sm_80")
    )
