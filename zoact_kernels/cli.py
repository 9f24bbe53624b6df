"""`zoact`: finetune, replay, explain, export, tune, bench, demo. Thin: options in, text out; all else is elsewhere.

Errors that a user can mend are one line and exit code 2; `--debug` anywhere shows the traceback.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import memory
from .data import parse_label_words
from .methods import StepResult
from .runlog import EvalRow, RunError, RunLog, StepRow
from .trainer import Recipe, Watch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune low-bit language models by forward passes only. --debug shows tracebacks.",
)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # files get whole lines


class Display(Watch):
    """A progress bar (in a file: ten lines) with loss, accuracy, tokens/s and peak; evaluations as lines."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
        )
        self.task = self.progress.add_task("", visible=False)
        self.loss = math.nan
        self.accuracy = ""
        self.steps = 0
        self.start = memory.resident()
        self.device = "cpu"

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def started(self, done: int, steps: int, device: str) -> None:
        self.start, self.steps, self.device = memory.resident(device), steps, device
        if done:
            self.said(f"continuing after step {done}")
        self.progress.reset(self.task, total=steps, completed=done, visible=True)

    def stepped(self, row: StepRow, result: StepResult) -> None:
        loss = result.loss
        if math.isfinite(loss):  # over about 20 steps
            self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        parts = [f"loss {self.loss:.4f}{self.accuracy}", f"{row.tokens / row.seconds:,.0f} tokens/s"]
        if row.floor > 0:
            parts.append(f"signal {row.signal / row.floor:,.0f} x rounding")
        if (peak := memory.highest(self.device)) is not None and self.start is not None:
            parts.append(f"peak +{memory.human(peak - self.start)}")
        text = " | ".join(parts)
        self.progress.update(self.task, completed=row.step + 1, description=text)
        if not console.is_terminal and (row.step + 1) % max(1, self.steps // 10) == 0:
            self.said(f"step {row.step + 1} of {self.steps}: {text}")

    def evaluating(self, step: int) -> None:
        self.progress.update(self.task, description=f"evaluating after {step} steps")

    def evaluated(self, row: EvalRow) -> None:
        self.accuracy = "" if math.isnan(row.accuracy) else f" | accuracy {row.accuracy:.1%}"
        self.said(f"after {row.step} steps: held-out loss {row.loss:.4f}{self.accuracy} ({len(row.losses)} examples)")

    def said(self, text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)


# --- finetune ---------------------------------------------------------------------------------------------------------


def _ranks(text: str) -> dict[str, int]:
    """ "*.q_proj=4,*.v_proj=0" -> {"*.q_proj": 4, "*.v_proj": 0}."""
    ranks = {}
    for item in filter(None, text.split(",")):
        pattern, _, rank = item.partition("=")
        if not rank.strip().isdigit():
            raise ValueError(f"`--ranks` has {item!r}; items are of the form pattern=rank")
        ranks[pattern.strip()] = int(rank)
    return ranks


def _values(items: list[str]) -> dict[str, Any]:
    """["rank=4", "over_rank=true"] -> {"rank": 4, "over_rank": True}: numbers and truth values as JSON, else text."""
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not name or not equals:
            raise ValueError(f"`--option` has {item!r}; it is of the form name=value")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


@app.command()
def finetune(
    context: typer.Context,
    out: Annotated[Path, _option("run directory")],
    model: Annotated[str, _option("GGUF file or Hugging Face directory (safetensors)")] = "",
    train: Annotated[str, _option("training examples: .jsonl, .csv or .tsv")] = "",
    eval: Annotated[str, _option("held-out examples, evaluated before, during and after")] = "",
    prompt: Annotated[str, _option("template over the columns: '{question}\\nType:'")] = "",
    labels: Annotated[str, _option("label=word,... or word,...: what the model should answer")] = "",
    label_column: Annotated[str, _option("column that holds the label")] = "label",
    completion: Annotated[str, _option("template of the answer, instead of --labels")] = "",
    separator: Annotated[str, _option("between prompt and answer")] = " ",
    max_length: Annotated[int, _option("tokens of a sequence; prompts lose their beginning")] = 512,
    method: Annotated[str, _option("what is perturbed and how it moves: see `zoact methods`")] = Recipe.method,
    option: Annotated[list[str] | None, _option("argument that only the method has: name=value (repeat)")] = None,
    rank: Annotated[int, _option("rank of each layer's basis")] = 1,
    ranks: Annotated[str, _option("ranks of their own: '*.q_proj=4,*.down_proj=0'")] = "",
    target: Annotated[list[str] | None, _option("pattern of layers to train (repeat; default all)", "--target")] = None,
    format: Annotated[str, _option("of weights that are dense in the file: int4, int8, nf4, fp4, dense")] = "int4",
    group_size: Annotated[int | None, _option("weights per scale, -1 for a row")] = None,
    dense: Annotated[
        bool, _option("train the dense twin of a low-bit model (methods that move the weights)", "--dense")
    ] = False,
    dtype: Annotated[str, _option("activations: float32, bfloat16, float16")] = "float32",
    device: Annotated[str, _option("cpu, cuda or cuda:1")] = "cpu",
    adapter: Annotated[str, _option("PEFT LoRA directory to continue from")] = "",
    steps: Annotated[int, _option("training steps")] = Recipe.steps,
    batch_size: Annotated[int, _option("examples a step")] = Recipe.batch_size,
    length_window: Annotated[
        int, _option("batches among which examples of similar length meet (0: any)")
    ] = Recipe.length_window,
    micro_batch: Annotated[int, _option("examples of a step at a time (0: all)")] = Recipe.micro_batch,
    lr: Annotated[float | None, _option("learning rate")] = Recipe.lr,
    sigma: Annotated[float | None, _option("perturbation radius")] = Recipe.sigma,
    queries: Annotated[int | None, _option("directions a step")] = Recipe.queries,
    sides: Annotated[str | None, _option("two-sided, one-sided or leave-one-out")] = Recipe.sides,
    scaling: Annotated[str | None, _option("of the differences: plain, std, clipped, sign")] = Recipe.scaling,
    mode: Annotated[str, _option("stacked (one forward) or sequential (less memory)")] = Recipe.mode,
    optimizer: Annotated[str | None, _option("adam, adamw, sgd, momentum, sign")] = Recipe.optimizer,
    weight_decay: Annotated[float | None, _option("weight decay")] = Recipe.weight_decay,
    schedule: Annotated[str, _option("constant, linear or cosine")] = Recipe.schedule,
    warmup: Annotated[int, _option("steps of rising learning rate")] = Recipe.warmup,
    noise: Annotated[str | None, _option("normal or rademacher")] = Recipe.noise,
    seed: Annotated[int, _option("the whole of the randomness")] = Recipe.seed,
    fork: Annotated[
        bool | None, _option("compute what is before the first trained block once (default: where possible)")
    ] = Recipe.fork,
    prefix_cache: Annotated[
        int | None, _option("bytes of hidden states kept there, for sequences that come again")
    ] = Recipe.prefix_cache,
    basis_batches: Annotated[int, _option("batches the basis is made of")] = Recipe.basis_batches,
    basis_method: Annotated[str, _option("gram, svd or power")] = Recipe.basis_method,
    basis_without_first: Annotated[
        bool, _option("leave first tokens out of the basis", "--basis-without-first")
    ] = Recipe.basis_without_first,
    eval_every: Annotated[int, _option("evaluate every so many steps too")] = Recipe.eval_every,
    eval_limit: Annotated[int, _option("held-out examples used (0: all)")] = 0,
    snapshot_every: Annotated[int, _option("steps between snapshots")] = Recipe.snapshot_every,
    threads: Annotated[int, _option("CPU threads (0: torch's default; a resumed run keeps its own)")] = 0,
    tiles: Annotated[Path | None, _option("table of Triton tiles that `zoact tune` wrote for this GPU")] = None,
    resume: Annotated[bool, _option("continue the run in --out; other options come from it", "--resume")] = False,
) -> None:
    """Fine-tune a model, or continue a run that ended early. Where no default is shown it is the method's own."""
    from . import finetune as room

    _set_threads(threads)
    if tiles is not None:
        from .triton_ops import tiles as room_of_tiles

        room_of_tiles.load(tiles, _arch_here())
    options = dict(context.params)
    options["labels"] = parse_label_words(labels) if labels else {}
    options["ranks"], options["targets"] = _ranks(ranks), tuple(target or ())
    options["options"] = _values(option or [])
    if resume:
        job, recipe = room.logged_job(out)
        given = {n for n in context.params if str(context.get_parameter_source(n)).endswith("COMMANDLINE")}
        given |= {plural for one, plural in (("target", "targets"), ("option", "options")) if one in given}
        options = {name: value for name, value in options.items() if name in given}
        job, recipe = replace(job, **_of(room.Job, options)), replace(recipe, **_of(Recipe, options))
    else:
        if not model or not train:
            raise ValueError("a new run needs --model and --train (or --resume with the --out of an earlier one)")
        job, recipe = room.Job(**_of(room.Job, options)), Recipe(**_of(Recipe, options))
    with Display() as display:
        outcome, _ = room.finetune(job, recipe, out, resume=resume, watch=display)
    _print_outcome(outcome)
    if outcome.result.stopped_by:
        console.print(f"stopped after {outcome.result.done} steps; continue: zoact finetune --resume --out {out}")
        raise typer.Exit(128 + outcome.result.stopped_by)


def _of(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in options.items() if name in names}


def _set_threads(threads: int) -> None:
    import torch

    if threads < 0:
        raise ValueError(f"`--threads` is {threads}; it has to be at least 1, or 0 for torch's default")
    if threads:
        torch.set_num_threads(threads)


def _print_outcome(outcome: Any, more: Sequence[tuple[str, ...]] = ()) -> None:
    """The table at the end: held-out numbers before and after, costs, sizes, checks."""
    from .finetune import paired

    before, after = outcome.before, outcome.after
    table = Table("", "before", "after", "change ± paired standard error", title=str(outcome.directory))
    if before is not None and after is not None and before.step != after.step:
        loss, loss_error = paired(before.losses, after.losses)
        if after.correct.size:
            gain, error = paired(before.correct, after.correct)
            change = f"{100 * gain:+.1f} ± {100 * error:.1f} points"
            table.add_row("held-out accuracy", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}", change)
        table.add_row("held-out loss", f"{before.loss:.4f}", f"{after.loss:.4f}", f"{loss:+.4f} ± {loss_error:.4f}")
        console.print(table)
    facts = Table(show_header=False)
    facts.add_row("steps", f"{outcome.result.done}")
    facts.add_row("seconds per step", f"{outcome.seconds_per_step:.3f} (median)")
    facts.add_row("tokens/s", f"{outcome.tokens_per_second:,.0f}")
    facts.add_row("peak memory above the loaded model", memory.human(outcome.result.peak_bytes))
    for row in more:
        facts.add_row(*row)
    facts.add_row("trainable parameters", f"{outcome.trainable:,}")
    facts.add_row("run log, adapter", f"{memory.human(outcome.log_bytes)}, {memory.human(outcome.adapter_bytes)}")
    same = "unchanged" if outcome.base_unchanged else "CHANGED"
    facts.add_row("base weights", f"{same}, sha256 {outcome.base_hash[:16]}...")
    console.print(facts)


# --- replay, export, explain, demo ------------------------------------------------------------------------------------


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="run directory")],
    adapter: Annotated[Path | None, _option("write the rebuilt adapter (PEFT LoRA) here")] = None,
) -> None:
    """Rebuild C from the log alone, without the model, and compare it with the snapshots."""
    from .finetune import export as write
    from .replay import replay as rebuild

    with RunLog.open(run) as log:
        rebuilt, name = rebuild(log), log.meta.get("job", {}).get("model")
    for step, same in rebuilt.checked:
        console.print(f"after {step} steps: {'identical' if same else 'DIFFERENT'}")
    console.print(f"{rebuilt.steps} steps replayed, C has sha256 {rebuilt.coeff_hash}")
    if adapter is not None:
        write(rebuilt.model, rebuilt.optimizer, adapter, name)
        console.print(f"adapter written to {adapter}")
    if not rebuilt.identical:
        raise RunError(f"{run}: the log does not give the C of its snapshots")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run directory")],
    out: Annotated[Path, _option("directory of the adapter (PEFT LoRA)")],
) -> None:
    """Write the adapter of a run as it stands after its last logged step; the model is not needed."""
    from .finetune import export as write
    from .replay import skeleton
    from .trainer import restore

    with RunLog.open(run) as log:
        layers = skeleton(log)
        optimizer = restore(layers, log, Recipe(**log.meta["recipe"]), Display())
        write(layers, optimizer, out, log.meta.get("job", {}).get("model"))
        console.print(f"adapter after {log.done} steps written to {out}")


