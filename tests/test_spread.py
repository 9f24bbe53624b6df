"""spread: the examples of a batch dealt out to the queries, whatever the method perturbs."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from close import assert_no_worse
from tails import BATCHES, plain, step
from torch import Tensor

from zoact_kernels import methods, rng
from zoact_kernels.layers import perturbed, zo_layers
from zoact_kernels.losses import Batch, group_losses
from zoact_kernels.methods import ZeroOrder
from zoact_kernels.swap import ZOConfig, swap

pytestmark = pytest.mark.usefixtures("one_thread")

Q, SIGMA = 4, 0.05
DENSE = ("mezo", "zo-adam", "lozo", "subzero")


def optimizer(method: str, kind: str = "llama", **arguments: Any) -> ZeroOrder:
    model: Any = plain(kind)
    dense = methods.METHODS[method].dense
    if method == "zo-act":
        swap(model, ZOConfig(group_size=8, quantizer="minmax", rank=2))
        generator = torch.Generator().manual_seed(2)
        for layer in zo_layers(model).values():
            if layer.rank:
                layer.set_basis(torch.linalg.qr(torch.randn(layer.in_features, layer.rank, generator=generator)).Q)
    else:
        swap(model, ZOConfig(format="dense", rank=0))
    assert dense or method in ("zo-act", "lozo", "subzero")
    given = {"queries": Q, "sigma": SIGMA, "lr": 0.0, "floor_every": 0, "seed": 3, "spread": True} | arguments
    return methods.create(method, model, **given)


def alone(own: ZeroOrder, share: Batch, seed: int) -> Tensor:
    """Losses [2, B / q] of a pair of groups on the examples that are its own, nothing else in the forward."""
    sigmas = torch.tensor([[SIGMA], [-SIGMA]])
    sizes = tuple(2 * size for size in share.leading)
    with torch.no_grad(), perturbed(own.model, torch.tensor([seed]), sigmas, own.noise, sizes):
        return group_losses(own.model, share, 2)


CLASSES = replace(
    BATCHES["words"],
    kind="sequence-classification",
    label_rows=torch.empty(0, dtype=torch.int64),
    label_positions=torch.empty(0, dtype=torch.int64),
    targets=torch.empty(0, dtype=torch.int64),
)
PAIRS = [("zo-act", "llama", name) for name in ("words", "phrases", "texts")]
PAIRS += [(method, "classifier", "") for method in ("zo-act", *DENSE)]


@pytest.mark.parametrize(("method", "kind", "batch"), PAIRS)
def test_every_pair_sees_its_own_examples(method: str, kind: str, batch: str) -> None:
    own, given = optimizer(method, kind), BATCHES.get(batch, CLASSES)
    result = step(own, given)
    shares = given.split(given.examples // Q)
    assert result.losses.shape == (2 * Q, 2)
    wanted = torch.cat([alone(own, share, int(seed)) for share, seed in zip(shares, result.seeds, strict=True)])
    truth = wanted.double()
    # Sums of another forward over the same numbers: fp32's error at these losses is that of the two, not of one
    pairs = zip(shares, result.seeds.tolist(), strict=True)
    parted = torch.cat([torch.cat([alone(own, part, s) for part in share.split(1)], dim=1) for share, s in pairs])
    worst = torch.maximum((parted - truth).abs().max(), torch.tensor(2.0**-20, dtype=torch.float64))
    assert float((result.losses - truth).abs().max()) <= 4 * float(worst)
    felt = (result.losses[0::2] - result.losses[1::2]).abs()
    assert float(felt.min()) > 64 * float(worst)  # a pair that saw the examples of another would show
    d = (wanted[0::2] - wanted[1::2]).mean(1) / (2 * SIGMA)
    assert float((result.weights.double() - d / Q).abs().max()) <= 4 * float(worst) / (SIGMA * Q)


def test_the_estimate_is_the_mean_of_d_z() -> None:
    """SGD moves C by lr times the mean over queries of d_j Z_j, d_j of the examples of query j alone."""
    own = optimizer("zo-act", lr=0.5, optimizer="sgd")
    before = {name: t.value.clone() for name, t in own.trainables.items()}
    result = step(own, BATCHES["words"])
    for name, t in own.trainables.items():
        steps = []
        for dtype in (torch.float32, torch.float64):
            d = (result.losses[0::2] - result.losses[1::2]).mean(1) / (2 * SIGMA)
            z = [torch.as_tensor(rng.noise("normal", int(s), int(t.param_id), *t.value.shape)) for s in result.seeds]
            g = (d.to(dtype)[:, None, None] * torch.stack(z).to(dtype)).mean(0)
            steps.append(before[name].to(dtype) - 0.5 * g)
        assert_no_worse(t.value.detach(), *steps, name)


def test_one_query_is_what_it_was() -> None:
    spread, usual = optimizer("zo-act", queries=1), optimizer("zo-act", queries=1, spread=False)
    assert torch.equal(step(spread, BATCHES["words"]).losses, step(usual, BATCHES["words"]).losses)


def test_a_closure_gets_two_copies() -> None:
    own, given = optimizer("zo-act"), BATCHES["words"]
    stacked = own.stack({"input_ids": given.input_ids, "attention_mask": given.attention_mask})
    assert len(stacked["input_ids"]) == 2 * len(given.input_ids)
    assert torch.equal(stacked["input_ids"][:8], stacked["input_ids"][8:])
    wanted = step(optimizer("zo-act"), given).losses

    def closure() -> Tensor:
        logits = own.model(**stacked).logits[torch.arange(16), given.label_positions.repeat(2)].float()
        scores = logits.gather(1, given.targets.repeat(2, 1)).double()
        return torch.nn.functional.cross_entropy(scores, given.labels.repeat(2), reduction="none")

    losses = own.step(closure).losses
    assert losses.shape == wanted.shape and float((losses - wanted).abs().max()) < 2.0**-14


@pytest.mark.parametrize("fork", (False, True))
def test_a_fork_and_a_cache(fork: bool) -> None:
    """The blocks before the first trained one see one copy of the batch, not one a group."""
    model: Any = plain("llama")
    swap(model, ZOConfig(group_size=8, quantizer="minmax", rank=0, ranks={"*layers.2.*": 2}))
    for layer in zo_layers(model).values():
        if layer.rank:
            layer.set_basis(torch.linalg.qr(torch.randn(layer.in_features, layer.rank)).Q)
    own = methods.create("zo-act", model, queries=Q, sigma=SIGMA, lr=0.0, floor_every=0, spread=True, fork=fork)
    seen: list[int] = []
    norm = model.model.layers[1].input_layernorm
    handle = norm.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    given = BATCHES["words"]
    result = step(own, given)
    handle.remove()
    assert seen == [8 if fork else 16]
    for share, seed, pair in zip(given.split(2), result.seeds, result.losses.split(2), strict=True):
        assert float((alone(own, share, int(seed)) - pair).abs().max()) < 2.0**-14


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", ({"sides": "one-sided"}, {"sides": "leave-one-out"}, {"mode": "sequential"}))
def test_only_two_sided_and_stacked(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="spread goes with two-sided, stacked groups"):
        optimizer("zo-act", **changes)


@pytest.mark.parametrize("queries", (3, 5, 16))
@pytest.mark.parametrize(("method", "kind"), (("zo-act", "llama"), ("mezo", "classifier")))
def test_a_batch_that_queries_cannot_share(method: str, kind: str, queries: int) -> None:
    own = optimizer(method, kind, queries=queries)
    with pytest.raises(ValueError, match=f"{queries} queries can't share"):
        step(own, BATCHES["words"] if kind == "llama" else CLASSES)


@pytest.mark.parametrize("method", DENSE)
def test_a_trained_head_of_label_rows(method: str) -> None:
    """Its rows are those of all queries at once: refused, and not mixed."""
    with pytest.raises(ValueError, match="head of LlamaForCausalLM is trained"):
        step(optimizer(method), BATCHES["words"])


def test_micro_batches_would_deal_otherwise() -> None:
    own, parts = optimizer("zo-act"), BATCHES["words"].split(4)
    with pytest.raises(ValueError, match="2 micro-batches"):
        own.step_on([functools.partial(group_losses, own.model, part) for part in parts], parts[0].leading)
