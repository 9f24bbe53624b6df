"""Who is timed at the other ops: our op and PyTorch as a competent user would write it.

Providers and gates as in providers.py. In-place ops change the weights of the ring; only their time and what the gate's
call changed matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from zoact_kernels import ops, reference, rng

from .cases import LAYERS, Case
from .providers import (
    PARAM_ID,
    Call,
    Data,
    Provider,
    _dequantise,
    _needs,
    _stored_for_layers,
    bitsandbytes_ring,
    dtype_of,
    sigma_of,
)

SEED = 7


def _scalars(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """seeds [1], weights [1], param_id [1] on the device."""
    values = torch.tensor([SEED]), torch.tensor([sigma_of(case)]), torch.tensor([PARAM_ID])
    return tuple(value.to(case.device) for value in values)  # type: ignore[return-value]


def _noise(case: Case, data: Data, columns: int) -> Tensor:
    """torch.randn, or the very Z of our seed where the gate has set it."""
    if data.noise:
        return data.noise[0].to(dtype_of(case))
    return torch.randn(case.N, columns, device=case.device, dtype=dtype_of(case))


def _set_noise(case: Case, data: Data, columns: int) -> Tensor:
    data.noise = [_drawn(case.N, columns).to(case.device)]
    return data.noise[0].double()


@functools.lru_cache(maxsize=1)  # seconds in NumPy for a large layer, and every provider's gate wants the same
def _drawn(rows: int, columns: int) -> Tensor:
    return rng.noise("normal", SEED, PARAM_ID, rows, columns)


# zo_dense_linear: + and - of one dense direction ----------------------------------------------------------------------


def dense_linear(case: Case, data: Data) -> Call:
    ring = [_stored_for_layers(w) for w in data.ring]
    seeds, _, param_id = _scalars(case)
    sigmas = torch.tensor([[sigma_of(case)], [-sigma_of(case)]], device=case.device)

    def call(i: int) -> Tensor:
        w = ring[i]
        return ops.zo_dense_linear(
            data.x, w.weight, w.scale, w.offset, None, None, seeds, sigmas, param_id, None, None, None, case.format,
            w.layout, w.group_size, case.N, "normal", groups=2,
        )  # fmt: skip

    return call


def torch_dense_linear(case: Case, data: Data) -> Call:
    """Z made once, W + sigma Z and W - sigma Z in turn in one buffer."""
    sigma = sigma_of(case)

    def call(i: int) -> Tensor:
        w, z = _dequantise(case, data.ring[i]), _noise(case, data, case.K)
        plus, minus = data.x.chunk(2)
        moved = torch.add(w, z, alpha=sigma)
        y = plus @ moved.T
        moved.add_(z, alpha=-2 * sigma)
        return torch.cat([y, minus @ moved.T])

    return call


def gate_dense_linear(case: Case, data: Data, call: Call) -> float:
    z = _set_noise(case, data, case.K)
    w = data.ring[0].dequantize(torch.float64)
    plus, minus = data.x.double().chunk(2)
    sigma = sigma_of(case)
    want = torch.cat([plus @ (w + sigma * z).T, minus @ (w - sigma * z).T])
    got = call(0).double()
    data.noise = None
    return float((got - want).abs().max() / want.abs().max())


# zo_perturb_: w += sigma Z --------------------------------------------------------------------------------------------


def perturb(case: Case, data: Data) -> Call:
    seeds, weights, param_id = _scalars(case)
    return lambda i: ops.zo_perturb_(data.ring[i].weight, seeds, weights, param_id)


def torch_perturb(case: Case, data: Data) -> Call:
    return lambda i: data.ring[i].weight.add_(sigma_of(case) * _noise(case, data, case.K))


def gate_perturb(case: Case, data: Data, call: Call) -> float:
    """Of what was added, so that rounding of w is part of the error."""
    z = _set_noise(case, data, case.K)
    before = data.ring[0].weight.double()
    call(0)
    error = (data.ring[0].weight.double() - before - sigma_of(case) * z).abs().max()
    data.noise = None
    return float(error / (before + sigma_of(case) * z).abs().max())


# zo_update_: Adam on the coefficients of a whole model ----------------------------------------------------------------


def _hyper(case: Case) -> Tensor:
    return torch.tensor([1e-3, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.001], device=case.device)


def _state(case: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    coeffs, first, second = (
        [torch.full((case.N, case.rank), value, device=case.device) for _ in range(LAYERS)] for value in (0.0, 0.1, 0.2)
    )
    return coeffs, first, second


def update(case: Case, data: Data) -> Call:
    coeffs, first, second = _state(case)
    seeds, weights, _ = _scalars(case)
    ids = torch.arange(LAYERS, device=case.device) + PARAM_ID
    skip = torch.zeros(1, dtype=torch.bool, device=case.device)
    hyper = _hyper(case)

    def call(i: int) -> list[Tensor]:
        ops.zo_update_(coeffs, first, second, ids, seeds, weights, hyper, skip, "adam")
        return coeffs

    return call


def torch_update(case: Case, data: Data) -> Call:
    """The noise layer by layer, then one multi-tensor call for each line of Adam."""
    coeffs, first, second = _state(case)
    lr, beta1, beta2, eps, _, correction1, correction2 = _hyper(case).tolist()

    def call(i: int) -> list[Tensor]:
        gradient = [_noise(case, data, case.rank) * sigma_of(case) for _ in coeffs]
        torch._foreach_lerp_(first, gradient, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradient, gradient, 1 - beta2)
        root = torch._foreach_div(second, correction2)
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, eps)
        torch._foreach_addcdiv_(coeffs, first, root, -lr / correction1)
        return coeffs

    return call


def gate_update(case: Case, data: Data, call: Call) -> float:
    """Of the first layer, whose noise the gate knows, against the reference in fp64."""
    _set_noise(case, data, case.rank)
    state = [[tensors[0].double()] for tensors in _state(case)]
    seeds, weights, param_id = _scalars(case)
    skip = torch.zeros(1, dtype=torch.bool, device=case.device)
    reference.zo_update_(*state, param_id, seeds, weights.double(), _hyper(case).double(), skip, "adam", "normal", [0])
    got = call(0)[0].double()
    data.noise = None
    return float((got - state[0][0]).abs().max() / state[0][0].abs().max())


# dequantize -----------------------------------------------------------------------------------------------------------


def dequantize(case: Case, data: Data) -> Call:
    ring = [_stored_for_layers(w) for w in data.ring]

    def call(i: int) -> Tensor:
        w = ring[i]
        return ops.dequantize(
            w.weight, w.scale, w.offset, None, w.format, w.layout, w.group_size, case.N, case.K, dtype_of(case)
        )

    return call


def torch_dequantize(case: Case, data: Data) -> Call:
    return lambda i: _dequantise(case, data.ring[i])


def bitsandbytes_dequantize(case: Case, data: Data) -> Call:
    ring, functional = bitsandbytes_ring(case, data), _needs("bitsandbytes.functional")
    return lambda i: functional.dequantize_4bit(ring[i][0], ring[i][1])


def gate_dequantize(case: Case, data: Data, call: Call) -> float:
    want = data.ring[0].dequantize(torch.float64)
    return float((call(0).double() - want).abs().max() / want.abs().max())


PROVIDERS: dict[str, dict[str, Provider]] = {
    "zo_dense_linear": {"zoact": dense_linear, "torch unfused": torch_dense_linear},
    "zo_perturb_": {"zoact": perturb, "torch unfused": torch_perturb},
    "zo_update_": {"zoact": update, "torch unfused": torch_update},
    "dequantize": {"zoact": dequantize, "torch unfused": torch_dequantize, "bitsandbytes": bitsandbytes_dequantize},
}
GATES: dict[str, Callable[[Case, Data, Call], float]] = {
    "zo_dense_linear": gate_dense_linear,
    "zo_perturb_": gate_perturb,
    "zo_update_": gate_update,
    "dequantize": gate_dequantize,
}
