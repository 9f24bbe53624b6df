"""The one-shot activation basis: for each layer the top-R right singular vectors A [K, R] of its inputs H [T, K].

H are the inputs of a layer over the unpadded tokens of a few clean forwards (arXiv 2607.01125). The rows of a weight's
gradient are combinations of rows of H, so A holds the directions in which the weight has most to learn.

    method    kept while capturing, for each group of layers    forwards over the batches
    svd       H, float32 [T, K]; SVD in float64                 1
    gram      H^T H, float64 [K, K]; its eigenvectors           1
    power     two sketches, float64 [K, R + oversample]         iterations + 1

and two more: one over the first batch to find which layers are fed by the same tensor, one over all to measure the
captured energy. Layers fed by the same tensor form a group and get one A, the same object. With `streaming` only one
group's H, Gram or sketch is alive at a time; the forwards are then run per group and end at that group's last call.
svd and gram cost about K^3 per group (3 s and 1 s at T = 2048, K = 1536 on one Zen 4 core; a quarter of an hour at
K = 14336), power T K (R + oversample) per pass: it is for large models.

A is computed in float64 and rounded once, so it is orthonormal to float32 and does not depend on the thread count but
through the rounding of the forward itself. The largest entry of each column is positive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import rng
from .activations import Batch, Forwards, Group, Progress, evaluating
from .layers import ZOLinear, perturbation_of, zo_layers

METHODS = ("svd", "gram", "power")
ROWS = 1024  # rows of H that are cast to float64 at once


@dataclass(frozen=True)
class LayerBasis:
    """What the basis of one layer holds.

    energy: |H A|^2 / |H|^2 over all unpadded tokens. energy_without_first: the same but for the first token of each
    sequence; it is far lower than `energy` where the outlier of the first token swallowed the basis. NaN where no token
    is left. tokens: rows of the H that A was made of. singular_values: the first `rank` of that H.
    """

    name: str
    group: int
    shared_with: tuple[str, ...]
    rank: int
    tokens: int
    energy: float
    energy_without_first: float
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class BasisReport:
    """One row per layer, in the order of the groups' first calls."""

    method: str
    layers: tuple[LayerBasis, ...]

    def __str__(self) -> str:
        head = f"{self.method} basis of {len(self.layers)} layers: energy captured (without first tokens)"
        rows = (f"  {r.name}: rank {r.rank}, {r.energy:.3f} ({r.energy_without_first:.3f})" for r in self.layers)
        return "\n".join((head, *rows))


