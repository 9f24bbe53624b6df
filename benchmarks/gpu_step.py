"""A whole training step of a small Llama with random weights, over its floor, in time and in memory.

    step          ZO-Act as a user runs it: + and - in one forward, losses to the host, C updated
    floor         a plain forward of the same rows through the same 4-bit model, its losses left on the device
    step graph    the step as `StepGraph` replays it: one CUDA graph, its losses to the host
    floor graph   the floor, captured and replayed; on the CPU both graphs are the calls as they are

Weights are random and 4-bit codes are rounded to nearest: only time and memory count. transformers' Llama where it is
installed, else the same layers in plain torch below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoact_kernels import memory, methods
from zoact_kernels.layers import zo_layers
from zoact_kernels.losses import Batch, group_losses
from zoact_kernels.step_graph import StepGraph
from zoact_kernels.swap import ZOConfig, swap

from .timing import captured, interleaved, ratio, synchronize

RANK, SIGMA = 8, 1e-3


@dataclass(frozen=True)
class Size:
    """Of the model and its batch: B sequences of T tokens, so a step has 2 B T rows."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    B: int
    T: int
    dtype: str = "bfloat16"

    @property
    def rows(self) -> int:
        return 2 * self.B * self.T


# One that fills a GPU, one whose time on a GPU is below what the host needs to launch it.
SIZES = {
    "cuda": (Size(2048, 5632, 12, 16, 32000, 16, 256), Size(2048, 5632, 12, 16, 32000, 1, 16)),
    "cpu": (Size(64, 128, 2, 4, 128, 2, 4, "float32"),),
}


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norms = nn.ModuleList(nn.RMSNorm(size.hidden) for _ in range(2))
        wide, narrow = size.intermediate, size.hidden
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(narrow, narrow, False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(narrow, wide, False) for _ in range(2))
        self.down_proj = nn.Linear(wide, narrow, False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, hidden]
        h = self.norms[0](x)
        projected = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Body(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


class PlainLlama(nn.Module):
    """A Llama without rotations, as transformers would present it to losses.py."""

    config = SimpleNamespace(is_encoder_decoder=False)
    base_model_prefix = "body"

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.body = Body(size)
        self.lm_head = nn.Linear(size.hidden, size.vocabulary, False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.body(input_ids)))


def dense_model(size: Size, device: str, plain: bool = False) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        if not plain:
            try:
                from transformers import LlamaConfig, LlamaForCausalLM
            except ImportError:
                plain = True
        if plain:
            model: nn.Module = PlainLlama(size)
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
                    num_attention_heads=size.heads, num_key_value_heads=size.heads, vocab_size=size.vocabulary,
                )
            )  # fmt: skip
    return model.to(getattr(torch, size.dtype)).eval()


class Subject:
    """A swapped model, its batch and the four things that are timed."""

    def __init__(self, size: Size, device: str, plain: bool = False) -> None:
        self.size, self.device = size, device
        self.model = dense_model(size, device, plain)
        self.kind = type(self.model).__name__
        swap(self.model, ZOConfig(format="int4", group_size=64, rank=RANK, quantizer="minmax"))
        self.layers = zo_layers(self.model)
        self.bases = {
            name: torch.linalg.qr(torch.randn(layer.in_features, RANK, device=device))[0].contiguous()
            for name, layer in self.layers.items()
        }
        self._set(self.bases)
        ids = torch.randint(size.vocabulary, (size.B, size.T), device=device)
        every = torch.arange(size.B, device=device)
        self.batch = Batch(
            "completion", ids, torch.ones_like(ids), every, torch.full_like(every, size.T - 1), torch.zeros_like(every)
        )
        self.optimizer = methods.create("zo-act", self.model, sigma=SIGMA, floor_every=0)

    def _set(self, bases: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            layer.basis = bases.get(name)

    def losses(self, groups: int = 2) -> Tensor:
        return group_losses(self.model, self.batch, groups)

    def step(self) -> Any:
        return self.optimizer.step_on([self.losses])

    def floor(self) -> Tensor:
        self._set({})  # a layer without a basis is plain low-bit inference
        try:
            return self.losses()
        finally:
            self._set(self.bases)

    def step_graph(self) -> Callable[[int], Any]:
        if self.device == "cpu":
            return lambda i: self.step()
        graph = StepGraph(self.optimizer, self.batch)
        return lambda i: graph.step(self.batch)

    def floor_graph(self) -> Callable[[int], Any]:
        return captured(lambda i: self.floor(), 1, self.device)


def held_and_peak(call: Callable[[], Any], device: str) -> tuple[int | None, int | None]:
    """Bytes alive before the call and at its highest point: of tensors on a GPU, of the process on the CPU."""
    if device == "cpu":
        memory.trim()
    synchronize(device)
    before = memory.resident(device)
    reset = memory.reset_highest(device)
    call()
    synchronize(device)
    return before, memory.highest(device) if reset else None


def measure(size: Size, device: str, rounds: int | None = None, plain: bool = False) -> list[dict[str, Any]]:
    """A row for each of the four; ratios round by round to the floor of the same kind."""
    with torch.no_grad():
        subject = Subject(size, device, plain)
        calls = {"step": subject.step, "floor": subject.floor}
        for call in calls.values():
            call()  # libraries compile and allocate at the first call
        peaks = {name: held_and_peak(call, device) for name, call in calls.items()}
        timed: dict[str, Callable[[int], Any]] = {name: lambda i, f=f: f() for name, f in calls.items()}
        times = interleaved(timed, 1, 2, device, rounds or 15, budget=20)
        graphs: dict[str, Callable[[int], Any]] = {}
        notes: dict[str, str] = {}
        for name, capture in (("step graph", subject.step_graph), ("floor graph", subject.floor_graph)):
            try:
                graphs[name] = capture()
            except Exception as error:
                notes[name] = f"not captured: {type(error).__name__}: {error}"[:300]
                synchronize(device)
        times |= interleaved(graphs, 1, 2, device, rounds or 15, budget=20)
    rows = []
    for name in ("step", "floor", "step graph", "floor graph"):
        row: dict[str, Any] = {
            "gpu_step": name, "model": subject.kind, "rows": size.rows, "B": size.B, "T": size.T, "dtype": size.dtype,
            "device": device, "layers": size.layers, "hidden": size.hidden, "rank": RANK, "threads": 1,
        }  # fmt: skip
        if name in notes:
            row["note"] = notes[name]
        if name in times:
            row["seconds"] = times[name].spread()
            floor = times.get("floor graph" if "graph" in name else "floor")
            if floor is not None:
                row["over_floor"] = ratio(times[name], floor).spread()
        if name in peaks:
            row["bytes"] = dict(zip(("before", "peak"), peaks[name], strict=True))
        rows.append(row)
    return rows
