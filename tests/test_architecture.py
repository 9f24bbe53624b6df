"""The laws that no single room can check: imports go one way, importing costs nothing, randomness has an address."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "zoact_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Top to bottom: a room imports only rooms above it. A folder is one room, but for its files that are named here.
ROOMS = """
    rng layouts fits formats quantize directions reference workspace triton_ops native cpu_ops cuda_ops dispatch
    autograd ops perturbation layers parameters tangent embedding integrations.bitsandbytes swap activations basis
    estimators optim first_order trainables fork tail state zeroth_order methods recipe losses step_graph memory
    backend runlog plots trainer replay distributed data demo integrations finetune learning study cli __main__
""".split()

# What only its own room may import, and only when asked (law 2.8).
HEAVY = {"triton", "transformers", "peft", "gguf", "bitsandbytes", "matplotlib", "rich", "typer", "accelerate"}


def room_of(name: str) -> str:
    """Room of a dotted name below zoact_kernels: "integrations.gguf" -> "integrations"."""
    first, _, rest = name.partition(".")
    own = f"{first}.{rest.partition('.')[0]}"
    return own if own in ROOMS else first


def room_of_file(path: Path) -> str:
    return room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        yield path, ast.parse(path.read_text(), str(path))


def without_type_checking(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node but those that only a type checker reads."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            stack.extend(node.orelse)
            continue
        yield node
        stack.extend(ast.iter_child_nodes(node))


def imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything a file imports, inside functions too."""
    package = ["zoact_kernels", *path.relative_to(PACKAGE).parts[:-1]]
    for node in without_type_checking(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *([node.module] if node.module else []), alias.name])


def complaints(forbidden) -> list[str]:
    """`file:line text` of every node that `forbidden(node)` names, in the whole package."""
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.expr | ast.stmt) and (what := forbidden(node)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {what}")
    return sorted(set(found))


def test_every_file_has_its_place() -> None:
    assert {room_of_file(path) for path in SOURCES} - {"__init__"} <= set(ROOMS), "add the room to ROOMS, at its place"


def test_imports_go_one_way() -> None:
    wrong = []
    for path, tree in trees():
        room = room_of_file(path)
        if room == "__init__":
            continue  # lists names of all rooms
        for line, name in imports(path, tree):
            target = room_of(name.removeprefix("zoact_kernels.")) if name.startswith("zoact_kernels.") else None
            if target in ROOMS and room in ROOMS and target != room and ROOMS.index(target) > ROOMS.index(room):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {target}, which stands below it")
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_only_when_asked() -> None:
    """At the top of a file, an optional library may stand only in the room that is about it."""
    allowed = {"integrations": HEAVY, "cli": {"typer", "rich"}, "triton_ops": {"triton"}}
    wrong = []
    for path, tree in trees():
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[])
        for line, name in imports(path, top):
            library = name.partition(".")[0]
            if library in HEAVY - allowed.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), set()):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {library}")
    assert not wrong, "\n".join(wrong)


PROBE = """
import sys, time, torch, numpy, safetensors.torch
def boom(*_, **__): raise AssertionError("the GPU was touched at import")
for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_capability",
             "get_device_properties", "get_device_name", "synchronize", "current_stream"):
    setattr(torch.cuda, name, boom)
torch._C._cuda_getDeviceCount = boom
before, start = set(sys.modules), time.perf_counter()
import zoact_kernels
print(time.perf_counter() - start)
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_import_costs_nothing() -> None:
    """No GPU query, no optional library, no compiled module, next to no time beside torch's own import."""
    run = subprocess.run([sys.executable, "-c", PROBE], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    seconds, modules = run.stdout.splitlines()
    assert not HEAVY & set(modules.split())
    assert float(seconds) < 2


def test_no_environment_variables() -> None:
    """Law 2.7: behaviour is an argument or a `using` context, never a variable from outside."""

    def forbidden(node: ast.AST) -> str | None:
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        return name if name in ("environ", "environb", "getenv", "putenv") else None

    assert not complaints(forbidden)


def test_nothing_is_unpickled() -> None:
    """Law 2.9: safetensors, GGUF, JSON and SQLite only."""

    def forbidden(node: ast.AST) -> str | None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            return next(
                (n for n in names if n in ("pickle", "dill", "shelve", "joblib", "marshal", "cloudpickle")), None
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save", "pd.read_pickle"):
            return ast.unparse(node.func)
        return (
            "allow_pickle"
            if isinstance(node, ast.Call) and any(k.arg == "allow_pickle" for k in node.keywords)
            else None
        )

    assert not complaints(forbidden)


def test_no_global_randomness() -> None:
    """Law 2.1: every random number is addressed through rng.py; no generator with a state trains anything."""
    torch_names = "manual_seed seed rand randn randint randperm normal bernoulli multinomial Generator".split()
    like = "rand_like randn_like randint_like normal_ uniform_ random_ bernoulli_ exponential_".split()

    def forbidden(node: ast.AST) -> str | None:
        if isinstance(node, ast.Import):
            return next((alias.name for alias in node.names if alias.name in ("random", "numpy.random")), None)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in ("random", "numpy.random"):
            return node.module
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if (owner == "torch" and node.attr in torch_names) or node.attr in like:
                return ast.unparse(node)
            if owner in ("np", "numpy") and node.attr == "random":
                return ast.unparse(node)
        return None

    assert not complaints(forbidden)


OPS = ["zo_linear", "zo_dense_linear", "zo_update", "zo_perturb"]


@pytest.mark.parametrize("stem", OPS)
def test_same_stem_in_every_room(stem: str) -> None:
    """You can guess every path: one stem is the op, its reference, its C++ file, its Triton file and its test."""
    assert (ROOT / f"csrc/cpu/{stem}.cpp").exists()
    assert (PACKAGE / f"triton_ops/{stem}.py").exists()
    assert re.search(rf"^def {stem}_?\(", (PACKAGE / "reference.py").read_text(), re.MULTILINE)
    assert f"{stem}" in (PACKAGE / "ops.py").read_text()


def native_sources() -> list[Path]:
    return [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]


def test_no_host_or_device_branches() -> None:
    """Host and device run the same text; only philox.h and ptx.cuh know which compiler reads them."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in native_sources()
        if path.name not in ("philox.h", "ptx.cuh")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.match(r"\s*#\s*(el)?if.*(__CUDA|__NVCC__|__HIP|__clang_cuda)", line)
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_share_nothing_across_isas() -> None:
    """No STL in a file compiled per ISA: the linker could keep the AVX-512 copy of a shared inline function."""
    allowed = "c(assert|float|limits|math|stddef|stdint|stdlib|string)|type_traits|omp.h|sys/mman.h|cuda_runtime.h"
    allowed += "|arm_neon.h|[a-z]+intrin.h"
    for path in native_sources():
        if path.name == "bindings.cpp":
            continue
        headers = set(re.findall(r"^\s*#\s*include\s*<([^>]+)>", path.read_text(), re.MULTILINE))
        shared = [header for header in headers if not re.fullmatch(allowed, header)]
        assert not shared, f"{path.relative_to(ROOT)} includes {shared}"


def test_interpreter_branches_have_their_place() -> None:
    """A kernel runs the same text compiled and interpreted, but for the two files of shared device functions."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in sorted((PACKAGE / "triton_ops").glob("*.py"))
        if path.name not in ("words.py", "dequant.py", "__init__.py")  # the last asks once, for dispatch
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"interpret|INTERPRETED", line)
    ]
    assert not wrong, "\n".join(wrong)
