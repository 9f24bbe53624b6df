"""Training of the nets of ZO Fine-tuner: its gradient against float64, its trajectory, its command and its file."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_no_worse
from safetensors import safe_open
from safetensors.torch import load_file
from test_cli import LABEL_OPTION, options, steps_of, zoact
from tiny_model import LABELS, PROMPT, make_model_dir, write_examples
from torch import Tensor, nn
from torch.func import functional_call

from zoact_kernels import finetune, learning, rng
from zoact_kernels.learning import Course
from zoact_kernels.losses import Batch, group_losses
from zoact_kernels.methods.learned import ZOFinetuner
from zoact_kernels.recipe import Recipe
from zoact_kernels.trainables import Weight

RECIPE = Recipe(method="zo-finetuner", batch_size=4)
COURSE = Course(epochs=2, restart_every=1, batch_size=4, lr=0.05, lr_nets=20.0, reach=1e-4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    make_model_dir(folder / "model", layers=1)
    train = write_examples(folder / "train.csv", 24)
    return {"model": str(folder / "model"), "train": str(train), "eval": str(write_examples(folder / "e.csv", 8, 24))}


def job(files: dict[str, str]) -> finetune.Job:
    return finetune.Job(model=files["model"], train=files["train"], prompt=PROMPT, labels=LABELS, rank=0, dense=True)


def student(files: dict[str, str], spread: float = 0.2) -> tuple[ZOFinetuner, finetune.Part]:
    """An optimizer whose nets are not the constant 1, and the data."""
    loaded = finetune.load(job(files))
    optimizer = ZOFinetuner(loaded.model, seed=3, floor_every=0)
    generator = torch.Generator().manual_seed(7)
    for tensor in optimizer.nets.tensors.values():
        tensor += spread * torch.randn(tensor.shape, generator=generator)
    return optimizer, loaded.training


class Loss(nn.Module):
    """Mean loss of a batch, by the names that the weights have in the model."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        return group_losses(self.model, batch, grad=True).mean()


def net_gradients(path: str, optimizer: ZOFinetuner, batch: Batch, reach: float, dtype: torch.dtype) -> list[Tensor]:
    """Of L(theta + reach c s_b z_b) to the nets: s by its formula, c a number, z materialised."""
    nets = {k: t.detach().to(dtype, copy=True).requires_grad_() for k, t in optimizer.nets.tensors.items()}
    inputs, n = optimizer.inputs().to(dtype), optimizer.sizes.to(dtype)
    hidden = torch.tanh(torch.einsum("bhi,bi->bh", nets["hidden"], inputs) + nets["bias"])
    s = ((nets["out"] * hidden).sum(1) + nets["shift"]).abs()
    c = (n.sum() / (n * s.detach() ** 2).sum()).sqrt()
    theta = {}
    for b, weight in enumerate(optimizer.trainables.values()):
        assert isinstance(weight, Weight)
        w = weight.whole()
        z = rng.noise("normal", rng.seed_for(3, 0, 0), int(weight.param_id), 1, w.numel()).view(w.shape)
        theta[f"model.{weight.name}"] = w.to(dtype) + reach * c * s[b] * z.to(dtype)
    loss = functional_call(Loss(path, dtype), theta, (batch,))
    return list(torch.autograd.grad(loss, list(nets.values())))


