"""The noise law: NumPy, torch, csrc/philox.h and every instruction set of cpu/noise.h give the same bits.

golden_noise.json was written by another program in float64; Random123's known answers come from its authors.

-ffp-contract=off is part of the law. With it left out (and -mfma given) the compiler fuses the products and sums of the
polynomials, and 5 % of the normals come out with other bits, which `==` below turns into red: try it in setup.py.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import law
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zoact_kernels import native, rng

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden_noise.json").read_text())
CSRC = HERE.parent / "csrc"
KINDS = ("normal", "rademacher")
TOLERANCE = 2e-6  # of a normal, against float64 (law 2.1)

Run = Callable[[str, int, int, int, int], np.ndarray]  # kind, seed, param_id, first, count -> fp32 [count]


def run_numpy(kind: str, seed: int, param_id: int, first: int, count: int) -> np.ndarray:
    return rng.noise_numpy(kind, seed, param_id, count, 1, row_offset=first)[:, 0]


def run_torch(kind: str, seed: int, param_id: int, first: int, count: int) -> np.ndarray:
    tensors = torch.tensor(seed), torch.tensor([param_id])
    return rng.noise(kind, *tensors, count, 1, row_offset=first)[:, 0].numpy()


def run_cpu(isa: str) -> Run:
    def run(kind: str, seed: int, param_id: int, first: int, count: int) -> np.ndarray:
        module = native.module()
        guard = 40  # more than two vectors: nothing may be written outside
        out = torch.full((guard + count + guard,), torch.nan)
        code = module.ENUMS["Noise"][kind]
        module.noise_run(isa, out.data_ptr() + 4 * guard, seed, param_id, code, first, count)
        assert out[:guard].isnan().all() and out[guard + count :].isnan().all()
        return out[guard : guard + count].numpy()

    return run


IMPLEMENTATIONS: dict[str, Run] = {"numpy": run_numpy, "torch": run_torch}
IMPLEMENTATIONS |= {f"cpu-{isa}": run_cpu(isa) for isa in native.isas()}
every_implementation = pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def box_muller_numpy(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rng._box_muller(np, a.astype(np.int64), b.astype(np.int64))


def box_muller_torch(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    even, odd = rng._box_muller(torch, torch.from_numpy(a.astype(np.int64)), torch.from_numpy(b.astype(np.int64)))
    return even.numpy(), odd.numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_random123(counter: str, key: str, answer: str) -> None:
    c, k, words = ([int(w, 16) for w in text.split()] for text in (counter, key, answer))
    got = rng.philox4x32(np.array(c, np.uint32), np.array(k, np.uint32))
    assert got.dtype == np.uint32 and got.tolist() == words
    # the same counter through the law: block, param_id, stream; seed
    seed = int(np.array([k[0] | k[1] << 32], np.uint64).astype(np.int64)[0])
    assert law.words(seed, c[2], c[3], c[0] | c[1] << 32) == words


def test_philox_broadcasts() -> None:
    counters = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    words = rng.philox4x32(counters, np.array([1, 2], np.uint32))
    assert words.shape == (2, 3, 4)
    assert (words[1, 2] == rng.philox4x32(counters[1, 2], np.array([1, 2], np.uint32))).all()


def test_words_golden() -> None:
    for g in GOLDEN["words"]:
        where = g["seed"], g["param_id"], g["stream"]
        got = rng.words(*where, np.uint64(g["block"]))
        assert got.dtype == np.uint32 and got.tolist() == g["words"], g
        assert law.words(*where, g["block"]) == g["words"], g
        seed, param_id, block = (torch.tensor(g[name]) for name in ("seed", "param_id", "block"))
        in_torch = rng._words(seed, param_id, g["stream"], block)
        assert [int(w) for w in in_torch] == g["words"], g


def test_words_of_many_blocks() -> None:
    blocks = np.array([[0, 1, 2**32 - 1], [2**32, 2**40 + 7, 2**62]], np.uint64)
    words = rng.words(-5, 7, rng.STREAM_MASK, blocks)
    assert words.shape == (2, 3, 4)
    assert (words[1, 1] == rng.words(-5, 7, rng.STREAM_MASK, blocks[1, 1])).all()


# ---------------------------------------------------------------------------------------------------------------------
# Noise


@every_implementation
def test_noise_golden(run: Run) -> None:
    for g in GOLDEN["noise"] + GOLDEN["far"]:
        e = g["row"] * g["cols"] + g["col"]
        assert abs(float(run("normal", g["seed"], g["param_id"], e, 1)[0]) - g["normal"]) < TOLERANCE, g
        assert run("rademacher", g["seed"], g["param_id"], e, 1)[0] == g["rademacher"], g
        row = rng.noise("normal", g["seed"], g["param_id"], 1, g["cols"], row_offset=g["row"])
        assert run("normal", g["seed"], g["param_id"], e, 1)[0] == row[0, g["col"]], g


def test_box_muller_golden() -> None:
    a, b = (np.array([g[name] for g in GOLDEN["box_muller"]]) for name in "ab")
    even, odd = (np.array([g[name] for g in GOLDEN["box_muller"]]) for name in ("even", "odd"))
    for box_muller in (box_muller_numpy, box_muller_torch, law.box_muller):
        x, y = box_muller(a, b)
        assert x.dtype == y.dtype == np.float32
        assert abs(x - even).max() < TOLERANCE and abs(y - odd).max() < TOLERANCE
        assert (abs(y - odd) < 2.0**-22 * abs(odd)).all()  # near an axis the small one is exact relative to itself


def test_box_muller_patterns() -> None:
    """The bit patterns that stand in the header of csrc/philox.h."""
    header = (CSRC / "philox.h").read_text()
    a = np.array([0, 0x12345678, 0x80000000, 0xFFFFFFFF])
    b = np.array([0, 0x3FFFFFFF, 0x9E3779B9, 0xE0000000])
    for box_muller in (box_muller_numpy, box_muller_torch, law.box_muller):
        even, odd = (v.view(np.uint32) for v in box_muller(a, b))
        for i in range(4):
            assert f"box_muller({a[i]:08x}, {b[i]:08x}) -> {even[i]:08x} {odd[i]:08x}" in header


def check_normals(us: np.ndarray) -> None:
    """No pair of words among `us` (values of w >> 9) can leave the tolerance.

    |r c - r64 c64| <= r |c - c64| + |r - r64| |c64| + half an ulp of the product: the errors of r and of the cosine are
    measured apart, for each u, and their worst cases put together.
    """
    words, one = us << 9, np.full_like(us, 0x1E3779B9)  # `one`: a word whose cosine and sine are neither 0 nor 1
    u = (2 * us + 1) * 2.0**-24
    r64 = np.sqrt(-2 * np.log(u))
    r, _ = box_muller_numpy(words, np.zeros_like(us))  # the cosine is exactly 1 here
    error_r = abs(r - r64)
    tiny = np.zeros_like(us)
    even, odd = box_muller_numpy(tiny, words)
    largest = float(box_muller_numpy(np.zeros(1, int), np.zeros(1, int))[0][0])
    cos, sin = largest * np.cos(2 * np.pi * u), largest * np.sin(2 * np.pi * u)
    error_angle = max(abs(even - cos).max(), abs(odd - sin).max())
    assert error_r.max() < 4.7e-7
    bound = r64 * error_angle / largest + error_r + np.spacing(r) / 2
    assert bound.max() < 1.5e-6  # 1.2e-6 where the half ulp of this product is not counted twice
    for a, b in ((words, one), (tiny, words), (words, words)):
        for got, want in zip(law.box_muller(a, b), box_muller_numpy(a, b), strict=True):
            assert (got == want).all()


def test_normal_error() -> None:
    ends = np.arange(2048)
    check_normals(np.concatenate([ends, np.arange(2048, 2**23 - 2048, 61), 2**23 - 1 - ends]))


@pytest.mark.soak
def test_normal_error_of_every_word() -> None:
    check_normals(np.arange(2**23))


def test_normal_error_of_pairs() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.integers(0, 2**32, (2, 2**20))
    u, v = ((2 * (w >> 9) + 1) * 2.0**-24 for w in (a, b))
    r = np.sqrt(-2 * np.log(u))
    for got, want in zip(box_muller_numpy(a, b), (r * np.cos(2 * np.pi * v), r * np.sin(2 * np.pi * v)), strict=True):
        assert abs(got - want).max() < TOLERANCE / 2


PLACES = (  # seed, param_id, first element
    (0, 0, 0),
    (1, 2860660309, 1),
    (-1, 2**32 - 1, 127),
    (-(2**63), 5, 2**34 - 3),  # normal: blocks cross 2^32 at 2^34
    (2**63 - 1, 6, 2**39 - 130),  # rademacher: at 2^39
    (123456789012345, 7, 2**62 + 11),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seed", "param_id", "first"), PLACES)
def test_noise_is_the_same_everywhere(kind: str, seed: int, param_id: int, first: int) -> None:
    count = 3001
    want = law.noise(kind, seed, param_id, first, count)
    assert np.isfinite(want).all()
    for name, run in IMPLEMENTATIONS.items():
        got = run(kind, seed, param_id, first, count)
        assert got.dtype == np.float32 and (got == want).all(), name


@every_implementation
@pytest.mark.parametrize("kind", KINDS)
def test_noise_at_any_alignment(run: Run, kind: str) -> None:
    """A run is a slice of a longer run: every offset in a block of 4 and of 128, every short length."""
    start = 2**32 - 300
    whole = run(kind, -9, 4, start, 900)
    places = [(i, n) for i in range(9) for n in (*range(10), 63, 64, 65)]
    places += [(i, n) for i in (120, 127, 128, 129, 255, 256) for n in (1, 31, 128, 257)]
    pick = random.Random(1)
    places += [(i, pick.randrange(900 - i)) for i in (pick.randrange(900) for _ in range(20))]
    for i, n in places:
        assert (run(kind, -9, 4, start + i, n) == whole[i : i + n]).all(), (i, n)


@pytest.mark.skipif(not native.isas(), reason=native.why_missing())
@pytest.mark.parametrize("isa", native.isas())
def test_noise_none_is_zero(isa: str) -> None:
    out = torch.full((5,), torch.nan)
    native.module().noise_run(isa, out.data_ptr(), 1, 2, native.module().ENUMS["Noise"]["none"], 3, 4)
    assert out[:4].tolist() == [0, 0, 0, 0] and out[4].isnan()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("row", "rows", "col_count"), [(0, 7, 13), (3, 2, 13), (6, 1, 5), (0, 0, 13), (2, 3, 0)])
def test_noise_of_a_part(kind: str, row: int, rows: int, col_count: int) -> None:
    """A shard makes its own rows (and first columns) of the whole parameter's Z."""
    whole = rng.noise(kind, 11, 12, 7, 13)
    part = rng.noise(kind, 11, 12, rows, col_count, row_offset=row, total_cols=13)
    assert part.shape == (rows, col_count)
    assert (part == whole[row : row + rows, :col_count]).all()
    in_numpy = rng.noise_numpy(kind, 11, 12, rows, col_count, row_offset=row, total_cols=13)
    assert in_numpy.shape == (rows, col_count) and (in_numpy == part.numpy()).all()


