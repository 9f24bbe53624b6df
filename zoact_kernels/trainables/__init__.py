"""What a method moves: one object for each parameter, with how a forward perturbs it and what a snapshot holds of it.

    kind           value [rows, cols] = shape of Z      row group g runs with
    Coefficients   C [N, R] of a ZOLinear with a basis  D(W) + (C + sum_s sigmas[g, s] Z_s) A^T
    Weight         any parameter of a dense model       W + sum_s sigmas[g, s] Z_s
    Scales         the scales of a low-bit weight       (q - zero) (scale + sum_s sigmas[g, s] Z_s)
    LowRank        a matrix, V renewed now and then     W + (C + sum_s sigmas[g, s] Z_s) V^T
    Core           a matrix, U and V renewed            W + c U (S + sum_s sigmas[g, s] Z_s) V^T

A rule (optim) moves `value` along the same Z: probe and update address the noise by (seed, param_id, row, column), and
both take it from one of these objects.
"""

from __future__ import annotations

from .base import Trainable, untied_layers
from .factors import Coefficients, Core, LowRank, coefficients, low_rank
from .scale import Scales, scales
from .weight import Weight, weights

__all__ = [
    "Coefficients",
    "Core",
    "LowRank",
    "Scales",
    "Trainable",
    "Weight",
    "coefficients",
    "low_rank",
    "scales",
    "untied_layers",
    "weights",
]
