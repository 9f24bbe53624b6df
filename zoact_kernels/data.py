"""From a file of examples to batches: readers, prompts, label words, tokens, and an order that nobody has to remember.

    read(path, task) -> [Example]                      JSONL, CSV or TSV, in UTF-8
    Dataset(examples, task, tokenizer).batch(indices) -> losses.Batch
    step_indices(run_seed, step, n, batch_size)        which examples a step sees: a pure function, so nothing to save

A `Task` says how a row of the file becomes a question: a prompt template over its columns, and either label words
(classification) or a completion template (language modelling). What a model sees is

    [BOS] prompt separator answer [EOS]                "Who wrote Hamlet ?\\nType:" " " "person"

tokenised as one text, so that " person" is the token a tokenizer makes of it in running text. Spaces at the end of a
prompt move into the separator, and a prompt that ends in a newline takes none. BOS stands where the tokenizer puts
one; EOS ends completions only. The last token of an answer is never an input: nothing is predicted from it.

Sequences longer than `max_length` lose the beginning of their prompt, never the end where the answer follows.
Every refusal is a `DataError` that names file, row, column and what is allowed.
"""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import rng
from .losses import Batch

STREAM_ORDER = 4  # of the generator (design 2.1): no noise, rounding or mask shares its words
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")


class DataError(ValueError):
    """A data set, a task or a split that cannot be used; the message names the place and what is allowed there."""