def test_noise_touches_no_generator() -> None:
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for kind in KINDS:
        rng.noise(kind, 1, 2, 3, 4)
        rng.noise_numpy(kind, 1, 2, 3, 4)
        for isa in native.isas():
            run_cpu(isa)(kind, 1, 2, 3, 4)
    rng.mask(1, 2, 0.5, 3, 4)
    rng.round_stochastic(torch.ones(2, 2), torch.bfloat16, 1, 2)
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    assert (before[0] == after[0]).all() and (before[1][1] == after[1][1]).all() and before[2] == after[2]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_tensors_is_never_read(kind: str) -> None:
    """Under FakeTensorMode nothing has a value: an .item() would raise. So a captured graph gets new noise."""
    with FakeTensorMode():
        seed, param_id = torch.zeros((), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        assert rng.noise(kind, seed, param_id, 5, 3).shape == (5, 3)
        assert rng.noise(kind, seed, param_id, 5, 3, total_cols=4, row_offset=2).dtype is torch.float32
        assert rng.mask(seed, param_id, torch.tensor([0.5]), 5, 3).dtype is torch.bool
        assert rng.round_stochastic(torch.ones(5, 3), torch.float16, seed, param_id).dtype is torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "gauss"}, "`kind` is 'gauss'; kinds of noise are normal, rademacher"),
        ({"seed": 2**63}, "`seed` is 9223372036854775808"),
        ({"param_id": -1}, r"`param_id` is -1; it has to be in \[0, 4294967296\)"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"`seed` is torch.int64 of shape \(2,\)"),
        ({"seed": torch.zeros(())}, "`seed` is torch.float32"),
        ({"rows": -1}, "`rows` is -1"),
        ({"row_offset": -1}, "`row_offset` is -1"),
        ({"total_cols": 3}, "`total_cols` is 3; a part with 4 columns needs at least that many"),
    ],
)
def test_noise_refuses(arguments: dict, message: str) -> None:
    whole = {"kind": "normal", "seed": 0, "param_id": 0, "rows": 3, "cols": 4} | arguments
    with pytest.raises(ValueError, match=message):
        rng.noise(**whole)


