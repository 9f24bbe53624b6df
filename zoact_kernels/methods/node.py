"""Noise on what linears give, not on their weights: behind the last attention, each label row its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import first_order
from ..layers import ZOLinear
from ..perturbation import Perturbation
from ..tail import Tail, Values
from ..trainables import Coefficients, Nodes, Trainable, between
from ..zeroth_order import Evaluation
from .tail import ZOActTail, whitening

AUTO = "auto"
# What families of models call the linear behind attention, the last one of a block, and the one that makes the values
ATTENDED = (
    "o_proj", "out_proj", "attn.c_proj", "self_attn.dense", "attention.dense", "self_attention.dense",
)  # fmt: skip
LAST = ("down_proj", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h")
VALUES = ("v_proj",)
MIXED = 0.633  # rms of what attention gives in SmolLM2-135M on question types, as FELT: C then moves it by equal shares


class ZOActNode(ZOActTail):
    """W_eff = D(W) + U S A^T as in zo-act-tail, S moved by noise on what the layer gives (node, activity perturbation).

        y_b = x_b W_eff^T +- sigma z_bj U^T            z_bj [Q] of label row b in query j
        dS  = 1/B sum_b mean_j d_bj z_bj (x_b A)       d_bj = (f_b+ - f_b-) / (2 sigma), the row's own example

    A loss meets Q numbers of a layer where noise on S has Q R of them: the variance falls by the rank, and every
    example of a forward has a direction of its own. Price: what is logged can't be replayed without the model.

    The linear that makes the values of the last attention has no noise. Its C [N, R] moves by the chain rule, since the
    way from it to the first of `layers` is linear where the weights of attention are fixed:

        dC_k = 1/B sum_b sum_(h of k) (W_eff^T U g_b)_h (m_bh A)      g_b = mean_j d_bj z_bj of that layer,
                                                                      m_bh mixture of head h (see `tail`)

    layers, values: names of linears in the last block, comma-separated; "auto": of ATTENDED, LAST and VALUES those that
    it has; values "" leaves them alone. rank, outputs: R and Q. tail_cache: bytes of rows kept. Raises ValueError for
    names that the last block does not have, and as zo-act-tail does.
    """

    name, paper = "zo-act-node", "arXiv 2210.03310"
    summary = "of this package: zo-act-tail's numbers and attention's values, by noise on outputs, each row its own"
    replayable = False  # the rows that noise is multiplied with are in no log
    one_graph = False
    whole_batch = True
    known_sides = ("two-sided",)
    recipe: ClassVar[dict[str, Any]] = {
        "steps": 600, "batch_size": 256, "length_window": 0, "schedule": "cosine", "floor_every": 0,
        "basis_batches": 8, "snapshot_every": 200,  # 2 048 rows for 512 directions
    }  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str = AUTO,
        values: str = AUTO,
        rank: int = 512,
        outputs: int = 8,
        queries: int = 2,
        sigma: float = 1e-2,
        optimizer: str = "adamw",
        lr: float = 1e-2,
        weight_decay: float = 4.0,
        spread: bool = False,
        **others: Any,
    ) -> None:
        if others.get("scaling", "plain") != "plain" or others.get("mode", "stacked") != "stacked":
            raise ValueError(f"{self.name} takes scaling 'plain' and mode 'stacked': each row has a weight of its own")
        if spread:
            raise ValueError(f"{self.name} takes no spread: each row has noise of its own as it is")
        self.names = [name.strip() for name in layers.split(",") if name.strip()]
        self.values = values.strip()
        if not self.names:
            raise ValueError(f"layers is {layers!r}; it names linears of the last block, comma-separated")
        others |= {"optimizer": optimizer, "lr": lr, "weight_decay": weight_decay, "spread": spread}
        super().__init__(model, rank=rank, outputs=outputs, queries=queries, sigma=sigma, **others)

    # --- what is trained ----------------------------------------------------------------------------------------------

    def find(self, model: nn.Module, handle: Perturbation) -> list[Trainable]:
        found = self.last_block(model)
        known = ", ".join(full.rpartition(".")[2] for full in found) or "none"
        if self.names == [AUTO]:
            self.names = [name for name in ATTENDED + LAST if _among(found, name)]
            if not self.names:
                raise ValueError(
                    f"layers is {AUTO!r}, which knows {', '.join(ATTENDED + LAST)}; the last block has the swapped "
                    f"linears {known}. Name those that attention and the block end with, or take another method: zo-act"
                )
        if self.values == AUTO:  # learned by the noise on what attention's output goes to
            attended = any(name in ATTENDED for name in self.names)
            self.values = next((name for name in VALUES if attended and _among(found, name)), "")
        for name in (*self.names, *([self.values] if self.values else [])):
            if not _among(found, name):
                raise ValueError(f"layers or values has {name!r}; the last block has the swapped linears {known}")
        self.free(model)
        for full, layer in found.items():
            if any(_called(full, name) for name in self.names):
                self.give_bases(layer)
        trained: list[Trainable] = between(model, Nodes)
        for full, layer in found.items():
            if self.values and _called(full, self.values):
                layer.set_basis(
                    torch.zeros(layer.in_features, min(self.rank, layer.in_features), device=layer.weight.device)
                )
                layer.perturbation = Perturbation()
                layer.perturbation.idle = True  # its C moves, by no noise
                trained.append(Coefficients(full, layer))
        return trained

    def make_rule(self, optimizer: str, trainables: Sequence[Trainable], **arguments: Any) -> Any:
        if optimizer not in first_order.RULES or optimizer == "sumo":
            raise ValueError(f"optimizer is {optimizer!r}; with {self.name} it may be sgd, adam or adamw")
        del arguments["noise"]
        values, ids = {t.name: t.value.detach() for t in trainables}, torch.cat([t.param_id for t in trainables])
        return first_order.RULES[optimizer](values, ids, **arguments)

    @functools.cached_property
    def fork(self) -> Tail:
        values = None
        for t in self.trainables.values():
            if isinstance(t, Coefficients):
                config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
                heads = config.num_attention_heads
                width = getattr(config, "head_dim", None) or config.hidden_size // heads
                values = Values(t.layer, heads, width)
        return Tail(self.model, self.tail_cache, values)

    @torch.no_grad()
    def prepare(self, batches: Iterable[Any], evaluate: Callable[[Any], Tensor]) -> None:
        self._mixed, self._mixed_count = torch.zeros(()), 0
        super().prepare(batches, evaluate)
        for t in self.trainables.values():
            if isinstance(t, Coefficients):
                assert t.layer.basis is not None and isinstance(self.fork.first, ZOLinear)
                share = self.inputs[self.fork.first] / MIXED
                t.layer.basis.copy_(whitening(self._mixed / self._mixed_count, t.layer.rank) * share)

    def seen(self) -> None:
        if self.fork.mixed is not None:
            rows = self.fork.mixed.flatten(0, 1).double().cpu()
            self._mixed = self._mixed + rows.T @ rows
            self._mixed_count += len(rows)

    # --- a step -------------------------------------------------------------------------------------------------------

    def _estimate(self, parts: Sequence[Evaluation], rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        losses, weights = super()._estimate(parts, rows)
        self.rule.gradients = self._gradients(losses)
        return losses, weights

    @torch.no_grad()
    def _gradients(self, losses: Tensor) -> dict[str, Tensor]:
        """Of the mean loss, from losses [2 q, B] and what the last forward left: {name: as the value}."""
        B, read = losses.shape[1], self.fork.read
        assert read is not None
        d = (losses[0::2] - losses[1::2]) / (2 * self.sigma)  # [q, B]
        own = d[:, read.sequences * B // self.fork.sequences].float()  # of each label row's example
        found: dict[str, Tensor] = {}
        attended: tuple[Nodes, Tensor] | None = None  # what is given attention's output, and the gradient by its own
        for t in self.trainables.values():
            if isinstance(t, Nodes):
                along = (own[..., None] * t.noise).mean(dim=0)  # [n, Q], the gradient by the output, along U
                found[t.name] = along.T @ t.rows / B
                if t.layer is self.fork.first:
                    attended = t, along
        for t in self.trainables.values():
            if isinstance(t, Coefficients):
                assert attended is not None and self.fork.values is not None and self.fork.mixed is not None
                first, along = attended
                found[t.name] = self._of_values(t, first, along) / B
        return found

    def _of_values(self, t: Coefficients, first: Nodes, along: Tensor) -> Tensor:
        values, mixed, basis = self.fork.values, self.fork.mixed, t.layer.basis
        assert values is not None and mixed is not None and basis is not None and first.layer.basis is not None
        out = along @ first.left.T  # [n, N]
        back = out @ first.layer.dequantize() + out @ first.coeff.detach() @ first.layer.basis.T
        parts = t.value.shape[0] // values.width
        back = back.view(len(back), parts, -1, values.width)
        rows = (mixed.float() @ basis).view(len(back), parts, -1, basis.shape[1])
        return torch.einsum("npgw,npgr->pwr", back, rows).flatten(0, 1)


def _among(found: Iterable[str], name: str) -> bool:
    return any(_called(full, name) for full in found)


def _called(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")
