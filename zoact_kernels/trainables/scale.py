"""The scales of low-bit weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..layers import ZOLinear
from .base import Trainable, untied_layers


class Scales(Trainable):
    """The scales [N, groups] of a low-bit weight, in fp32; the codes stay: w = (q - zero) (scale + sum sigma Z).

    zero = -offset / scale stays too, so an offset moves with its scale. floor: no scale comes nearer to 0, unless it
    began there; those that are negative (as GGUF has them) stay so. Untouched scales and offsets keep their bits.
    """

    def __init__(self, name: str, layer: ZOLinear, floor: float) -> None:
        packed = layer.packed().to_layout("row")
        if packed.scale is None or packed.flat:
            why = "has blocks that run across rows" if packed.flat else "has no scales"
            raise ValueError(f"{name} is {packed.format} and {why}; this method trains the scales of a low-bit model")
        self.name, self.parameter, self.param_id, self.layer = name, f"{name}.scale", layer.param_id, layer
        self.start, offsets = packed.scales().contiguous(), packed.offsets()
        self.value, self.floor = self.start.clone(), floor
        self.offset = None if offsets is None else offsets.contiguous()
        if self.offset is not None:
            self.start_offset = self.offset.clone()
            self.ratio = torch.where(self.start == 0, torch.zeros_like(self.start), self.offset / self.start)
        layer.weight, layer.layout, layer.nested = packed.weight, "row", None
        layer.scale, layer.offset = self.value, self.offset
        layer.probe = probe_scales

    @torch.no_grad()
    def settle(self) -> None:
        sign = torch.where(self.start < 0, -1.0, 1.0)
        self.value.copy_(sign * torch.maximum(sign * self.value, self.start.abs().clamp(max=self.floor)))
        if self.offset is not None:
            # A group of scale 0 is one value, its offset: it has no zero point to keep.
            still = (self.value == self.start) | (self.start == 0)
            self.offset.copy_(torch.where(still, self.start_offset, self.ratio * self.value))

    def check(self) -> None:
        if self.layer.scale is not self.value:
            raise RuntimeError(
                f"{self.name} has other scales since; make the optimizer after moving or copying a model"
            )

    def held(self) -> dict[str, Tensor]:
        if self.offset is None:
            return {"start": self.start}
        return {"start": self.start, "start_offset": self.start_offset, "ratio": self.ratio}

    def written(self) -> list[Tensor]:
        return [self.value] if self.offset is None else [self.value, self.offset]

    def whole(self) -> Tensor:
        return self.value.to("cpu", copy=True)

    def anatomy(self) -> dict[str, Any]:
        layer = self.layer
        return {
            "name": self.name, "param_id": int(self.param_id), "out_features": layer.out_features, "rank": 0,
            "in_features": layer.in_features, "origin": layer.origin, "format": layer.format,
            "group_size": layer.group_size, "offset": self.offset is not None,
        }  # fmt: skip


def probe_scales(layer: ZOLinear, x: Tensor, sigmas: Tensor, bias: Tensor | None) -> Tensor:
    """y_g = x_g ((q - zero) (scale + sum_s sigmas[g, s] Z_s))^T + bias."""
    p = layer.perturbation
    return torch.ops.zoact.zo_dense_linear(
        x, layer.weight, layer.scale, layer.offset, layer.nested, bias, p.seeds, sigmas, layer.param_id, None, None,
        None, layer.format, layer.layout, layer.group_size, layer.out_features, p.noise, "scale", "none",
        sigmas.shape[0],
    )  # fmt: skip


def scales(model: nn.Module, floor: float) -> list[Trainable]:
    """The scales of every low-bit layer, heads tied to a packed table left out."""
    return [Scales(rng.strip_prefixes(name), layer, floor) for name, layer in untied_layers(model).items()]
