"""The published methods, each a short class over the general step: its formulas, its defaults, what it trains.

    zo-act   C of every layer, right basis from activations, once                       arXiv 2607.01125
    mezo     every parameter, dense normal noise, SGD                                   arXiv 2305.17333
    fzoo     random signs, one-sided, differences divided by their spread               arXiv 2506.09034
    sparse-mezo, zo-sparse   MeZO under a mask by magnitude, or by chance               arXiv 2402.15751, 2402.11592
    zo-sign, zo-momentum, zo-adam   MeZO with another rule                              arXiv 2402.11592
    lozo, lozo-m   U V^T, V renewed now and then, SGD or momentum in the factor         arXiv 2410.07698
    qzo      the scales of a low-bit model, clipped differences                          arXiv 2505.13430
    subzero  U Z V^T, U and V orthonormal and renewed now and then, SGD                 arXiv 2410.08989

Defaults are the published ones where there are any; they stand in the signature of `__init__`, the rest is ZeroOrder's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import rng
from .layers import Mask, Perturbation, ZOLinear, zo_layers
from .trainables import Coefficients, Core, LowRank, Trainable, Weight, coefficients, low_rank, scales, weights
from .zeroth_order import MODES, RECENT, Evaluation, LoggedStep, StepResult, ZeroOrder

__all__ = [
    "METHODS",
    "MODES",
    "RECENT",
    "Evaluation",
    "LoggedStep",
    "StepResult",
    "ZOAct",
    "ZeroOrder",
    "arguments",
    "create",
]


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


class MeZO(ZeroOrder):
    """theta +- sigma z, z ~ N(0, I);  d = (f+ - f-) / (2 sigma);  theta <- theta - lr (d z + wd theta).

    All parameters take part, norms, biases and embeddings too, a tied head once. Weights in 16 bits are rounded
    stochastically.
    """

    name, paper = "mezo", "arXiv 2305.17333"
    summary = "all weights along dense normal noise, by SGD"
    dense = True

    def __init__(
        self, model: nn.Module, *, sigma: float = 1e-3, lr: float = 1e-6, optimizer: str = "sgd", **others: Any
    ) -> None:
        super().__init__(model, sigma=sigma, lr=lr, optimizer=optimizer, **others)

    def find(self, model: nn.Module, handle: Perturbation) -> list[Weight]:
        return weights(model, handle)


class FZOO(MeZO):
    """u_j = +-1 entry by entry, one-sided;  theta <- theta - lr / (q std(f_1 ... f_q)) sum_j (f_j - f_0) u_j.

    The released code's form, to which its lr belongs: std of the population, and no sigma in the update.
    """

    name, paper = "fzoo", "arXiv 2506.09034"
    summary = "all weights along signs, differences divided by their spread"

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma: float = 1e-4,
        queries: int = 8,
        sides: str = "one-sided",
        scaling: str = "std",
        noise: str = "rademacher",
        lr: float = 5e-5,
        **others: Any,
    ) -> None:
        super().__init__(
            model, sigma=sigma, queries=queries, sides=sides, scaling=scaling, noise=noise, lr=lr, **others
        )


class SparseMeZO(MeZO):
    """MeZO along z * (|theta| <= h), h the quantile 1 - sparsity of each tensor's magnitudes at the beginning.

    The mask is that of the clean theta, in both probes and in the update.
    """

    name, paper = "sparse-mezo", "arXiv 2402.15751"
    summary = "the small weights alone, along dense normal noise"

    def __init__(self, model: nn.Module, *, sparsity: float = 0.75, **others: Any) -> None:
        _check_share("sparsity", sparsity)
        self.sparsity = sparsity
        super().__init__(model, **others)

    def find(self, model: nn.Module, handle: Perturbation) -> list[Weight]:
        found = weights(model, handle)
        for weight in found:
            magnitudes = weight.value.abs().float().flatten()
            kept = max(1, math.ceil((1 - self.sparsity) * magnitudes.numel()))
            weight.cover(Mask("magnitude", magnitudes.kthvalue(kept).values.reshape(1).clone()))
        return found


class ZOSparse(MeZO):
    """MeZO along z * mask, a random share 1 - sparsity of the entries, drawn anew every `period` steps."""

    name, paper = "zo-sparse", "arXiv 2402.11592"
    summary = "a random part of the weights at a time"

    def __init__(self, model: nn.Module, *, sparsity: float = 0.75, period: int = 1000, **others: Any) -> None:
        _check_share("sparsity", sparsity)
        _check_period(period)
        self.sparsity, self.period = sparsity, period
        super().__init__(model, **others)

    def find(self, model: nn.Module, handle: Perturbation) -> list[Weight]:
        found = weights(model, handle)
        device = found[0].value.device
        self._mask_seed = torch.zeros(1, dtype=torch.int64, device=device)  # of all, filled by `refresh`
        share = torch.tensor([1 - self.sparsity], dtype=torch.float32, device=device)
        for weight in found:
            weight.cover(Mask("random", share, self._mask_seed))
        return found

    def refresh(self) -> None:
        self._mask_seed.fill_(rng.seed_for(self.seed, self.iteration // self.period))


class ZOSign(MeZO):
    """theta <- theta - lr sign(d) z: the sign of the scalar."""

    name, paper = "zo-sign", "arXiv 2402.11592"
    summary = "MeZO with the sign of the difference alone"

    def __init__(self, model: nn.Module, *, optimizer: str = "sign", **others: Any) -> None:
        super().__init__(model, optimizer=optimizer, **others)


class ZOMomentum(MeZO):
    """m <- 0.9 m + d z;  theta <- theta - lr m: a tensor of the model's size beside it."""

    name, paper = "zo-momentum", "arXiv 2402.11592"
    summary = "MeZO with heavy-ball momentum"

    def __init__(self, model: nn.Module, *, optimizer: str = "momentum", **others: Any) -> None:
        super().__init__(model, optimizer=optimizer, **others)