@app.command()
def methods() -> None:
    """The methods: what each trains, its defaults where they are its own, where it was published."""
    from .methods import METHODS, ZeroOrder, arguments

    table = Table("method", "what it trains", "its own defaults", "published", "replay", "weights")
    usual = {p.name: p.default for p in inspect.signature(ZeroOrder.__init__).parameters.values()}
    for name, method in METHODS.items():
        own = arguments(name).items()
        told = ", ".join(f"{key} {value}" for key, value in own if key not in usual or value != usual[key])
        replayed, weights = "yes" if method.replayable else "no", "dense" if method.dense else "any"
        table.add_row(name, method.summary, told, method.paper, replayed, weights)
    console.print(table)
    told = ", ".join(f"{key} {value}" for key, value in usual.items() if value not in (None, inspect.Parameter.empty))
    console.print(f"all others: {told}")


@app.command()
def explain(
    model: Annotated[str, _option("GGUF file or Hugging Face directory")] = "",
    rank: Annotated[int, _option("rank of each layer's basis")] = 1,
    ranks: Annotated[str, _option("ranks of their own: '*.q_proj=4'")] = "",
    format: Annotated[str, _option("of weights that are dense in the file")] = "int4",
    group_size: Annotated[int | None, _option("weights per scale, -1 for a row")] = None,
    rows: Annotated[int, _option("rows (tokens of all row groups) to choose for")] = 512,
    groups: Annotated[int, _option("row groups")] = 2,
    device: Annotated[str, _option("cpu, or cuda: what a GPU would run, here or elsewhere")] = "cpu",
    arch: Annotated[str, _option("of that GPU, if none is here: 80, 90, gfx942")] = "",
    dtype: Annotated[str, _option("activations on that GPU: bfloat16, float16, float32")] = "bfloat16",
) -> None:
    """What runs where and why: for each layer of --model, or (without) for this installation or a GPU."""
    from .backend import environment, explain_layers, explain_shapes
    from .finetune import DTYPES
    from .integrations.transformers import load_model
    from .layers import zo_layers
    from .swap import ZOConfig

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
    config = ZOConfig(format=format, group_size=group_size, rank=rank, ranks=_ranks(ranks))
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

    from .dispatch import arch_of

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


