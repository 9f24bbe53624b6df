"""The committed support matrix: a refusal inside it is red (law 2.7), and so is a promise that nobody wrote down."""

from __future__ import annotations

import pytest
import support

from zoact_kernels import native
from zoact_kernels.dispatch import Reference

pytest.importorskip("triton")


@pytest.mark.skipif(native.module() is None, reason=native.why_missing())
def test_support_matrix() -> None:
    committed, now = support.TABLE.read_text(encoding="utf-8").splitlines(), support.text().splitlines()
    gone = [line for line in committed if line not in now]
    new = [line for line in now if line not in committed]
    assert committed == now, f"python tests/support.py writes it anew; committed {gone[:5]}, now {new[:5]}"


def test_the_reference_takes_every_row() -> None:
    for row, problem in support.rows():
        for column in support.COLUMNS:
            assert Reference().refusal(support.elsewhere(problem, row[1], column)) is None
