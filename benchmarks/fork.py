"""Steps of the demo model of which only the last blocks are trained: whole, forked, and with a prefix cache.

    python -m benchmarks.fork [--blocks 3] [--queries 1 4 16]

CPU seconds of one thread (the least of a few steps), so that other work on the machine shows as little as it can; the
highest memory of a step above what stood before it. One JSON line each is appended to the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from zoact_kernels import finetune, memory, methods
from zoact_kernels.basis import compute_basis
from zoact_kernels.losses import group_losses

from .run import RESULTS
from .timing import machine

CACHE = 1 << 28


def cpu_seconds(run: Callable[[], Any], times: int) -> float:
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def measure(blocks: int, queries: list[int]) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    loaded = finetune.load(finetune.demo_job())
    model, batch = loaded.model, loaded.training.batch_at(finetune.demo_recipe(), 0)
    for name, layer in list(finetune.zo_layers(model).items()):
        if not any(f".layers.{30 - back}." in name for back in range(1, blocks + 1)):
            layer.rank, layer.coeff = 0, None
    compute_basis(model, [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}])
    for q in queries:
        whole = None
        for name, arguments in (
            ("whole", {"fork": False}),
            ("forked", {"fork": True}),
            ("cache", {"prefix_cache": CACHE}),
        ):
            optimizer = methods.create("zo-act", model, queries=q, floor_every=0, lr=0.0, **arguments)
            if name == "forked":
                optimizer.fork.remember = False  # every batch is a new one

            def step(optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.iteration = 0
                evaluate = [lambda groups: group_losses(model, batch, groups)]
                return optimizer.step_on(evaluate, batch.leading).losses

            first = cpu_seconds(step, 1)
            then = cpu_seconds(step, 3)
            with memory.peak_memory() as peak:
                losses = step()
            whole = losses if whole is None else whole
            yield {
                "fork": name, "blocks": blocks, "groups": 2 * q, "rows": batch.input_ids.numel(), "first": first,
                "then": then, "peak_bytes": peak.bytes, "same_bits": torch.equal(losses, whole),
                "cache_bytes": optimizer.fork.cache.bytes if name == "cache" else 0,
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=3, help="last blocks that are trained")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16], help="directions a step")
    given = parser.parse_args()
    for row in measure(given.blocks, given.queries):
        print(row, flush=True)
        with open(RESULTS / "fork.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "machine": machine()}) + "\n")


if __name__ == "__main__":
    main()
