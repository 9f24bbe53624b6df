"""One implementation for a run, and what is said about all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoact_kernels import native
from zoact_kernels.backend import environment, explain_layers, layer_problem, pin
from zoact_kernels.cpu_ops import Cpu
from zoact_kernels.dispatch import choose, using
from zoact_kernels.layers import zo_layers
from zoact_kernels.swap import ZOConfig, swap

compiled = pytest.mark.skipif(native.module() is None, reason=native.why_missing())


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 16))
    swap(model, ZOConfig(group_size=16, rank=2))
    return model


def test_environment_names_what_matters() -> None:
    about = environment()
    assert about["torch"].startswith(torch.__version__) and "implementation reference" in about
    assert about["implementation reference"] == "ready"


@compiled
def test_pin_takes_the_compiled_one_and_repeats_it(model: nn.Module) -> None:
    pinned = pin(model, 64, 2, 1)
    assert pinned["implementation"] == "cpu" and pinned["isa"] == native.isas()[0]
    assert pin(model, 64, 2, 1, pinned) == pinned
    other = {**pinned, "isa": native.isas()[-1]}
    assert pin(model, 64, 2, 1, other)["isa"] == native.isas()[-1]
    assert pin(model, 64, 2, 1, {**pinned, "isa": "abacus512"})["isa"] == native.isas()[0]


def test_pin_respects_using(model: nn.Module) -> None:
    with using("reference"):
        assert pin(model, 64, 2, 1)["implementation"] == "reference"
    assert pin(model, 64, 2, 1, {"implementation": "reference", "isa": None})["implementation"] == "reference"


def test_pin_of_layers_that_differ(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer that the first implementation declines keeps its own; which one runs never follows the rows."""
    monkeypatch.setattr(Cpu, "refusal", lambda self, p: "sixteen" if p.N == 16 else None)
    choose.cache_clear()
    with using("reference"):
        want = model(torch.ones(2, 48))
    pinned = pin(model, 64, 2, 1)
    assert pinned["implementation"] == "cpu,reference"
    assert pin(model, 64, 2, 1, pinned) == pinned
    with using(pinned["implementation"], op="zo_linear"):
        for rows in (2, 4096):
            told = explain_layers(model, rows)
            assert {name: t.chosen for name, t in told.items()} == {"0": "cpu", "2": "reference"}
        assert torch.allclose(model(torch.ones(2, 48)), want, atol=1e-5)
    choose.cache_clear()


def test_explain_layers(model: nn.Module) -> None:
    told = explain_layers(model, rows=7, groups=2)
    assert set(told) == {"0", "2"}
    problem = layer_problem(zo_layers(model)["0"], 8, 2, 1, torch.float32)
    assert (problem.M, problem.N, problem.K, problem.rank, problem.seeds, problem.groups) == (8, 32, 48, 2, 1, 2)