class ZOAdam(MeZO):
    """Adam fed d z: two tensors of the model's size beside it."""

    name, paper = "zo-adam", "arXiv 2402.11592"
    summary = "MeZO with Adam"

    def __init__(self, model: nn.Module, *, optimizer: str = "adam", **others: Any) -> None:
        super().__init__(model, optimizer=optimizer, **others)


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
        _check_period(period)
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
        if max(errors, default=0.0) > 1e-9:  # more than rounding in float64
            self.note = f"deltas re-compressed to rank {self.delta_rank}, relative error up to {max(errors):.1e}"

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


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it lies in [0, 1)")


def _check_period(period: int) -> None:
    if period < 1:
        raise ValueError(f"period is {period}; it has to be at least 1 step")


_ALL = (ZOAct, ZOActOneSided, MeZO, FZOO, SparseMeZO, ZOSparse, ZOSign, ZOMomentum, ZOAdam, LOZO, LOZOM, SubZero, QZO)
METHODS: dict[str, type[ZeroOrder]] = {method.name: method for method in _ALL}


def arguments(method: str) -> dict[str, Any]:
    """The arguments of a named method beside the model, with its defaults. Raises ValueError for an unknown one."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; known are {', '.join(METHODS)}")
    found: dict[str, Any] = {}
    for kind in reversed(METHODS[method].__mro__):
        if "__init__" in vars(kind) and issubclass(kind, ZeroOrder):
            parameters = inspect.signature(kind.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    return found


def create(method: str, model: nn.Module, **changes: Any) -> ZeroOrder:
    """The optimizer of a named method; `changes` are further or other arguments of its class."""
    known = arguments(method)
    for name in changes.keys() - known.keys():
        raise ValueError(f"method {method} has no argument {name!r}; it has {', '.join(known)}")
    return METHODS[method](model, **changes)