@app.command()
def tune(
    model: Annotated[str, _option("GGUF file or Hugging Face directory: tune for the shapes of its layers")] = "",
    shapes: Annotated[str, _option("or for these, out x in: '4096x4096,14336x4096'")] = "",
    rows: Annotated[str, _option("rows (tokens of all row groups), each bucket of them once")] = "2,32,64,256,1024",
    format: Annotated[str, _option("int4, int8, nf4, fp4 or dense; of --model: of weights that are dense")] = "int4",
    dtype: Annotated[str, _option("activations: float32, bfloat16, float16")] = "bfloat16",
    out: Annotated[Path | None, _option("the table (default: in the platform's folder of caches)")] = None,
) -> None:
    """Time the Triton tiles on this GPU and write the fastest down, for finetune --tiles. It changes no bit of y."""
    from .triton_ops import tune as room
    from .triton_ops.tiles import Shape

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`--dtype` is {dtype!r}; it may be float32, bfloat16 or float16")
    if bool(model) == bool(shapes):
        raise ValueError("`tune` needs --model or --shapes, one of the two")
    counts = [int(count) for count in rows.split(",") if count.strip().isdigit() and int(count)]
    if len(counts) != len(rows.split(",")):
        raise ValueError(f"`--rows` is {rows!r}; it is numbers from 1 on, with commas in between")
    sizes = _layer_shapes(model, format) if model else [(format, *_out_by_in(item)) for item in shapes.split(",")]
    if not (arch := _arch_here()):
        raise ValueError("torch sees no GPU here; `zoact tune` times its tiles on one")
    entries = room.tune(
        (Shape(arch, dtype, f, M, N, K) for f, N, K in sizes for M in counts), room.on_gpu(), console.print
    )
    path = out or room.default_path(arch)
    room.write(path, arch, entries)
    console.print(f"{len(entries)} tiles in {path}; use them with: zoact finetune --tiles {path}", markup=False)


