"""What a run is told: the recipe, one frozen value with every default filled in from its method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .methods import METHODS, ZeroOrder, arguments, create

METHOD: Any = None  # default of a recipe's field: what the method's own is
USUAL = {
    "steps": 200, "batch_size": 16, "length_window": 8, "schedule": "constant", "basis_batches": 2,
    "snapshot_every": 50,
}  # fmt: skip
FREE = ("eval_every", "snapshot_every")  # of a recipe: may change at resume, since no bit of C depends on them


@dataclass(frozen=True)
class Recipe:
    """What is trained and how. method: a name of `methods.METHODS`; METHOD is that method's own default.

    batch_size examples a step, of similar length among `length_window` batches (0: of any length), run `micro_batch` at
    a time (0: all at once). The basis comes from the batches of the first `basis_batches` steps. eval_every,
    snapshot_every: in steps; 0 means only before and after.
    options: arguments that only this method has, by name. The others are arguments of `ZeroOrder` and `compute_basis`.
    """

    method: str = "zo-act"

    steps: int = METHOD
    batch_size: int = METHOD
    length_window: int = METHOD
    micro_batch: int = 0
    sigma: float = METHOD
    queries: int = METHOD
    sides: str = METHOD
    scaling: str = METHOD
    clip: float = METHOD
    mode: str = "stacked"
    optimizer: str = METHOD
    lr: float = METHOD
    beta1: float = METHOD
    beta2: float = METHOD
    eps: float = METHOD
    weight_decay: float = METHOD
    schedule: str = METHOD
    warmup: int = 0
    seed: int = 0
    noise: str = METHOD
    floor_every: int = METHOD
    fork: bool | None = METHOD
    prefix_cache: int = METHOD
    spread: bool = METHOD
    basis_batches: int = METHOD
    basis_method: str = "power"
    basis_without_first: bool = False
    eval_every: int = 0
    snapshot_every: int = METHOD
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = arguments(self.method) | USUAL | METHODS[self.method].recipe
        own["beta1"], own["beta2"] = own.pop("betas")
        for name in own.keys() & vars(self).keys():
            if getattr(self, name) is METHOD:
                object.__setattr__(self, name, own[name])
        for name in self.options:
            if name not in own or name in vars(self):
                extra = ", ".join(own.keys() - vars(self).keys()) or "none"
                raise ValueError(f"`options` has {name!r}; options that only {self.method} has are: {extra}")
        at_least = {"steps": 0, "batch_size": 1, "length_window": 0, "micro_batch": 0, "basis_batches": 1}
        for name, least in {**at_least, **dict.fromkeys(FREE, 0)}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it has to be at least {least}")

    def create(self, model: nn.Module) -> ZeroOrder:
        """The optimizer of this recipe. Raises ValueError for values out of range."""
        optimizer = create(
            self.method,
            model,
            betas=(self.beta1, self.beta2),
            **self.options,
            **{
                name: getattr(self, name)
                for name in "sigma queries sides scaling clip mode optimizer lr eps weight_decay schedule steps warmup "
                "seed noise floor_every fork prefix_cache spread".split()
            },
        )
        if optimizer.whole_batch and 0 < self.micro_batch < self.batch_size:
            raise ValueError(f"`micro_batch` is {self.micro_batch}; {self.method} takes its batch whole here (0)")
        return optimizer
