"""What the README says is so: its commands are there, its example runs, its option names exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_two_commands_stand_in_the_first_30_lines(root):
    top = "\n".join(README.splitlines()[:30])
    makefile = (root / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in top
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for target in ("soak", "check", "bench"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_example_runs_and_trains(tmp_path):
    from test_swap import llama

    from zoact_kernels.layers import zo_layers

    llama().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    ids = torch.randint(0, 97, (3, 6))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 4

    def losses_per_example(output):
        return torch.nn.functional.cross_entropy(output.logits[:, -1].float(), output.logits[:, -1].argmax(-1) * 0 + 5,
                                                 reduction="none")  # fmt: skip

    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    names = {"folder": str(tmp_path / "model"), "batches": batches, "losses_per_example": losses_per_example}
    exec(compile(code, "README.md", "exec"), names)
    assert names["result"].step == 3 and not names["result"].skipped
    assert names["result"].losses.shape == (2, 3)
    assert all(layer.coeff.abs().max() > 0 for layer in zo_layers(names["model"]).values())


def test_the_options_of_the_command_line_exist():
    from typer.testing import CliRunner

    from zoact_kernels.cli import app

    commands = re.findall(r"^    zoact (\w+)((?:.*\\\n)*.*)$", README, re.MULTILINE)
    assert {name for name, _ in commands} >= {"finetune", "replay", "export", "explain"}
    for name, rest in commands:
        said = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+", rest.split("#")[0]):
            assert option in said, f"zoact {name} {option}"
