"""Adapters beside frozen weights of any format: MeZO over LoRA and over a prefix, and P-RGE over half a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..perturbation import Perturbation
from ..trainables import PrefixTensor, Trainable, loras, prefixes
from ..zeroth_order import ZeroOrder


class _LoRA(ZeroOrder):
    """D(W) + alpha / rank B A^T in the layers that `targets` name: last parts of their names, or patterns.

    A [K, R] is drawn Kaiming-uniform by `seed`, B [N, R] begins at 0. What a target had learned before stays, frozen.
    """

    basis = "random"
    both: bool  # factors

    def __init__(
        self, model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str] | str = ("q_proj", "v_proj"),
        sigma: float, lr: float, optimizer: str = "sgd", **others: Any,
    ) -> None:  # fmt: skip
        self.rank, self.alpha, self.targets = rank, alpha, targets
        super().__init__(model, sigma=sigma, lr=lr, optimizer=optimizer, **others)

    def find(self, model: nn.Module, handle: Perturbation) -> list[Trainable]:
        return loras(model, self.targets, self.rank, self.alpha, self.seed, both=self.both)


class MeZOLoRA(_LoRA):
    """MeZO on both factors: D(W) + alpha / rank (B +- sigma Z_B) (A +- sigma Z_A)^T, Z_B Z_A^T included."""

    name, paper = "mezo-lora", "arXiv 2305.17333"
    summary = "both factors of a LoRA along dense normal noise, by SGD"
    both = True

    def __init__(
        self, model: nn.Module, *, rank: int = 8, alpha: float = 16.0, sigma: float = 1e-2, lr: float = 1e-4,
        **others: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, rank=rank, alpha=alpha, sigma=sigma, lr=lr, **others)


class PRGE(_LoRA):
    """MeZO on B alone: D(W) + alpha / rank (B +- sigma Z_j) A^T, A fixed and one for all 2 q copies, one forward.

    B <- B - lr mean_j d_j Z_j. Published with q x batch = 16, and lr 5e-5 at q = 16.
    """

    name, paper = "p-rge", "arXiv 2409.15520"
    summary = "B of a LoRA whose A is fixed, several queries in one forward, by SGD"
    both = False

    def __init__(
        self, model: nn.Module, *, rank: int = 16, alpha: float = 32.0, queries: int = 4, sigma: float = 1e-2,
        lr: float = 1e-4, **others: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, rank=rank, alpha=alpha, queries=queries, sigma=sigma, lr=lr, **others)


class MeZOPrefix(ZeroOrder):
    """MeZO on the keys and values of `tokens` positions before every sequence, in each layer; nothing else moves.

    They begin as those of a real forward over tokens drawn by `seed`; each row group has its own copy of them. A prefix
    that the model has already is trained further.
    """

    name, paper = "mezo-prefix", "arXiv 2305.17333"
    summary = "keys and values of a prefix along dense normal noise, by SGD"

    def __init__(
        self, model: nn.Module, *, tokens: int = 5, sigma: float = 1e-1, lr: float = 1e-2, optimizer: str = "sgd",
        **others: Any,
    ) -> None:  # fmt: skip
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}; a prefix has at least 1")
        self.tokens = tokens
        super().__init__(model, sigma=sigma, lr=lr, optimizer=optimizer, **others)

    def find(self, model: nn.Module, handle: Perturbation) -> list[PrefixTensor]:
        return prefixes(model, handle, self.tokens, self.seed)
