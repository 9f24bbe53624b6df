"""Commands about the machine: explain, tune, bench."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import memory
from .terminal import about, console, ranks_of


def explain(
    model: Annotated[str, about("GGUF file or Hugging Face directory")] = "",
    rank: Annotated[int, about("rank of each layer's basis")] = 1,
    ranks: Annotated[str, about("ranks of their own: '*.q_proj=4'")] = "",
    format: Annotated[str, about("of weights that are dense in the file")] = "int4",
    group_size: Annotated[int | None, about("weights per scale, -1 for a row")] = None,
    rows: Annotated[int, about("rows (tokens of all row groups) to choose for")] = 512,
    groups: Annotated[int, about("row groups")] = 2,
    device: Annotated[str, about("cpu, or cuda: what a GPU would run, here or elsewhere")] = "cpu",
    arch: Annotated[str, about("of that GPU, if none is here: 80, 90, gfx942")] = "",
    dtype: Annotated[str, about("activations on that GPU: bfloat16, float16, float32")] = "bfloat16",
) -> None:
    """What runs where and why: for each layer of --model, or (without) for this installation or a GPU."""
    from ..backend import environment, explain_layers, explain_shapes
    from ..finetune import DTYPES
    from ..integrations.transformers import load_model
    from ..layers import zo_layers
    from ..swap import ZOConfig

    arch = _arch(device, arch)
    if dtype not in DTYPES:
        raise ValueError(f"`--dtype` is {dtype!r}; activations may be {', '.join(DTYPES)}")
    if arch and not model:
        _print_shapes(explain_shapes(arch, DTYPES[dtype]), f"int4 4096 x 4096, {dtype}, rank 16, on {arch}")
        return
    if not model:
        table = Table(show_header=False)
        for name, value in environment().items():
            table.add_row(name, value)
        console.print(table)
        return
    config = ZOConfig(format=format, group_size=group_size, rank=rank, ranks=ranks_of(ranks))
    loaded = load_model(model, config)
    told = explain_layers(loaded.model, rows, groups, 1, arch, DTYPES[dtype] if arch else None)
    table = Table(title=f"{model} on {arch}" if arch else model)
    for column in ("layer", "format", "layout", "out x in", "rank", "runs on", "bytes"):
        table.add_column(column, no_wrap=True)
    refusals: Counter[str] = Counter()
    total = parameters = 0
    for name, layer in zo_layers(loaded.model).items():
        why, size = told[name], layer.packed().nbytes
        kind = layer.format if layer.group_size == -1 else f"{layer.format}/{layer.group_size}"
        shape = f"{layer.out_features} x {layer.in_features}"
        table.add_row(name, kind, layer.layout, shape, str(layer.rank), why.chosen, f"{size:,}")
        total, parameters = total + size, parameters + layer.rank * layer.out_features
        refusals.update(f"{who} declines: {reason}" for who, reason in why.refusals.items())
    console.print(table)
    console.print(f"{len(told)} layers, {memory.human(total)} packed, {parameters:,} trainable parameters")
    for reason, count in refusals.items():
        console.print(f"{reason} ({count} layers)", markup=False)
    if not refusals:
        console.print("no implementation declines any layer")
    _print_products(told)
    for name, reason in loaded.report.skipped.items():
        console.print(f"{name}: left as it is: {reason}", markup=False)


def _arch(device: str, arch: str) -> str:
    """`--arch` as `Problem.arch`; that of the GPU here where none is given; "" for the CPU."""
    import torch

    from ..dispatch import arch_of

    if device not in ("cpu", "cuda"):
        raise ValueError(f"`--device` is {device!r}; it may be cpu or cuda")
    if device == "cpu":
        if arch:
            raise ValueError(f"`--arch` is {arch!r}, which goes with --device cuda")
        return ""
    if not arch and not (arch := arch_of(torch.device("cuda", 0))):
        raise ValueError("`--arch` is needed, since torch sees no GPU here: 80, 86, 89, 90, 100, 120 or gfx942, say")
    name = arch if arch.startswith(("sm_", "gfx")) else f"sm_{arch}"
    if not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]+", name):
        raise ValueError(f"`--arch` is {arch!r}; it is a number like 90 (compute capability 9.0) or a name like gfx942")
    return name


def _print_shapes(told: Mapping[Any, Any], title: str) -> None:
    """Rows against implementations: which runs, and what each would take by the model of dispatch."""
    names = sorted({name for why in told.values() for name in why.seconds})
    table = Table("rows", "runs on", *(f"{name}, modelled us" for name in names), title=title)
    refusals: Counter[str] = Counter()
    for problem, why in told.items():
        times = (f"{1e6 * why.seconds[name]:,.1f}" if name in why.seconds else "declines" for name in names)
        table.add_row(str(problem.M), why.chosen, *times)
        refusals.update(f"{who} declines: {reason}" for who, reason in why.refusals.items())
    console.print(table)
    for reason, count in refusals.items():
        console.print(f"{reason} ({count} of {len(told)} rows)", markup=False)
    _print_products(told)
    console.print("The least modelled time among those that do not decline runs. Modelled, not measured.")


def _print_products(told: Mapping[Any, Any]) -> None:
    console.print(f"x and W are multiplied in {', '.join(sorted({why.products for why in told.values()}))}")


def tune(
    model: Annotated[str, about("GGUF file or Hugging Face directory: tune for the shapes of its layers")] = "",
    shapes: Annotated[str, about("or for these, out x in: '4096x4096,14336x4096'")] = "",
    rows: Annotated[str, about("rows (tokens of all row groups), each bucket of them once")] = "2,32,64,256,1024",
    format: Annotated[str, about("int4, int8, nf4, fp4 or dense; of --model: of weights that are dense")] = "int4",
    dtype: Annotated[str, about("activations: float32, bfloat16, float16")] = "bfloat16",
    out: Annotated[Path | None, about("the table (default: in the platform's folder of caches)")] = None,
) -> None:
    """Time the Triton tiles on this GPU and write the fastest down, for finetune --tiles. It changes no bit of y."""
    from ..triton_ops import tune as room
    from ..triton_ops.tiles import Shape

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`--dtype` is {dtype!r}; it may be float32, bfloat16 or float16")
    if bool(model) == bool(shapes):
        raise ValueError("`tune` needs --model or --shapes, one of the two")
    counts = [int(count) for count in rows.split(",") if count.strip().isdigit() and int(count)]
    if len(counts) != len(rows.split(",")):
        raise ValueError(f"`--rows` is {rows!r}; it is numbers from 1 on, with commas in between")
    sizes = _layer_shapes(model, format) if model else [(format, *_out_by_in(item)) for item in shapes.split(",")]
    if not (arch := arch_here()):
        raise ValueError("torch sees no GPU here; `zoact tune` times its tiles on one")
    entries = room.tune(
        (Shape(arch, dtype, f, M, N, K) for f, N, K in sizes for M in counts), room.on_gpu(), console.print
    )
    path = out or room.default_path(arch)
    room.write(path, arch, entries)
    console.print(f"{len(entries)} tiles in {path}; use them with: zoact finetune --tiles {path}", markup=False)


def arch_here() -> str:
    import torch

    from ..dispatch import arch_of

    return arch_of(torch.device("cuda"))


def _layer_shapes(model: str, format: str) -> list[tuple[str, int, int]]:
    """(format, out, in) of each kind of layer; "flat" as tiles.Shape has it."""
    from ..integrations.transformers import load_model
    from ..layers import zo_layers
    from ..swap import ZOConfig

    layers = zo_layers(load_model(model, ZOConfig(format=format, rank=1)).model).values()
    found = ((layer.format, layer.packed().flat, layer.out_features, layer.in_features) for layer in layers)
    return sorted({("flat" if flat else kind, N, K) for kind, flat, N, K in found})


def _out_by_in(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"\s*([1-9]\d*)\s*x\s*([1-9]\d*)\s*", text)):
        raise ValueError(f"`--shapes` has {text!r}; items are of the form 14336x4096, out x in")
    return int(found[1]), int(found[2])


def bench(
    what: Annotated[
        str, typer.Argument(help="kernels, step (of the demo model) or report (of all results)")
    ] = "kernels",
    profile: Annotated[str, about("kernels: smoke, quick, targets, updates, scaling, table or full")] = "quick",
    providers: Annotated[str, about("kernels: only these, comma-separated")] = "",
    device: Annotated[str, about("kernels: cpu or cuda")] = "cpu",
    threads: Annotated[int, about("step: CPU threads")] = 1,
    out: Annotated[Path | None, about("results file to append to (default: in benchmarks/results)")] = None,
) -> None:
    """Time the kernels beside other libraries, or a whole step beside other methods (needs the repository)."""
    modules = {"kernels": "run", "step": "step", "report": "report"}
    if what not in modules:
        raise ValueError(f"`what` is {what!r}; allowed are {', '.join(modules)}")
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        raise ValueError(
            "the benchmarks are in the repository, not in the installed package: clone it, then `make bench`"
        )
    given: dict[str, Any] = {"out": out.absolute() if out else None}
    if what == "kernels":
        given |= {"profile": profile, "providers": providers or None, "device": device}
    elif what == "step":
        given |= {"threads": threads}
    else:
        given = {}
    options = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", f"benchmarks.{modules[what]}", *options]
    raise typer.Exit(subprocess.run(command, cwd=root).returncode)