@pytest.mark.parametrize("reach", [-1e-4, 0.05])
def test_the_gradient_of_the_nets(files: dict[str, str], reach: float) -> None:
    """As through a materialised theta', in every net's every tensor; tables, norms and linears alike."""
    optimizer, training = student(files)
    batch = training.batch_at(RECIPE, 0)
    optimizer._prepare()
    _, got = learning.look_ahead(optimizer, batch, torch.tensor([reach]))
    plain, truth = (
        net_gradients(files["model"], optimizer, batch, float(torch.tensor(reach)), dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for key, a, b, c in zip(optimizer.nets.tensors, got, plain, truth, strict=True):
        assert (c.flatten(1) if c.dim() > 1 else c[:, None]).abs().amax(1).min() > 0, key  # every net has one
        assert_no_worse(a, b, c, key)
    assert not any(t.requires_grad for t in optimizer.nets.tensors.values())


def test_a_lesson(files: dict[str, str]) -> None:
    """nets <- nets - lr_nets grad at theta - reach d c s z, d and the history from the two forwards of a step."""
    optimizer, training = student(files)
    batch = training.batch_at(RECIPE, 0)
    twin, _ = student(files)
    result = twin.step_on([lambda groups: group_losses(twin.model, batch, groups)], batch.leading)
    other, _ = student(files)
    other._prepare()
    ahead, grads = learning.look_ahead(other, batch, -COURSE.reach * result.weights)
    assert learning.teach(optimizer, batch, COURSE) == float(ahead)
    for mine, start, grad in zip(optimizer.nets.tensors.values(), other.nets.tensors.values(), grads, strict=True):
        assert torch.equal(mine, start - COURSE.lr_nets * grad) and not torch.equal(mine, start)
    assert torch.equal(optimizer.losses, twin.losses) and torch.equal(optimizer.previous, twin.previous)


def test_the_trajectory(files: dict[str, str]) -> None:
    """First-order SGD with momentum and clipping at a rate that falls to 0, anew at each restart; theta comes back."""
    optimizer, training = student(files)
    start = {t.name: t.value.clone() for t in optimizer.trainables.values()}
    steps, seen = 5, []
    iterator = learning.lessons(optimizer, COURSE, lambda step: training.batch_at(RECIPE, step), steps)
    for lesson in iterator:
        seen.append({t.name: t.value.clone() for t in optimizer.trainables.values()})
        assert not lesson.skipped and (lesson.step, lesson.steps) == (len(seen) - 1, 2 * steps)
        if lesson.step == steps - 1:
            assert optimizer.losses.any() and not torch.equal(optimizer.previous, torch.ones_like(optimizer.previous))
    assert all(torch.equal(t.value, start[t.name]) for t in optimizer.trainables.values())
    module = Loss(files["model"], torch.float32)
    names = [f"model.{name}" for name in start]
    for restart in (0, steps):
        parameters = dict(module.named_parameters())
        leaves = [parameters[name] for name in names]
        for leaf, value in zip(leaves, start.values(), strict=True):
            leaf.data.copy_(value.view(leaf.shape))
            leaf.requires_grad_()
        sgd = torch.optim.SGD(leaves, lr=1.0, momentum=COURSE.momentum)
        for step in range(steps):
            sgd.param_groups[0]["lr"] = COURSE.lr * (1 - step / steps)
            sgd.zero_grad()
            module(training.batch_at(RECIPE, restart + step)).backward()
            torch.nn.utils.clip_grad_norm_(leaves, COURSE.clip)
            sgd.step()
            for leaf, (name, value) in zip(leaves, seen[restart + step].items(), strict=True):
                moved = (leaf.detach() - start[name].view(leaf.shape)).norm()
                off = (leaf.detach() - value.view(leaf.shape)).norm()
                assert off < 1e-3 * moved, f"{name} after {step + 1} steps"  # fp32 gradients in another order


def test_lessons_leave_the_model_as_it_was(files: dict[str, str]) -> None:
    """Given up half-way, or with a loss that is not finite: weights, flags and generators are what they were."""
    optimizer, training = student(files)
    model, state = optimizer.model, torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in itertools.islice(learning.lessons(optimizer, COURSE, lambda s: training.batch_at(RECIPE, s), 5), 3):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    optimizer.trainables["model.norm.weight"].value.fill_(math.nan)
    nets = {key: tensor.clone() for key, tensor in optimizer.nets.tensors.items()}
    iterator = learning.lessons(optimizer, COURSE, lambda s: training.batch_at(RECIPE, s), 5)
    assert next(iterator).skipped
    iterator.close()
    assert all(torch.equal(tensor, nets[key]) for key, tensor in optimizer.nets.tensors.items())


def test_the_same_lessons_twice(files: dict[str, str]) -> None:
    learned = []
    for _ in range(2):
        optimizer, training = student(files)
        for _ in learning.lessons(optimizer, COURSE, lambda s, t=training: t.batch_at(RECIPE, s), 2):
            pass
        learned.append(optimizer.nets.state())
    assert all(torch.equal(tensor, learned[1][key]) for key, tensor in learned[0].items())


def test_nets_learn_where_the_gradient_is(files: dict[str, str]) -> None:
    """Lessons at one theta raise the scale of tensors with much of the squared gradient against those with little."""
    optimizer, training = student(files, spread=0.0)
    batch = training.batch_at(RECIPE, 0)
    leaves = [getattr(t.owner, t.key).requires_grad_() for t in optimizer.trainables.values()]
    grads = torch.autograd.grad(group_losses(optimizer.model, batch, grad=True).mean(), leaves)
    for leaf in leaves:
        leaf.requires_grad_(False)
    course = replace(COURSE, lr_nets=0.5)
    for _ in range(25):
        learning.teach(optimizer, batch, course)
        optimizer.iteration += 1
    optimizer.refresh()
    order = torch.tensor([float(g.norm()) for g in grads]).argsort()
    low, high = optimizer.scales[order[:3]], optimizer.scales[order[-3:]]
    assert float(low.max()) < float(high.min()), optimizer.scales[order].tolist()


# --- the command ------------------------------------------------------------------------------------------------------


def command(files: dict[str, str], out: Path, **changes: Any) -> list[str]:
    given = {
        "model": files["model"], "train": files["train"], "prompt": PROMPT, "labels": LABEL_OPTION, "out": out,
        "epochs": 2, "limit": 3, "batch-size": 4, "lr-nets": 20, "reach": 1e-4, "threads": 1, **changes,
    }  # fmt: skip
    return ["learn-perturbations", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def test_learn_then_finetune(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nets of one task, used on another run: resumed and replayed from its snapshots, their file gone."""
    nets = tmp_path / "nets.safetensors"
    assert zoact(*command(files, nets)) == 0
    assert f"--option nets={nets}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [nets.name]
    with safe_open(nets, "pt") as file:
        assert file.metadata()["model"] == "model" and "lr_nets=20" in file.metadata()["course"].replace("': ", "=")
    first = load_file(nets)
    assert zoact(*command(files, tmp_path / "more.safetensors", start=nets, epochs=1)) == 0
    assert any(not torch.equal(t, first[key]) for key, t in load_file(tmp_path / "more.safetensors").items())
    runs = tmp_path / "runs"
    runs.mkdir()
    capsys.readouterr()
    given = [*options(files, runs / "whole", method="zo-finetuner", lr=1e-3, steps=4), "--dense", "--option"]
    assert zoact(*given, f"nets={nets}") == 0
    assert "no trained `nets`" not in capsys.readouterr().out
    assert zoact(*options(files, runs / "mezo", method="mezo", lr=1e-3, steps=4), "--dense") == 0
    assert steps_of(runs / "whole")[0] != steps_of(runs / "mezo")[0]
    given = [*options(files, runs / "parted", method="zo-finetuner", lr=1e-3, steps=1), "--dense", "--option"]
    assert zoact(*given, f"nets={nets}") == 0
    nets.unlink()
    assert zoact("finetune", "--resume", "--out", str(runs / "parted"), "--steps", "4") == 0
    assert steps_of(runs / "whole") == steps_of(runs / "parted")
    assert zoact("replay", str(runs / "whole")) == 0
    assert zoact(*given[:-1], "--option", f"nets={nets}", "--out", str(runs / "new")) == 2
    assert "no such file" in capsys.readouterr().err and not (runs / "new").exists()


def test_nets_of_another_model(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model_dir(tmp_path / "model", layers=2)
    nets = tmp_path / "nets.safetensors"
    assert zoact(*command(files, nets, epochs=1, limit=1)) == 0
    capsys.readouterr()
    given = options({**files, "model": str(tmp_path / "model")}, tmp_path / "run", method="zo-finetuner", lr=None)
    assert zoact(*given, "--dense", "--option", f"nets={nets}") == 2
    said = capsys.readouterr().err
    assert "no whole net for model.layers.1." in said and "and 6 more" in said and not (tmp_path / "run").exists()
    assert zoact(*command({**files, "model": str(tmp_path / "model")}, nets, start=nets)) == 2
    assert "`start`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "`epochs` is 0"),
        ({"restart-every": 0}, "`restart_every` is 0"),
        ({"lr-nets": 0}, "`lr_nets` is 0"),
        ({"reach": math.nan}, "`reach` is nan"),
        ({"limit": -1}, "`limit` -1"),
        ({"train": "nowhere.csv"}, "nowhere.csv"),
        ({"start": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"out": "nowhere/nets.safetensors"}, "no folder 'nowhere'"),
    ],
    ids=str,
)
def test_bad_input(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    assert zoact(*command(files, **{"out": tmp_path / "nets.safetensors", **changes})) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())
