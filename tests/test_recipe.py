"""benchmarks.recipe: variants are recipes, bases stay comparable, the table pairs rows and names what is missing."""

from __future__ import annotations

import base64
import functools
from typing import Any

import numpy as np
import pytest
import torch
from tails import fresh, words

from benchmarks import recipe as room
from zoact_kernels.losses import group_losses
from zoact_kernels.methods.node import ZOActNode
from zoact_kernels.trainables import Nodes

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", room.VARIANTS)
def test_a_variant_differs_in_what_it_says(name: str) -> None:
    variant, usual = room.VARIANTS[name], room.recipe_of(room.VARIANTS[room.DEFAULT], 600)
    given = room.recipe_of(variant, 600)
    apart = {key for key, value in vars(given).items() if value != vars(usual)[key]}
    assert apart == {"options" if key in room.OPTIONS else key for key in variant.changes}
    assert (
        name == room.DEFAULT
        or bool(apart)
        or bool(variant.still)
        or variant.bases is not room.VARIANTS["default"].bases
        or variant.noise is not room.noises
    )


def test_orthogonal_noise_is_as_long_and_reaches_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = ZOActNode(fresh(), rank=6, outputs=4, queries=2)
    batch = words(*range(1, 9))
    optimizer.prepare([batch], functools.partial(group_losses, optimizer.model))
    node = next(t for t in optimizer.trainables.values() if isinstance(t, Nodes))

    def noise_of_a_step() -> torch.Tensor:
        optimizer.iteration = 0
        optimizer.step_on([functools.partial(group_losses, optimizer.model, batch)], batch.leading)
        return node.noise.clone()

    drawn = noise_of_a_step()
    monkeypatch.setattr(room.between, "noises", room.orthogonal)
    turned = noise_of_a_step()
    assert torch.allclose(turned.norm(dim=2), drawn.norm(dim=2), rtol=1e-5)
    assert float((turned[0] * turned[1]).sum(-1).abs().max()) < 1e-5 < float((drawn[0] * drawn[1]).sum(-1).abs().min())
    parallel = (turned[0] * drawn[0]).sum(-1).abs() / drawn[0].square().sum(-1)
    assert torch.allclose(parallel, torch.ones_like(parallel), rtol=1e-5)


def test_bases_are_changed_as_told() -> None:
    optimizer = ZOActNode(fresh(), rank=6, outputs=2)
    optimizer.prepare([words(*range(1, 25))], functools.partial(group_losses, optimizer.model))
    layers = [t.layer for t in optimizer.trainables.values()]  # type: ignore[attr-defined]
    before = [layer.basis.clone() for layer in layers]
    room.plain_bases(optimizer)
    for layer, whitened in zip(layers, before, strict=True):
        norms = layer.basis.norm(dim=0)
        assert torch.allclose(norms, norms[:1].expand_as(norms)) and not torch.equal(layer.basis, whitened)
        # The energy of x A: one where it is whitened, rank in all
        energy = (norms / whitened.norm(dim=0)).square().sum()
        assert torch.allclose(energy, torch.tensor(6.0))
    room.random_outputs(optimizer)
    for t in optimizer.trainables.values():
        if isinstance(t, Nodes):
            assert torch.allclose(t.left.T @ t.left, torch.eye(2), atol=1e-5)


def row(name: str, correct: list[int]) -> dict[str, Any]:
    bits = base64.b64encode(np.packbits(np.array(correct, np.uint8)).tobytes()).decode()
    return {
        "variant": name, "steps": 3, "trained": 5, "pairs": 1200, "validation": [0.5, 0.75], "loss": 0.61,
        "accuracy": float(np.mean(correct)), "correct": bits, "n": len(correct),
    }  # fmt: skip


def test_table() -> None:
    rows = {n: row(n, hits) for n, hits in (("default", [1, 1, 0, 1, 0]), ("rank 32", [1, 0, 0, 0, 0]))}
    text = room.table(rows)
    # Differences 0, -1, 0, -1, 0: mean -0.4, deviation 0.5477
    assert "| rank 32 | 32 | 5 | 1,200 | 0.500, 75.0 % | 0.610, 20.0 % | -40.0 ± 24.5 |" in text
    assert "| default |" in text and "Not run yet: no values, last alone" in text