def _arch_here() -> str:
    import torch

    from .dispatch import arch_of

    return arch_of(torch.device("cuda"))


def _layer_shapes(model: str, format: str) -> list[tuple[str, int, int]]:
    """(format, out, in) of each kind of layer; "flat" as tiles.Shape has it."""
    from .integrations.transformers import load_model
    from .layers import zo_layers
    from .swap import ZOConfig

    layers = zo_layers(load_model(model, ZOConfig(format=format, rank=1)).model).values()
    found = ((layer.format, layer.packed().flat, layer.out_features, layer.in_features) for layer in layers)
    return sorted({("flat" if flat else kind, N, K) for kind, flat, N, K in found})


def _out_by_in(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"\s*([1-9]\d*)\s*x\s*([1-9]\d*)\s*", text)):
        raise ValueError(f"`--shapes` has {text!r}; items are of the form 14336x4096, out x in")
    return int(found[1]), int(found[2])


@app.command()
def bench(
    what: Annotated[
        str, typer.Argument(help="kernels, step (of the demo model) or report (of all results)")
    ] = "kernels",
    profile: Annotated[str, _option("kernels: smoke, quick, targets, updates, scaling, table or full")] = "quick",
    providers: Annotated[str, _option("kernels: only these, comma-separated")] = "",
    device: Annotated[str, _option("kernels: cpu or cuda")] = "cpu",
    threads: Annotated[int, _option("step: CPU threads")] = 1,
    out: Annotated[Path | None, _option("results file to append to (default: in benchmarks/results)")] = None,
) -> None:
    """Time the kernels beside other libraries, or a whole step beside other methods (needs the repository)."""
    modules = {"kernels": "run", "step": "step", "report": "report"}
    if what not in modules:
        raise ValueError(f"`what` is {what!r}; allowed are {', '.join(modules)}")
    root = Path(__file__).resolve().parents[1]
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


