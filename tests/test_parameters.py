"""Tables that row groups have noise of their own in, looked up once for all sequences, as BERT does with positions."""

from __future__ import annotations

import pytest
import torch
from test_methods_dense import T, V, run, swapped
from torch import Tensor, nn

from zoact_kernels import methods
from zoact_kernels.layers import perturbed


class Placed(nn.Module):
    """A net beside a table of positions, which it looks up for all sequences at once, or for each."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.net, self.places, self.shared = swapped(), nn.Embedding(T, V), shared
        nn.init.normal_(self.places.weight, generator=torch.Generator().manual_seed(2))

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(T)[None]
        return self.net(ids) + self.places(places if self.shared else places.expand(ids.shape))


WAYS = [({}, 1), ({}, 2), ({"mode": "sequential"}, 1), ({"mode": "sequential"}, 2), ({"queries": 3, "spread": True}, 1)]
CASES = [(method, *way) for method in ("mezo", "lozo") for way in WAYS]


@pytest.mark.parametrize("method, changes, parts", [*CASES, ("forward-gradient-dense", {}, 1)])
def test_ids_that_all_sequences_share(method, changes, parts):
    results = []
    for shared in (True, False):
        optimizer = methods.create(method, Placed(shared), lr=0.01, sigma=0.05, floor_every=0, seed=4, **changes)
        begin = optimizer.state_dict()
        results.append((run(optimizer, 3, parts), optimizer.state_dict()))
    (steps, state), (wanted, other) = results
    assert all(torch.equal(a.losses, b.losses) for a, b in zip(steps, wanted, strict=True))
    assert all(torch.equal(tensor, other[key]) or key == "floor" for key, tensor in state.items())
    assert not torch.equal(state["coeff/places.weight"], begin["coeff/places.weight"])


def test_ids_of_nobody_knows_how_many_sequences():
    """Nothing before them says how many they stand for, and an earlier forward has no say."""
    model = Placed(True)
    methods.create("mezo", model)
    groups = torch.tensor([1]), torch.tensor([[0.1], [-0.1]])
    with perturbed(model, *groups):
        model(torch.zeros(4, T, dtype=torch.int64))
    with perturbed(model, *groups), pytest.raises(ValueError, match=r"layer 'places' got x of shape \(1, 5\)"):
        model.places(torch.arange(T)[None])
