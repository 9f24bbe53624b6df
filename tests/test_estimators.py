"""Estimators against their formulas, and against the identities of E[estimate] on a quadratic (methods 2.3, 2.6)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from zoact_kernels import estimators, rng
from zoact_kernels.directions import DIRECTIONS, lazy_factor, mean_estimate

QUERIES = (1, 2, 3, 8)
SIGMA = 0.3  # large, so that curvature would show

CASES = [(sides, q) for sides in estimators.SIDES for q in QUERIES if sides != "leave-one-out" or q > 1]
CASES_OF_SEVERAL = [case for case in CASES if case[1] > 1]


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_group_sigmas():
    s = torch.tensor(0.5)
    assert torch.equal(estimators.group_sigmas("two-sided", 2, 0.5), torch.tensor([[s, 0], [-s, 0], [0, s], [0, -s]]))
    assert torch.equal(estimators.group_sigmas("one-sided", 2, 0.5), torch.tensor([[0, 0], [s, 0], [0, s]]))
    assert torch.equal(estimators.group_sigmas("leave-one-out", 2, 0.5), torch.tensor([[s, 0], [0, s]]))
    for sides, q in CASES:
        sigmas = estimators.group_sigmas(sides, q, 1e-3)
        assert sigmas.shape == (estimators.group_count(sides, q), q) and sigmas.dtype == torch.float32


def formula(losses: list[float], sides: str, q: int, scaling: str, clip: float = 100.0) -> list[float]:
    """The table of methods 2.3, entry by entry."""
    if sides == "two-sided":
        d = [(losses[2 * j] - losses[2 * j + 1]) / (2 * SIGMA) for j in range(q)]
    elif sides == "one-sided":
        d = [(losses[j + 1] - losses[0]) / SIGMA for j in range(q)]
    else:  # f_j against the mean of the others
        d = [(losses[j] - sum(losses[:j] + losses[j + 1 :]) / (q - 1)) / SIGMA for j in range(q)]
    if scaling == "std":
        mean = sum(d) / q
        d = [x / math.sqrt(sum((y - mean) ** 2 for y in d) / q) for x in d]
    if scaling == "clipped":
        d = [min(max(x, -clip), clip) for x in d]
    if scaling == "sign":
        d = [math.copysign(1, x) for x in d]
    return [x / q for x in d]


@pytest.mark.parametrize("scaling", estimators.SCALINGS)
@pytest.mark.parametrize(("sides", "q"), CASES_OF_SEVERAL)
def test_weights(sides, q, scaling):
    losses = torch.randn(estimators.group_count(sides, q), dtype=torch.float64)
    got = estimators.weights(losses, sides, q, SIGMA, scaling=scaling, clip=0.7)
    want = torch.tensor(formula(losses.tolist(), sides, q, scaling, clip=0.7), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_weights_of_fzoo():
    f = torch.tensor([1.0, 1.5, 0.5, 3.0], dtype=torch.float64)
    want = (f[1:] - f[0]) / (3 * f[1:].std(correction=0))
    torch.testing.assert_close(estimators.weights(f, "one-sided", 3, 1e-4, scaling="std"), want)


def test_weights_of_tangents():
    """They are what would else be differenced, over sigma and q; of q groups and no other."""
    assert torch.equal(estimators.group_sigmas("tangent", 2, 0.5), 0.5 * torch.eye(2))
    slopes = torch.tensor([[1.0, 3.0], [-4.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    got = estimators.weights(slopes, "tangent", 3, 0.25)
    assert torch.equal(got, torch.tensor([2.0, -1.5, 0.5], dtype=torch.float64) / 0.25 / 3)
    assert torch.equal(estimators.weights(slopes, "tangent", 3, 0.25, scaling="sign"), got.sign() / 3)
    with pytest.raises(ValueError, match=r"tangent with 2 queries takes float64 \(2,\)"):
        estimators.weights(slopes, "tangent", 2, 0.25)


@pytest.mark.parametrize(("sides", "q"), CASES)
def test_weights_do_not_see_a_constant(sides, q):
    losses = torch.randn(estimators.group_count(sides, q), 5, dtype=torch.float64)
    plain = estimators.weights(losses, sides, q, SIGMA)
    torch.testing.assert_close(estimators.weights(losses + 7, sides, q, SIGMA), plain, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(estimators.weights(losses.mean(1), sides, q, SIGMA), plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("sides", "q"), CASES_OF_SEVERAL)
def test_weights_std_is_free_of_scale_and_offset(sides, q):
    losses = torch.randn(estimators.group_count(sides, q), dtype=torch.float64)
    plain = estimators.weights(losses, sides, q, SIGMA, scaling="std")
    scaled = estimators.weights(37 * losses + 11, sides, q, SIGMA / 5, scaling="std")
    torch.testing.assert_close(scaled, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("sides", "q"), CASES_OF_SEVERAL)
def test_weights_std_of_equal_losses_is_zero(sides, q):
    for value in (0.0, 0.1, 7.3):  # 0.1 and 7.3 are no binary fractions
        losses = torch.full((estimators.group_count(sides, q), 3), value, dtype=torch.float64)
        assert torch.equal(estimators.weights(losses, sides, q, SIGMA, scaling="std"), torch.zeros(q).double())


def test_weights_feel_a_small_difference():
    losses = torch.tensor([7 + 1e-6, 7.0], dtype=torch.float64)
    got = float(estimators.weights(losses, "two-sided", 1, 1e-3))
    assert abs(got - 1e-6 / 2e-3) < 1e-12
    huge = torch.tensor([[1e12, 3e-4], [1e12, 2e-4]], dtype=torch.float64)  # summed first, one ulp is 1.2e-4
    assert float(estimators.contrasts(huge, "two-sided", 1)) == (3e-4 - 2e-4) / 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("scaling", estimators.SCALINGS)
@pytest.mark.parametrize(("sides", "q"), CASES_OF_SEVERAL)
def test_weights_of_lost_losses_raise_nothing(sides, q, scaling, value):
    losses = torch.randn(estimators.group_count(sides, q), dtype=torch.float64)
    losses[-1] = value
    assert estimators.weights(losses, sides, q, SIGMA, scaling=scaling).shape == (q,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimators.group_sigmas("both", 1, 1e-3), "sides is 'both'"),
        (lambda: estimators.group_sigmas("two-sided", 0, 1e-3), "queries is 0"),
        (lambda: estimators.group_sigmas("leave-one-out", 1, 1e-3), "at least 2"),
        (lambda: estimators.group_sigmas("two-sided", 1, 0.0), "sigma is 0.0"),
        (lambda: estimators.group_sigmas("two-sided", 1, math.nan), "sigma is nan"),
        (lambda: estimators.weights(torch.zeros(3).double(), "two-sided", 1, 1.0), r"takes float64 \(2,\)"),
        (lambda: estimators.weights(torch.zeros(2), "two-sided", 1, 1.0), "torch.float32"),
        (lambda: estimators.weights(torch.zeros(2).double(), "two-sided", 1, 1.0, scaling="l2"), "scaling is 'l2'"),
        (lambda: estimators.weights(torch.zeros(2).double(), "two-sided", 1, 1.0, clip=0), "clip is 0"),
        (lambda: estimators.check("one-sided", 1, "std"), "spread of at least 2"),
    ],
)
def test_estimators_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("sides", "q"), CASES)
def test_rounding_floor(sides, q):
    """A loss linear in the perturbation has none; noise that does not shrink is found at its size."""
    clean, slope = torch.randn(5, dtype=torch.float64), torch.randn(q, 5, dtype=torch.float64)
    sigmas = estimators.group_sigmas(sides, q, 1.0).double()
    at = [clean + shrink * sigmas @ slope for shrink in (1.0, estimators.FLOOR_SHRINK)]
    assert estimators.rounding_floor(at[0], at[1], sides, q) < 1e-14
    noise = 1e-3 * torch.randn(2, *at[0].shape, dtype=torch.float64)
    found = estimators.rounding_floor(at[0] + noise[0], at[1] + noise[1], sides, q)
    assert 1e-5 < found < 4e-3


def test_better_sigma():
    assert estimators.better_sigma(1e-3, 1e-6, 1e-3) is None  # clear of the floor
    assert estimators.better_sigma(1e-3, math.nan, 1e-3) is None  # never measured
    assert estimators.better_sigma(math.nan, 1e-6, 1e-3) is None
    assert estimators.better_sigma(0.0, 0.0, 1e-3) == pytest.approx(1e-2)  # nothing moves at all
    assert estimators.better_sigma(1e-6, 1e-6, 1e-3) == pytest.approx(1e-2)
    assert estimators.better_sigma(2e-6, 1e-6, 1e-3) == pytest.approx(5e-3)
    assert estimators.better_sigma(1e-9, 1e-6, 1e-3) == pytest.approx(1.0)  # and no further than 1000-fold


# --- means and variances on a quadratic, Dim coordinates -------------------------------------------------------------

DIM, SAMPLES = 6, 6_000
GRADIENT = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0], dtype=torch.float64)
HESSIAN = torch.diag(torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 4.0], dtype=torch.float64)) + 0.3


STRUCTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "masked": {"mask": torch.tensor([[1.0, 0, 1], [0, 1, 0]]).double()},
    "right-basis": {"basis": lazy_factor(1, 2, 3, 1, orthonormal=True)},
    "uv": {"basis": lazy_factor(3, 4, 3, 2)},
    "uzv": {"basis": lazy_factor(5, 6, 3, 1, orthonormal=True), "left": lazy_factor(7, 8, 2, 1, orthonormal=True)},
    "scale": {"codes": torch.tensor([[1.0, -2, 3], [0, 2, -1]]).double(), "group_size": 2},
}


def quadratic(c: Tensor) -> Tensor:
    """c [..., Dim] -> loss [...]."""
    return 7.0 + c @ GRADIENT + 0.5 * (c @ HESSIAN * c).sum(-1)


def estimates(sides: str, q: int, sigma: float = SIGMA) -> Tensor:
    """Independent estimates of the gradient at 0, [n, Dim], and the wrong mean(d) mean(Z) beside them, [2, n, Dim]."""
    n = SAMPLES // q
    z = rng.noise("normal", 11, 5, n * q, DIM).double().view(n, q, DIM)
    weights = weights_along(z, sides, sigma)
    right = torch.einsum("ns,nsd->nd", weights, z)
    wrong = weights.sum(1, keepdim=True) * z.mean(1)  # weights hold the 1/q: their sum is mean(d)
    return torch.stack((right, wrong))


def weights_along(deltas: Tensor, sides: str, sigma: float = SIGMA) -> Tensor:
    """Weights [n, q] of n independent steps along deltas [n, q, Dim], of the quadratic at 0."""
    q = deltas.shape[1]
    sigmas = estimators.group_sigmas(sides, q, sigma).double()
    points = torch.einsum("gs,nsd->ngd", sigmas, deltas)
    losses = points @ GRADIENT if sides == estimators.TANGENT else quadratic(points)
    return torch.stack([estimators.weights(row, sides, q, sigma) for row in losses])


def off_by(samples: Tensor, mean: Tensor) -> float:
    """Distance of the sample mean from `mean` in standard errors, the worst coordinate."""
    error = samples.std(0) / math.sqrt(len(samples))
    return float(((samples.mean(0) - mean) / error).abs().max())


@pytest.mark.parametrize(("sides", "q"), [*CASES, *((estimators.TANGENT, q) for q in QUERIES)])
def test_weights_are_unbiased(sides, q):
    right, wrong = estimates(sides, q)
    assert off_by(right, GRADIENT) < 4
    if q > 1:  # the tempting product of means is q times too small, and this test sees it
        assert off_by(wrong, GRADIENT) > 10
        if sides == "leave-one-out":  # the d sum to zero: nothing at all is left
            assert float(wrong.abs().max()) < 1e-12
        else:
            assert off_by(wrong, GRADIENT / q) < 4


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("sides", [*estimators.SIDES, estimators.TANGENT])
def test_weights_have_the_mean_of_their_structure(sides, structure):
    """Over W [2, 3], whatever is differenced: the mean is the last column of the table of `directions`."""
    q, (row, given) = 2, (DIRECTIONS[structure], STRUCTURES[structure])
    shape = row.shape(2, 3, *given.values())
    z = rng.noise("normal", 12, 5, 3000, math.prod(shape)).double().view(-1, *shape)
    deltas = torch.stack([row.expand(one, *given.values()).flatten() for one in z]).view(-1, q, DIM)
    found = torch.einsum("ns,nsd->nd", weights_along(deltas, sides), deltas)
    mean = mean_estimate(structure, GRADIENT.view(2, 3), **given).flatten()
    deviation = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - mean).abs() <= 4 * deviation + 1e-12).all())
    assert structure == "dense" or float((mean - GRADIENT).norm()) > 10 * float(deviation.norm())  # it is another one


@pytest.mark.parametrize("sides", ["two-sided", estimators.TANGENT])
@pytest.mark.parametrize("q", [1, 4])
def test_weights_mean_squared_error(q, sides):
    """E|g - grad|^2 = (Dim + 1) |grad|^2 / q for the exact directional derivative of a quadratic."""
    squared = (estimates(sides, q)[0] - GRADIENT).square().sum(1)
    want = (DIM + 1) * float(GRADIENT.square().sum()) / q
    assert abs(float(squared.mean()) - want) < 4 * float(squared.std()) / math.sqrt(len(squared))


def test_weights_cosine():
    """E|cos| = Gamma(Dim/2) / (sqrt(pi) Gamma((Dim+1)/2)), one direction."""
    right = estimates("two-sided", 1)[0]
    cosine = (right @ GRADIENT / right.norm(dim=1) / GRADIENT.norm()).abs()
    want = math.gamma(DIM / 2) / (math.sqrt(math.pi) * math.gamma((DIM + 1) / 2))
    assert abs(float(cosine.mean()) - want) < 4 * float(cosine.std()) / math.sqrt(len(cosine))


def test_weights_one_sided_varies_more():
    """By sigma^2 curvature^2: four times as much at twice the radius."""
    two = float((estimates("two-sided", 1)[0] - GRADIENT).square().sum(1).mean())
    extra = [float((estimates("one-sided", 1, s)[0] - GRADIENT).square().sum(1).mean()) - two for s in (0.3, 0.6)]
    assert 0 < extra[0] < extra[1] and 3 < extra[1] / extra[0] < 5