@app.command()
def demo(
    out: Annotated[
        Path | None, _option("run directory (default: the first free of runs/demo, runs/demo-2, ...)")
    ] = None,
    steps: Annotated[int | None, _option("fewer or more steps than the committed recipe")] = None,
    resume: Annotated[bool, _option("continue an interrupted demo", "--resume")] = False,
    threads: Annotated[int, _option("CPU threads (0: torch's default)")] = 0,
) -> None:
    """SmolLM2-135M (4-bit GGUF) learns question types (TREC) on this CPU, without a backward pass."""
    from . import finetune as room
    from .replay import replay as rebuild

    _set_threads(threads)
    job, recipe = room.demo_job(), room.demo_recipe()
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    if out is None:
        if resume:
            raise ValueError("`--resume` needs the --out of the demo to continue")
        names = (Path("runs", "demo" if n == 1 else f"demo-{n}") for n in itertools.count(1))
        out = next(path for path in names if not RunLog.exists(path))
    with Display() as display:
        outcome, loaded = room.finetune(job, recipe, out, resume=resume, watch=display)
        if outcome.result.stopped_by:
            display.said(f"stopped after {outcome.result.done} steps; continue: zoact demo --resume --out {out}")
            raise typer.Exit(128 + outcome.result.stopped_by)
        display.said("measuring a step beside the plain forward")
        costs = room.compare_costs(outcome.result.optimizer, loaded.training.batch_at(recipe, 0))
    with RunLog.open(out) as log:
        rebuilt = rebuild(log)
    ratio = costs.step_seconds / costs.forward_seconds
    times = f"{costs.step_seconds:.3f} s / {costs.forward_seconds:.3f} s = {ratio:.2f}"
    peaks = f"{memory.human(costs.step_bytes)} / {memory.human(costs.forward_bytes)}"
    more = (
        (f"a step / plain forward of its {costs.rows} rows", times),
        ("peak memory above the weights, the same", peaks),
        ("C replayed from the log", "identical" if rebuilt.identical else "DIFFERENT"),
    )
    _print_outcome(outcome, more)
    console.print(f"curve: {out / 'curve.png'}   adapter: {out / 'adapter'}")
    if not (outcome.base_unchanged and rebuilt.identical):
        raise RunError("the base weights changed or the log does not give C; see the table")


# --- entry ------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for what a user can mend, 128 + n when stopped by signal n."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            app([argument for argument in given if argument != "--debug"])
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if debug:
            raise
        Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(130)


def _say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    console.print(f"warning: {message}", markup=False, style="yellow", soft_wrap=True)
