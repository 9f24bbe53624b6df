"""A tiny random Llama with a tokenizer, and files of examples, for tests of whole runs (seconds, no downloads)."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

WORDS = ("red green blue small large round square old new fast slow warm cold bright dark the a is was it thing stone "
         "river house bird tree Type Colour shape good bad").split()  # fmt: skip
LABELS = {"0": "good", "1": "bad"}
PROMPT = "the {adjective} {noun} is"


def make_model_dir(path: Path, seed: int = 0, layers: int = 2) -> Path:
    """A Hugging Face directory: LlamaForCausalLM with random weights (K = 48, 80), safetensors, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=48, intermediate_size=80, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        eos_token_id=1, pad_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # a random init of 0.02 makes an almost linear model
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def write_examples(path: Path, count: int, start: int = 0) -> Path:
    """A CSV of `count` rows (adjective, noun, label); the label is a function of the adjective."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("adjective", "noun", "label"))
        for i in range(start, start + count):
            writer.writerow((WORDS[i * 7 % 15], WORDS[21 + i * 5 % 5], i * 7 % 15 % 2))
    return path
