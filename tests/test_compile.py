"""torch.compile(fullgraph=True) of swapped models: no graph break, the same numbers, equal blocks compile once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_device import ThroughAten, on_fake_device
from test_swap import Mlp, llama, with_bases
from torch._subclasses.fake_tensor import FakeTensorMode

from zoact_kernels.swap import ZOConfig, perturbed, swap


class Counting:
    """A backend that runs ATen ops as they are, so numbers stay the same bits, and counts its compilations."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.count += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_a_whole_model_in_one_graph():
    model = llama(layers=2)
    swap(model, ZOConfig(rank=2, group_size=16))
    with_bases(model)
    ids = torch.randint(0, 97, (4, 5))
    backend = Counting()
    fast = torch.compile(model, fullgraph=True, backend=backend)
    clean = model(ids, use_cache=False).logits
    assert torch.equal(fast(ids, use_cache=False).logits, clean)
    sigmas = torch.tensor([[0.05], [-0.05]])
    for seed in (3, 4, 5):
        with perturbed(model, torch.tensor([seed]), sigmas):
            assert torch.equal(fast(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert backend.count == 2  # clean and perturbed; new seeds need no new graph


@torch.no_grad()
def test_equal_blocks_compile_once():
    model = llama(layers=4)
    swap(model, ZOConfig(rank=2, group_size=16))
    with_bases(model)
    ids = torch.randint(0, 97, (4, 5))
    want = model(ids, use_cache=False).logits
    backend = Counting()
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    assert torch.equal(model(ids, use_cache=False).logits, want)
    assert backend.count == 1


@torch.no_grad()
def test_a_whole_model_on_a_fake_device():
    """Traced as on a GPU: no read of a value, no tensor of another device, one graph clean and one perturbed."""
    model = Mlp()
    swap(model, ZOConfig(rank=2, group_size=8, layout="row"))
    with_bases(model)
    mode = FakeTensorMode()
    there = (model, torch.randn(4, 24), torch.tensor([3]), torch.tensor([[0.1], [-0.1]]))
    fake, x, seeds, sigmas = on_fake_device(mode, there)
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        assert all(i.device.type == "cuda" for i in inputs if isinstance(i, torch.Tensor))
        return graph

    fast = torch.compile(fake, fullgraph=True, backend=backend)
    with mode:
        assert fast(x).device.type == "cuda"
        with ThroughAten():
            perturbation = perturbed(fake, seeds, sigmas)
            perturbation.__enter__()
        assert fast(x).shape[0] == 4
        perturbation.__exit__(None, None, None)
    assert count == 2


INDUCTOR = """
import torch
from test_swap import Mlp, with_bases
from zoact_kernels.swap import ZOConfig, swap

model = Mlp()
swap(model, ZOConfig(rank=2, group_size=8))
with_bases(model)
x = torch.randn(4, 24)
with torch.no_grad():
    fast = torch.compile(model, fullgraph=True)
    assert (fast(x) - model(x)).abs().max() < 1e-6
"""


def test_inductor_gives_the_same_numbers():
    """In a process of its own: Inductor's compiler does not start where a test has imported distutils before."""
    run = subprocess.run(
        [sys.executable, "-c", INDUCTOR], cwd=Path(__file__).parent, env={**os.environ, "PYTHONPATH": "."},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
