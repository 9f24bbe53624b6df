"""Directions Z A^T on a basis A [K, R] of the layer's own input activations: one A for a run, or one for each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import CleanInputs, Layer
from ..basis import power_basis, recompression_note
from ..layers import ZOLinear, zo_layers
from ..perturbation import Perturbation
from ..trainables import AlongInputs, Coefficients, Trainable, coefficients, low_rank
from ..trainables.factors import fill_normal
from ..zeroth_order import Evaluation, Radii, ZeroOrder
from .checks import check_period


class ZOAct(ZeroOrder):
    """W_eff = D(W) + (C +- sigma Z) A^T, A [K, R] the top directions of a layer's inputs, C trained, by Adam.

    Layers of rank 0 are left alone. Basis first (`compute_basis`): a basis set later gives a layer another C.
    """

    name, paper = "zo-act", "arXiv 2607.01125"
    summary = "coefficients on a one-shot activation basis"
    basis = "activations"

    @property
    def layers(self) -> dict[str, ZOLinear]:
        """The trained layers by name."""
        return {name: t.layer for name, t in self.trainables.items() if isinstance(t, Coefficients)}

    def find(self, model: nn.Module, handle: Perturbation) -> list[Trainable]:
        return coefficients(model)

    @classmethod
    def adopt(cls, model: nn.Module, layers: Sequence[str], state: Mapping[str, Tensor]) -> None:
        found = zo_layers(model)
        for name, layer in found.items():
            if layer.rank and name not in layers:
                layer.rank, layer.coeff, layer.basis = 0, None, None
        device = next(iter(found.values())).param_id.device
        bases = {key: a.to(device) for key, a in state.items() if key.startswith("basis/")}  # layers share them
        for name, index in zip(layers, state["basis_of"].tolist(), strict=True):
            found[name].set_basis(bases[f"basis/{index}"], state[f"coeff/{name}"].to(device))


class ZOActOneSided(ZOAct):
    """ZO-Act with forward differences, as a text that cites the paper has it."""

    name = "zo-act-one-sided"
    summary = "the same by forward differences"

    def __init__(self, model: nn.Module, *, sides: str = "one-sided", **others: Any) -> None:
        super().__init__(model, sides=sides, **others)


class AGZO(ZeroOrder):
    """W +- sigma Z A^T for the matrices of linears, +- sigma Z for all else;  W <- W - lr d Z A^T.

    A [K, R] belongs to the step: the clean row group's inputs H of a layer, padding apart, give it while the forward
    runs, right before the layer's perturbed rows use it; Q = qr(H^T Omega), `iterations` times Q = qr(H^T (H Q)). Omega
    is noise of (step, name of the first layer that is fed by H). Two-sided, a clean group runs beside the others.

    A dense W is written at each step. Beside a frozen one stands a delta of rank `delta_rank` and columns for `window`
    steps; when these are full it is re-compressed, and that step's note has the error. Packed tables stay as they are.

    rank and iterations are the paper's. sigma is of the re-run by AIM-ZO's authors (1e-4 to 1e-3; at the paper's 1e-7,
    for fp32, differences are rounding): on SmolLM2-135M d is the same within 3 % at both ends, and another at 1e-2.
    lr is ours: Delta^T (Hessian) Delta is 2e3 to 7e3 there, over int4 as over dense weights, so single steps descend up
    to some 3e-4, and a minibatch's noise asks for a good part less; the re-run has 5e-7, for models of 2.7 B and more.
    Raises ValueError for a batch in parts: each would have another A.
    """

    name, paper = "agzo", "arXiv 2601.17261"
    summary = "all matrices along Z A^T, A of each step's own inputs, by SGD"
    replayable = False  # A is in no log
    basis = "inputs"
    rules = ("sgd", "sign")  # moments along one A mean nothing along the next

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 1,
        iterations: int = 3,
        delta_rank: int = 16,
        window: int = 16,
        sigma: float = 1e-3,
        sides: str = "one-sided",
        lr: float = 1e-5,
        optimizer: str = "sgd",
        weight_decay: float = 0.0,
        **others: Any,
    ) -> None:
        check_period(window)
        if rank < 1 or delta_rank < rank or iterations < 0:
            raise ValueError(
                f"rank is {rank}, delta_rank {delta_rank} and iterations {iterations}; needed are 1 <= rank <= "
                "delta_rank and 0 <= iterations"
            )
        if optimizer not in self.rules or weight_decay:
            raise ValueError(
                f"optimizer is {optimizer!r} with weight_decay {weight_decay}; with {self.name} it may be "
                f"{', '.join(self.rules)} without, since every step has another basis"
            )
        self.rank, self.iterations, self.delta_rank, self.window = rank, iterations, delta_rank, window
        self._folded = torch.tensor(0)  # windows that were compressed
        super().__init__(
            model, sigma=sigma, sides=sides, lr=lr, optimizer=optimizer, weight_decay=weight_decay, **others
        )

    def find(self, model: nn.Module, handle: Perturbation) -> list[Trainable]:
        found = low_rank(model, handle, self.rank, self.delta_rank, AlongInputs)
        self._handle = handle
        self._along = {t.name: t for t in found if isinstance(t, AlongInputs)}
        self._columns = torch.zeros(self.rank, dtype=torch.int64, device=found[0].value.device)
        for trainable in self._along.values():
            trainable.open(self.window, self._columns)
        return found

    def radii(self) -> Tensor:
        table = super().radii()
        self._extra = 0 if self.sides == "one-sided" else 1
        return torch.cat([table.new_zeros(self._extra, self.queries), table])

    def refresh(self) -> None:
        full, step = divmod(self.iteration, self.window)
        self._columns.copy_(torch.arange(step * self.rank, (step + 1) * self.rank))
        if full != self._folded:
            errors = [trainable.compress() for trainable in self._along.values()]
            self._folded.fill_(full)
            self.note = recompression_note(errors, self.delta_rank)

    def own_state(self) -> dict[str, Tensor]:
        return {"folded": self._folded}

    def _evaluate(
        self, parts: Sequence[Evaluation], shrink: float, rows: tuple[int, ...], radii: Radii | None = None
    ) -> Tensor:
        if len(parts) > 1:
            raise ValueError(
                f"the batch comes in {len(parts)} parts, and each would give {self.name} another basis; `micro_batch` "
                "has to be 0 (mode='sequential' saves memory too)"
            )
        layers = {
            owner: Layer(name, trainable.point)
            for name, trainable in self._along.items()
            for owner, _ in trainable.sites
        }
        inputs = CleanInputs(self.model, layers, self._handle, self._basis_of)

        def evaluate(groups: int) -> Tensor:
            losses = parts[0](groups)
            inputs.clean = False
            return losses

        with inputs:
            losses = super()._evaluate([evaluate], shrink, rows, radii)
        missing = [name for name in self._along if name not in inputs.seen]
        for name in missing:  # no part in the losses, none in the step
            self._along[name].point(losses.new_zeros(()))
        told = f"not reached, left as they are: {', '.join(missing)}" if missing else ""
        if told not in self.note:
            self.note = "; ".join(filter(None, (self.note, told)))
        return losses[self._extra :] + 0 * losses[: self._extra].sum(0)  # NaN where that group was lost

    def _basis_of(self, leader: str, rows: Tensor, number: Tensor | None) -> Tensor:
        start = rows.new_empty(len(rows), self.rank)
        fill_normal(start, self._seeds[:1], self._along[leader].start_id)
        return power_basis(rows, start if number is None else start[number], self.iterations)
