"""The sanitizers' driver (`make sanitize`) finds what it is there for: errors planted in a copy of the kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zoact_kernels import native

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(native.module() is None, reason=native.why_missing() or "compiled"),
]

# kernel -> what stands in its source, the error in its place, what is reported
PLANTED = {
    "zo_perturb": ("load(w + i, n)", "load(w + i, n + 1)", ("heap-buffer-overflow", "READ of size")),
    "zo_update": ("store(c + i, cs, n)", "store(c + i, cs, n + 1)", ("heap-buffer-overflow", "WRITE of size")),
    "dequantize": ("is_short(p.rows * w.K,", "is_short(p.rows * w.K * INT64_MAX,", ("signed integer overflow",)),
    "zo_linear": ("", "", ()),
}

BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import sanitize
try:
    sanitize.build(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, isas=["base"])
except sanitize.setup.CannotBuild as reason:
    print(reason)
"""


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, for the ISA that every CPU has, and dumped calls of each kernel."""
    folder = tmp_path_factory.mktemp("sanitize")
    csrc = shutil.copytree(root / "csrc", folder / "csrc")
    for kernel, (text, error, _) in PLANTED.items():
        source = csrc / f"cpu/{kernel}.cpp"
        assert text in source.read_text()
        source.write_text(source.read_text().replace(text, error) if text else source.read_text())
    command = [sys.executable, "-c", BUILD, str(csrc), str(folder)]  # setuptools stays out of this process
    if reason := subprocess.run(command, cwd=root, text=True, stdout=subprocess.PIPE, check=True).stdout:
        pytest.skip(reason)
    tests = [f"tests/test_{kernel}.py" for kernel in PLANTED]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "opcheck or base", *tests]
    subprocess.run([*command, "--dump-calls", str(folder)], cwd=root, check=True)
    return folder


@pytest.mark.parametrize("kernel", PLANTED)
def test_planted_errors_are_found(folder: Path, kernel: str) -> None:
    calls = sorted(folder.glob(f"{kernel}-*.calls"))
    assert calls
    run = subprocess.run([folder / "driver", *calls], text=True, capture_output=True)
    words = PLANTED[kernel][2]
    assert (run.returncode != 0) == bool(words), run.stderr
    assert all(word in run.stderr for word in words), run.stderr
    if words:
        assert f"found in {kernel} on base, threads = " in run.stderr  # and the test that made the call
    else:
        assert f"{kernel} " in run.stdout