def compute_basis(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: str = "svd",
    streaming: bool = False,
    exclude_first_token: bool = False,
    oversample: int = 8,
    iterations: int = 6,
    seed: int = 0,
    progress: Progress | None = None,
) -> BasisReport:
    """Compute and set the basis of every layer of rank > 0, and report what it captures. All are set, or none.

    batches: dicts of arguments of `model`, or functions without arguments that run it. The "attention_mask" [B, T] of a
        dict drops padding. Without one every token counts, and token 0 of each [..., T, K] input is its first token.
    exclude_first_token: leave the first unpadded token of each sequence out of H.
    oversample, iterations, seed: of "power" alone; it starts from Philox noise, a function of seed and layer.
    progress: called as progress(done, total, what) after each forward.

    Raises ValueError for an unknown method, no batches, fewer tokens than the rank, a rank above K, inputs that are not
    finite or do not fit the mask, or coefficients that are not zero (a new basis would change what the model computes);
    RuntimeError when a layer is not reached, is perturbed, or shares its input in some of the batches only.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it may be {', '.join(METHODS)}")
    runs = list(batches)
    if not runs:
        raise ValueError("batches is empty; a basis needs at least one batch of calibration tokens")
    layers = _targets(model)
    forwards = Forwards(model, layers, runs, exclude_first_token, progress)

    with evaluating(model):
        groups = forwards.groups()
        parts = [[group] for group in groups] if streaming else [groups]
        passes = iterations + 1 if method == "power" else 1
        forwards.total = 1 + len(runs) * (passes * len(parts) + 1)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for part in parts:
            captures = {group.leader: _capture(method, group, oversample, iterations, seed) for group in part}
            for _ in range(passes):
                forwards.feed({name: capture.add for name, capture in captures.items()}, part if streaming else None)
                for capture in captures.values():
                    capture.end_pass()
            while captures:  # each is dropped before the next one is solved or made
                name = next(iter(captures))
                found[name] = captures.pop(name).vectors()
            del capture
        energies = {group.leader: _Energy(found[group.leader][0]) for group in groups}
        forwards.feed({name: energy.add for name, energy in energies.items()}, groups=groups, with_first=True)

    shared: dict[tuple[str, int], Tensor] = {}
    rows = []
    for index, group in enumerate(groups):
        vectors, values = found[group.leader]
        for name in group.names:
            rank = layers[name].rank
            layers[name].set_basis(
                shared.setdefault((group.leader, rank), vectors[:, :rank].to(torch.float32).contiguous())
            )
            others = tuple(other for other in group.names if other != name)
            tokens = energies[group.leader].tokens(exclude_first_token)
            captured = energies[group.leader].captured(rank)
            rows.append(LayerBasis(name, index, others, rank, tokens, *captured, tuple(values[:rank].tolist())))
    return BasisReport(method, tuple(rows))


def _targets(model: nn.Module) -> dict[str, ZOLinear]:
    layers = {name: layer for name, layer in zo_layers(model).items() if layer.rank > 0}
    if perturbation_of(model).active:
        raise RuntimeError("the model is being perturbed; a basis comes from clean forwards")
    if not layers:
        raise ValueError("no layer of the model has a rank above 0; swap it with ZOConfig(rank=1) or more")
    for name, layer in layers.items():
        if layer.rank > layer.in_features:
            raise ValueError(f"rank of {name} is {layer.rank}; its inputs have only {layer.in_features} dimensions")
        if layer.coeff is not None and bool(layer.coeff.detach().any()):
            raise ValueError(f"coeff of {name} is not zero: another basis would change the model; merge it first")
    return layers


# --- from rows to singular vectors ------------------------------------------------------------------------------------


def _float64(rows: Tensor) -> Iterator[Tensor]:
    return (piece.double() for piece in rows.split(ROWS))


class _Svd:
    """Keeps H and decomposes it. The base of the others: they keep less."""

    def __init__(self, group: Group) -> None:
        self.group, self.tokens = group, 0
        self.h: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self.tokens += len(rows)
        self.h.append(rows)

    def end_pass(self) -> None:
        if self.tokens < self.group.rank:
            raise ValueError(
                f"{self.group.leader} has rank {self.group.rank} but saw {self.tokens} tokens; "
                "a basis needs at least as many calibration tokens as its rank"
            )

    def vectors(self) -> tuple[Tensor, Tensor]:
        """A float64 [K, R] with the sign rule applied, and the R largest singular values of H, falling."""
        h = torch.cat(self.h).double()
        self.h = []
        _, values, vt = torch.linalg.svd(h, full_matrices=False)
        return self._top(vt.T, values)

    def _top(self, vectors: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        a = vectors[:, : self.group.rank]
        largest = a.gather(0, a.abs().argmax(dim=0, keepdim=True))
        return a * torch.where(largest < 0, -1.0, 1.0), values[: self.group.rank]

    def _rayleigh(self, gram: Tensor, frame: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(gram)  # rising
        vectors = vectors.flip(1)
        return self._top(vectors if frame is None else frame @ vectors, values.flip(0).clamp_min(0).sqrt())


class _Gram(_Svd):
    """Keeps H^T H. Singular values below 1e-8 of the largest are lost to the squaring; the top ones are not."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        K = group.in_features
        self.gram = torch.zeros(K, K, dtype=torch.float64, device=group.param_id.device)

    def add(self, rows: Tensor) -> None:
        self.tokens += len(rows)
        for piece in _float64(rows):
            self.gram.addmm_(piece.T, piece)

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self._rayleigh(self.gram)


class _Power(_Svd):
    """Block subspace iteration, Q <- qr(H^T (H Q)), one per pass; the last pass makes the small Gram (H Q)^T (H Q)."""

    def __init__(self, group: Group, oversample: int, iterations: int, seed: int) -> None:
        super().__init__(group)
        width = min(group.in_features, group.rank + oversample)
        start = rng.noise(
            "normal", seed, int(group.param_id), group.in_features, width, device=group.param_id.device
        ).double()
        self.frame = torch.linalg.qr(start).Q
        self.sketch = torch.zeros_like(self.frame)
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=start.device)
        self.iterations, self.passed = iterations, 0

    def add(self, rows: Tensor) -> None:
        self.tokens += len(rows)
        for piece in _float64(rows):
            projected = piece @ self.frame
            if self.passed < self.iterations:
                self.sketch.addmm_(piece.T, projected)
            else:
                self.gram.addmm_(projected.T, projected)

    def end_pass(self) -> None:
        if self.passed == 0:
            super().end_pass()
        if self.passed < self.iterations:
            self.frame = torch.linalg.qr(self.sketch).Q
            self.sketch = torch.zeros_like(self.frame)
        self.passed += 1

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self._rayleigh(self.gram, self.frame)


