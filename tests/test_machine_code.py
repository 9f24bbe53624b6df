"""The machine code of the Triton kernels, compiled without a GPU: no spills, tensor cores in the K loop, wide accesses.

`make test` compiles a few launches for one architecture, `make soak` every kernel in every shipped configuration for
all. What was reached stands in benchmarks/results/machine_code.json: `python tests/machine_code.py` writes it anew.
"""

from __future__ import annotations

import json
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
        assert not code.faults(case, launch, built, target), f"{launch.kernel.__name__} for {target}"
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
    assert not {row: found["faults"] for row, found in ROWS.items() if found["faults"]}


@pytest.mark.parametrize("target", code.TARGETS)
def test_tensor_cores_multiply_at_one_depth(target: str) -> None:
    """A tile for few rows and one for many step through k alike, or the bits of a row would depend on M (law 2.4).

    Half precision: 16. fp32 is multiplied without tensor cores, on CDNA 3 by fp32 matrix instructions of depth 4. Of
    sm_100 the name of the instruction does not tell.
    """
    depths = {row: found["depth"] for (row, t), found in ROWS.items() if t == target and row.endswith("product_kernel")}
    assert all(depth in ([], ["4" if "-f32-M" in row else "16"]) for row, depth in depths.items())
    assert any(depths.values()) or target == "sm_100"


def test_a_spill_is_seen() -> None:
    """The gate itself: a kernel held to 64 registers spills, and is told so."""
    (launch,) = [x for x in code.launches("linear-nf4-bf16-M64", "sm_80") if x.kernel.__name__ == "product_kernel"]
    tight = launch._replace(options=launch.options | {"maxnreg": 64})
    assert any(
        "stack" in fault for fault in code.faults("linear-nf4-bf16-M64", tight, code.build(tight, "sm_80"), "sm_80")
    )
