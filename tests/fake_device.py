"""Fake tensors of a CUDA device, for a torch that has none: sizes, dtypes and devices are real, values are not."""

from __future__ import annotations

import copy
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

T = TypeVar("T")


def on_fake_device(mode: FakeTensorMode, thing: T) -> T:
    """A deep copy of models, optimizers, tuples ... with all their tensors on a fake CUDA device."""

    def fake(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        made = FakeTensor(mode, meta, torch.device("cuda"))
        return memo.setdefault(id(tensor), nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made)

    with mock.patch.object(torch.Tensor, "__deepcopy__", fake), mock.patch.object(nn.Parameter, "__deepcopy__", fake):
        return copy.deepcopy(thing)


class ThroughAten(TorchFunctionMode):
    """Methods as ATen operations: on fake CUDA tensors a torch without CUDA refuses the methods, not the operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is torch.Tensor.copy_:
            return aten.copy_.default(*args, **kwargs or {})
        if func is torch.Tensor.contiguous:
            return aten.clone.default(*args, memory_format=torch.contiguous_format)
        if func is torch.Tensor.__setitem__:
            tensor, where, value = args
            value = aten.full.default([], value, dtype=tensor.dtype, device=tensor.device) if value == 1 else value
            return aten.index_put_.default(tensor, list(where), value)
        if func is not torch.Tensor.__getitem__:
            return func(*args, **kwargs or {})
        tensor, where = args
        axis, picked = 0, []
        parts = where if isinstance(where, tuple) else (where,)
        for i, part in enumerate(parts):
            if part is Ellipsis:
                axis = tensor.dim() - sum(later is not None for later in parts[i + 1 :])
                continue
            if part is None:
                tensor = aten.unsqueeze.default(tensor, axis)
            elif isinstance(part, slice):
                tensor = aten.slice.Tensor(tensor, axis, part.start, part.stop, part.step or 1)
            elif isinstance(part, int):
                tensor, axis = aten.select.int(tensor, axis, part), axis - 1
            else:
                picked += [None] * (axis - len(picked)) + [part]
            axis += 1
        return aten.index.Tensor(tensor, picked) if picked else tensor
