"""The Triton zo_perturb_: the bits of reference.py, and the promises of tests/test_zo_perturb.py."""

from __future__ import annotations

import copy

import pytest
import torch
from test_zo_perturb import CASES, DTYPES, Case, Problem, assert_same, problem, same
from test_zo_perturb import run as reference_run

from zoact_kernels.ops import using


def run(p: Problem) -> Problem:
    p = copy.deepcopy(p)
    with using("triton"):
        torch.ops.zoact.zo_perturb_(*p.arguments())
    return p


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zo_perturb(case: Case) -> None:
    p = problem(case)
    assert_same(run(p), reference_run(p))


@pytest.mark.parametrize("rank", [0, 3])
def test_zo_perturb_of_a_shard(rank: int) -> None:
    p = problem(Case(40, 77, torch.bfloat16, rank=rank, mask="none" if rank else "random", rounding=True))
    whole = run(p)
    shard = copy.deepcopy(p)
    shard.w, shard.row_offset = shard.w[20:33], 20
    assert same(run(shard).w, whole.w[20:33]).all()
    if not rank:
        columns = copy.deepcopy(p)
        columns.w, columns.cols = columns.w[:, :50], 77
        assert same(run(columns).w, whole.w[:, :50]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zo_perturb_transposed(dtype: torch.dtype) -> None:
    p = problem(Case(19, 23, dtype))
    q = copy.deepcopy(p)
    q.w = q.w.T.contiguous().T
    assert same(run(q).w, run(p).w).all()
