"""The compiled module. Every argument is positional; a pointer is an int, 0 = null; an enum is an int of `ENUMS`.

The arguments are the fields of the structs in csrc/cpu/kernels.h, in the same order; their meaning stands there. The
caller has checked dtypes, shapes, strides and devices, and keeps the tensors alive over the call. The GIL is released.

Raises RuntimeError with the message of a kernel or about `isa`, TypeError when an argument does not fit.
"""

from collections.abc import Sequence

# fmt: off
# (one line per group of fields, as in the struct)

ENUMS: dict[str, dict[str, int]]  # DType, Format, Layout, Noise, Mask, Rule -> name -> value

def isas() -> tuple[str, ...]: ...
def zo_linear(
    isa: str,
    x: int, y: int, dtype: int, M: int, x_stride: int,
    # the weight
    codes: int, scale: int, offset: int, nested: int, format: int, layout: int, code_dtype: int, scale_dtype: int,
    N: int, K: int, group_size: int, flat: bool,
    bias: int, bias_dtype: int, base_basis: int, base_coeff: int, base_rank: int,
    basis: int, basis_per_group: bool, coeff: int, coeff_groups: int, projected: int, R: int,
    # the direction
    seeds: int, sigmas: int, S: int, direction_G: int, noise: int, param_id: int, row_offset: int, cols: int,
    G: int, threads: int, /,
) -> None: ...
def zo_dense_linear(
    isa: str,
    x: int, y: int, dtype: int, M: int, x_stride: int,
    # the weight
    codes: int, scale: int, offset: int, nested: int, format: int, layout: int, code_dtype: int, scale_dtype: int,
    N: int, K: int, group_size: int, flat: bool,
    bias: int, bias_dtype: int,
    # the direction
    seeds: int, sigmas: int, S: int, direction_G: int, noise: int, param_id: int, row_offset: int, cols: int,
    on_scale: bool, mask: int, mask_value: float, mask_seed: int, noise_scale: int, G: int, threads: int, /,
) -> None: ...
def zo_update(
    isa: str,
    # one item per layer, here alone a sequence of pointers; an empty one is a moment that the rule does not have
    coeffs: Sequence[int], exp_avgs: Sequence[int], exp_avg_sqs: Sequence[int],
    rows: Sequence[int], cols: Sequence[int], row_offsets: Sequence[int],
    param_ids: int, seeds: int, weights: int, S: int, weights_per_layer: bool,
    noise: int, rule: int, hyper: int, threads: int, /,
) -> None: ...
def zo_perturb(
    isa: str,
    w: int, dtype: int, N: int, C: int, w_stride: int, seeds: int, weights: int, S: int,
    noise: int, param_id: int, row_offset: int, cols: int, basis: int, R: int,
    mask: int, mask_value: float, mask_seed: int, noise_scale: int, has_rounding: bool, rounding_seed: int,
    threads: int, /,
) -> None: ...
def dequantize(
    isa: str,
    # the weight
    codes: int, scale: int, offset: int, nested: int, format: int, layout: int, code_dtype: int, scale_dtype: int,
    N: int, K: int, group_size: int, flat: bool,
    row_start: int, rows: int, out: int, dtype: int, threads: int, /,
) -> None: ...
def noise_run(isa: str, out: int, seed: int, param_id: int, kind: int, first: int, count: int, /) -> None: ...
