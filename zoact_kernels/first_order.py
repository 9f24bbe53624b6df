"""Update rules fed with gradients, for what a method trains by autograd beside what it moves along noise.

    sgd     g += wd theta;  theta <- theta - lr g
    adam    g += wd theta;  m <- beta1 m + (1-beta1) g;  v <- beta2 v + (1-beta2) g^2;
            theta <- theta - lr (m / (1-beta1^t)) / (sqrt(v / (1-beta2^t)) + eps)
    adamw   theta <- theta - lr wd theta first, then adam without wd
    sumo    Q [N, R] = top left singular vectors of g, taken anew every `period` steps, when S <- (Q^T Q_before) S;
            S [R, K] <- beta1 S + Q^T g;  O = X Y^T where S = X Sigma Y^T;  |O| at most `growth` |O of the step before|;
            theta <- theta - lr wd theta - scale lr Q O                                             arXiv 2505.24749

The first three are torch.optim's to the bit. Everything is reckoned in fp32; values in 16 bits are rounded
stochastically, by the noise law, since a step below half an ulp would be lost every time. t counts applied updates.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from . import rng
from .optim import check_entries


class SGD:
    """theta <- theta - lr g. The base of the others: they keep moments.

    values: {name: theta [rows, cols]}, updated in place. param_ids: int64 [L] in the same order, for the rounding of 16
    bits. undecayed: names that weight decay leaves alone. `gradients`, {name: g as theta}, and `lr` are set before each
    `launch`. Raises ValueError for numbers out of range.
    """

    rule = "sgd"
    decoupled = False  # weight decay shrinks theta on its own, and is no part of the gradient

    def __init__(
        self,
        values: Mapping[str, Tensor],
        param_ids: Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        undecayed: Collection[str] = (),
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas) or eps < 0 or weight_decay < 0:
            raise ValueError(
                f"betas are {betas} (in [0, 1)), eps is {eps} and weight_decay {weight_decay} (neither negative)"
            )
        self.coeffs, self.param_ids, self.betas, self.eps = dict(values), param_ids, betas, eps
        self.decay = {name: 0.0 if name in undecayed else weight_decay for name in self.coeffs}
        self.skip = torch.zeros(1, dtype=torch.bool, device=param_ids.device)
        self.t, self.lr = 0, 0.0
        self.gradients: Mapping[str, Tensor] = {}
        self.moments = {name: self.begin(value) for name, value in self.coeffs.items()}

    def begin(self, value: Tensor) -> dict[str, Tensor]:
        """The moments of one value before its first step, fp32."""
        return {}

    def move(self, theta: Tensor, g: Tensor, moments: dict[str, Tensor]) -> None:
        """One step of theta, in place; its moments go on. All fp32, g as theta."""
        theta.add_(g, alpha=-self.lr)

    @torch.no_grad()
    def launch(self, seeds: Tensor, weights: Tensor | None = None) -> None:
        """One step along `gradients`, or nothing where `skip` is set. seeds: int64 [S], the first one for rounding."""
        if bool(self.skip):
            return
        for param_id, (name, value) in zip(self.param_ids.split(1), self.coeffs.items(), strict=True):
            theta, g, decay = value.float(), self.gradients[name].float(), self.decay[name]
            if decay and self.decoupled:
                theta.mul_(1 - self.lr * decay)
            elif decay:
                g = g.add(theta, alpha=decay)
            self.move(theta, g, self.moments[name])
            if theta.data_ptr() != value.data_ptr():  # a copy, since value has 16 bits
                value.copy_(rng.round_stochastic(theta, value.dtype, seeds[:1], param_id))

    def prepare(self, lr: float) -> None:
        """The learning rate of the next step."""
        self.lr = lr

    def finish(self) -> None:
        """Count the step that `launch` made, unless it was skipped."""
        self.t += not bool(self.skip)
        self.gradients = {}

    def written(self) -> list[Tensor]:
        """The values and their moments."""
        return [*self.coeffs.values(), *self._moments().values()]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of t and the moments: "t" int64 [], "<moment>/<name>"."""
        return {"t": torch.tensor(self.t)} | {key: moment.clone() for key, moment in self._moments().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a `state_dict` of the same rule over equally named and shaped values, in place.

        Raises ValueError for missing or surplus entries or another shape, before anything is changed.
        """
        wanted = self._moments()
        check_entries(state, {"t": torch.tensor(0), **wanted}, f"state of first-order {self.rule}")
        for key, moment in wanted.items():
            moment.copy_(state[key])
        self.t = int(state["t"])

    def _moments(self) -> dict[str, Tensor]:
        return {f"{kind}/{name}": m for name, moments in self.moments.items() for kind, m in moments.items()}


class Adam(SGD):
    """Adam; weight decay, if any, is L2 through the moments."""

    rule = "adam"

    def begin(self, value: Tensor) -> dict[str, Tensor]:
        return {
            kind: torch.zeros(value.shape, dtype=torch.float32, device=value.device)
            for kind in ("exp_avg", "exp_avg_sq")
        }

    def move(self, theta: Tensor, g: Tensor, moments: dict[str, Tensor]) -> None:
        (beta1, beta2), t = self.betas, self.t + 1
        m, v = moments["exp_avg"].lerp_(g, 1 - beta1), moments["exp_avg_sq"]
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        spread = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(self.eps)
        theta.addcdiv_(m, spread, value=-self.lr / (1 - beta1**t))


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    rule = "adamw"
    decoupled = True


class SUMO(AdamW):
    """Matrices by orthogonalised momentum in a subspace, exactly, by SVD; what has one row or column by AdamW.

    State of a matrix: (N + K) R numbers. rank: R, of the paper's fine-tuning; a smaller side of a matrix bounds it.
    period and growth are ours, and so is scale, which lr could take in. A new Q costs a whole SVD of each gradient.
    """

    rule = "sumo"

    def __init__(
        self,
        values: Mapping[str, Tensor],
        param_ids: Tensor,
        *,
        rank: int = 8,
        period: int = 200,
        scale: float = 1.0,
        growth: float = 1.1,
        **others: Any,
    ) -> None:
        if rank < 1 or period < 1 or not scale > 0 or not growth >= 1:
            raise ValueError(
                f"sumo's rank is {rank}, period {period}, scale {scale} and growth {growth}; the first two are at "
                "least 1, scale is positive and growth at least 1"
            )
        self.rank, self.period, self.scale, self.growth = rank, period, scale, growth
        super().__init__(values, param_ids, **others)

    def begin(self, value: Tensor) -> dict[str, Tensor]:
        (N, K), device = value.shape, value.device
        if min(N, K) == 1:
            return super().begin(value)
        R = min(self.rank, N, K)
        shapes = {"subspace": (N, R), "momentum": (R, K), "norm": ()}
        return {kind: torch.zeros(shape, device=device) for kind, shape in shapes.items()}

    def move(self, theta: Tensor, g: Tensor, moments: dict[str, Tensor]) -> None:
        if "exp_avg" in moments:
            return super().move(theta, g, moments)
        q, s, norm = moments["subspace"], moments["momentum"], moments["norm"]
        if self.t % self.period == 0:
            new = torch.linalg.svd(g, full_matrices=False).U[:, : q.shape[1]]
            s.copy_(new.T @ q @ s)
            q.copy_(new)
        s.mul_(self.betas[0]).addmm_(q.T, g)
        o = polar(s)
        size = o.norm()
        if 0 < norm * self.growth < size:
            o, size = o * (norm * self.growth / size), norm * self.growth
        norm.copy_(size)
        theta.addmm_(q, o, alpha=-self.lr * self.scale)


def polar(s: Tensor) -> Tensor:
    """X Y^T of the SVD s = X Sigma Y^T [R, K], over the singular values that are not rounding; in fp64."""
    x, sigma, y = torch.linalg.svd(s.double(), full_matrices=False)
    felt = sigma > torch.finfo(s.dtype).eps * max(s.shape) * sigma[0]
    return ((x * felt) @ y).to(s.dtype)


RULES: dict[str, type[SGD]] = {rule.rule: rule for rule in (SGD, Adam, AdamW, SUMO)}