@dataclass(frozen=True)
class Task:
    """How a row becomes an example.

    prompt: template over the columns, "{question}\\nType:" (double braces for a literal one).
    label_words: what stands in the label column -> the word the model should say; its order is the order of classes.
    label: the label column. completion: template of the answer, instead of label words.
    separator: between prompt and answer. end: completions end with EOS. mean: their loss is a mean over tokens.
    Raises DataError for templates or label words that cannot work.
    """

    name: str
    prompt: str
    label_words: Mapping[str, str] = field(default_factory=dict)
    label: str = "label"
    completion: str = ""
    separator: str = " "
    end: bool = True
    mean: bool = False

    def __post_init__(self) -> None:
        if bool(self.label_words) == bool(self.completion):
            raise DataError(f"task {self.name!r} needs either `label_words` or a `completion` template, and not both")
        columns = [column for text in (self.prompt, self.completion) for _, column in _parts(self.name, text)]
        if not any(columns):
            raise DataError(f"task {self.name!r}: neither prompt nor completion names a column, as in '{{question}}'")
        words = [word.strip() for word in self.label_words.values()]
        if self.label_words and (len(words) < 2 or len(set(words)) < len(words) or not all(words)):
            raise DataError(
                f"task {self.name!r}: `label_words` maps to {words}; at least two different, non-empty words are needed"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """What stands in the label column, in the order of label indices."""
        return tuple(self.label_words)

    def example(self, row: Mapping[str, str], place: str = "the row") -> Example:
        """The example of one row. Raises DataError naming `place`, the column and what is allowed."""
        text = _fill(self.name, self.prompt, row, place)
        if self.completion:
            completion = _fill(self.name, self.completion, row, place)
            if not completion.strip():
                raise DataError(f"{place}: the completion {self.completion!r} is empty")
            return Example(text, completion=completion)
        value = _column(row, self.label, place, "the label")
        if value not in self.label_words:
            raise DataError(
                f"{place}, column {self.label!r}: label {value!r} is not among the label words; "
                f"allowed are {', '.join(map(repr, self.classes))}"
            )
        return Example(text, label=self.classes.index(value))


@dataclass(frozen=True)
class Example:
    """A filled-in prompt with either the index of its class or the text of its completion."""

    text: str
    label: int | None = None
    completion: str = ""


def parse_label_words(text: str) -> dict[str, str]:
    """From "0=negative,1=positive" to {"0": "negative", "1": "positive"}; a bare "yes,no" maps each to itself."""
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    words = {key.strip(): (word if sign else key).strip() for key, sign, word in pairs}
    if len(words) < len(pairs) or not all(words) or not all(words.values()):
        raise DataError(f"label words {text!r} are not of the form 'label=word,label=word', each label once")
    return words


# --- files ------------------------------------------------------------------------------------------------------------


def read(path: str | Path, task: Task) -> list[Example]:
    """All examples of a .jsonl/.ndjson, .csv or .tsv file in UTF-8, in file order.

    CSV and TSV have a header line and the quoting of the csv module, strictly. JSON lines hold one flat object each;
    numbers and booleans count as their JSON text. Blank lines are skipped.
    Raises FileNotFoundError, and DataError for a file or row that cannot be used.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in JSON_LINES and suffix not in DELIMITERS:
        raise DataError(f"{path}: unknown kind of file {suffix!r}; allowed are {', '.join((*JSON_LINES, *DELIMITERS))}")
    text = _decode(path)
    rows = _json_rows(path, text) if suffix in JSON_LINES else _csv_rows(path, text, DELIMITERS[suffix])
    examples = [task.example(row, place) for place, row in rows]
    if not examples:
        raise DataError(f"{path}: empty data set; at least one row is needed")
    return examples


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}); convert the file") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    # Not splitlines(): it also splits at U+2028, which is legal inside a JSON string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for row, (number, line) in enumerate(lines, 1):
        place = f"{path}, row {row} (line {number})"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{place}: not a JSON value ({error}); each line holds one object") from None
        if not isinstance(value, dict):
            raise DataError(f"{place}: a JSON {type(value).__name__}; each line holds one object")
        yield place, {key: cell if isinstance(cell, str) else json.dumps(cell) for key, cell in value.items()}


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    row = 0
    while True:
        place = f"{path}, row {row} (line {reader.line_num + 1})" if header else f"{path}, header"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{place}: unreadable row ({error})") from None
        if not cells:
            continue
        if not header:
            header = cells
            if len(set(header)) < len(header):
                raise DataError(f"{place}: a column name stands twice in {header}")
        elif len(cells) != len(header):
            raise DataError(f"{place}: {len(cells)} cells; the header has {len(header)} ({', '.join(header)})")
        else:
            yield place, dict(zip(header, cells, strict=True))
        row += 1


def _parts(task: str, template: str) -> list[tuple[str, str | None]]:
    """(text, column or None) pieces of a template; only plain columns, since str.format would reach into objects."""
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"task {task!r}: template {template!r} cannot be read ({error})") from None
    for _, column, spec, conversion in pieces:
        if column is not None and (not column or spec or conversion):
            raise DataError(f"task {task!r}: template {template!r} may name columns only, as in '{{question}}'")
    return [(text, column) for text, column, _, _ in pieces]


def _fill(task: str, template: str, row: Mapping[str, str], place: str) -> str:
    return "".join(
        text + ("" if column is None else _column(row, column, place, f"template {template!r}"))
        for text, column in _parts(task, template)
    )


def _column(row: Mapping[str, str], column: str, place: str, wanted_by: str) -> str:
    if column not in row:
        raise DataError(f"{place}: {wanted_by} needs column {column!r}; there are {', '.join(map(repr, row))}")
    return row[column]


# --- order and splits -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)  # a step needs a piece of it, and n = 100 000 take 30 ms
def order(run_seed: int, epoch: int, n: int) -> np.ndarray:
    """Permutation [n] int64 of an epoch, read-only, a pure function of its arguments (Philox words, sorted)."""
    block = np.arange(n, dtype=np.uint64) + (np.uint64(epoch) << np.uint64(32))
    words = rng.words(run_seed, 0, STREAM_ORDER, block).astype(np.uint64)
    permutation = np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable")
    permutation.flags.writeable = False
    return permutation


def step_indices(run_seed: int, step: int, n: int, batch_size: int) -> np.ndarray:
    """Examples [min(batch_size, n)] int64 of step 0, 1, ...: whole batches of shuffled epochs, remainders left out."""
    if n < 1 or batch_size < 1 or step < 0:
        raise DataError(f"step {step} of {n} examples in batches of {batch_size}; allowed are >= 0, >= 1 and >= 1")
    steps = max(1, n // batch_size)
    start = step % steps * batch_size
    return order(run_seed, step // steps, n)[start : start + batch_size]


def deduplicate(examples: Sequence[Example]) -> list[Example]:
    """Examples of different text, the first of each: do this before `split`, or the split leaks."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.text, example)
    return list(first.values())


def split(examples: Sequence[Example], held_out: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(train, held out), each in file order, with every class in both in its proportion (largest remainders).

    Raises DataError unless 0 < held_out < number of examples.
    """
    n = len(examples)
    if not 0 < held_out < n:
        raise DataError(f"`held_out` is {held_out}; of {n} examples, 1 to {n - 1} can be held out")
    members: dict[int | None, list[int]] = {}
    for i in order(seed, 0, n):
        members.setdefault(examples[i].label, []).append(int(i))
    share = {label: held_out * len(ids) / n for label, ids in members.items()}
    count = {label: int(exact) for label, exact in share.items()}
    by_remainder = sorted(share, key=lambda label: (count[label] - share[label], -1 if label is None else label))
    for label in by_remainder[: held_out - sum(count.values())]:
        count[label] += 1
    chosen = {i for label, ids in members.items() for i in ids[: count[label]]}
    return [examples[i] for i in range(n) if i not in chosen], [examples[i] for i in sorted(chosen)]


# --- tokens -----------------------------------------------------------------------------------------------------------


class Dataset:
    """Tokenised examples of a task, ready to be drawn as batches.

    tokenizer: of Hugging Face transformers. max_length: tokens a sequence may have (512 unless told).
    classifier: for models that classify sequences (an encoder, say) rather than continue them.
    Raises DataError for an empty data set, label words that are the same tokens, or an answer that leaves no room.
    """

    words: list[list[int]]  # tokens of the C label words; [] for completion and classifiers
    labels: Tensor | None  # [n] int64

    def __init__(
        self,
        examples: Sequence[Example],
        task: Task,
        tokenizer: Any,
        *,
        max_length: int = 512,
        classifier: bool = False,
    ) -> None:
        if not examples:
            raise DataError(f"task {task.name!r}: empty data set; at least one example is needed")
        if classifier and task.completion:
            raise DataError(f"task {task.name!r} has completions; a classifier needs label words")
        self.task, self.classifier, self.words = task, classifier, []
        self.pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.labels = None if task.completion else torch.tensor([example.label for example in examples])
        self._answers: list[list[int]] = []  # completions only
        if classifier:
            texts = [example.text for example in examples]
            self._prompts: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
            return
        prompts = [example.text.rstrip(" ") for example in examples]
        tokens = _encode(tokenizer, prompts)
        if task.completion:
            self._answers = _answers(tokenizer, task, prompts, tokens, [example.completion for example in examples])
            if task.end and tokenizer.eos_token_id is not None:
                self._answers = [[*answer, tokenizer.eos_token_id] for answer in self._answers]
        else:
            self.words = _label_words(tokenizer, task)
        start = _start(tokenizer)
        self._prompts = []
        for i, prompt in enumerate(tokens):
            if not prompt and not start and task.completion:  # plain text: its first token is context
                prompt, self._answers[i] = self._answers[i][:1], self._answers[i][1:]
            longest = max(map(len, self._answers[i : i + 1] or self.words))
            room = max_length - len(start) - longest + 1  # + 1: the last token of an answer is no input
            if room < 1 or not prompt + start or longest < 1:
                raise DataError(
                    f"task {task.name!r}, example {i + 1}: a prompt of {len(prompt)} tokens and an answer of {longest} "
                    f"do not fit; both need a token, and answers may have at most max_length = {max_length}"
                )
            self._prompts.append(start + prompt[-room:])

    def __len__(self) -> int:
        return len(self._prompts)

    def batch(self, indices: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> Batch:
        """The examples of `indices`, in that order, padded on the right to the longest of them."""
        if len(indices) == 0:
            raise DataError("`indices` is empty; a batch needs at least one example")
        chosen = [int(i) for i in indices]
        labels = None if self.labels is None else self.labels[chosen]
        if self.classifier:
            ids, mask = _padded([self._prompts[i] for i in chosen], self.pad)
            return Batch("sequence-classification", ids, mask, labels=labels).to(device)
        if self.words and max(map(len, self.words)) == 1:
            ids, mask = _padded([self._prompts[i] for i in chosen], self.pad)
            targets = torch.tensor(self.words).T.expand(len(chosen), -1)  # [n, C]
            rows = torch.arange(len(chosen))
            return Batch("classification", ids, mask, rows, mask.sum(1) - 1, targets, labels).to(device)
        pairs = [(self._prompts[i], answer) for i in chosen for answer in (self.words or self._answers[i : i + 1])]
        ids, mask = _padded([prompt + answer[:-1] for prompt, answer in pairs], self.pad)
        return Batch(
            "classification" if self.words else "completion",
            ids,
            mask,
            torch.tensor([s for s, (_, answer) in enumerate(pairs) for _ in answer]),
            torch.tensor([len(prompt) - 1 + k for prompt, answer in pairs for k in range(len(answer))]),
            torch.tensor([token for _, answer in pairs for token in answer]),
            labels,
            choices=len(self.words) or 1,
            mean=self.task.mean,
        ).to(device)

    def batches(
        self, batch_size: int, indices: Sequence[int] | np.ndarray | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[Batch]:
        """All examples (or those of `indices`) in order, for evaluation; the last batch may be smaller."""
        if batch_size < 1:
            raise DataError(f"`batch_size` is {batch_size}; it must be at least 1")
        chosen = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(chosen), batch_size):
            yield self.batch(chosen[start : start + batch_size], device)


def _padded(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask, both [S, T] int64."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return tokens


def _start(tokenizer: Any) -> list[int]:
    """[BOS] where the tokenizer begins texts with one, else []."""
    special = tokenizer("")["input_ids"][:1]
    return list(special) if special == [tokenizer.bos_token_id] else []


def _answers(
    tokenizer: Any, task: Task, prompts: list[str], tokens: list[list[int]], answers: list[str]
) -> list[list[int]]:
    """Tokens of each answer as they follow its prompt in one text, or alone where the boundary melts into one token."""
    joined = []
    for prompt, answer in zip(prompts, answers, strict=True):
        bare = not prompt or prompt.endswith("\n") or answer[:1].isspace()
        joined.append(("" if bare else task.separator) + answer)
    whole = _encode(tokenizer, [prompt + answer for prompt, answer in zip(prompts, joined, strict=True)])
    alone = _encode(tokenizer, joined)
    return [
        both[len(prompt) :] if both[: len(prompt)] == prompt else rest
        for both, prompt, rest in zip(whole, tokens, alone, strict=True)
    ]


def _label_words(tokenizer: Any, task: Task) -> list[list[int]]:
    """Tokens of the label words, after the text that ends every prompt."""
    text, column = _parts(task.name, task.prompt)[-1]
    ending = text.rstrip(" ") if column is None else ""
    answers = list(task.label_words.values())
    prompts = [ending or "?"] * len(answers)
    words = _answers(tokenizer, task, prompts, _encode(tokenizer, prompts), answers)
    if len(set(map(tuple, words))) < len(words) or not all(words):
        raise DataError(
            f"task {task.name!r}: label words {answers} become the tokens {words}, which must differ; use other words"
        )
    return words
