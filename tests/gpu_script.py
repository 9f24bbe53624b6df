"""Every op once by every implementation, at small sizes: what test_gpu.py runs under compute-sanitizer.

python tests/gpu_script.py [cpu | cuda]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from zoact_kernels import ops
from zoact_kernels.dispatch import IMPLEMENTATIONS
from zoact_kernels.formats import LAYOUTS
from zoact_kernels.quantize import quantize

N, K, R = 70, 1300, 5  # no tile, no vector and no group divides them; K is split


def linears(name: str, device: str) -> int:
    """zo_linear in each format, dtype and width of tile that the implementation takes."""
    done = 0
    for format in ("int4", "nf4", "int8", "dense"):
        for dtype in (torch.bfloat16, torch.float32):
            weight = torch.randn(N, K, device=device) / K**0.5
            packed = quantize(weight.to(dtype) if format == "dense" else weight, format, method="minmax")
            for M in (2, 34):
                x = torch.randn(M, K, dtype=dtype, device=device)
                basis, coeff = torch.randn(K, R, device=device) / K**0.5, torch.randn(N, R, device=device)
                seeds, param_id = torch.tensor([7], device=device), torch.tensor([77], device=device)
                sigmas = torch.tensor([[0.5], [-0.5]], device=device)
                for layout in LAYOUTS:
                    try:
                        w = packed.to_layout(layout)
                    except ValueError:  # the format has no such layout
                        continue
                    arguments = (
                        x, w.weight, w.scale, w.offset, None, None, None, None, basis, coeff, None, None, seeds,
                        sigmas, param_id, format, layout, w.group_size, N, "normal", 2,
                    )  # fmt: skip
                    if next(i for i in IMPLEMENTATIONS if i.name == name).refusal(ops.linear_problem(*arguments)):
                        continue
                    with ops.using(name):
                        assert torch.isfinite(ops.zo_linear(*arguments)).all()
                    done += 1
                    break
    return done


def others(name: str, device: str) -> int:
    """zo_dense_linear, zo_perturb_, zo_update_ and dequantize where the implementation has them."""
    one, weight = torch.tensor([7], device=device), torch.tensor([0.5], device=device)
    w = torch.randn(N, K, device=device)
    coeff, first, second = (torch.zeros(N, R, device=device) for _ in range(3))
    hyper = torch.tensor([1e-2, 0.9, 0.999, 1e-8, 0.1, 0.1, 0.001], device=device)
    skip = torch.tensor([False], device=device)
    packed = quantize(w, "int4", method="minmax")
    sigmas = torch.tensor([[0.5], [-0.5]], device=device)
    x = torch.randn(2, K, device=device)
    done = 0
    for call in (
        lambda: ops.zo_dense_linear(
            x, packed.weight, packed.scale, packed.offset, None, None, one, sigmas, one, None, None, None, "int4",
            "row", packed.group_size, N, "normal", groups=2,
        ),
        lambda: ops.zo_perturb_(w, one, weight, one),
        lambda: ops.zo_update_([coeff], [first], [second], one, one, weight, hyper, skip, "adam"),
        lambda: ops.dequantize(
            packed.weight, packed.scale, packed.offset, None, "int4", "row", packed.group_size, N, K, torch.bfloat16
        ),
    ):  # fmt: skip
        try:
            with ops.using(name):
                call()
        except RuntimeError as error:
            if not str(error).startswith("no implementation takes"):
                raise
            continue
        done += 1
    return done


def run(device: str) -> int:
    """Calls that were made; the reference is torch and not counted."""
    torch.manual_seed(0)
    names = [i.name for i in IMPLEMENTATIONS if i.name != "reference"]
    count = sum(linears(name, device) + others(name, device) for name in names)
    if device != "cpu":
        torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    print(f"{run(device)} calls on {device}")
