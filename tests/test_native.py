"""The compiled module: found or missing with a reason, its instruction sets, its complaints about arguments."""

from __future__ import annotations

import ast
import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from zoact_kernels import cuda_ops, native

needs_module = pytest.mark.skipif(native.module() is None, reason=native.why_missing())


@needs_module
def test_isas_best_first() -> None:
    isas = native.isas()
    assert isas[-1] == "base"
    assert list(isas) == [isa for isa in ("avx512vnni", "avx512", "avx2", "base") if isa in isas]
    assert set(isas) <= set(native.build()["isas"])
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if " avx512_vnni " in flags and "avx512vnni" in native.build()["isas"]:
        assert isas[0] == "avx512vnni"


@needs_module
def test_module_has_no_reason_to_be_missing() -> None:
    assert native.why_missing() == ""
    assert "why_missing" not in native.build()


def test_threads_follow_torch() -> None:
    torch.set_num_threads(1)
    assert native.threads() == 1


@needs_module
@pytest.mark.parametrize("isa", ["sse2", "", "AVX2", "avx512_vnni"])
def test_unknown_isa(isa: str) -> None:
    with pytest.raises(RuntimeError, match=f'isa is "{isa}", which is not compiled in; this CPU runs .*base'):
        native.module().noise_run(isa, 0, 0, 0, 0, 0, 0)


def signatures() -> dict[str, list[ast.arg]]:
    tree = ast.parse(Path(native.__file__).with_name("_C.pyi").read_text())
    return {node.name: node.args.posonlyargs for node in tree.body if isinstance(node, ast.FunctionDef)}


KERNELS = [name for name in signatures() if name != "isas"]
ZERO = {"str": "base", "int": 0, "bool": False, "float": 0.0, "Sequence[int]": []}


@needs_module
@pytest.mark.parametrize("name", KERNELS)
def test_signatures_match_stub(name: str) -> None:
    """The bindings read exactly the arguments that _C.pyi names, of exactly those types (an empty problem: no work)."""
    kernel = getattr(native.module(), name)
    types = [ast.unparse(argument.annotation) for argument in signatures()[name]]
    values = [ZERO[kind] for kind in types]
    with pytest.raises(TypeError, match=f"got {len(values) - 1} arguments, which is too few"):
        kernel(*values[:-1])
    with pytest.raises(TypeError, match=f"got {len(values) + 1} arguments, which is too many"):
        kernel(*values, 0)
    for index, kind in enumerate(types):
        if kind == "bool":
            continue
        wrong = [*values[:index], 3 if kind in ("str", "Sequence[int]") else "three", *values[index + 1 :]]
        with pytest.raises(TypeError, match=f"argument {index} is .*three|argument {index} is 3,"):
            kernel(*wrong)


@needs_module
@pytest.mark.parametrize("name, index, value", [("noise_run", 1, -1), ("noise_run", 3, 2**32), ("noise_run", 2, 2**63)])
def test_numbers_that_do_not_fit(name: str, index: int, value: int) -> None:
    """A pointer is no negative number, param_id has 32 bits, a seed 64."""
    values = ["base", 0, 0, 0, 0, 0, 0]
    values[index] = value
    with pytest.raises(TypeError, match=f"argument {index} is {value}"):
        getattr(native.module(), name)(*values)


@needs_module
def test_zo_update_wants_one_item_per_layer() -> None:
    with pytest.raises(RuntimeError, match="one item per layer"):
        native.module().zo_update("base", [1, 2], [], [], [1], [1, 1], [0, 0], 0, 0, 0, 0, False, 0, 0, 0, 1)


@needs_module
def test_noise_run_writes_where_it_is_told() -> None:
    """Seven floats of eight, on every ISA."""
    for isa in native.isas():
        out = (ctypes.c_float * 8)(*[7.0] * 8)
        native.module().noise_run(isa, ctypes.addressof(out), 1, 2, native.module().ENUMS["Noise"]["rademacher"], 0, 7)
        assert set(out[:7]) <= {-1.0, 1.0}
        assert out[7] == 7.0


@needs_module
def test_enums_follow_header(root: Path) -> None:
    """ENUMS holds every value of every enum class of kernels.h."""
    for line in (root / "csrc/cpu/kernels.h").read_text().splitlines():
        if line.startswith("enum class"):
            name, _, values = line.removeprefix("enum class ").partition(" : int32_t ")
            pairs = dict(item.split(" = ") for item in values.strip("{ };").split(", "))
            assert native.module().ENUMS[name] == {key: int(value) for key, value in pairs.items()}


