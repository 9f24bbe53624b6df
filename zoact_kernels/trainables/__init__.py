"""What a method moves: one object for each parameter, with how a forward perturbs it and what a snapshot holds of it.

    kind           value [rows, cols] = shape of Z      row group g runs with
    Coefficients   C [N, R] of a ZOLinear with a basis  D(W) + (C + sum_s sigmas[g, s] Z_s) A^T
    Weight         any parameter of a dense model       W + sum_s sigmas[g, s] Z_s
    Scales         the scales of a low-bit weight       (q - zero) (scale + sum_s sigmas[g, s] Z_s)
    LowRank        a matrix, V renewed now and then     W + (C + sum_s sigmas[g, s] Z_s) V^T
    Core           a matrix, U and V renewed            W + c U (S + sum_s sigmas[g, s] Z_s) V^T
    Between        S of fixed bases on both sides       D(W) + U (S + sum_s sigmas[g, s] Z_s) A^T
    Nodes          S as above, noise on outputs         y + sum_s sigmas[g, s] Z_s U^T, Z_s [n, Q]
    LoraB          B [N, R] of a LoRA                   D(W) + c (B + sum_s sigmas[g, s] Z_s) A^T
    LoraA          A [K, R] of a LoRA, beside its B     D(W) + c (B + sum ... Z_s) (A + sum_s sigmas[g, s] Z_As)^T
    PrefixTensor   keys or values before a sequence     K + sum_s sigmas[g, s] Z_s
    AlongInputs    a matrix, A of each step's inputs    W + sum_s sigmas[g, s] Z_s A^T, Z [N, R]; value is W, or C of A

A rule (optim) moves `value` along the same Z: probe and update address the noise by (seed, param_id, row, column), and
both take it from one of these objects.
"""

from __future__ import annotations

from .base import Trainable, untied_layers
from .between import Between, Nodes, between
from .factors import Coefficients, Core, LowRank, coefficients, low_rank
from .inputs import AlongInputs
from .lora import LoraA, LoraB, loras, set_aside
from .prefix import Prefix, PrefixTensor, prefix_of, prefixes
from .scale import Scales, scales
from .weight import Weight, weights

__all__ = [
    "AlongInputs",
    "Between",
    "Coefficients",
    "Core",
    "LoraA",
    "LoraB",
    "LowRank",
    "Nodes",
    "Prefix",
    "PrefixTensor",
    "Scales",
    "Trainable",
    "Weight",
    "between",
    "coefficients",
    "loras",
    "low_rank",
    "prefix_of",
    "prefixes",
    "scales",
    "set_aside",
    "untied_layers",
    "weights",
]
