"""Tuning on the user's card, opt-in: time the tiles that a product may have, keep the fastest in a table on disk.

`zoact tune` writes the table, `tiles.load` reads it; nothing looks for one by itself. Only BM, warps and stages are
tried, which no sum depends on: steps and splits of K, hence bits, are those of the rules. Ranks that load different
tables still compute alike, but wait for the slowest.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import tiles
from .tiles import Shape, Tile

WORTH = 0.97  # of the rule's time: what a tile has to be below, so that noise of the clock changes nothing


def candidates(s: Shape) -> list[Tile]:
    """The rule's tile, then the others that differ in BM, warps and stages."""
    rule = tiles.linear_rule(s)
    rows = [BM for BM in tiles.ROWS if BM <= s.bucket]
    others = (rule._replace(BM=a, warps=b, stages=c) for a, b, c in itertools.product(rows, tiles.WARPS, (2, 3, 4, 5)))
    return [rule, *(tile for tile in others if tile != rule)]


def tune(
    shapes: Iterable[Shape], seconds: Callable[[Shape, Tile], float], said: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Entries of a table: of each bucket of M the tile that takes the least `seconds(shape, tile)`. A tile that raises
    RuntimeError (too much shared memory, no room for registers) is passed over."""
    entries = []
    for s in dict.fromkeys(shape._replace(M=shape.bucket) for shape in shapes):
        times: dict[Tile, float] = {}
        for tile in candidates(s):
            with contextlib.suppress(RuntimeError):
                times[tile] = seconds(s, tile)
        rule = tiles.linear_rule(s)
        if not times:
            raise RuntimeError(f"no tile of {s} runs")
        best = min(times, key=lambda tile: times[tile])
        if rule in times and times[best] > WORTH * times[rule]:
            best = rule
        entries.append(
            dict(product=s.product, format=s.format, N=s.N, K=s.K, bucket=s.bucket, BM=best.BM, warps=best.warps,
                 stages=best.stages, seconds=times[best], rule_seconds=times.get(rule))
        )  # fmt: skip
        gain = (
            f"{times[rule] / times[best]:.2f} x the rule's speed" if rule in times else "the rule's tile does not run"
        )
        said(f"{s.format} {s.product} N={s.N} K={s.K} M={s.bucket}: {best}, {1e6 * times[best]:.1f} us, {gain}")
    return entries


def on_gpu(group_size: int = 64, rank: int = 8) -> Callable[[Shape, Tile], float]:
    """`seconds` of a zo_linear on the current GPU, two row groups and one seed: the median, L2 flushed in between."""
    from ..formats import expected_shapes
    from . import Triton

    def seconds(s: Shape, tile: Tile) -> float:
        from triton.runtime.errors import TritonError
        from triton.testing import do_bench

        dtype = torch.float32 if s.product == "tf32" else getattr(torch, s.product)
        with torch.device("cuda"):
            format = "nf4" if s.format == "flat" else s.format
            code, scale = expected_shapes(format, "row", group_size, s.N, s.K, s.format == "flat")
            stored = dtype if format == "dense" else torch.int8 if format == "int8" else torch.uint8
            one = torch.ones(1, dtype=torch.int64)
            arguments: dict[str, Any] = dict(
                x=torch.zeros(s.M, s.K, dtype=dtype), weight=torch.zeros(code, dtype=stored),
                scale=None if format == "dense" else torch.zeros(scale), offset=None, nested=None, bias=None,
                base_basis=None, base_coeff=None, basis=torch.zeros(s.K, rank), coeff=torch.zeros(s.N, rank),
                coeff_groups=None, projected=None, seeds=one, sigmas=torch.ones(2, 1), param_id=one, format=format,
                layout="row", group_size=group_size, out_features=s.N, groups=2,
            )  # fmt: skip
        with tiles.using(s, tile):
            try:
                return do_bench(lambda: Triton().zo_linear(**arguments), return_mode="median") / 1e3
            except TritonError as error:
                raise RuntimeError(str(error)) from error

    return seconds


def default_path(arch: str) -> Path:
    """Where the table of this machine lies: the platform's folder of caches, a name for each GPU and Triton."""
    folders = {"darwin": "Library/Caches", "win32": "AppData/Local"}
    name = f"tiles-{arch}-triton-{version('triton')}.json"
    return Path.home() / folders.get(sys.platform, ".cache") / "zoact_kernels" / name


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def write(path: Path, arch: str, entries: list[dict[str, Any]]) -> None:
    """The table, whole or not at all: a reader beside us sees the old one or the new one."""
    table = {"kind": tiles.KIND, "arch": arch, "triton": version("triton"), "tiles": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path.parent) as new:
        new.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        new.replace(path)
