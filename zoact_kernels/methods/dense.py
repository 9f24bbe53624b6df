"""All weights of a dense model along dense noise: MeZO, and the methods that change its noise, mask or rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import estimators, rng
from ..perturbation import Mask, Perturbation
from ..trainables import Weight, weights
from ..zeroth_order import Evaluation, ZeroOrder
from .checks import check_period, check_share


class MeZO(ZeroOrder):
    """theta +- sigma z, z ~ N(0, I);  d = (f+ - f-) / (2 sigma);  theta <- theta - lr (d z + wd theta).

    All parameters take part, norms, biases and embeddings too, a tied head once; wd is 0 where a name has bias,
    layer_norm or layernorm. Weights in 16 bits are rounded stochastically.
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
        check_share("sparsity", sparsity)
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
        check_share("sparsity", sparsity)
        check_period(period)
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


class ZOConservative(MeZO):
    """The best of theta, theta - step and theta + step by the loss on the batch; theta where they are equal.

    step: what the rule makes of d z, so theta + step is what it makes of -d z, from the same moments. Values and
    moments are copied and put back, not stepped back. With momentum or Adam the moments go with the choice too. 5
    forwards. A step that stays at theta counts as skipped.
    """

    name, paper = "zo-conservative", "arXiv 2402.11592"
    summary = "MeZO that stays, or turns back, where its step is worse"

    def _on_device(self, parts: Sequence[Evaluation], rows: tuple[int, ...], dry: bool = False) -> Tensor:
        losses, weights = self._estimate(parts, rows)
        self._take(losses, weights, dry)
        saved, tried = self.rule.save(), [self._clean(parts, losses.shape[1])]
        for sign in (1, -1):
            self.rule.launch(self._seeds, sign * self._weights)
            self._settle()
            tried.append(self._clean(parts, losses.shape[1]))
            self.rule.restore(saved)
        means = torch.cat(tried).mean(dim=1)
        best = torch.where(means.isfinite(), means, torch.inf).argmin()  # the first of those that are equal
        self._weights.mul_(torch.where(best == 2, -1.0, 1.0))
        self.rule.skip.logical_or_(best == 0)
        self.rule.launch(self._seeds, self._weights)
        self._settle()
        return torch.cat([losses, *tried])

    def _clean(self, parts: Sequence[Evaluation], examples: int) -> Tensor:
        """Losses [1, B] at theta; a closure over stacked inputs gives them once for every copy."""
        with self.forking():
            return torch.cat([estimators.per_example(part(1), 1) for part in parts], dim=1)[:, :examples]

    def _signal(self, losses: Tensor) -> float:
        return super()._signal(losses[: self.groups])

    def _reason(self, losses: Tensor, weights: Tensor) -> str:
        if losses.isfinite().all() and weights.isfinite().all():
            return "neither side of theta is better"
        return super()._reason(losses, weights)
