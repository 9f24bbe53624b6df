"""MeZO over a prefix, against transformers' own cache with the same keys and values in it, in float64."""

from __future__ import annotations

import copy
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_no_worse
from invariants import descends, resumes
from safetensors.torch import load_file, save_file
from test_cli import options, steps_of, zoact
from tiny_model import make_model_dir, write_examples
from torch import Tensor

from zoact_kernels import methods, rng
from zoact_kernels.integrations.peft import export_adapter, export_lora, export_prefix, import_adapter, import_lora
from zoact_kernels.layers import perturbed
from zoact_kernels.losses import Batch, evaluate, group_losses
from zoact_kernels.runlog import RunLog
from zoact_kernels.swap import ZOConfig, swap, zo_layers
from zoact_kernels.trainables import prefix_of
from zoact_kernels.trainer import base_hash

transformers = pytest.importorskip("transformers")

P, L, V = 5, 2, 41
SIZES = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": L, "num_attention_heads": 4}
KINDS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_positions=64, n_embd=24, n_layer=L, n_head=4)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=V, hidden_size=24, ffn_dim=40, num_hidden_layers=L, num_attention_heads=4,
                               max_position_embeddings=64, word_embed_proj_dim=24, dropout=0.1)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=9)
    ),
    "classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, num_labels=3, pad_token_id=0)
    ),
}  # fmt: skip


def model_of(kind: str = "llama") -> Any:
    torch.manual_seed(1)
    model = KINDS[kind]().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)  # a random init of 0.02 makes an almost linear model
    return model


def make(model: Any, **changes: Any) -> Any:
    return methods.create("mezo-prefix", model, **{"floor_every": 0, **changes})


