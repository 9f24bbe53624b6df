"""From the losses of the row groups to the weights of the noises, g = sum_s weights[s] Z_s, mean over queries included.

Two choices make an estimator. `sides` says which groups are evaluated (G groups, q = S queries, one seed per query):

    two-sided       G = 2q    +s0, -s0, +s1, -s1 ...     d_j = (f_{+j} - f_{-j}) / (2 sigma)           arXiv 2305.17333
    one-sided       G = q+1   clean, +s0, +s1 ...        d_j = (f_j - f_0) / sigma                     arXiv 2607.01125
    leave-one-out   G = q     +s0, +s1 ...               d_j = (f_j - mean f) q / ((q - 1) sigma)      RLOO of AIM-ZO
    tangent         G = q     no difference: t_j, the derivative of f along sigma Delta_j, is given in place of a loss
                                                         d_j = t_j / sigma                              arXiv 2402.11592

`scaling` says what becomes of the directional derivatives d [S]; always weights_j = scaled(d)_j / q:

    plain     d
    std       d / std_pop(d): free of sigma and of the scale and offset of the loss; zeros where all d are equal.
              one-sided it is FZOO's (f_j - f_0) / (q std_pop(f_1 ... f_q))                            arXiv 2506.09034
    clipped   min(max(d, -clip), clip)                                                                 arXiv 2505.13430
    sign      sign(d): of the scalar, not of the entries                                               arXiv 2402.11592

Losses are float64. Given per example, [G, B], they are differenced example by example and only then averaged, so what
the groups have in common cancels before any sum is rounded. With q > 1 every direction keeps its own scalar: the mean
of d_j Z_j is unbiased, mean(d) mean(Z) is q times too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SIDES = ("two-sided", "one-sided", "leave-one-out")
TANGENT = "tangent"  # of methods that differentiate: what the others would give it are losses

CLIP = 100.0  # QZO's threshold
FLOOR_SHRINK = 2.0**-5  # the second radius of `rounding_floor`, relative to the first
DROWNED = 3.0  # a mean signal below this many floors is mostly rounding
CLEAR = 10.0  # and this many floors are comfortable


def group_count(sides: str, queries: int) -> int:
    """G for q = `queries`. Raises ValueError for unknown sides or too few queries."""
    if sides not in (*SIDES, TANGENT):
        raise ValueError(f"sides is {sides!r}; it may be {', '.join(SIDES)} or {TANGENT}")
    least = 2 if sides == "leave-one-out" else 1
    if queries < least:
        raise ValueError(f"queries is {queries}; {sides} needs at least {least}")
    return {"two-sided": 2 * queries, "one-sided": queries + 1}.get(sides, queries)


def group_sigmas(sides: str, queries: int, sigma: float) -> Tensor:
    """Signed radius of every seed in every group, float32 [G, S] S = `queries`; a row has at most one that is not 0."""
    group_count(sides, queries)
    if not 1e-30 < sigma < 1e30:
        raise ValueError(f"sigma is {sigma}; the radius is a positive number that float32 can hold")
    eye = torch.eye(queries, dtype=torch.float32) * sigma
    if sides == "two-sided":
        return torch.stack((eye, -eye), dim=1).flatten(0, 1)
    return torch.cat((torch.zeros(1, queries), eye)) if sides == "one-sided" else eye


def contrasts(losses: Tensor, sides: str, queries: int) -> Tensor:
    """What each query saw, float64 [S]: f+ - f-, f_j - f_0 or f_j - mean(f), differenced per example, then averaged.

    losses: float64 [G] or [G, B], groups in the order of `group_sigmas`; for "tangent" their derivatives. Raises
    ValueError for another G or dtype.
    """
    groups = group_count(sides, queries)
    if losses.dim() not in (1, 2) or losses.shape[0] != groups or losses.dtype != torch.float64:
        raise ValueError(
            f"losses are {losses.dtype} {tuple(losses.shape)}; {sides} with {queries} queries takes float64 "
            f"({groups},) or ({groups}, examples)"
        )
    table = losses.reshape(groups, -1)
    if sides == "two-sided":
        table = table[0::2] - table[1::2]
    elif sides == "one-sided":
        table = table[1:] - table[:1]
    elif sides == "leave-one-out":
        table = table - table.mean(dim=0)
    return table.mean(dim=1)


def _std(d: Tensor, clip: float) -> Tensor:
    spread = d.std(correction=0)
    # d of equal losses may still differ in the last bit of float64: that spread is rounding, not information
    degenerate = spread <= 1e-12 * d.abs().max()
    return torch.where(degenerate, torch.zeros_like(d), d / torch.where(degenerate, torch.ones_like(spread), spread))


SCALINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "plain": lambda d, clip: d,
    "std": _std,
    "clipped": lambda d, clip: d.clamp(-clip, clip),
    "sign": lambda d, clip: d.sign(),
}


def check(sides: str, queries: int, scaling: str = "plain", clip: float = CLIP) -> None:
    """Raises ValueError for an estimator that does not exist: unknown sides or scaling, too few queries, clip <= 0."""
    group_count(sides, queries)
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is {scaling!r}; it may be {', '.join(SCALINGS)}")
    if scaling == "std" and queries < 2:
        raise ValueError(f"queries is {queries}; scaling 'std' needs the spread of at least 2")
    if not clip > 0:
        raise ValueError(f"clip is {clip}; it must be positive")


def weights(
    losses: Tensor, sides: str, queries: int, sigma: float, *, scaling: str = "plain", clip: float = CLIP
) -> Tensor:
    """Weights of the noises, float64 [S]: g = sum_s weights[s] Z_s. Formulas above.

    losses: float64 [G] or [G, B]. A non-finite loss gives non-finite weights (the step is to be skipped); scaling "std"
    with no spread between the queries gives zeros.
    Raises ValueError as `check` and `contrasts` do.
    """
    check(sides, queries, scaling, clip)
    difference = contrasts(losses, sides, queries)
    unit = {"two-sided": 0.5, "leave-one-out": queries / max(queries - 1, 1)}.get(sides, 1.0) / sigma
    return SCALINGS[scaling](difference * unit, clip) / queries


def rounding_floor(losses: Tensor, shrunk: Tensor, sides: str, queries: int) -> float:
    """How much of a loss difference is rounding: mean over queries of |contrast' - contrast * FLOOR_SHRINK|.

    shrunk: the losses of the same batch and seeds at sigma * FLOOR_SHRINK. A smooth loss has contrasts in proportion to
    sigma and leaves nothing; rounding inside the model does not shrink. Shapes as in `contrasts`.
    """
    left = contrasts(shrunk, sides, queries) - contrasts(losses, sides, queries) * FLOOR_SHRINK
    return float(left.abs().mean())


def better_sigma(signal: float, floor: float, sigma: float) -> float | None:
    """A radius whose signal clears the rounding floor, rounded up to 1, 2 or 5 times 10^n; None while `sigma` will do.

    signal: mean |f+ - f-| over recent steps, in proportion to sigma; floor: `rounding_floor`, which is not.
    """
    if math.isnan(floor) or signal > DROWNED * floor or not math.isfinite(signal):
        return None
    wanted = sigma * (CLEAR * floor / signal if signal > 0 and floor > 0 else CLEAR)
    wanted = min(wanted, 1000 * sigma)
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(float(f"{m * power:.0e}") for m in (1, 2, 5, 10) if m * power >= wanted * (1 - 1e-9))


def per_example(losses: Tensor, groups: int) -> Tensor:
    """Losses of a closure, float32 or float64 [groups B] or [groups, B], as float64 [groups, B]. Raises ValueError."""
    if losses.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"losses are {losses.dtype}; needed are float32 or float64: one ulp of a 16-bit loss is larger than what a "
            "step measures. Cast the logits with .float() before the loss"
        )
    expected = losses.dim() < 2 or (losses.dim() == 2 and losses.shape[0] == groups)
    if not expected or losses.numel() == 0 or losses.numel() % groups:
        raise ValueError(
            f"losses have shape {tuple(losses.shape)}; {groups} row groups give ({groups} * B,) or ({groups}, B), one "
            "loss per example, group after group"
        )
    return losses.detach().double().reshape(groups, -1)
