"""What every trainable is, and which layers of a model have one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..embedding import PackedEmbedding
from ..layers import ZOLinear, zo_layers
from ..optim import check_entries
from ..perturbation import Mask


class Trainable:
    """One parameter. name: unique in the model. value [rows, cols]: what the rule moves in place, along a Z so shaped.

    param_id: int64 [1], of the noise. gain: what a method's direction multiplies the estimate along Z by.
    basis: A [K, R] where there is one, which several trainables may share.
    along: B [cols, R] where value moves along Z B^T, Z [rows, R], and not along Z; filled in place before each update.
    """

    name: str
    value: Tensor
    param_id: Tensor
    parameter: str  # its name in the base model
    gain = 1.0
    decays = True  # whether weight decay, if any, is for it too
    mask = Mask()
    basis: Tensor | None = None
    along: Tensor | None = None
    basis_shape: tuple[int, int] | None = None

    @property
    def leaf(self) -> Tensor:
        """What the model computes with, to ask for a gradient: `value`, or the tensor that it is a view of."""
        return self.value

    def check(self) -> None:
        """Raises RuntimeError if the model does not use `value` any more."""

    def held(self) -> dict[str, Tensor]:
        """What a snapshot has to hold besides `value` and `basis`; the tensors themselves, by name."""
        return {}

    def room(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that can take over `held`: those that are there, or new ones where runs may differ in a size."""
        return self.held()

    def check_held(self, held: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless `take` can take over `held`."""
        check_entries(held, self.room(held), f"state of {self.name}")

    def take(self, held: Mapping[str, Tensor]) -> None:
        """Take over what `held` gave and `check_held` passed."""
        for key, tensor in self.held().items():
            tensor.copy_(held[key])

    def settle(self) -> None:
        """Bring what follows from `value` up to date: called after it was moved or loaded, on the device alone."""

    def written(self) -> list[Tensor]:
        """The tensors of the base model that training changes."""
        return []

    def whole(self) -> Tensor | None:
        """The trained parameter of the base model, in its own shape, a copy on the CPU; None if an adapter holds it."""
        return None

    def anatomy(self) -> dict[str, Any]:
        """What a replay without the model has to know, as JSON values."""
        raise NotImplementedError


def untied_layers(model: nn.Module) -> dict[str, ZOLinear]:
    """The ZOLinear layers by name, but for a head whose packed storage a table reads: a probe of the one would miss the
    other, and an update would move both.

    Raises ValueError if there is none.
    """
    heads = [module.head for module in model.modules() if isinstance(module, PackedEmbedding)]
    layers = {n: layer for n, layer in zo_layers(model).items() if not any(layer is head for head in heads)}
    if not layers:
        raise ValueError("`model` has no ZOLinear layer to train: swap it first")
    return layers
