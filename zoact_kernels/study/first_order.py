"""What forward passes alone are measured against: Adam with gradients of the same losses on the same batches.

adam-on-c   C of every layer on the activation basis, as ZO-Act has it
lora        both factors of a LoRA by peft: rank 8, alpha 16, all linears of the blocks; a new head whole

As first-order Adam is commonly run: gradients clipped to norm CLIP, the lr falling in a line to 0. Without either, the
best of a sweep of 33 steps (a LoRA at 3.2e-3, loss 0.48) came apart in the 66 of a final one (2.31, untrained 1.55).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from .. import rng
from ..layers import zo_layers
from ..losses import group_losses
from ..recipe import Recipe
from .settings import HEAD, Setting, give_basis, plain

LORA_RANK, LORA_ALPHA = 8, 16
CLIP = 1.0


@dataclass
class FirstOrder:
    """A model whose `parameters` Adam moves, one `step` a batch. clip: largest norm of all gradients together. fall:
    what becomes of the lr, if anything."""

    model: nn.Module
    parameters: list[nn.Parameter]
    adam: torch.optim.Adam
    clip: float = math.inf
    fall: LinearLR | None = None

    @property
    def state_bytes(self) -> int:
        """What is trained, its gradients and its moments."""
        return 4 * sum(p.numel() * p.element_size() for p in self.parameters)

    def step(self, batch: Any) -> Tensor:
        """Losses [B] of the batch before the step."""
        losses = group_losses(self.model, batch, grad=True)[0]
        self.adam.zero_grad(set_to_none=True)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.adam.step()
        if self.fall is not None:
            self.fall.step()
        return losses.detach()


def _on_c(setting: Setting, rank: int, recipe: Recipe) -> tuple[nn.Module, list[nn.Parameter]]:
    give_basis(setting, rank, recipe)
    found = [layer.coeff for layer in zo_layers(setting.model).values() if layer.coeff is not None]
    return setting.model, found


def _lora(setting: Setting, rank: int, recipe: Recipe) -> tuple[nn.Module, list[nn.Parameter]]:
    from peft import LoraConfig, get_peft_model

    model = plain(setting)
    head = [HEAD] if hasattr(model, HEAD) else []
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inner = [name for name in linears if name not in (HEAD, "lm_head")]
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=inner, modules_to_save=head or None)
    adapted: nn.Module = get_peft_model(model, config).eval()
    with torch.no_grad():  # peft draws A from a global generator; this has the variance of its draw
        for name, p in adapted.named_parameters():
            if "lora_A" in name:
                z = rng.noise("normal", rng.seed_for(recipe.seed, 0), rng.param_id(name), *p.shape)
                p.copy_(z / math.sqrt(3 * p.shape[1]))
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


BOUNDS: dict[str, Callable[[Setting, int, Recipe], tuple[nn.Module, list[nn.Parameter]]]] = {
    "adam-on-c": _on_c,
    "lora": _lora,
}


def begin(name: str, setting: Setting, rank: int, recipe: Recipe) -> FirstOrder:
    """recipe: its seed, steps, lr and batches; the method that it names is not used."""
    model, parameters = BOUNDS[name](setting, rank, recipe)
    adam = torch.optim.Adam(parameters, lr=recipe.lr)
    fall = LinearLR(adam, start_factor=1.0, end_factor=0.0, total_iters=max(1, recipe.steps))
    return FirstOrder(model, parameters, adam, CLIP, fall)


def steps(bound: FirstOrder, setting: Setting, recipe: Recipe) -> Iterator[float]:
    """Take the recipe's steps; seconds of each."""
    for step in range(recipe.steps):
        start = time.perf_counter()
        bound.step(setting.training.batch_at(recipe, step))
        yield time.perf_counter() - start
