"""A whole training step of the demo model, ours and others': `zoact bench step`, or `python -m benchmarks.step`.

Same model (SmolLM2-135M), same batch, same label-only head, as many rows through every layer for each:

    zoact       ZO-Act on the 4-bit model: + and - stacked in one forward, update of C included
    forward     the floor: a plain forward of the same rows through the same 4-bit model, no side path
    mezo        MeZO in place on the dense fp32 twin: w += sigma z, two forwards, w restored, w updated (2305.17333)
    lora        a PEFT LoRA of rank 1 on the dense twin, moved as in MeZO, two forwards
    dual        P-RGE's dual forwarding on the dense twin: + and - stacked, B+ and B- side by side, one bmm (2409.15520)
    dense       a plain forward of the same rows through the dense twin

Times are taken in turn in one process. Memory is taken in a fresh process each: bytes above the imports after loading,
and the highest in a step. There every block of 64 kB and more is mapped by itself (MALLOC_MMAP_THRESHOLD_), so that the
peak is what is alive: else it is also which holes of the heap a run happens to touch, 22 to 55 MB for the same step.
A profiled step says where the time goes. One JSON line a contender is appended to the results.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from zoact_kernels import finetune, memory, methods
from zoact_kernels.basis import compute_basis
from zoact_kernels.layers import zo_layers
from zoact_kernels.losses import Batch, group_losses
from zoact_kernels.swap import unswap

from .run import RESULTS
from .timing import interleaved, machine, ratio

SIGMA, LR = 1e-3, 1e-6
ROUNDS = 9


@dataclass
class Contender:
    """A model that is ready, and what one step of it is."""

    model: nn.Module
    batch: Batch
    step: Callable[[], Any]


def _swapped() -> tuple[nn.Module, Batch]:
    loaded = finetune.load(finetune.demo_job())
    return loaded.model, loaded.training.batch_at(finetune.demo_recipe(), 0)


def _twin() -> tuple[nn.Module, Batch]:
    """The dense fp32 model with the weights that the 4-bit one decodes to."""
    model, batch = _swapped()
    unswap(model)
    head = model.get_output_embeddings().weight
    model.set_input_embeddings(nn.Embedding.from_pretrained(head, freeze=False))
    return model.eval(), batch


def zoact() -> Contender:
    model, batch = _swapped()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    compute_basis(model, [inputs])
    optimizer = methods.create(next(iter(methods.METHODS)), model, floor_every=0)
    return Contender(model, batch, lambda: optimizer.step_on([lambda groups: group_losses(model, batch, groups)]))


def forward() -> Contender:
    model, batch = _swapped()
    for layer in zo_layers(model).values():
        layer.basis = None
    return Contender(model, batch, lambda: group_losses(model, batch, 2))


def dense() -> Contender:
    model, batch = _twin()
    return Contender(model, batch, lambda: group_losses(model, batch, 2))


def _in_place(model: nn.Module, batch: Batch, parameters: list[Tensor]) -> Callable[[], None]:
    """MeZO's step: the noise is made again from a seed each of the four times that it is needed."""

    def move(seed: int, factor: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            z = torch.normal(0.0, 1.0, p.shape, generator=generator)
            p.add_(z, alpha=factor)

    step = 0

    @torch.no_grad()
    def run() -> None:
        nonlocal step
        step += 1
        move(step, SIGMA)
        plus = group_losses(model, batch, 1).mean()
        move(step, -2 * SIGMA)
        minus = group_losses(model, batch, 1).mean()
        move(step, SIGMA)
        move(step, -LR * float(plus - minus) / (2 * SIGMA))

    return run


def mezo() -> Contender:
    model, batch = _twin()
    return Contender(model, batch, _in_place(model, batch, [p.detach() for p in model.parameters()]))


def lora() -> Contender:
    from peft import LoraConfig, inject_adapter_in_model

    model, batch = _twin()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, lora_dropout=0.0, target_modules=names), model)
    parameters = [p.detach() for name, p in model.named_parameters() if "lora_" in name]
    return Contender(model.eval(), batch, _in_place(model, batch, parameters))


