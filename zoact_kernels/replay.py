"""A run without its model: the trained layers alone, and C rebuilt from the log's seeds and weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .formats import FORMATS, PackedWeight, expected_shapes
from .layers import ZOLinear
from .methods import METHODS
from .perturbation import Perturbation
from .recipe import Recipe
from .runlog import RunError, RunLog
from .trainables import Prefix
from .trainer import coeff_hash, load_state
from .zeroth_order import ZeroOrder


def skeleton(log: RunLog) -> nn.Module:
    """The trained layers of a run without their weights: enough for `replay` and `export_lora`; no forward."""
    root, perturbation = nn.Module(), Perturbation()
    for entry in log.meta["layers"]:
        if "beside" in entry:  # a factor of a layer that is there
            continue
        if "prefix" in entry:
            owner = entry["prefix"]["name"].rpartition(".")[0]
            if not hasattr(parent := _reach(root, owner), "prefix"):
                Prefix(**entry["prefix"]).attach(parent)
            continue
        if "shape" in entry:
            owner, _, key = entry["name"].rpartition(".")
            dtype = getattr(torch, entry["dtype"])
            parent = _reach(root, owner, nn.Embedding(1, 1) if "rank" in entry else None)
            parent.register_parameter(key, nn.Parameter(torch.zeros(entry["shape"], dtype=dtype)))
            continue
        N, K = entry["out_features"], entry["in_features"]
        written = entry.get("written", "")
        weight = torch.zeros(N, K, dtype=getattr(torch, written)) if written else torch.zeros(1).expand(N, K)  # 4 bytes
        packed = PackedWeight("dense", "row", -1, N, K, weight)
        if "format" in entry:  # scales are trained: they are there, the codes are not
            packed = _scales_alone(entry["format"], entry["group_size"], N, K, entry["offset"])
        layer = ZOLinear(
            packed, rank=entry["rank"], name=entry["name"], param_id=entry["param_id"], perturbation=perturbation
        )
        layer.origin, layer.frozen = entry["origin"], not written
        parent, _, last = entry["name"].rpartition(".")
        _reach(root, parent).add_module(last, layer)
    if log.meta["causal_lm"] and not hasattr(root, "lm_head"):
        root.lm_head = nn.Module()  # what tells a causal language model to those who look
    return root


def _scales_alone(format: str, group_size: int, N: int, K: int, offset: bool) -> PackedWeight:
    """A weight without its codes: zeros [N, K] in a byte."""
    codes, groups = expected_shapes(format, "row", group_size, N, K)
    scale, dtype = torch.ones(groups), FORMATS[format].code_dtypes[0]
    code = torch.zeros(1, dtype=dtype).expand(codes)
    return PackedWeight(format, "row", group_size, N, K, code, scale, torch.ones(groups) if offset else None)


def _reach(root: nn.Module, path: str, last: nn.Module | None = None) -> nn.Module:
    """The submodule `path` of `root`, made where it is missing, its last part of `last`."""
    parts = [part for part in path.split(".") if part]
    for i, part in enumerate(parts):
        if part not in root._modules:
            root.add_module(part, last if last is not None and i == len(parts) - 1 else nn.Module())
        root = root.get_submodule(part)
    return root


@dataclass(frozen=True)
class Replay:
    """C rebuilt from the log. checked: after so many steps, was C what the snapshot holds? model: a `skeleton`."""

    steps: int
    coeff_hash: str
    checked: tuple[tuple[int, bool], ...]
    model: nn.Module
    optimizer: ZeroOrder

    @property
    def identical(self) -> bool:
        return all(same for _, same in self.checked)


def replay(log: RunLog) -> Replay:
    """Rebuild C from the first snapshot and the logged steps, compared with every other snapshot on the way.

    Raises RunError: the first snapshot is not there or can't be read, or the method of the run is not `replayable`.
    """
    recipe = Recipe(**log.meta["recipe"])
    if not METHODS[recipe.method].replayable:
        raise RunError(
            f"{log.directory} is a run of {recipe.method}, whose steps need more than the seeds and weights of the "
            "log: they take the model and its data, with which `zoact finetune --resume` evaluates them again"
        )
    snapshots = {row.step: row for row in log.snapshots()}
    if 0 not in snapshots:
        raise RunError(f"{log.directory} has no snapshot of its beginning, so there is nothing to replay from")
    model = skeleton(log)
    optimizer = load_state(model, log, recipe, log.load(snapshots[0]))
    checked = [(0, coeff_hash(optimizer) == snapshots[0].coeff_hash)]
    for row in log.steps():
        optimizer.replay([row])
        if (met := snapshots.get(row.step + 1)) is not None:
            checked.append((met.step, coeff_hash(optimizer) == met.coeff_hash))
    return Replay(optimizer.iteration, coeff_hash(optimizer), tuple(checked), model, optimizer)