def _capture(method: str, group: Group, oversample: int, iterations: int, seed: int) -> _Svd:
    if method == "power":
        return _Power(group, oversample, iterations, seed)
    return _Gram(group) if method == "gram" else _Svd(group)


class _Energy:
    """|H A|^2 column by column and |H|^2, float64, [0] over all tokens and [1] over all but the first ones."""

    def __init__(self, vectors: Tensor) -> None:
        self.basis = vectors.float().double()  # what the layers get
        self.columns = torch.zeros(2, vectors.shape[1], dtype=torch.float64, device=vectors.device)
        self.whole = torch.zeros(2, dtype=torch.float64, device=vectors.device)
        self.count = [0, 0]

    def add(self, rows: Tensor, first: Tensor) -> None:
        for index, part in enumerate((rows, rows[~first])):
            self.count[index] += len(part)
            for piece in _float64(part):
                self.columns[index] += (piece @ self.basis).square().sum(dim=0)
                self.whole[index] += piece.square().sum()

    def tokens(self, exclude_first: bool) -> int:
        return self.count[exclude_first]

    def captured(self, rank: int) -> tuple[float, float]:
        energy, without = (self.columns[:, :rank].sum(dim=1) / self.whole).tolist()
        return energy, without


def power_basis(h: Tensor, start: Tensor, iterations: int) -> Tensor:
    """A [K, R] from H [n, K] and start [n, R], all fp32: Q = qr(H^T start), `iterations` times Q = qr(H^T (H Q)).

    Of the QRs that whose R has a positive diagonal, which makes Q unique. A is nearly the top-R right singular vectors
    where the R-th singular value stands out, and orthonormal to fp32. R = 1 is a handful of matrix-vector products.
    Zeros where H is zero or not finite: what is multiplied by A stays finite.
    """
    q = _orthonormal(h.T @ start)
    for _ in range(iterations):
        q = _orthonormal(h.T @ (h @ q))
    return q


def _orthonormal(q: Tensor) -> Tensor:
    fine = torch.isfinite(q).all() & q.any()
    safe = torch.where(fine, q, torch.ones_like(q))
    if q.shape[1] == 1:
        unit = safe / torch.linalg.vector_norm(safe)
    else:
        unit, r = torch.linalg.qr(safe)
        unit = unit * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return torch.where(fine, unit, torch.zeros_like(unit))


def recompress(basis: Tensor, coeff: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best delta C A^T of rank `rank` to one of a larger rank: (A [K, rank] orthonormal, C [N, rank], error).

    basis [K, r], coeff [N, r]. error: what is lost, relative in the Frobenius norm. No N x K matrix is made: with
    A = Q_a R_a and C = Q_c R_c it is the SVD of R_c R_a^T. Surplus columns of a smaller delta are zero.
    """
    q_a, r_a = torch.linalg.qr(basis.double())
    q_c, r_c = torch.linalg.qr(coeff.double())
    u, s, v = torch.linalg.svd(r_c @ r_a.T, full_matrices=False)
    kept = min(rank, len(s))
    new_basis, new_coeff = basis.new_zeros(basis.shape[0], rank), coeff.new_zeros(coeff.shape[0], rank)
    new_basis[:, :kept] = q_a @ v[:kept].T
    new_coeff[:, :kept] = q_c @ (u[:, :kept] * s[:kept])
    whole = float(s.square().sum().sqrt())
    return new_basis, new_coeff, float(s[kept:].square().sum().sqrt()) / whole if whole else 0.0


def recompression_note(errors: Sequence[float], rank: int) -> str:
    """What a step has to tell of re-compressions with these errors; nothing where they lost no more than rounding."""
    worst = max(errors, default=0.0)
    return f"deltas re-compressed to rank {rank}, relative error up to {worst:.1e}" if worst > 1e-9 else ""
