"""Parameters of a dense model themselves, along dense noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..embedding import PackedEmbedding
from ..layers import ZOLinear, zo_layers
from ..parameters import Perturbed, perturb
from ..perturbation import Mask, Perturbation
from .base import Trainable

UNDECAYED = ("bias", "layer_norm", "layernorm")  # in MeZO's released code; a final norm called `norm` decays


class Weight(Trainable):
    """A parameter itself: value is a view of it as [first size, rest], so the noise of an entry is at its flat address.

    A vector [n] is [n, 1]. owner, key: the module that has it.
    """

    def __init__(self, name: str, owner: nn.Module, key: str, param_id: Tensor) -> None:
        self.name = self.parameter = name
        self.decays = not any(word in name for word in UNDECAYED)
        self.owner, self.key, self.param_id = owner, key, param_id
        self.value = self._current().view(self._current().shape[0], -1)
        self.sites = [(owner, key)]  # several where it is tied

    @property
    def leaf(self) -> Tensor:
        tensor: Tensor = getattr(self.owner, self.key)
        return tensor

    def cover(self, mask: Mask) -> None:
        """Only what `mask` lets take part is perturbed and moved from now on."""
        self.mask = mask
        for owner, key in self.sites:
            if isinstance(owner, Perturbed):
                owner.zo_masks[key] = mask
            elif isinstance(owner, ZOLinear):
                setattr(owner, "mask" if key == "weight" else "bias_mask", mask)

    def held(self) -> dict[str, Tensor]:
        """The threshold of a mask by magnitude, which is that of the weights at the beginning."""
        return {"mask": self.mask.value} if self.mask.kind == "magnitude" and self.mask.value is not None else {}

    def _current(self) -> Tensor:
        tensor = getattr(self.owner, self.key)
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    def check(self) -> None:
        if self._current().data_ptr() != self.value.data_ptr():
            raise RuntimeError(
                f"{self.name} is another tensor since; make the optimizer after moving or copying a model"
            )

    def written(self) -> list[Tensor]:
        return [self.value]

    def whole(self) -> Tensor:
        return self._current().to("cpu", copy=True)

    def anatomy(self) -> dict[str, Any]:
        current = self._current()
        return {
            "name": self.name,
            "param_id": int(self.param_id),
            "shape": list(current.shape),
            "dtype": str(current.dtype).removeprefix("torch."),
        }


def probe_dense(layer: ZOLinear, x: Tensor, sigmas: Tensor, bias: Tensor | None) -> Tensor:
    """y_g = x_g (W + sum_s sigmas[g, s] Z_s)^T + bias."""
    p = layer.perturbation
    return torch.ops.zoact.zo_dense_linear(
        x, layer.weight, layer.scale, layer.offset, layer.nested, bias, p.seeds, sigmas, layer.param_id, None,
        layer.mask.value, layer.mask.seed, layer.format, layer.layout, layer.group_size, layer.out_features, p.noise,
        "weight", layer.mask.kind, sigmas.shape[0],
    )  # fmt: skip


def weights(
    model: nn.Module, handle: Perturbation, *, swapped: bool = True, only: Callable[[str, Tensor], bool] | None = None
) -> list[Weight]:
    """Every parameter of a dense model, in module order, one that is tied once; `handle` is what perturbs them.

    swapped: False leaves out the weights of swapped layers and packed tables, which may then be in few bits. only:
    predicate (name, parameter) of those that take part among the others. Raises ValueError for weights in few bits
    otherwise, and for layers with coefficients of their own.
    """
    found: list[Weight] = []
    known: dict[int, Weight] = {}  # by the id of the parameter
    layers = zo_layers(model)
    taken = {int(layer.param_id) for layer in layers.values()}

    def param_id(name: str, device: torch.device) -> Tensor:
        number, tries = rng.param_id(name), 0
        while number in taken:
            tries += 1
            number = rng.param_id(f"{name}~{tries}")
        taken.add(number)
        return torch.tensor([number], device=device)

    for name, module in list(model.named_modules()):
        prefix = rng.strip_prefixes(f"{name}.") if name else ""
        if swapped and (isinstance(module, PackedEmbedding) or (isinstance(module, ZOLinear) and module.frozen)):
            raise ValueError(
                f"{name} is {module.format}, frozen, and this method trains the weights themselves: take the dense "
                "twin of the model (--dense, swap.dense_twin), or a method that trains something beside the weights"
            )
        if isinstance(module, ZOLinear) and swapped:
            if module.coeff is not None or module.base_coeff is not None:
                raise ValueError(f"{name} has coefficients beside its weight; swap with rank=0, or merge them first")
            if module.layout != "row":
                row = module.packed().to_layout("row")
                module.weight, module.layout = row.weight, "row"
            module.probe = probe_dense
            found.append(Weight(f"{prefix}weight", module, "weight", module.param_id))
        if isinstance(module, ZOLinear):
            if module.bias is not None and (only is None or only(f"{prefix}bias", module.bias)):
                module.bias_id = param_id(f"{prefix}bias", module.bias.device)
                found.append(Weight(f"{prefix}bias", module, "bias", module.bias_id))
            continue
        ids = {}
        for key, parameter in module._parameters.items():
            if parameter is None or not (only is None or only(f"{prefix}{key}", parameter)):
                continue
            if not parameter.is_contiguous():
                raise ValueError(f"{prefix}{key} is not contiguous; make it so before it is trained")
            if id(parameter) in known:
                known[id(parameter)].sites.append((module, key))
            else:
                number = param_id(f"{prefix}{key}", parameter.device)
                known[id(parameter)] = Weight(f"{prefix}{key}", module, key, number)
                found.append(known[id(parameter)])
            ids[key] = known[id(parameter)].param_id
        if ids:
            perturb(module, name, ids, handle)
    return found
