"""What the study counts and measures: forwards, cosines with the gradient, slopes and curvatures."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_study import TINY, patched

from zoact_kernels.layers import zo_layers
from zoact_kernels.losses import group_losses
from zoact_kernels.methods import create
from zoact_kernels.runlog import RunLog
from zoact_kernels.study import curvature, measures, meter, plan, settings, work
from zoact_kernels.study.statistics import expected_cosine


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, tmp_path_factory.getbasetemp() / "study")


def test_the_meter_counts_blocks(tiny: None) -> None:
    setting = settings.load("tiny", "colours")
    batch = setting.training.dataset.batch(range(5))
    counted = meter.Meter(setting.model)
    group_losses(setting.model, batch, 3)
    assert counted.forwards == 15
    counted.paused = True
    group_losses(setting.model, batch)
    counted.paused = False
    hidden = torch.randn(4, 3, 48)
    positions = setting.model.model.rotary_emb(hidden, torch.arange(3)[None])
    setting.model.model.layers[1](hidden, position_embeddings=positions)  # the second of two blocks alone
    assert counted.forwards == 17
    settings.give_basis(setting, 1, work.recipe_of(plan.contender("zo-act"), lr=1.0, steps=1, seed=0))
    before = counted.forwards
    group_losses(setting.model, batch, grad=True).mean().backward()
    assert counted.forwards == before + 15
    counted.close()
    group_losses(setting.model, batch)
    assert counted.forwards == before + 15


def test_the_meter_counts_a_tail(tiny: None) -> None:
    """New sequences whole, the values' block once more for every part of their inputs, label rows by their share."""
    setting = settings.load("tiny", "colours")
    recipe = replace(work.recipe_of(plan.NODE, lr=1e-3, steps=3, seed=0), basis_batches=1, options={"rank": 4})
    optimizer = recipe.create(setting.model)
    first, second, third = (setting.training.dataset.batch(range(i, i + 5)) for i in (0, 5, 10))  # 15 texts there are
    evaluate = partial(group_losses, setting.model)
    counted = meter.Meter(setting.model)
    optimizer.prepare([first], evaluate)
    before, heads = counted.forwards, setting.model.config.num_attention_heads
    assert len(setting.model.model.layers) == 2 and before >= 5 * (1 + heads / 2)

    def rows_of(batch: Any) -> float:
        return 4 * 5 / batch.input_ids.shape[1] / 2

    optimizer.step_on([partial(evaluate, first)], first.leading)  # kept since its basis
    assert counted.forwards == pytest.approx(before + rows_of(first))
    counted.paused = True
    with optimizer.forking():
        evaluate(second)
    counted.paused = False
    assert counted.forwards == pytest.approx(before + rows_of(first))
    optimizer.step_on([partial(evaluate, third)], third.leading)
    once = counted.forwards - before - rows_of(first) - rows_of(third)
    assert once >= 5 * (1 + heads / 2)
    assert once <= 9 * (1 + heads / 2)  # some lengths are looked at alone


def test_steps_on_known_examples_are_no_measure_of_a_step() -> None:
    class Counter:
        forwards = 0.0

    watch = work.Measured(Counter(), math.inf, 2)  # type: ignore[arg-type]
    watch.meter.forwards = 7.0  # type: ignore[misc]
    watch.started(0, 5, "cpu")
    for step, forwards in enumerate((7.5, 8.0, 18.0, 28.0, 38.0)):
        watch.meter.forwards = forwards  # type: ignore[misc]
        watch.stepped(SimpleNamespace(step=step), None)  # type: ignore[arg-type]
    assert (watch.setup, watch.per_step) == (8.0, 10.0)
    assert plan.NODE.known_steps == 64 and plan.contender("zo-act").known_steps == 0
    assert plan.contender(plan.NODE.name) is plan.NODE


def test_a_step_that_finds_all_rows_kept_is_no_cost(tiny: None, tmp_path: Path) -> None:
    who = replace(plan.NODE, recipe={"basis_batches": 1})
    found = work.cost(TINY, who, tmp_path, math.inf)
    with RunLog.open(tmp_path / "log") as log:
        took = [row.seconds for row in log.steps()]
    assert len(took) == who.known_steps + work.COST_STEPS == 11
    assert found["step_seconds"] == pytest.approx(float(np.median(took[1:])), rel=1e-5)
    assert found["trained"] > 0 and found["setup_forwards"] > 16  # the basis' examples, and their values' block again


def test_cosines_are_as_theory_has_them() -> None:
    """A gradient of low rank and one of full rank, a basis that holds a part of it; prime sizes."""
    torch.manual_seed(3)
    basis = torch.linalg.qr(torch.randn(31, 2)).Q
    for gradient in (torch.randn(23, 3) @ torch.randn(3, 31), torch.randn(23, 31)):
        for structure, draws, seen, error, theory, dense in measures.cosines(gradient, 17, basis, 400):
            assert draws == 400 and abs(seen - theory) < 4 * error, structure
            if structure == "dense":
                assert theory == pytest.approx(dense) == pytest.approx(expected_cosine(23 * 31), rel=1e-4)
            if structure == "right":
                inside = float((gradient @ basis).norm() / gradient.norm())
                assert theory == pytest.approx(inside * expected_cosine(46), rel=1e-4)