def ids(rows: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [rows, 7] and a mask with pads on the right."""
    x = torch.randint(2, V, (rows, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(x)
    mask[0, 5:] = 0
    return x, mask


def path_of(model: Any) -> str:
    """Where the prefix is: beside the layers."""
    return {"gpt2": "transformer.prefix", "opt": "model.decoder.prefix"}.get(model.config.model_type, "model.prefix")


def noise(seed: int, model: Any, layer: int, kind: str, cols: int) -> Tensor:
    name = f"{path_of(model)}.{layer}.{kind}"
    return rng.noise("normal", seed, zlib.crc32(name.encode()), P, cols).double()


def tensors(model: Any) -> dict[tuple[int, str], Tensor]:
    own = prefix_of(model)
    return {(i, kind): own.tensor(kind, i).double() for i in range(own.layers) for kind in ("keys", "values")}


def logits_with(plain: Any, states: dict[tuple[int, str], Tensor], x: Tensor, mask: Tensor) -> Tensor:
    """Logits of a model without a prefix, given the states as a past that its own cache holds."""
    dtype, rows = next(plain.parameters()).dtype, len(x)
    cache = transformers.DynamicCache(config=plain.config)
    heads = getattr(plain.config, "num_key_value_heads", None) or plain.config.num_attention_heads
    for i in range(L):
        own = [states[i, kind].to(dtype).view(1, P, heads, -1).transpose(1, 2) for kind in ("keys", "values")]
        cache.update(*(t.expand(rows, -1, -1, -1) for t in own), i)
    whole = torch.cat([torch.ones(rows, P, dtype=mask.dtype), mask], 1)
    with torch.no_grad():
        if hasattr(plain, "score"):  # a classifier looks for the last token that is no pad
            return plain(input_ids=x, attention_mask=whole, past_key_values=cache, use_cache=True).logits
        return plain(input_ids=x, attention_mask=whole, past_key_values=cache).logits


def assert_is(y: Tensor, kind: str, states: dict[tuple[int, str], Tensor], x: Tensor, mask: Tensor) -> None:
    kept = mask.bool() if y.dim() == 3 else slice(None)
    truth = logits_with(model_of(kind).double(), states, x, mask)
    assert_no_worse(y[kept], logits_with(model_of(kind), states, x, mask)[kept], truth[kept], kind)


def evaluation(model: Any, x: Tensor, mask: Tensor) -> methods.Evaluation:
    def losses(groups: int) -> Tensor:
        logits = model(input_ids=x.repeat(groups, 1), attention_mask=mask.repeat(groups, 1), use_cache=False).logits
        return (logits[:, -1] if logits.dim() == 3 else logits).double().log_softmax(-1)[:, 2].neg().view(groups, -1)

    return losses


def run(optimizer: Any, steps: int) -> list[methods.StepResult]:
    return [optimizer.step_on([evaluation(optimizer.model, *ids(seed=optimizer.iteration))]) for _ in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_with_real_activations(kind):
    """Keys and values of a forward over P tokens from the words of stream 5, bit for bit; the model as it was."""
    model = model_of(kind)
    before = base_hash(model)
    optimizer = make(model, seed=4)
    words = rng.words(4, zlib.crc32(b"prefix"), 5, np.arange(2, dtype=np.uint64))
    tokens = ((words.reshape(-1)[:P] >> 9).astype(np.float64) + 0.5) / 2**23 * V
    with torch.no_grad():
        cache = model_of(kind).base_model(input_ids=torch.from_numpy(tokens).long()[None], use_cache=True)
    for (i, key), found in tensors(model).items():
        stored = getattr(cache.past_key_values.layers[i], key)  # [1, H, P, D]
        assert torch.equal(found.float(), stored[0].transpose(0, 1).reshape(P, -1))
    assert len(optimizer.trainables) == 2 * L and base_hash(model) == before
    assert model.state_dict().keys() == model_of(kind).state_dict().keys()
    assert not torch.equal(tensors(model)[0, "keys"], tensors(make(model_of(kind), seed=5).model)[0, "keys"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_group_has_its_own_prefix(kind):
    """Outside `perturbed` the learned one; inside, group g has K + sum_s sigmas[g, s] Z_s in every layer."""
    model = model_of(kind)
    optimizer = make(model, queries=2, sides="one-sided", seed=3)
    run(optimizer, 2)
    states, (x, mask) = tensors(model), ids()
    seeds = [rng.seed_for(3, optimizer.iteration, query) for query in range(2)]
    with torch.no_grad():
        clean = model(input_ids=x, attention_mask=mask).logits
        assert_is(clean, kind, states, x, mask)
        assert_no_worse(model(input_ids=x, attention_mask=mask, use_cache=False).logits, clean, clean.double())
        for table in (optimizer._table, optimizer._table + 0.02):  # the second: several seeds in a group
            with perturbed(model, torch.tensor(seeds), table, leading=(9,)):
                y = model(input_ids=x.repeat(3, 1), attention_mask=mask.repeat(3, 1), use_cache=False).logits
            for row, part in zip(table.double(), y.chunk(3), strict=True):
                moved = {
                    at: t + sum(s * noise(seed, model, *at, t.shape[1]) for s, seed in zip(row, seeds, strict=True))
                    for at, t in states.items()
                }
                assert_is(part, kind, moved, x, mask)
            assert (y.chunk(3)[1] - y.chunk(3)[2]).abs().max() > 1e-3  # it is felt
        free = logits_with(model_of(kind), {at: t * 0 for at, t in states.items()}, x, mask)
        assert (clean - free).abs().max() > 1e-3


@pytest.mark.parametrize("queries", [1, 3])
def test_update_moves_along_what_was_probed(queries):
    model = model_of()
    optimizer = make(model, queries=queries, lr=0.3, seed=6)
    before = base_hash(model)
    truth = tensors(model)
    plain = {at: t.float() for at, t in truth.items()}
    for _ in range(3):
        (result,) = run(optimizer, 1)
        assert not result.skipped and optimizer.sigma == 0.1
        for w, seed in zip(result.weights, result.seeds.tolist(), strict=True):
            for at, t in truth.items():
                z = noise(seed, model, *at, t.shape[1])
                truth[at], plain[at] = t - 0.3 * float(w) * z, plain[at] - 0.3 * w * z.float()
    for at, t in truth.items():
        assert_no_worse(tensors(model)[at].float(), plain[at], t, str(at))
        assert not torch.equal(t, tensors(make(model_of(), seed=6).model)[at])
    assert base_hash(model) == before


WAYS = ("greedy", "no cache", "beams", "pads")


@pytest.mark.parametrize(
    ("kind", "way"),
    # The window of Mistral's attention counts pads, so that these change what it sees.
    [(kind, way) for kind in KINDS for way in WAYS if kind != "classifier" and (kind, way) != ("mistral", "pads")],
)
def test_generate_goes_on_from_the_prefix(kind, way):
    """What it writes is what a plain model writes whose every forward has the prefix as its past; pads on the left."""
    model, plain = model_of(kind), model_of(kind)
    run(make(model, lr=0.3), 1)
    x, mask = ids(2)[0], torch.ones(2, 7, dtype=torch.int64)
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if way == "pads":
        mask[0, :3] = 0
    if way == "beams":  # what it says of its beams is what a plain model says of them
        found = model.generate(
            x, **given, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
        )
        y, states = found.sequences, tensors(model)
        truth, score = (
            logits_with(m, states, y, torch.ones_like(y))[:, 6:-1].log_softmax(-1).gather(2, y[:, 7:, None]).sum((1, 2))
            for m in (model_of(kind).double(), plain)
        )
        assert_no_worse(found.sequences_scores, score, truth)
        return
    y = model.generate(x, attention_mask=mask, **given, use_cache=way != "no cache")
    assert y.shape == (2, 13)
    wanted, whole = x, mask
    for _ in range(6):
        if way == "pads":  # positions count the tokens
            states = [
                logits_with(plain, tensors(model), s[m.bool()][None], m[m.bool()][None])
                for s, m in zip(wanted, whole, strict=True)
            ]
            last = torch.cat([s[:, -1] for s in states])
        else:
            last = logits_with(plain, tensors(model), wanted, whole)[:, -1]
        wanted, whole = torch.cat([wanted, last.argmax(-1)[:, None]], 1), torch.cat([whole, whole[:, :1] * 0 + 1], 1)
    assert torch.equal(y, wanted)


def batch(kind: str = "classification") -> Batch:
    x, mask = ids(4)
    ends = mask.sum(1) - 1
    if kind == "completion":
        return Batch(kind, x, mask, torch.arange(4).repeat_interleave(2), torch.stack([ends - 1, ends], 1).view(-1),
                     torch.arange(8))  # fmt: skip
    return Batch(kind, x, mask, torch.arange(4), ends, torch.tensor([[3, 9]]).repeat(4, 1), torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize("kind", ["classification", "completion"])
@torch.no_grad()
def test_label_only_losses_see_it(kind):
    """The label rows of a whole forward, chunked or not, in parts or whole; evaluation takes the learned prefix."""
    model = model_of()
    optimizer = make(model, lr=0.3)
    run(optimizer, 1)
    b, seeds = batch(kind), torch.tensor([5])
    with perturbed(model, seeds, optimizer._table, leading=tuple(2 * size for size in b.leading)):
        whole = group_losses(model, b, 2)
        chunked = group_losses(model, b, 2, chunk_bytes=1)
    with perturbed(model, seeds, optimizer._table):
        parts = torch.cat([group_losses(model, part, 2) for part in b.split(3)], 1)
    for other in (chunked, parts):
        assert_no_worse(other.float(), whole.float(), whole)
    logits = logits_with(model_of().double(), tensors(model), b.input_ids, b.attention_mask)
    rows = logits[b.label_rows, b.label_positions]
    if kind == "completion":
        truth = -rows.log_softmax(-1)[torch.arange(8), b.targets].view(4, 2).sum(1)
    else:
        truth = -rows[:, [3, 9]].log_softmax(-1)[torch.arange(4), b.labels]
    seen = evaluate(model, [b]).losses
    assert (whole[0] - whole[1]).abs().max() > 1e-3
    torch.testing.assert_close(seen, truth, rtol=0, atol=1e-4 * float(truth.abs().max()))


def test_resume_and_replay_after_every_step():
    resumes(lambda **changes: make(model_of(), **{"lr": 0.3, "seed": 9, **changes}), run, 3, look=tensors)


def test_sequential_and_micro_batches_are_the_same_step():
    """To rounding: torch's own attention gives a row other last bits in another batch. Nothing global is read."""
    found = []
    for mode, parts in (("stacked", 1), ("sequential", 1), ("stacked", 3)):
        optimizer = make(model_of(), mode=mode, lr=0.3)
        generator = torch.get_rng_state()
        x, mask = ids()
        pieces = zip(x.chunk(parts), mask.chunk(parts), strict=True)
        result = optimizer.step_on([evaluation(optimizer.model, *piece) for piece in pieces])
        assert torch.equal(torch.get_rng_state(), generator)
        found.append(result.losses)
    for losses in found[1:]:
        assert_no_worse(losses.float(), found[0].float(), found[0])


@torch.no_grad()
def test_step_descends_and_flipped_ascends():
    def fresh() -> tuple[Any, methods.Evaluation]:
        model = model_of()
        return make(model, queries=4, lr=0.1), evaluation(model, *ids())

    descends(fresh, share=0.2)


def test_lost_losses_skip():
    model = model_of()
    optimizer = make(model, lr=0.3)
    run(optimizer, 1)
    before = tensors(model)
    assert optimizer.step_on([lambda groups: torch.full((groups, 3), math.nan)]).skipped
    assert all(torch.equal(t, before[at]) for at, t in tensors(model).items())


def test_over_low_bit_layers_and_beside_another_method():
    """Frozen weights of any format; the prefix stays, unmoved, when another method takes over."""
    model = model_of()
    swap(model, ZOConfig(format="int4", group_size=8, rank=1))
    optimizer = make(model, lr=0.3)
    run(optimizer, 2)
    assert {layer.rank for layer in zo_layers(model).values()} == {0}
    (x, mask), before = ids(), tensors(model)
    clean = model(input_ids=x, attention_mask=mask).logits
    qzo = methods.create("qzo", model, lr=1e-3, floor_every=0)
    with pytest.raises(RuntimeError, match="or another method's, since"):
        run(optimizer, 1)
    assert torch.equal(model(input_ids=x, attention_mask=mask).logits, clean)
    with torch.no_grad(), perturbed(model, torch.tensor([1]), torch.tensor([[0.0], [1e-2]])):
        y = model(input_ids=x.repeat(2, 1), attention_mask=mask.repeat(2, 1)).logits
    run(qzo, 1)
    assert not torch.equal(*y.chunk(2)) and all(torch.equal(t, before[at]) for at, t in tensors(model).items())
    again = make(model)  # trained on from where it stands
    assert all(torch.equal(t, before[at]) for at, t in tensors(model).items())
    run(again, 1)
    with pytest.raises(ValueError, match="tokens is 3; the model has a prefix of 5 already"):
        make(model, tokens=3)
    prefix_of(model).remove(model)
    assert prefix_of(model) is None and not model.model._forward_pre_hooks
    make(model, tokens=3)


def test_copies_moves_and_dtypes():
    model = model_of()
    optimizer = make(model, lr=0.3)
    twin = copy.deepcopy(optimizer)
    run(twin, 1)
    x, _ = ids()
    assert not torch.equal(tensors(model)[0, "keys"], tensors(twin.model)[0, "keys"])
    assert not torch.equal(model(input_ids=x).logits, twin.model(input_ids=x).logits)
    run(optimizer, 1)
    assert torch.equal(model(input_ids=x).logits, twin.model(input_ids=x).logits)
    before = tensors(model)
    model.bfloat16()
    assert all(torch.equal(t, before[at]) for at, t in tensors(model).items())  # still fp32
    assert model(input_ids=x).logits.dtype == torch.bfloat16 and prefix_of(model).dtype == torch.bfloat16
    own = prefix_of(model)
    own.keys_0 = own.keys_0.clone()
    with pytest.raises(RuntimeError, match="is another tensor, or"):
        run(optimizer, 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen3"])
def test_export_is_prefix_tuning_of_peft(kind, tmp_path: Path):
    """PEFT computes the same logits, bit for bit, and writes the same tensor again."""
    peft = pytest.importorskip("peft")
    model, (x, mask) = model_of(kind), ids()
    run(make(model, lr=0.3), 2)
    export_adapter(model, tmp_path / "one")
    loaded = peft.PeftModel.from_pretrained(model_of(kind), str(tmp_path / "one")).eval()
    with torch.no_grad():
        theirs = loaded(input_ids=x, attention_mask=mask).logits
        ours = model(input_ids=x, attention_mask=mask).logits
    assert torch.equal(theirs, ours)
    loaded.save_pretrained(str(tmp_path / "two"))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() == {"prompt_embeddings"} and torch.equal(
        *(t["prompt_embeddings"] for t in (one, two))
    )


def test_import_takes_ours_back_bit_for_bit(tmp_path: Path):
    """Into a model of any format, in place of a prefix as long; what does not fit leaves the model as it was."""
    model = model_of()
    run(make(model, lr=0.3), 1)
    export_adapter(model, tmp_path / "one")
    other = model_of()
    swap(other, ZOConfig(format="int8", group_size=8, rank=0))
    for _ in range(2):
        assert import_adapter(other, tmp_path / "one") == {}
        assert all(torch.equal(t, tensors(model)[at]) for at, t in tensors(other).items())
    twin, (x, mask) = model_of(), ids()
    import_adapter(twin, tmp_path / "one")
    assert torch.equal(twin(input_ids=x, attention_mask=mask).logits, model(input_ids=x, attention_mask=mask).logits)
    run(make(twin), 1)  # and on from there

    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    good = load_file(tmp_path / "one" / "adapter_model.safetensors")["prompt_embeddings"]
    for changes, stored, message in (
        ({"prefix_projection": True}, good, "without projection"),
        ({}, good[:, :-1], r"prompt_embeddings is \(5, 47\); the model needs \(5, 48\)"),
        ({}, good * math.nan, "no finite `prompt_embeddings`"),
        ({}, good[:0], "one token at least"),
    ):
        bad = tmp_path / "bad"
        bad.mkdir(exist_ok=True)
        (bad / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file({"prompt_embeddings": stored.contiguous()}, bad / "adapter_model.safetensors")
        fresh = model_of()
        with pytest.raises(ValueError, match=message):
            import_adapter(fresh, bad)
        assert prefix_of(fresh) is None and not fresh.model._forward_pre_hooks
    with pytest.raises(ValueError, match="`peft_type` is 'PREFIX_TUNING'; 'LORA' can be imported"):
        import_lora(model_of(), tmp_path / "one")


def test_a_run_from_an_adapter(tmp_path: Path, capsys):
    make_model_dir(tmp_path / "model", layers=1)
    files = {"model": str(tmp_path / "model"), "train": str(write_examples(tmp_path / "train.csv", 24))}
    one, whole, parted = (tmp_path / name for name in ("one", "whole", "parted"))
    given = {"method": "mezo-prefix", "lr": 0.1, "eval": None}
    assert zoact(*options(files, one, **given, steps=2)) == 0
    given["adapter"] = one / "adapter"
    assert zoact(*options(files, whole, **given, steps=3)) == 0
    assert zoact(*options(files, parted, **given, steps=1)) == 0
    assert zoact("finetune", "--resume", "--out", str(parted), "--steps", "3") == 0
    assert steps_of(whole) == steps_of(parted)
    with RunLog.open(one) as old, RunLog.open(whole) as new:
        last, first = old.load(old.snapshots()[-1]), new.load(new.snapshots()[0])
    assert all(torch.equal(first[key], t) for key, t in last.items() if key.startswith("coeff/"))
    capsys.readouterr()
    assert zoact(*options(files, tmp_path / "no", **{**given, "method": "mezo-lora"})) == 2
    assert "a prefix, which mezo-lora does not train" in capsys.readouterr().err


def test_what_cannot_be_exported(tmp_path: Path):
    model = model_of()
    with pytest.raises(ValueError, match="`model` has no prefix"):
        export_prefix(model, tmp_path / "adapter")
    swap(model, ZOConfig(format="int8", group_size=8, rank=0))
    make(model)
    with pytest.raises(ValueError, match="no ZOLinear with a basis"):
        export_lora(model, tmp_path / "adapter")
    layer = next(iter(zo_layers(model).values()))
    layer.set_basis(torch.eye(24)[:, :1].contiguous(), torch.ones(layer.out_features, 1))
    with pytest.raises(ValueError, match="a prefix and a LoRA"):
        export_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has learned coefficients"):
        make(model)
    assert not (tmp_path / "adapter").exists()


def test_models_without_a_cache_are_refused():
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    with pytest.raises(ValueError, match="BertModel keeps no keys and values.*encoders don't"):
        make(bert)
    assert prefix_of(bert) is None
    sizes = {"vocab_size": V, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        make(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    with pytest.raises(ValueError, match="Linear is no Hugging Face model"):
        make(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="tokens is 0"):
        make(model_of(), tokens=0)
    model, (x, mask) = model_of(), ids()
    make(model)
    with pytest.raises(ValueError, match="is a StaticCache; a prefix stands in a DynamicCache"):
        model(input_ids=x, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=20))
    with pytest.raises(ValueError, match="`attention_mask` is no"):
        model(input_ids=x, attention_mask=mask[:, None, None].expand(-1, 1, 7, 7))
    with (
        pytest.raises(ValueError, match="'model.prefix' got x of shape"),
        perturbed(model, torch.tensor([1]), torch.zeros(2, 1), leading=(4,)),
    ):
        model(input_ids=x.repeat(2, 1))
