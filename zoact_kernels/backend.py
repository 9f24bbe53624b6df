"""What code will run, here and for this model: the environment, the choice for each layer, and one choice for a run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import __version__, native
from .cpu_ops import Cpu
from .dispatch import IMPLEMENTATIONS, Explanation, Problem, arch_of, explain, using
from .layers import ZOLinear, zo_layers
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
    problems = {
        name: layer_problem(layer, max(1, rows // groups) * groups, groups, seeds, dtype or own)
        for name, layer in zo_layers(model).items()
    }
    return {name: explain(_elsewhere(problem, arch) if arch else problem) for name, problem in problems.items()}


def explain_shapes(arch: str, dtype: torch.dtype = torch.bfloat16) -> dict[Problem, Explanation]:
    """What a GPU would run, for a layer of 4096 x 4096 int4 weights, rank 16, two row groups, few rows and many."""
    problems = [
        _elsewhere(
            Problem("zo_linear", "cuda", dtype, M, 4096, 4096, "int4", "row", 64, torch.uint8, torch.float16, 16, 0,
                    2, 1, "normal"),
            arch,
        )
        for M in (2, 16, 32, 64, 128, 512, 4096)
    ]  # fmt: skip
    return {problem: explain(problem) for problem in problems}


def _elsewhere(problem: Problem, arch: str) -> Problem:
    """The same problem on a GPU, its weight in the layout that a move there gives it."""
    return problem._replace(device="cuda", arch=arch, layout="row")


def pin(
    model: nn.Module, rows: int, groups: int, seeds: int, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The back end of a run: one implementation for all layers, its instruction set, versions, threads (JSON values).

    The one that dispatch chooses (or `using` forces) for every layer, else the first that takes them all, those whose
    rows are batch-invariant first (design law 2.4). `before`, an earlier answer, is repeated as far as it can be had.
    Raises RuntimeError if no implementation takes every layer.
    """
    told = explain_layers(model, rows, groups, seeds)
    able = [i for i in IMPLEMENTATIONS if not any(i.name in t.refusals for t in told.values())]
    if not able:
        raise RuntimeError("no implementation takes every layer of the model; `zoact explain` says why")
    chosen = {t.chosen for t in told.values()}
    able.sort(key=lambda i: (chosen != {i.name}, not i.batch_invariant))
    name, isa = able[0].name, None
    device = next(iter(zo_layers(model).values())).weight.device
    if before is not None and before["implementation"] in {i.name for i in able}:
        name = before["implementation"]
    if name == "cpu":
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
