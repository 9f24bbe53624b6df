"""All matrices along factors of low rank that are drawn anew now and then; vectors along dense noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..basis import recompression_note
from ..perturbation import Perturbation
from ..trainables import Core, LowRank, Trainable, low_rank
from ..zeroth_order import ZeroOrder
from .checks import check_period


class _Renewed(ZeroOrder):
    """Factors that are drawn anew every `period` steps, as functions of (seed, step // period, name): nothing depends
    on how a step was reached, and probe and update see the same ones on refresh steps too.

    What the steps between two draws add is one matrix of low rank, because W is linear in what moves: it stands beside
    W in the forward and is folded into W when the factors are renewed. Beside frozen weights it goes into a delta of
    rank `delta_rank`; the note of that step has the error of its re-compression. Vectors take dense noise.
    """

    basis = "random"
    kind: type[LowRank] = LowRank
    rules: tuple[str, ...] = ()

    def __init__(
        self, model: nn.Module, *, rank: int, period: int, delta_rank: int, optimizer: str = "sgd",
        weight_decay: float = 0.0, **others: Any,
    ) -> None:  # fmt: skip
        check_period(period)
        if rank < 1 or delta_rank < rank:
            raise ValueError(f"rank is {rank} and delta_rank {delta_rank}; needed are 1 <= rank <= delta_rank")
        if weight_decay:
            raise ValueError(f"weight_decay is {weight_decay}; {self.name} moves factors, which can't decay W: 0 only")
        if optimizer not in self.rules:
            raise ValueError(f"optimizer is {optimizer!r}; with {self.name} it may be {', '.join(self.rules)}")
        self.rank, self.period, self.delta_rank = rank, period, delta_rank
        self._epoch = torch.tensor(-1)  # step // period of the factors at hand
        super().__init__(model, optimizer=optimizer, **others)

    def find(self, model: nn.Module, handle: Perturbation) -> list[Trainable]:
        return low_rank(model, handle, self.rank, self.delta_rank, self.kind)

    def refresh(self) -> None:
        epoch, errors = self.iteration // self.period, []
        if epoch == self._epoch:
            return
        seed = torch.tensor([rng.seed_for(self.seed, epoch)], device=self.device)
        for name, trainable in self.trainables.items():
            if isinstance(trainable, LowRank):
                turn, error = trainable.renew(seed)
                errors.append(error)
                if name in self.rule.exp_avgs:  # LOZO-M: S <- S (V_old^T V_new) / K
                    self.rule.exp_avgs[name].copy_(self.rule.exp_avgs[name] @ turn)
        self._epoch.fill_(epoch)
        self.note = recompression_note(errors, self.delta_rank)

    def own_state(self) -> dict[str, Tensor]:
        return {"epoch": self._epoch}


class LOZO(_Renewed):
    """W +- sigma U V^T, U [N, R] new each step, V [K, R] every `period` steps;  W <- W - lr d U V^T  (over_rank: / R).

    The released code has no 1/R, so that its mean step is R times the gradient's; the paper has it.
    """

    name, paper = "lozo", "arXiv 2410.07698"
    summary = "all matrices along U V^T with a lazy V, by SGD"
    rules = ("sgd", "sign", "momentum", "ema")  # linear, so that moments can pass from one V to the next

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 2,
        period: int = 50,
        over_rank: bool = False,
        delta_rank: int = 16,
        lr: float = 1e-6,
        optimizer: str = "sgd",
        **others: Any,
    ) -> None:
        self.over_rank = over_rank
        super().__init__(model, rank=rank, period=period, delta_rank=delta_rank, lr=lr, optimizer=optimizer, **others)

    def find(self, model: nn.Module, handle: Perturbation) -> list[Trainable]:
        found = super().find(model, handle)
        for trainable in found:
            if isinstance(trainable, LowRank) and self.over_rank:
                trainable.gain = 1 / self.rank
        return found


class LOZOM(LOZO):
    """S <- beta S + (1 - beta) d U;  W <- W - lr S V^T / R;  S <- S (V_old^T V_new) / K where V is renewed."""

    name = "lozo-m"
    summary = "LOZO with momentum in the factor"

    def __init__(self, model: nn.Module, *, optimizer: str = "ema", over_rank: bool = True, **others: Any) -> None:
        super().__init__(model, optimizer=optimizer, over_rank=over_rank, **others)


class SubZero(_Renewed):
    """W +- sigma sqrt(N K)/R U Z V^T, Z [R, R] new each step, U and V orthonormal, new every `period` steps; SGD.

    The mean squared norm of a direction is N K, so sigma and lr are MeZO's. Rank and period are the released code's;
    the paper has 48 and 1000 for OPT-13B.
    """

    name, paper = "subzero", "arXiv 2410.08989"
    summary = "all matrices along U Z V^T with lazy orthonormal U and V, by SGD"
    kind = Core
    rules = ("sgd", "sign")

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 8,
        period: int = 2000,
        delta_rank: int = 16,
        lr: float = 1e-6,
        optimizer: str = "sgd",
        **others: Any,
    ) -> None:
        super().__init__(model, rank=rank, period=period, delta_rank=delta_rank, lr=lr, optimizer=optimizer, **others)
