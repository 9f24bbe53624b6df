"""What code will run, here and for this model: the environment, the choice for each layer, and one choice for a run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import __version__, native
from .cpu_ops import Cpu
from .dispatch import IMPLEMENTATIONS, Explanation, Problem, arch_of, explain, using
from .formats import PackedWeight
from .layers import ZOLinear, gpu_layout, zo_layers
from .memory import openmp_runtimes
from .ops import linear_problem

LIBRARIES = ("numpy", "safetensors", "transformers", "peft", "gguf", "bitsandbytes", "triton")


def environment() -> dict[str, str]:
    """Versions, processor, compiled module or why there is none, OpenMP runtimes, implementations: name -> value."""
    compiled = native.module()
    build = native.build()
    about: dict[str, str] = {
        "zoact_kernels": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        **{name: _version(name) for name in LIBRARIES},
        "processor": _processor(torch.device("cpu")),
        "compiled module": native.why_missing() if compiled is None else str(compiled.__file__),
    }
    if compiled is not None:
        about["instruction sets"] = f"{', '.join(native.isas())} (runs {Cpu.isa()})"
        about["built with"] = ", ".join(f"{key} {value}" for key, value in build.items()) or "unknown"
    about["CUDA kernels"] = native.why_no_cuda() or f"compiled for {', '.join(native.cuda_archs())}"
    if native.cuda() is None and not native.why_no_cuda():
        about["CUDA kernels"] += "; not loaded: torch finds no CUDA device"
    runtimes = openmp_runtimes()
    about["OpenMP runtimes"] = ", ".join(runtimes) or "none loaded"
    if len(runtimes) > 1:
        about["OpenMP runtimes"] += " (more than one: their threads compete)"
    sample = Problem("zo_linear", "cpu", torch.float32, 32, 64, 64, "int4", "row", 32, torch.uint8, torch.float16, 1)
    for implementation in IMPLEMENTATIONS:
        reason = implementation.refusal(sample)
        about[f"implementation {implementation.name}"] = "ready" if reason is None else f"declines: {reason}"
    return about


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def layer_problem(layer: ZOLinear, rows: int, groups: int, seeds: int, dtype: torch.dtype) -> Problem:
    """What dispatch sees when `layer` runs on `rows` rows of `dtype` in `groups` row groups with `seeds` noises."""
    device = layer.weight.device
    x = torch.empty(1, dtype=dtype, device=device).expand(rows, layer.in_features)
    noisy, basis = layer.rank > 0 and seeds > 0, layer.basis
    if layer.rank and basis is None:  # of the shape that it will have
        basis = torch.zeros(1, device=device).expand(layer.in_features, layer.rank)
    return linear_problem(
        x, layer.weight, layer.scale, layer.offset, layer.nested, layer.bias, layer.base_basis, layer.base_coeff,
        basis, layer.coeff, None, None,
        torch.zeros(seeds, dtype=torch.int64, device=device) if noisy else None,
        torch.zeros(groups, seeds, device=device) if noisy else None,
        layer.param_id if noisy else None,
        layer.format, layer.layout, layer.group_size, layer.out_features, "normal", groups,
    )  # fmt: skip


def explain_layers(
    model: nn.Module, rows: int = 64, groups: int = 2, seeds: int = 1, arch: str = "", dtype: torch.dtype | None = None
) -> dict[str, Explanation]:
    """Why each layer of a swapped model runs where it does, by name. `rows` is rounded down to whole groups.

    arch: tell instead what a GPU of that architecture ("sm_90", "gfx942") would run; it need not be here.
    dtype: of the activations; None for the model's own.
    """
    own: torch.dtype = getattr(model, "dtype", torch.float32)
    told = {}
    for name, layer in zo_layers(model).items():
        problem = layer_problem(layer, max(1, rows // groups) * groups, groups, seeds, dtype or own)
        if arch:  # the weight in the layout that a move there gives it
            problem = problem._replace(device="cuda", arch=arch, layout=gpu_layout(layer.packed(), arch))
        told[name] = explain(problem)
    return told


def explain_shapes(arch: str, dtype: torch.dtype = torch.bfloat16) -> dict[Problem, Explanation]:
    """What a GPU would run, for a layer of 4096 x 4096 int4 weights, rank 16, two row groups, few rows and many."""
    N = K = 4096
    codes = torch.empty(N, K // 2, dtype=torch.uint8, device="meta")
    scale = torch.empty(N, K // 64, dtype=torch.float16, device="meta")
    layout = gpu_layout(PackedWeight("int4", "row", 64, N, K, codes, scale), arch)
    problems = [
        Problem("zo_linear", "cuda", dtype, M, N, K, "int4", layout, 64, codes.dtype, scale.dtype, 16, 0, 2, 1,
                "normal", (), arch)
        for M in (2, 16, 32, 64, 128, 512, 4096)
    ]  # fmt: skip
    return {problem: explain(problem) for problem in problems}


def pin(
    model: nn.Module, rows: int, groups: int, seeds: int, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The back end of a run: its implementations, instruction set, versions, threads (JSON values).

    "implementation" is what `using` takes: the one that dispatch chooses for every layer; where that differs, all that
    it chooses, those of most layers first, so that each layer keeps its own for the run whatever the number of rows
    (design law 2.4). `before`, an earlier answer, is repeated as far as it can be had.
    """
    told = explain_layers(model, rows, groups, seeds)
    chosen = Counter(t.chosen for t in told.values())
    name, isa = ",".join(who for who, _ in chosen.most_common()), None
    device = next(iter(zo_layers(model).values())).weight.device
    earlier = before["implementation"].split(",") if before else []
    if set(earlier) <= {i.name for i in IMPLEMENTATIONS} and all(set(earlier) & set(t.seconds) for t in told.values()):
        name = ",".join(earlier)
    if "cpu" in name.split(","):
        isa = Cpu.isa()
        if before is not None and before["isa"]:
            with contextlib.suppress(ValueError), using("cpu", isa=before["isa"]):
                isa = before["isa"]
    return {
        "implementation": name,
        "isa": isa,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "zoact_kernels": __version__,
        "processor": _processor(device),
    }


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {arch_of(device)}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