def test_expected_cosine() -> None:
    """E|cos| in one dimension is 1, in two 2 / pi, in three 1 / 2; far out sqrt(2 / (pi d))."""
    assert [expected_cosine(d) for d in (1, 2, 3)] == pytest.approx([1, 2 / math.pi, 0.5])
    assert expected_cosine(1e6) == pytest.approx(math.sqrt(2 / (math.pi * 1e6)), rel=1e-6)


def test_gradients_and_derivatives_agree(tiny: None) -> None:
    """What two forwards see is the product of the direction with the gradient in C, which is grad W times A."""
    setting = settings.load("tiny", "colours")
    layers = zo_layers(setting.model)
    settings.give_basis(setting, 2, work.recipe_of(plan.contender("zo-act"), lr=1.0, steps=1, seed=0))
    batch = setting.training.dataset.batch(range(6))
    table = measures.derivatives(setting.model, batch, (1e-2,), 6)
    seen, exact = np.array([row[2] for row in table]), np.array([row[3] for row in table])
    assert np.abs(seen - exact).max() < 0.05 * np.abs(exact).max()
    coeffs = {name: layer.coeff for name, layer in layers.items() if layer.coeff is not None}
    bases = {name: layers[name].basis for name in coeffs}
    inner = torch.autograd.grad(group_losses(setting.model, batch, grad=True).mean(), list(coeffs.values()))
    whole = measures.gradients(settings.plain(setting), [batch], coeffs)
    for name, part in zip(coeffs, inner, strict=True):
        wanted = whole[name] @ bases[name]
        assert torch.allclose(part, wanted, atol=1e-5 * float(wanted.abs().max()) + 1e-7)
    shares = measures.shares(whole[name], torch.eye(whole[name].shape[1]), (1, whole[name].shape[1]))
    assert 0 <= shares[0] < shares[1] == 1


def test_the_gain_of_a_quadratic_is_slope_over_trace() -> None:
    """Loss g w + w H w / 2, directions in a subspace: |P g|^2 / (2 tr P H P), whatever the length of z."""
    generator = np.random.default_rng(5)
    root, g = generator.normal(size=(200, 200)), generator.normal(size=200)
    for basis, length in ((np.eye(200), 1.0), (np.linalg.qr(generator.normal(size=(200, 60)))[0], 7.0)):
        z = length * generator.normal(size=(4000, basis.shape[1])) @ basis.T
        seen, error = curvature.gain(z @ g, np.square(z @ root).sum(1))
        inside = basis.T @ g
        wanted = float(inside @ inside) / (2 * float(np.square(root @ basis).sum()))
        assert abs(seen - wanted) < 4 * error and error < 0.05 * seen


def test_slope_and_curvature_are_those_of_materialised_weights(tiny: None) -> None:
    setting = settings.load("tiny", "colours")
    settings.give_basis(setting, 2, work.recipe_of(plan.contender("zo-act"), lr=1.0, steps=1, seed=0))
    layers = {name: layer for name, layer in zo_layers(setting.model).items() if layer.basis is not None}
    directions = {name: (layer.basis, layer.param_id) for name, layer in layers.items()}
    batch, sigma = setting.training.dataset.batch(range(6)), 0.05
    optimizer = create("zo-act", setting.model, optimizer="sgd", lr=curvature.NO_STEP, sigma=sigma)
    seeds: list[torch.Tensor] = []
    step_on = optimizer.step_on
    optimizer.step_on = lambda *given: seeds.append((found := step_on(*given)).seeds) or found
    slopes, bends = curvature.curvatures(setting.model, optimizer, batch, 3)
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    plain, losses = settings.plain(setting), []
    for seed in seeds:
        for sign in (1, -1, 0):
            for name, (basis, param_id) in directions.items():
                z = torch.empty(weights[name].shape[0], basis.shape[1])
                measures.fill_normal(z, seed, param_id)
                plain.get_submodule(name).weight.data = weights[name] + sign * sigma * z @ basis.T
            losses.append(float(group_losses(plain, batch).double().mean()))
    for draw, (slope, bend) in enumerate(zip(slopes, bends, strict=True)):
        up, down, middle = losses[3 * draw : 3 * draw + 3]
        # A few roundings of losses near 2: 1e-6 over sigma^2
        assert slope == pytest.approx((up - down) / (2 * sigma), abs=2e-5)
        assert bend == pytest.approx((up + down - 2 * middle) / sigma**2, abs=8e-4)
        assert abs(bend) > 8e-3
