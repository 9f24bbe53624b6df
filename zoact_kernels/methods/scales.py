"""The scales of a low-bit model, its codes left as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..perturbation import Perturbation
from ..trainables import Trainable, scales
from ..zeroth_order import ZeroOrder


class QZO(ZeroOrder):
    """scale +- sigma z, d clipped to +-100;  scale <- max(scale - lr d z, floor): the codes never change.

    A zero point stays where it is, so the offset of a format that has one moves as -zero scale. The paper's floor is 0,
    the released code's 1e-7. Scales are kept in fp32.
    """

    name, paper = "qzo", "arXiv 2505.13430"
    summary = "the scales of a low-bit model, by SGD on clipped differences"

    def __init__(
        self,
        model: nn.Module,
        *,
        floor: float = 1e-7,
        sigma: float = 1e-3,
        lr: float = 1e-7,
        scaling: str = "clipped",
        optimizer: str = "sgd",
        **others: Any,
    ) -> None:
        if not floor >= 0:
            raise ValueError(f"floor is {floor}; a scale is not negative")
        self.scale_floor = floor
        super().__init__(model, sigma=sigma, lr=lr, scaling=scaling, optimizer=optimizer, **others)

    def find(self, model: nn.Module, handle: Perturbation) -> list[Trainable]:
        return scales(model, self.scale_floor)
