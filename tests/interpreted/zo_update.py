"""The Triton zo_update_: the bits of reference.py, and the promises of tests/test_zo_update.py."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_zo_update import CASES, MOMENTS, Case, Problem, assert_same, problem, same_bits
from test_zo_update import run as reference_run

from zoact_kernels.ops import using


def run(p: Problem) -> Problem:
    p = copy.deepcopy(p)
    with using("triton"):
        torch.ops.zoact.zo_update_(*p.arguments())
    return p


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zo_update(case: Case) -> None:
    p = problem(case)
    assert_same(run(p), reference_run(p))


def test_zo_update_of_a_shard() -> None:
    p = problem(Case("adam", shapes=((200, 3),)))
    shard = copy.deepcopy(p)
    for name in ("coeffs", "exp_avgs", "exp_avg_sqs"):
        setattr(shard, name, [t[100:160] for t in getattr(shard, name)])
    shard.row_offsets = [100]
    whole, part = run(p), run(shard)
    for name in ("coeffs", "exp_avgs", "exp_avg_sqs"):
        assert same_bits(getattr(part, name)[0], getattr(whole, name)[0][100:160])


@pytest.mark.parametrize("rule", MOMENTS)
def test_zo_update_skip(rule: str) -> None:
    p = problem(Case(rule))
    p.weights[1] = math.nan
    p.skip.fill_(True)
    assert same_bits(run(p).memory, p.memory)
    p.skip.fill_(False)
    assert run(p).coeffs[0].isnan().all()


def test_zo_update_again() -> None:
    """The second step of the same tensors reads the table of the first and the new numbers."""
    p = problem(Case("adam"))
    q = copy.deepcopy(p)
    for seeds in ((1, 2, 3), (4, 5, 6)):
        p.seeds.copy_(torch.tensor(seeds))
        q.seeds.copy_(torch.tensor(seeds))
        with using("triton"):
            torch.ops.zoact.zo_update_(*p.arguments())
        with using("reference"):
            torch.ops.zoact.zo_update_(*q.arguments())
        assert_same(p, q)
