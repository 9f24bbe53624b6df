"""Commands about a run: finetune, replay, export, methods, demo."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import memory
from ..data import parse_label_words
from ..recipe import Recipe
from ..runlog import RunError, RunLog
from .hardware import arch_here
from .terminal import Display, about, console, fields_of, ranks_of, set_threads


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


def finetune(
    context: typer.Context,
    out: Annotated[Path, about("run directory")],
    model: Annotated[str, about("GGUF file or Hugging Face directory (safetensors)")] = "",
    train: Annotated[str, about("training examples: .jsonl, .csv or .tsv")] = "",
    demo: Annotated[str, about("packaged task instead of --train and --eval: trec, sms or reviews")] = "",
    eval: Annotated[str, about("held-out examples, evaluated before, during and after")] = "",
    prompt: Annotated[str, about("template over the columns: '{question}\\nType:'")] = "",
    labels: Annotated[str, about("label=word,... or word,...: what the model should answer")] = "",
    label_column: Annotated[str, about("column that holds the label")] = "label",
    completion: Annotated[str, about("template of the answer, instead of --labels")] = "",
    separator: Annotated[str, about("between prompt and answer")] = " ",
    max_length: Annotated[int, about("tokens of a sequence; prompts lose their beginning")] = 512,
    method: Annotated[
        str | None,
        about("what is perturbed and how it moves: see `zoact methods` (default: zo-act-node for --labels, or zo-act)"),
    ] = None,
    option: Annotated[list[str] | None, about("argument that only the method has: name=value (repeat)")] = None,
    rank: Annotated[int, about("rank of each layer's basis")] = 1,
    ranks: Annotated[str, about("ranks of their own: '*.q_proj=4,*.down_proj=0'")] = "",
    target: Annotated[list[str] | None, about("pattern of layers to train (repeat; default all)", "--target")] = None,
    format: Annotated[str, about("of weights that are dense in the file: int4, int8, nf4, fp4, dense")] = "int4",
    group_size: Annotated[int | None, about("weights per scale, -1 for a row")] = None,
    dense: Annotated[
        bool, about("train the dense twin of a low-bit model (methods that move the weights)", "--dense")
    ] = False,
    dtype: Annotated[str, about("activations: float32, bfloat16, float16")] = "float32",
    device: Annotated[str, about("cpu, cuda or cuda:1")] = "cpu",
    adapter: Annotated[str, about("PEFT LoRA directory to continue from")] = "",
    steps: Annotated[int | None, about("training steps")] = Recipe.steps,
    batch_size: Annotated[int | None, about("examples a step")] = Recipe.batch_size,
    length_window: Annotated[
        int | None, about("batches among which examples of similar length meet (0: any)")
    ] = Recipe.length_window,
    micro_batch: Annotated[int, about("examples of a step at a time (0: all)")] = Recipe.micro_batch,
    lr: Annotated[float | None, about("learning rate")] = Recipe.lr,
    sigma: Annotated[float | None, about("perturbation radius")] = Recipe.sigma,
    queries: Annotated[int | None, about("directions a step")] = Recipe.queries,
    sides: Annotated[str | None, about("two-sided, one-sided or leave-one-out")] = Recipe.sides,
    scaling: Annotated[str | None, about("of the differences: plain, std, clipped, sign")] = Recipe.scaling,
    mode: Annotated[str, about("stacked (one forward) or sequential (less memory)")] = Recipe.mode,
    optimizer: Annotated[str | None, about("adam, adamw, sgd, momentum, sign")] = Recipe.optimizer,
    weight_decay: Annotated[float | None, about("weight decay")] = Recipe.weight_decay,
    schedule: Annotated[str | None, about("constant, linear or cosine")] = Recipe.schedule,
    warmup: Annotated[int, about("steps of rising learning rate")] = Recipe.warmup,
    noise: Annotated[str | None, about("normal or rademacher")] = Recipe.noise,
    seed: Annotated[int, about("the whole of the randomness")] = Recipe.seed,
    fork: Annotated[
        bool | None, about("compute what is before the first trained block once (default: where possible)")
    ] = Recipe.fork,
    prefix_cache: Annotated[
        int | None, about("bytes of hidden states kept there, for sequences that come again")
    ] = Recipe.prefix_cache,
    basis_batches: Annotated[int | None, about("batches the basis is made of")] = Recipe.basis_batches,
    basis_method: Annotated[str, about("gram, svd or power")] = Recipe.basis_method,
    basis_without_first: Annotated[
        bool, about("leave first tokens out of the basis", "--basis-without-first")
    ] = Recipe.basis_without_first,
    eval_every: Annotated[int, about("evaluate every so many steps too")] = Recipe.eval_every,
    eval_limit: Annotated[int, about("held-out examples used (0: all)")] = 0,
    snapshot_every: Annotated[int | None, about("steps between snapshots")] = Recipe.snapshot_every,
    threads: Annotated[int, about("CPU threads (0: torch's default; a resumed run keeps its own)")] = 0,
    tiles: Annotated[Path | None, about("table of Triton tiles that `zoact tune` wrote for this GPU")] = None,
    resume: Annotated[bool, about("continue the run in --out; other options come from it", "--resume")] = False,
) -> None:
    """Fine-tune a model, or continue a run that ended early. Where no default is shown it is the method's own."""
    from .. import finetune as room

    set_threads(threads)
    if tiles is not None:
        from ..triton_ops import tiles as room_of_tiles

        room_of_tiles.load(tiles, arch_here())
    options = dict(context.params)
    options["labels"] = parse_label_words(labels) if labels else {}
    options["ranks"], options["targets"] = ranks_of(ranks), tuple(target or ())
    options["options"] = _values(option or [])
    if resume:
        job, recipe = room.logged_job(out)
        given = {n for n in context.params if str(context.get_parameter_source(n)).endswith("COMMANDLINE")}
        given |= {plural for one, plural in (("target", "targets"), ("option", "options")) if one in given}
        options = {name: value for name, value in options.items() if name in given}
        job, recipe = replace(job, **fields_of(room.Job, options)), replace(recipe, **fields_of(Recipe, options))
    else:
        if not model or not (train or demo):
            raise ValueError(
                "a new run needs --model and --train or --demo (or --resume with the --out of an earlier one)"
            )
        job = room.Job(**fields_of(room.Job, options))
        options["method"] = method or room.default_method(job)
        recipe = Recipe(**fields_of(Recipe, options))
    with Display() as display:
        outcome, _ = room.finetune(job, recipe, out, resume=resume, watch=display)
    _print_outcome(outcome)
    if outcome.result.stopped_by:
        console.print(f"stopped after {outcome.result.done} steps; continue: zoact finetune --resume --out {out}")
        raise typer.Exit(128 + outcome.result.stopped_by)


