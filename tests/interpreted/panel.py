"""zo_linear by way of a dequantised panel and a GEMM, against reference.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LINEAR, Case, cover, linear_arguments
from close import assert_no_worse
from test_zo_linear import OPTIONAL, example, expected
from torch import Tensor

from zoact_kernels import ops
from zoact_kernels.triton_ops import panel


def run(**arguments: Any) -> Tensor:
    with ops.using("panel"):
        return ops.zo_linear(**dict.fromkeys(OPTIONAL) | arguments)


@pytest.mark.parametrize("case", [c for c in cover(LINEAR) if c.weight != "none"][::2], ids=str)
def test_panel(case: Case) -> None:
    torch.manual_seed(0)
    arguments = linear_arguments(case)
    assert_no_worse(run(**arguments), expected(**arguments), expected(**arguments, compute=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_panels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several panels: the noise, C and bias of each are those of its rows."""
    monkeypatch.setattr(panel, "PANEL", 64 * 96 * dtype.itemsize)
    arguments = example(9, 200, 96, R=5, G=3, layout="row") | dict(coeff_groups=torch.randn(3, 200, 5))
    arguments["x"] = arguments["x"].to(dtype)
    assert_no_worse(run(**arguments), expected(**arguments), expected(**arguments, compute=torch.float64))


def test_panel_refuses_what_it_is_not_for() -> None:
    arguments = example(2, 33, 64, "none", layout="row")
    with pytest.raises(RuntimeError, match="without a weight has no panel"):
        run(**arguments)
