"""zo_dense_linear and dequantize in Triton's interpreter: half of what test_triton.py would take otherwise."""

from __future__ import annotations

import interpreting
import pytest

pytest.importorskip("triton")
FILES = ("dequantize", "zo_dense_linear")


@pytest.mark.parametrize("stem", FILES)
def test_interpreted(stem: str) -> None:
    interpreting.run(stem, "not soak")


@pytest.mark.soak
@pytest.mark.parametrize("stem", FILES)
def test_interpreted_grid(stem: str) -> None:
    interpreting.run(stem, "soak")