class DualLinear(nn.Module):
    """y = x W^T + bmm(x A, [B + sigma z, B - sigma z]) on rows stacked as (+, -)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.A = torch.randn(linear.in_features, 1) / linear.in_features**0.5
        self.B = torch.zeros(1, linear.out_features)
        self.pair = torch.zeros(2, 1, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.A).view(2, -1, 1)
        return self.linear(x) + torch.bmm(h, self.pair).view(*x.shape[:-1], -1)


def dual() -> Contender:
    model, batch = _twin()
    pairs = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            parent, _, leaf = name.rpartition(".")
            pairs.append(DualLinear(module))
            setattr(model.get_submodule(parent), leaf, pairs[-1])
    step = 0

    def noise(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.normal(0.0, 1.0, p.B.shape, generator=generator) for p in pairs]

    @torch.no_grad()
    def run() -> None:
        nonlocal step
        step += 1
        for p, z in zip(pairs, noise(step), strict=True):
            p.pair[0], p.pair[1] = p.B + SIGMA * z, p.B - SIGMA * z
        plus, minus = group_losses(model, batch, 2).mean(1).tolist()
        for p, z in zip(pairs, noise(step), strict=True):
            p.B.sub_(z, alpha=LR * (plus - minus) / (2 * SIGMA))

    return Contender(model, batch, run)


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "zoact": zoact, "forward": forward, "mezo": mezo, "lora": lora, "dual": dual, "dense": dense,
}  # fmt: skip


KINDS = {  # of what a step does, by the start of the op's name; the first match counts
    "linear layers": ("zoact::zo_linear", "aten::addmm", "aten::mm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "noise and update": ("zoact::zo_update_", "aten::normal_", "aten::add_", "aten::sub_"),
}


def anatomy(step: Callable[[], Any]) -> dict[str, float]:
    """Share of each kind of op in the time of a step; "other": norms, activations, rotations, the loss, Python."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        step()
        total = time.perf_counter() - start
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), None)
        if kind:
            spent[kind] += event.self_cpu_time_total / 1e6 / total
    return {**spent, "other": max(0.0, 1 - sum(spent.values()))}


def phases(name: str) -> dict[str, int | None]:
    """Bytes above the imports, in this process: after loading, and the peak of a step."""
    for library in ("gguf", "peft", "tokenizers", "transformers.models.llama.modeling_llama"):
        importlib.import_module(library)  # which loading would import
    memory.trim()
    imports = memory.resident()
    contender = CONTENDERS[name]()
    contender.step()  # libraries allocate for good at the first call
    memory.trim()
    loaded = memory.resident()
    if imports is None or loaded is None or not memory.reset_highest():
        return {"loaded": None, "step": None}
    contender.step()
    peak = memory.highest()
    return {"loaded": loaded - imports, "step": None if peak is None else peak - imports}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall-clock time")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated; zoact is always there")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.jsonl", help="JSON lines to append to")
    parser.add_argument("--phases", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.phases:
        print(json.dumps(phases(options.phases)))
        return
    names = options.contenders.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        parser.error(f"--contenders: {unknown[0]!r} is not one of {', '.join(CONTENDERS)}")
    names = ["zoact", *(name for name in names if name != "zoact")]
    console = Console(highlight=False)
    ready = {}
    for name in names:
        console.print(f"loading {name}")
        ready[name] = CONTENDERS[name]()
    calls = {name: (lambda i, step=contender.step: step()) for name, contender in ready.items()}
    console.print(f"timing {len(calls)} contenders in turn")
    times = interleaved(calls, 1, options.threads, rounds=ROUNDS, budget=120)
    shares = {name: anatomy(contender.step) for name, contender in ready.items()}
    load, rows = os.getloadavg()[0], 2 * ready["zoact"].batch.input_ids.numel()
    ready.clear(), calls.clear()
    held = {}
    for name in names:
        console.print(f"memory of {name}")
        command = [sys.executable, "-m", "benchmarks.step", "--phases", name, "--threads", str(options.threads)]
        alive_only = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        told = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=RESULTS.parents[1], env=alive_only
        )
        held[name] = json.loads(told.stdout.splitlines()[-1])
    run = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    table = Table("contender", "seconds", "time / zoact's", "loaded", "peak of a step", "above loaded")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        file.write(json.dumps({"run": run, "profile": "step", "machine": machine()}) + "\n")
        for name in names:
            taken, over, bytes = times[name], ratio(times[name], times["zoact"]), held[name]
            row = {
                "run": run, "step": name, "rows": rows, "threads": options.threads, "load": round(load, 2),
                "seconds": {"p20": taken.quantile(0.2), "p50": taken.median, "p80": taken.quantile(0.8)},
                "over_ours": {"p20": over.quantile(0.2), "p50": over.median, "p80": over.quantile(0.8)},
                "bytes_above_imports": bytes, "shares": shares[name],
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
            above = bytes["step"] - bytes["loaded"] if bytes["step"] is not None else None
            table.add_row(
                name, f"{taken.median:.3f}", f"{over.median:.3f} [{over.quantile(0.2):.3f}, {over.quantile(0.8):.3f}]",
                memory.human(bytes["loaded"]), memory.human(bytes["step"]), memory.human(above),
            )  # fmt: skip
    console.print(table)
    console.print(f"{rows} rows a step, {options.threads} threads; results: {options.out}")


if __name__ == "__main__":
    main()
