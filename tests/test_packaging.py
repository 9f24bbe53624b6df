"""`pip install .` with a compiler, without one, and with a broken source; what a source distribution carries.

Each test works in a copy of the tree, which takes along the objects of the last build; ninja leaves alone
what is up to date. These are tests of the packaging; a fresh clone compiles everything anyway.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from zoact_kernels import native

pytest.importorskip("pip")
pytest.importorskip("pybind11")
pytest.importorskip("ninja")

needs_compiler = pytest.mark.skipif(native.module() is None, reason=native.why_missing())

USE = """
import sys  # the finder of an editable install would look for a missing submodule in the checkout
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch, zoact_kernels
from zoact_kernels import native, ops
x, w = torch.randn(3, 8), torch.randn(5, 8)
y = torch.ops.zoact.zo_linear(x, w, *[None] * 13, format="dense", layout="row", group_size=-1, out_features=5)
torch.testing.assert_close(y, x @ w.T)
print(zoact_kernels.__file__, *native.isas(), native.why_missing(), sep="\\n")
"""


def copy_tree(root: Path, to: Path) -> Path:
    """What a clone has, and the objects of the CPU kernels with ninja's notes on them."""
    made = shutil.ignore_patterns(".*", "*.so", "_build.json", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(root, to, ignore=made)
    for folder in (root / ".ci", *(root / "build").glob("cpu-*")):
        shutil.copytree(folder, to / folder.relative_to(root))
    return to


@pytest.fixture(scope="module")
def tree(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(root, tmp_path_factory.mktemp("clone") / "zoact_kernels")


def package_files(tree: Path) -> list[Path]:
    """Sources and data of the package, without what a build or an import left there."""
    made = (".so", ".pyc")
    files = [path for path in (tree / "zoact_kernels").rglob("*") if path.is_file() and path.suffix not in made]
    return [path for path in files if path.name != "_build.json"]


NO_CUDA = {"ZOACT_BUILD_CUDA": "0"}  # it would compile for minutes; the tests of the CUDA library ask for it


def setup_py(tree: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=tree, text=True, capture_output=True, env={**os.environ, **NO_CUDA, **env})


def install(tree: Path, target: Path, **env: str) -> list[str]:
    """pip install into `target`; returns what USE prints from there, and the tags of the wheel."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(tree)], check=True, env={**os.environ, **NO_CUDA, **env})
    run = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=target.parent,
        env={**os.environ, "PYTHONPATH": str(target)},
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr
    wheel = next(target.glob("zoact_kernels-*.dist-info/WHEEL")).read_text()
    tags = [line.removeprefix("Tag: ") for line in wheel.splitlines() if line.startswith("Tag: ")]
    file, *rest = run.stdout.splitlines()
    assert Path(file).is_relative_to(target)
    return [*rest, *tags]


@needs_compiler
def test_install_with_compiler(tree: Path, tmp_path: Path) -> None:
    *isas, why, tag = install(tree, tmp_path / "site", ZOACT_BUILD_CPU="1")
    assert tuple(isas) == native.isas()
    assert why == ""
    assert tag.startswith(sys.implementation.cache_tag.replace("cpython-", "cp"))
    missing = [path for path in package_files(tree) if not (tmp_path / "site" / path.relative_to(tree)).exists()]
    assert not missing


@pytest.mark.parametrize("hidden", ["CXX", "PATH"])
def test_install_without_compiler(tree: Path, tmp_path: Path, hidden: str) -> None:
    """A pure wheel that works, that knows why, and that holds no module of an earlier build."""
    env = {"CXX": "/nonexistent/c++"} if hidden == "CXX" else {"PATH": str(tmp_path), "CXX": ""}
    why, tag = install(tree, tmp_path / "site", ZOACT_BUILD_CPU="auto", **env)
    assert "no C++ compiler: looked for " + ("/nonexistent/c++" if hidden == "CXX" else "c++, g++, clang++") in why
    assert tag == "py3-none-any"
    assert not list((tmp_path / "site").rglob("*.so"))


@pytest.mark.parametrize(
    "wish, code, message",
    [
        ("1", 1, "no C++ compiler: looked for /nonexistent (ZOACT_BUILD_CPU=1 asks for the compiled kernels)"),
        ("auto", 0, "WITHOUT its compiled CPU kernels: no C++ compiler"),
        ("0", 0, "switched off by ZOACT_BUILD_CPU=0"),
        ("yes", 1, "ZOACT_BUILD_CPU is 'yes'; it must be auto, 0 or 1"),
    ],
)
def test_build_switch(tree: Path, tmp_path: Path, wish: str, code: int, message: str) -> None:
    run = setup_py(tree, "build_ext", "--build-lib", str(tmp_path), ZOACT_BUILD_CPU=wish, CXX="/nonexistent")
    assert (run.returncode, message in run.stderr) == (code, True), run.stderr


@needs_compiler
def test_cuda_library_is_optional(tree: Path, tmp_path: Path) -> None:
    """A switched-off or failing nvcc leaves the CPU kernels and a reason; asked for by name, it is an error."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho broken: error >&2\nexit 1\n")
    nvcc.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    target = tmp_path / "lib/zoact_kernels"
    build = ("build_ext", "--build-lib", str(target.parent))
    for wish, words in (("0", "switched off by ZOACT_BUILD_CUDA=0"), ("auto", "broken: error")):
        run = setup_py(tree, *build, ZOACT_BUILD_CPU="1", ZOACT_BUILD_CUDA=wish, PATH=path)
        assert run.returncode == 0, run.stderr
        assert words in (target / "_build.json").read_text()
        assert not (target / "_cuda.so").exists()
    run = setup_py(tree, *build, ZOACT_BUILD_CPU="1", ZOACT_BUILD_CUDA="1", PATH=path)
    assert run.returncode == 1 and "ZOACT_BUILD_CUDA=1 asks for the CUDA kernels" in run.stderr
    run = setup_py(tree, *build, ZOACT_BUILD_CUDA="yes")
    assert run.returncode == 1 and "ZOACT_BUILD_CUDA is 'yes'" in run.stderr


NVCC = """#!/bin/sh
case "$*" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
--list-gpu-code) echo sm_75 sm_80 sm_90 ;;
*) while [ $# -gt 0 ]; do case "$1" in -o | -MF) echo "nothing:" > "$2" ;; esac; shift; done ;;
esac
"""


@needs_compiler
def test_cuda_library_is_built_where_nvcc_is(tree: Path, tmp_path: Path) -> None:
    """Without being asked for, for the GPUs that this nvcc knows; the record says which, and which CUDA it needs."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    target = tmp_path / "lib/zoact_kernels"
    env = {name: value for name, value in os.environ.items() if name != "ZOACT_BUILD_CUDA"}
    env |= {"ZOACT_BUILD_CPU": "1", "PATH": f"{tmp_path}{os.pathsep}{env['PATH']}"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(target.parent)]
    subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True)
    record = json.loads((target / "_build.json").read_text())
    assert (record["cuda_archs"], record["cuda_version"]) == (["80", "90a"], "12.4")
    assert (target / "_cuda.so").exists()
    rules = (tree / "build/cuda/build.ninja").read_text()
    codes = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")
    assert all(f"-gencode={code} " in rules for code in codes) and rules.count("-gencode=") == len(codes)
    subprocess.run(command, cwd=tree, env=env | {"ZOACT_BUILD_CUDA": "0"}, check=True, capture_output=True)
    assert not (target / "_cuda.so").exists()


@needs_compiler
def test_broken_source(root: Path, tmp_path: Path) -> None:
    """A compile error stops a developer; a user gets pure Python, a warning, and the compiler's words in the record."""
    tree = copy_tree(root, tmp_path / "tree")
    for kernel in (tree / "csrc/cpu").glob("*.cpp"):
        kernel.unlink()  # the bindings alone fail faster
    bindings = tree / "csrc/bindings.cpp"
    bindings.write_text("#error broken on purpose\n" + bindings.read_text())
    run = setup_py(tree, "build_ext", "--inplace", ZOACT_BUILD_CPU="1")
    assert run.returncode == 1
    assert "broken on purpose" in run.stderr
    run = setup_py(tree, "build_ext", "--inplace", ZOACT_BUILD_CPU="auto")
    assert run.returncode == 0, run.stderr
    assert "WARNING" in run.stderr
    assert "broken on purpose" in (tree / "zoact_kernels/_build.json").read_text()


def test_sdist_is_complete(tree: Path, tmp_path: Path) -> None:
    run = setup_py(tree, "-q", "sdist", "-d", str(tmp_path))
    assert run.returncode == 0, run.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [path for path in (tree / "csrc").rglob("*") if path.is_file()]
    wanted += package_files(tree)
    wanted += [tree / name for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "tests/conftest.py")]
    assert {str(path.relative_to(tree)) for path in wanted} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]


