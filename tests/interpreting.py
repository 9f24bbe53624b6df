"""Runs a file of tests/interpreted: kernels in Triton's interpreter, on the CPU.

TRITON_INTERPRET=1 counts when Triton is imported and turns compiling off, so each file runs in a process of its own;
test_machine_code.py compiles the same kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILES = sorted(path.stem for path in (HERE / "interpreted").glob("*.py"))


def run(stem: str, marks: str) -> None:
    """Its tests with these marks pass, at least one of them ran and none was skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider", "--tb=short"]
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    ended = subprocess.run(
        [*command, str(HERE / "interpreted" / f"{stem}.py")], env=kept | {"TRITON_INTERPRET": "1"}, cwd=HERE.parent,
        text=True, capture_output=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    assert re.search(r"\d+ passed", ended.stdout), ended.stdout
    assert "skipped" not in ended.stdout, ended.stdout
