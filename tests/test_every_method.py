"""benchmarks/every_method.py: what is asked of the command line, what is left out when it goes on, when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import every_method
from zoact_kernels.methods import METHODS

GOOD = {
    "code": 0, "wall_seconds": 9.0, "seconds": 3.0, "forwards": 640.0, "first": 1.5, "last": 1.25, "skipped": 0,
    "held_out": [1.0, 0.5],
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that were run, of which mezo fails."""
    names: list[str] = []

    def measure(method: str, steps: int, model: str, log: Path) -> dict[str, Any]:
        names.append(method)
        row = {"method": method, "steps": steps, "model": model, "dense": METHODS[method].dense}
        return {**row, **GOOD} if method != "mezo" else {**row, "code": 2, "wall_seconds": 1.0, "error": "no luck"}

    monkeypatch.setattr(every_method, "measure", measure)
    return names


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    given = ["--out", str(out), "--logs", str(out / "logs"), "--model", "some.gguf", *arguments]
    monkeypatch.setattr("sys.argv", ["every_method", *given])
    return every_method.main()


def test_goes_on_and_fails(asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, "--method", "qzo", "--method", "zo-act") == 0
    told = (tmp_path / "methods.md").read_text()
    assert f"goes on): {', '.join(name for name in METHODS if name not in asked)}." in told
    assert run(monkeypatch, tmp_path) == 1
    assert "Not run yet" not in (tmp_path / "methods.md").read_text()
    assert asked == ["qzo", "zo-act", *(name for name in METHODS if name not in ("qzo", "zo-act"))]
    asked.clear()
    assert run(monkeypatch, tmp_path) == 1 and asked == ["mezo"]
    asked.clear()
    assert run(monkeypatch, tmp_path, "--steps", "3", "--method", "lozo") == 0 and asked == ["lozo"]
    assert run(monkeypatch, tmp_path, "--steps", "3", "--method", "lozo", "--again") == 0 and len(asked) == 2
    rows = [json.loads(line) for line in (tmp_path / "methods.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == set(METHODS) and len(rows) == len(METHODS)
    told = [line for line in (tmp_path / "methods.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in told] == list(METHODS)
    assert "| mezo | dense | failed: no luck |" in told[list(METHODS).index("mezo")]
    assert "| qzo | INT4 | 20 | 0 | 3 | 640 | 1.5000, 1.2500 | 1.0000 → 0.5000 |" in told


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    """All is an option of `zoact finetune`, and says nothing of the method itself."""
    from typer.testing import CliRunner

    from zoact_kernels.cli import app

    said = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"}).output
    for name, method in METHODS.items():
        given = every_method.command(name, 20, "m.gguf", tmp_path)
        options = [word for word in given if word.startswith("--")]
        assert all(option in said for option in options) and ("--dense" in options) == method.dense
        assert set(options) - {"--dense"} == {"--model", "--demo", "--out", "--method", "--steps", "--eval-limit"}