HIDE = """
import sys
sys.modules["zoact_kernels._C"] = None  # as if it were not there
from zoact_kernels import cuda_ops, native
assert native.module() is None and native.isas() == ()
print(native.why_missing())
"""


def test_why_missing() -> None:
    run = subprocess.run([sys.executable, "-c", HIDE], text=True, capture_output=True, check=True)
    assert run.stdout.startswith("the CPU kernels are not compiled: ")


def test_build_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native.build() == {}
    (tmp_path / "_build.json").write_text(json.dumps({"why_missing": "no C++ compiler"}))
    assert native.build() == {"why_missing": "no C++ compiler"}


@needs_module
def test_one_openmp() -> None:
    """The module shares torch's libgomp: two runtimes in a process would fight for the cores."""
    if not native.build()["openmp"] or not Path("/proc/self/maps").exists():
        return
    code = "from zoact_kernels import native; native.module(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout
    libraries = {line.split()[-1] for line in maps.splitlines() if "omp" in line.rpartition("/")[2]}
    assert len(libraries) == 1, libraries


# ---------------------------------------------------------------------------------------------------------------------
# The CUDA kernels


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where native.py finds its files, on a machine where torch sees a CUDA device."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "_driver_version", lambda: 13)
    native._load_cuda.cache_clear()
    yield tmp_path
    native._load_cuda.cache_clear()


def library(folder: Path, functions: tuple[str, ...]) -> None:
    """A `_cuda.so` with these functions."""
    text = "".join(f'extern "C" const char* {name}(const void*) {{ return "no kernel"; }}' for name in functions)
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(folder / "_cuda.so")]
    subprocess.run(command, input=text, text=True, check=True)


@needs_module
def test_cuda_is_missing_for_a_reason(installation: Path) -> None:
    assert native.cuda() is None
    assert native.why_no_cuda().startswith("the CUDA kernels are not compiled: they were never built; run ")
    native._load_cuda.cache_clear()
    (installation / "_build.json").write_text(json.dumps({"why_no_cuda": "no CUDA compiler: nvcc is not on the PATH"}))
    assert native.why_no_cuda() == "the CUDA kernels are not compiled: no CUDA compiler: nvcc is not on the PATH"
    assert native.cuda_archs() == ()


@needs_module
def test_cuda_that_does_not_load(installation: Path) -> None:
    (installation / "_cuda.so").write_bytes(b"\x7fELF, and no more")
    assert native.cuda() is None
    assert native.why_no_cuda().startswith("the compiled CUDA kernels do not load: ")


@needs_module
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_cuda_of_another_version(installation: Path) -> None:
    library(installation, ("zo_linear", "zo_update"))
    assert native.cuda() is None
    assert native.why_no_cuda().endswith("without zo_dense_linear, zo_perturb, dequantize: build them anew")


@needs_module
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_cuda_is_loaded_where_torch_sees_a_device(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(installation, native.CUDA_FUNCTIONS)
    (installation / "_build.json").write_text(json.dumps({"cuda_archs": ["80", "90a"]}))
    assert native.cuda_archs() == ("80", "90a")
    found = native.cuda()
    assert found is native.cuda() and native.why_no_cuda() == ""
    with pytest.raises(RuntimeError, match="zo_update: no kernel"):
        cuda_ops.Gpu().call("zo_update", cuda_ops.ZoUpdate(**dict.fromkeys(cuda_ops.ZoUpdate.kinds)))
    assert cuda_ops.Gpu().missing("sm_86") is None and cuda_ops.Gpu().missing("sm_120") is None  # by PTX
    assert "not for sm_75" in (cuda_ops.Gpu().missing("sm_75") or "")
    native._load_cuda.cache_clear()
    (installation / "_build.json").write_text(json.dumps({"cuda_archs": ["80"], "cuda_version": "13.0"}))
    monkeypatch.setattr(native, "_driver_version", lambda: 12)
    assert native.cuda() is None
    assert native.why_no_cuda().endswith("compiled by CUDA 13.0, and the driver of this GPU knows CUDA 12")
    native._load_cuda.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: pytest.fail(f"{path} is loaded without a device"))
    assert native.cuda() is None and native.why_no_cuda() == ""
