"""zo_perturb_: every instruction set gives the bits of reference.py, and reference.py gives w + sum weights * Z."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from zoact_kernels import native, reference, rng
from zoact_kernels.ops import using

pytestmark = pytest.mark.skipif(native.module() is None, reason=native.why_missing())
every_isa = pytest.mark.parametrize("isa", native.isas())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """w [N, C] with `margin` columns of NaN on both sides of every row, or none: then rows follow one another."""

    N: int
    C: int
    dtype: torch.dtype = torch.float32
    noise: str = "normal"
    seeds: tuple[int, ...] = (7,)
    rank: int = 0
    mask: str = "none"
    noise_scale: bool = False
    rounding: bool = False
    margin: int = 0
    row_offset: int = 0
    cols: int = 0

    def __str__(self) -> str:
        name = f"N{self.N}-C{self.C}-{str(self.dtype)[6:]}-{self.noise}-S{len(self.seeds)}"
        extras = {
            f"R{self.rank}": self.rank,
            self.mask: self.mask != "none",
            "noise_scale": self.noise_scale,
            "stochastic": self.rounding,
            f"margin{self.margin}": self.margin,
            f"offset{self.row_offset}": self.row_offset,
            f"cols{self.cols}": self.cols,
        }
        return "-".join([name, *(text for text, there in extras.items() if there)])


@dataclass
class Problem:
    memory: Tensor
    w: Tensor
    seeds: Tensor
    weights: Tensor
    param_id: Tensor
    basis: Tensor | None
    noise_scale: Tensor | None
    mask_value: Tensor | None
    mask_seed: Tensor | None
    rounding_seed: Tensor | None
    noise: str
    mask: str
    row_offset: int
    cols: int

    def arguments(self) -> tuple:
        return tuple(value for name, value in vars(self).items() if name != "memory")


def problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(3)
    N, C = case.N, case.C
    memory = torch.full((N, C + 2 * case.margin), math.nan, dtype=case.dtype)
    w = memory[:, case.margin : case.margin + C]
    w.copy_(torch.randn(N, C, generator=generator))
    value = {"none": None, "magnitude": torch.tensor([0.5]), "random": torch.tensor([0.3])}[case.mask]
    return Problem(
        memory,
        w,
        torch.tensor(case.seeds, dtype=torch.int64),
        torch.randn(len(case.seeds), generator=generator) * 0.1,
        torch.tensor([2**32 - 7]),
        torch.randn(C, case.rank, generator=generator) if case.rank else None,
        torch.rand(N, C, generator=generator) if case.noise_scale else None,
        value,
        torch.tensor([-5]) if case.mask == "random" else None,
        torch.tensor([2**40 + 1]) if case.rounding else None,
        case.noise,
        case.mask,
        case.row_offset,
        case.cols,
    )


def run(p: Problem, isa: str | None = None) -> Problem:
    """The call on a copy of `p`: by the kernel of `isa`, or by reference.py."""
    p = copy.deepcopy(p)
    if isa is None:
        reference.zo_perturb_(*p.arguments())
    else:
        with using("cpu", isa=isa):
            torch.ops.zoact.zo_perturb_(*p.arguments())
    return p


def same(a: Tensor, b: Tensor) -> Tensor:
    """Equal values, zeros of equal sign; a NaN equals a NaN."""
    return ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())


def assert_same(got: Problem, want: Problem) -> None:
    differ = ~same(got.memory, want.memory)
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} values, first at {differ.nonzero()[0].tolist()}"


SEEDS = (3, -1, 2**63 - 1, 11)
CASES = [
    *(Case(61, 127, dtype, noise) for dtype in DTYPES for noise in ("normal", "rademacher")),
    *(Case(13, 1031, dtype, seeds=SEEDS, mask=mask) for dtype in DTYPES for mask in ("magnitude", "random")),
    *(Case(13, 515, dtype, seeds=SEEDS[:2], noise_scale=True, margin=5) for dtype in DTYPES),
    *(Case(37, 113, dtype, seeds=SEEDS, rounding=True) for dtype in DTYPES),
    *(Case(37, 113, dtype, mask="random", noise_scale=True, rounding=True, margin=3) for dtype in DTYPES),
    *(Case(23, 67, dtype, rank=5, seeds=SEEDS) for dtype in DTYPES),
    *(Case(9, 530, dtype, "rademacher", rank=1, rounding=True, margin=7) for dtype in DTYPES),
    Case(3, 18, rank=517, seeds=SEEDS[:2]),
    Case(2, 16, rank=64, row_offset=2**33, cols=100),
    Case(7, 33, seeds=()),
    Case(7, 33, rank=3, seeds=()),
    Case(0, 33),
    Case(33, 0),
    Case(0, 4, rank=2),
    Case(1, 1),
    Case(1, 5000, torch.bfloat16, rounding=True),
    Case(5000, 1, torch.float16, rounding=True),
    Case(5, 33, torch.bfloat16, mask="random", rounding=True, row_offset=2**32 - 2, cols=1009),
    Case(5, 33, mask="magnitude", margin=1),
]


@every_isa
@pytest.mark.parametrize("case", CASES, ids=str)
def test_zo_perturb(case: Case, isa: str) -> None:
    p = problem(case)
    want = run(p)
    if p.w.numel() and case.seeds:
        assert not same(want.w, p.w).all()  # something moved
    assert_same(run(p, isa), want)


@every_isa
def test_zo_perturb_formula(isa: str) -> None:
    """The reference against the sentence it stands for, in fp64."""
    p = problem(Case(29, 31, seeds=SEEDS))
    z = torch.stack([rng.noise("normal", s, p.param_id, 29, 31).double() for s in p.seeds])
    want = p.w.double() + (p.weights.double()[:, None, None] * z).sum(0)
    assert (run(p, isa).w - want).abs().max() < 4 * torch.finfo(torch.float32).eps * want.abs().max()
    q = problem(Case(29, 31, seeds=SEEDS, rank=4))
    z = torch.stack([rng.noise("normal", s, q.param_id, 29, 4).double() for s in q.seeds])
    want = q.w.double() + (q.weights.double()[:, None, None] * z).sum(0) @ q.basis.double().T
    assert (run(q, isa).w - want).abs().max() < 8 * torch.finfo(torch.float32).eps * want.abs().max()


@every_isa
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zo_perturb_threads(dtype: torch.dtype, rank: int, isa: str) -> None:
    for margin in (0, 2):
        p = problem(Case(45, 601, dtype, seeds=SEEDS, rank=rank, rounding=True, margin=margin))
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(p, isa))
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])


@every_isa
@pytest.mark.parametrize("rank", [0, 3])
def test_zo_perturb_of_a_shard(rank: int, isa: str) -> None:
    """Rows 20 .. 33 on their own get what they get in the whole, noise, mask and rounding; and columns 0 .. 50."""
    mask = "none" if rank else "random"
    p = problem(Case(40, 77, torch.bfloat16, rank=rank, mask=mask, rounding=True))
    whole = run(p, isa)
    shard = copy.deepcopy(p)
    shard.w, shard.row_offset = shard.w[20:33], 20
    assert same(run(shard, isa).w, whole.w[20:33]).all()
    if not rank:
        columns = copy.deepcopy(p)
        columns.w, columns.cols = columns.w[:, :50], 77
        assert same(run(columns, isa).w, whole.w[:, :50]).all()


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zo_perturb_transposed(dtype: torch.dtype, isa: str) -> None:
    """A w whose rows are not contiguous (a tied, transposed weight) is perturbed in place all the same."""
    p = problem(Case(19, 23, dtype))
    want = run(p)
    p.w = p.w.t().contiguous().t()
    assert p.w.stride() == (1, 19)
    got = run(p, isa)
    assert same(got.w, want.w).all() and got.w.stride() == (1, 19)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", [False, True])
def test_zo_perturb_mask_leaves_the_rest(dtype: torch.dtype, rounding: bool, isa: str) -> None:
    """What a mask leaves out keeps its bits: signed zeros, infinities, and values that rounding could move."""
    p = problem(Case(16, 40, dtype, mask="magnitude", rounding=rounding))
    p.w[0, :6] = torch.tensor([-0.0, 0.0, math.inf, -math.inf, math.nan, 3.0])
    p.mask_value.fill_(0.5)
    got = run(p, isa)
    part = p.w.float().abs() <= 0.5
    assert part[0, :6].tolist() == [True, True, False, False, False, False]
    assert same(got.w, p.w)[~part].all()
    assert not same(got.w, p.w)[part].all()
    p.mask_value.fill_(-1.0)  # no magnitude is that small
    assert same(run(p, isa).w, p.w).all()
    q = problem(Case(16, 40, dtype, mask="random", rounding=rounding))
    part = rng.mask(q.mask_seed, q.param_id, q.mask_value, 16, 40)
    moved = ~same(run(q, isa).w, q.w)
    assert not moved[~part].any() and moved[part].float().mean() > 0.5
    q.mask_value.fill_(1.0)
    everywhere = copy.deepcopy(q)
    everywhere.mask, everywhere.mask_value, everywhere.mask_seed = "none", None, None
    assert_same(run(q, isa), run(everywhere, isa))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_zo_perturb_stochastic_rounding_is_felt(dtype: torch.dtype, isa: str) -> None:
    """Steps of a sixteenth of an ulp: lost by rounding to nearest, kept on average by stochastic rounding."""
    p = problem(Case(64, 256, dtype, "rademacher"))
    p.w.fill_(1.0)
    ulp = torch.finfo(dtype).eps
    p.weights.fill_(ulp / 16)
    assert (run(p, isa).w == 1).all()
    p.rounding_seed = torch.tensor([1])
    got = run(p, isa).w.double()
    signs = rng.noise("rademacher", 7, p.param_id, 64, 256)
    up = (got[signs > 0] > 1).double().mean()  # the ulp below 1 is half as wide: 1/16 above, 1/8 below
    down = (got[signs < 0] < 1).double().mean()
    count = p.w.numel() / 2
    assert abs(up - 1 / 16) < 4 * math.sqrt(1 / 16 * 15 / 16 / count)
    assert abs(down - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / count)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", [False, True])
def test_zo_perturb_nan(dtype: torch.dtype, rounding: bool, isa: str) -> None:
    """NaN and infinity stay where they are; a NaN weight reaches every element that takes part."""
    p = problem(Case(11, 37, dtype, rounding=rounding))
    clean = run(p, isa)
    p.w[3, 4], p.w[5, 6], p.w[5, 7] = math.nan, math.inf, -math.inf
    got = run(p, isa)
    assert got.w[3, 4].isnan() and got.w[5, 6] == math.inf and got.w[5, 7] == -math.inf
    assert int((~same(got.w, clean.w)).sum()) == 3
    p.weights.fill_(math.nan)
    assert run(p, isa).w.isnan().all() and run(p).w.isnan().all()


@every_isa
def test_zo_perturb_there_and_back(isa: str) -> None:
    """+Z then -Z: w returns within the rounding of two fp32 sums (in-place MeZO; W itself is the method's to keep)."""
    p = problem(Case(31, 200))
    there = run(p, isa)
    there.weights.neg_()
    back = run(there, isa).w
    assert (back - p.w).abs().max() <= torch.finfo(torch.float32).eps * there.w.abs().max()
    assert (there.w - p.w).abs().max() > 0.01


def test_zo_perturb_touches_no_generator() -> None:
    before = torch.get_rng_state()
    run(problem(Case(5, 5, torch.bfloat16, rounding=True, mask="random")), native.isas()[0])
    assert (torch.get_rng_state() == before).all()


@pytest.mark.parametrize("case", [Case(5, 7), Case(5, 7, torch.bfloat16, rank=2, rounding=True)], ids=str)
def test_zo_perturb_opcheck(case: Case) -> None:
    torch.library.opcheck(torch.ops.zoact.zo_perturb_.default, problem(case).arguments())


def test_zo_perturb_kernel_refuses() -> None:
    enums = native.module().ENUMS

    def call(noise: str = "normal", mask: str = "none", basis: int = 0, dtype: str = "f32", N: int = 1) -> None:
        native.module().zo_perturb(
            "base", 0, enums["DType"][dtype], N, 1, 1, 0, 0, 0, enums["Noise"][noise], 0, 0, 1, basis, 0,
            enums["Mask"][mask], 0.0, 0, 0, False, 0, 1,
        )  # fmt: skip

    call(N=0)
    with pytest.raises(RuntimeError, match="`noise` is none; it has to be normal or rademacher"):
        call(noise="none")
    with pytest.raises(RuntimeError, match="`basis` does not go with a mask or `noise_scale`"):
        call(mask="random", basis=64)
    with pytest.raises(RuntimeError, match="`w` has a dtype other than float32, bfloat16 and float16"):
        call(dtype="i64")
