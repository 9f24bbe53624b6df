"""Intervals and comparisons, without a library of statistics.

    accuracy of one method    correct[s, e], seeds s = 1..S, test examples e = 1..E, the same examples for all seeds
    mean                      a = mean over s and e
    variance of the mean      v = v_s + v_e:  v_s = var_s(mean_e) / S,  v_e = var_e(mean_s) / E
    degrees of freedom        Welch-Satterthwaite: v^2 / (v_s^2 / (S - 1) + v_e^2 / (E - 1))
    interval                  a +- t(0.975) sqrt(v)

So it holds for other seeds and for other examples; each part holds a share of the other's noise, which errs on the wide
side. A difference of two methods is the same with correct[s, e] of the one minus that of the other: both saw the same
examples, and seed s gave both the same batches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """mean +- half, at 95 %. half is NaN where there is one seed only."""

    mean: float
    half: float
    seeds: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def t_quantile(probability: float, freedom: float) -> float:
    """Student's t, probability in (0.5, 1), freedom f >= 1: with t = sqrt(f) tan(u) the density is cos(u)^(f - 1).

    Within 1e-6, relative, of the tables up to 10 000 degrees of freedom; beyond, the last of them is returned.
    """
    if not 0.5 < probability < 1 or not freedom >= 1:
        raise ValueError(f"probability {probability} has to lie in (0.5, 1) and freedom {freedom} to be at least 1")
    freedom = min(freedom, 1e4)
    end = min(math.pi / 2, 12 / math.sqrt(freedom))  # nothing is left beyond
    u = np.linspace(0.0, end, 200_001)
    density = np.cos(u) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(2 * probability - 1, mass / mass[-1], u)))


def interval(table: np.ndarray) -> Interval:
    """Of the mean of table [seeds, examples]; formulas above."""
    S, E = table.shape
    by_seed, by_example = table.mean(axis=1), table.mean(axis=0)
    mean = float(by_seed.mean())
    if S < 2 or E < 2:
        return Interval(mean, math.nan, S)
    v_s, v_e = float(by_seed.var(ddof=1)) / S, float(by_example.var(ddof=1)) / E
    if v_s + v_e == 0:
        return Interval(mean, 0.0, S)
    freedom = (v_s + v_e) ** 2 / (v_s**2 / (S - 1) + v_e**2 / (E - 1))
    return Interval(mean, t_quantile(0.975, freedom) * math.sqrt(v_s + v_e), S)


def seed_interval(values: np.ndarray) -> Interval:
    """Of the mean of one number a seed [S]: t interval over the seeds alone."""
    S = len(values)
    if S < 2:
        return Interval(float(values.mean()), math.nan, S)
    return Interval(float(values.mean()), t_quantile(0.975, S - 1) * float(values.std(ddof=1)) / math.sqrt(S), S)


def expected_cosine(dimensions: float) -> float:
    """E|cos| of a vector with an isotropic one: Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)), about sqrt(2 / (pi d))."""
    return math.exp(math.lgamma(dimensions / 2) - math.lgamma((dimensions + 1) / 2)) / math.sqrt(math.pi)