def _print_outcome(outcome: Any, more: Sequence[tuple[str, ...]] = ()) -> None:
    """The table at the end: held-out numbers before and after, costs, sizes, checks."""
    from ..finetune import paired

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


def replay(
    run: Annotated[Path, typer.Argument(help="run directory")],
    adapter: Annotated[Path | None, about("write the rebuilt adapter (PEFT LoRA) here")] = None,
) -> None:
    """Rebuild C from the log alone, without the model, and compare it with the snapshots."""
    from ..finetune import export as write
    from ..replay import replay as rebuild

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


def export(
    run: Annotated[Path, typer.Argument(help="run directory")],
    out: Annotated[Path, about("directory of the adapter (PEFT LoRA)")],
) -> None:
    """Write the adapter of a run as it stands after its last logged step; the model is not needed."""
    from ..finetune import export as write
    from ..replay import skeleton
    from ..trainer import restore

    with RunLog.open(run) as log:
        layers = skeleton(log)
        optimizer = restore(layers, log, Recipe(**log.meta["recipe"]), Display())
        write(layers, optimizer, out, log.meta.get("job", {}).get("model"))
        console.print(f"adapter after {log.done} steps written to {out}")


def methods() -> None:
    """The methods: what each trains, its defaults where they are its own, where it was published."""
    from ..methods import METHODS, ZeroOrder, arguments

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


def demo(
    out: Annotated[Path | None, about("run directory (default: the first free of runs/demo, runs/demo-2, ...)")] = None,
    steps: Annotated[int | None, about("fewer or more steps than the committed recipe")] = None,
    resume: Annotated[bool, about("continue an interrupted demo", "--resume")] = False,
    threads: Annotated[int, about("CPU threads (0: torch's default)")] = 0,
) -> None:
    """SmolLM2-135M (4-bit GGUF) learns question types (TREC) on this CPU, without a backward pass."""
    from .. import finetune as room
    from ..replay import replay as rebuild

    set_threads(threads)
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
    told = "no: rows of the model are in its steps"
    if outcome.result.optimizer.replayable:
        with RunLog.open(out) as log:
            told = "identical" if rebuild(log).identical else "DIFFERENT"
    ratio = costs.step_seconds / costs.forward_seconds
    times = f"{costs.step_seconds:.3f} s / {costs.forward_seconds:.3f} s = {ratio:.2f}"
    peaks = f"{memory.human(costs.step_bytes)} / {memory.human(costs.forward_bytes)}"
    more = (
        (f"a step / plain forward of its {costs.rows} rows", times),
        ("peak memory above the weights, the same", peaks),
        ("C replayed from the log", told),
    )
    _print_outcome(outcome, more)
    console.print(f"curve: {out / 'curve.png'}   adapter: {out / 'adapter'}")
    if not outcome.base_unchanged or told == "DIFFERENT":
        raise RunError("the base weights changed or the log does not give C; see the table")