# ---------------------------------------------------------------------------------------------------------------------
# Distribution

COUNT = 1 << 20


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return rng.noise_numpy("normal", 20, 1, 1024, 1024).astype(np.float64).ravel()


def test_normal_moments(normals: np.ndarray) -> None:
    """Each sample moment within four of its own standard deviations."""
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normals**power).mean() - mean) < 4 * math.sqrt(variance / COUNT), power


def test_normal_distribution(normals: np.ndarray) -> None:
    """Kolmogorov-Smirnov at 1e-4 (2.23 / sqrt(n)), and the tail: 5.77 is the largest normal there can be."""
    ordered = np.sort(normals)[::64]
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in ordered])
    assert abs(cdf - np.arange(0, COUNT, 64) / COUNT).max() < 2.23 / math.sqrt(COUNT) + 1e-4
    beyond = (abs(normals) > 4).mean()
    assert abs(beyond - 6.33e-5) < 4 * math.sqrt(6.33e-5 / COUNT) and abs(normals).max() < 5.78


def test_rademacher_is_balanced() -> None:
    signs = rng.noise_numpy("rademacher", 20, 1, 1024, 1024)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / math.sqrt(COUNT)
    assert abs((signs[:, 1:] * signs[:, :-1]).mean()) < 4 / math.sqrt(COUNT)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_independent(kind: str, normals: np.ndarray) -> None:
    """Neighbours in seed, in parameter, in row and in column: |correlation| < 4 / sqrt(n)."""
    base = rng.noise_numpy(kind, 20, 1, 1024, 1024).ravel()
    others = {
        "seed": rng.noise_numpy(kind, 21, 1, 1024, 1024).ravel(),
        "negative seed": rng.noise_numpy(kind, -20, 1, 1024, 1024).ravel(),
        "param_id": rng.noise_numpy(kind, 20, 2, 1024, 1024).ravel(),
        "factor": rng.noise_numpy(kind, 20, rng.param_id("w#V"), 1024, 1024).ravel(),
        "row": np.roll(base, 1024),
        "column": np.roll(base, 1),
        "lane": np.roll(base, 2),
        "kind": normals if kind == "rademacher" else np.sign(np.roll(normals, 4)),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / math.sqrt(base.size), name


def test_streams_are_disjoint() -> None:
    blocks = np.arange(4096, dtype=np.uint64)
    words = [rng.words(1, 2, stream, blocks).ravel() for stream in range(4)]
    assert len(np.unique(np.concatenate(words))) > 4 * words[0].size - 60  # 2^16 draws of 2^32 share half a pair
    for i in range(4):
        for j in range(i):
            assert (words[i] == words[j]).sum() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Seeds and names


def test_seed_for_golden() -> None:
    for g in GOLDEN["seed_for"]:
        assert rng.seed_for(g["run_seed"], g["step"], g["query"]) == g["seed"], g


def test_seed_for_never_repeats() -> None:
    seeds = {rng.seed_for(run, step, query) for run in (0, 1, -1) for step in range(300) for query in range(4)}
    assert len(seeds) == 3 * 300 * 4
    assert min(seeds) < -(2**62) and max(seeds) > 2**62 and all(-(2**63) <= s < 2**63 for s in seeds)


@pytest.mark.parametrize(("run_seed", "step", "query"), [(2**63, 0, 0), (0, -1, 0), (0, 2**64, 0), (0, 0, 2**32)])
def test_seed_for_refuses(run_seed: int, step: int, query: int) -> None:
    with pytest.raises(ValueError, match=r"`(run_seed|step|query)` is -?\d+; it has to be in"):
        rng.seed_for(run_seed, step, query)


def test_param_id_golden() -> None:
    for g in GOLDEN["noise"] + GOLDEN["far"]:
        assert rng.param_id(g["name"]) == g["param_id"]
        for prefix in (*rng.PREFIXES, "module._orig_mod.base_model.model.", "_orig_mod.module."):
            assert rng.param_id(prefix + g["name"]) == g["param_id"]


def test_strip_prefixes_only_at_the_front() -> None:
    assert rng.strip_prefixes("module.module.layer.module.weight") == "layer.module.weight"
    assert rng.strip_prefixes("base_model.layer") == "base_model.layer"
    assert rng.strip_prefixes("modules.layer") == "modules.layer"
    assert rng.strip_prefixes("") == ""


def test_assign_param_ids() -> None:
    names = ["plumless", "buckeroo", "a.weight", "module.a.weight"]  # one CRC-32; one name after stripping
    assert rng.param_id("plumless") == rng.param_id("buckeroo")
    ids = rng.assign_param_ids(names)
    assert list(ids) == names and len(set(ids.values())) == 4
    assert ids["buckeroo"] == rng.param_id("buckeroo") and ids["plumless"] == rng.param_id("plumless~1")
    assert ids["a.weight"] == rng.param_id("a.weight") and ids["module.a.weight"] == rng.param_id("a.weight~1")
    assert rng.assign_param_ids(reversed(names)) == ids  # order does not matter
    assert rng.assign_param_ids([]) == {}
    with pytest.raises(ValueError, match="`names` holds 'x' twice"):
        rng.assign_param_ids(["x", "x"])


# ---------------------------------------------------------------------------------------------------------------------
# nvcc


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile csrc/philox.h for a GPU")
def test_philox_compiles_for_cuda(tmp_path: Path) -> None:
    """philox.h as device code: its fp32 operations stay apart, although nvcc fuses a product and a sum by default."""
    command = f"nvcc -arch=sm_90 -std=c++17 -x cu -I{CSRC} {HERE / 'philox_driver.cpp'} -o".split()
    subprocess.run([*command, str(tmp_path / "law.cubin"), "-cubin"], check=True)
    ptx = tmp_path / "law.ptx"
    subprocess.run([*command, str(ptx), "-ptx"], check=True)
    text = ptx.read_text()
    assert "mul.rn.f32" in text and "sqrt.rn.f32" in text
    assert "fma.rn.f32" not in text and "mul.f32" not in text and "sqrt.approx" not in text