NINJA_FILE = """
import pathlib, runpy
build = runpy.run_path("setup.py")
assert not build["accepts"](["false"], [])
print(build["ninja_file"](["c++"], {isas}, [], pathlib.Path("/a b.so"), pathlib.Path("build/here")))
"""


@pytest.mark.parametrize("isas", [["base"], ["base", "avx2", "avx512"], ["base", "avx2", "avx512", "avx512vnni"]])
def test_ninja_file_keeps_isas_apart(root: Path, isas: list[str]) -> None:
    """Every kernel once per ISA with its flags only; nothing of an ISA that the compiler does not know."""
    command = [sys.executable, "-c", NINJA_FILE.format(isas=isas)]
    text = subprocess.run(command, cwd=root, text=True, capture_output=True, check=True).stdout
    lines = text.splitlines()
    kernels = len(list((root / "csrc/cpu").glob("*.cpp")))
    assert sum(": compile " in line for line in lines) == kernels * len(isas) + 1
    assert ("-mavx512f" in text) == ("avx512" in isas) == ("ZO_HAS_AVX512 " in text.replace("\n", " "))
    assert ("-mavx512vnni" in text) == ("avx512vnni" in isas) == ("ZO_HAS_AVX512VNNI" in text)
    base = [after for line, after in itertools.pairwise(lines) if ".base.o: compile" in line]
    assert base and not any("-m" in flags for flags in base)
    assert "build /a$ b.so: link" in text
    assert "cpp" in text and str(root / "csrc") not in text
