"""A lane is a device and an implementation: which there are, and how a call gets into one and its result out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import weight_arguments
from test_zo_linear import OPTIONAL
from torch import Tensor

from zoact_kernels import ops, triton_ops
from zoact_kernels.dispatch import IMPLEMENTATIONS, Problem
from zoact_kernels.formats import LAYOUTS, PackedWeight

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
INVARIANT = [i.name for i in IMPLEMENTATIONS if i.batch_invariant]


def here(device: str, op: str) -> list[str]:
    """Implementations that take the op there, or might if there were such a device; `reference` is torch, no kernel."""
    problem = Problem(op, device, torch.float32, 1, 64, 64)
    refusals = {i.name: i.refusal(problem) or "" for i in IMPLEMENTATIONS if i.name != "reference"}
    return [name for name, why in refusals.items() if (why == "" if device == "cpu" else "tensors are on" not in why)]


def lanes(op: str = "zo_linear", names: Sequence[str] | None = None) -> list[Any]:
    """(device, implementation): where Triton interprets its own, elsewhere the compiled ones of the CPU and of GPUs."""
    found = [(device, name) for device in ("cpu", "cuda") for name in here(device, op)]
    if triton_ops.interpreted():
        found = [("cpu", name) for name in here("cpu", op) if name != "cpu"]
    return [
        pytest.param(device, name, marks=CUDA if device == "cuda" else [], id=f"{device}-{name}")
        for device, name in found
        if names is None or name in names
    ]


def crossed(cases: Sequence[Any], op: str = "zo_linear", names: Sequence[str] | None = None) -> list[Any]:
    """Each lane with each case; on the CPU with the first three, since other files have all of them there."""
    return [
        pytest.param(*lane.values, case, marks=lane.marks, id=f"{lane.id}-{case}")
        for lane in lanes(op, names)
        for case in (cases if lane.values[0] == "cuda" else cases[:3])
    ]


each_lane = pytest.mark.parametrize("device, name", lanes())


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """By one implementation; what it declines is skipped with its words."""
    try:
        with ops.using(name):
            yield
    except RuntimeError as error:
        if not str(error).startswith("no implementation takes"):
            raise
        pytest.skip(str(error))


def moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def layouts(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments with the weight in each layout that it has."""
    if arguments["weight"] is None:
        yield arguments
        return
    held = PackedWeight(
        arguments["format"], arguments["layout"], arguments["group_size"], arguments["out_features"],
        arguments["x"].shape[-1], arguments["weight"], arguments["scale"], arguments["offset"], arguments["nested"],
    )  # fmt: skip
    for layout in LAYOUTS:
        with contextlib.suppress(ValueError):  # the format has no such layout
            yield arguments | weight_arguments(held.to_layout(layout))


def in_some_layout(name: str, arguments: dict[str, Any], call: Callable[..., Tensor]) -> Tensor:
    """The call by one implementation, its weight in the first layout that this reads; else skipped with its words."""
    reasons = []
    for candidate in layouts(arguments):
        try:
            with ops.using(name):
                return call(**candidate)
        except RuntimeError as error:
            if not str(error).startswith("no implementation takes"):
                raise
            reasons.append(str(error))
    pytest.skip("; ".join(reasons))


def arranged(name: str, device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a zo_linear call on the device, its weight in the first layout that the implementation reads."""
    filled = dict.fromkeys(OPTIONAL) | moved(arguments, device)
    implementation = next(i for i in IMPLEMENTATIONS if i.name == name)
    refusals = []
    for candidate in layouts(filled):
        reason = implementation.refusal(ops.linear_problem(**candidate))
        if reason is None:
            return candidate
        refusals.append(reason)
    pytest.skip(f"{name}: {'; '.join(dict.fromkeys(refusals))}")


def linear(name: str, device: str, **arguments: Any) -> Tensor:
    """y on the CPU."""
    there = arranged(name, device, arguments)
    with forced(name):
        return ops.zo_linear(**there).cpu()


def problem_on(problem: Any, device: str) -> Any:
    """A call of zo_update_ or zo_perturb_ with its tensors on the device, each in memory of its own."""
    there = copy.copy(problem)
    for key, value in vars(problem).items():
        if isinstance(value, Tensor):
            setattr(there, key, value.to(device, copy=True))
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            setattr(there, key, [tensor.to(device, copy=True) for tensor in value])
    return there
