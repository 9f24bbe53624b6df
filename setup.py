"""Build zoact_kernels: the package metadata is in pyproject.toml, this file compiles csrc into `zoact_kernels._C`.

setup.py writes a ninja file (each kernel source once per instruction set, then the bindings), and the ninja of PyPI
runs it, so a rebuild compiles only what changed. Nothing here needs torch: the module takes raw pointers.

    ZOACT_BUILD_CPU=auto   (default) without a working compiler install pure Python, say so, and record the reason
    ZOACT_BUILD_CPU=1      a compiler is required, any failure is an error (`make`, CI)
    ZOACT_BUILD_CPU=0      pure Python
    ZOACT_BUILD_CUDA=auto  (default) csrc/cuda where nvcc is: three minutes of one core; 1: required; 0: not (`make`)
    ZOACT_CUDA_ARCHS       the GPUs to compile for, and PTX of the last one; by default those of 80 86 89 90a 100 120
                           that nvcc knows

The CUDA kernels become a library of their own, `_cuda.so`, with a C interface and a static cudart: the module does not
need it. `_build.json` beside the module records what was built, or why it was
not; `zoact_kernels.native` reads it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Explicit FMA only (design 2.1, 2.4): contraction would make the bits depend on what the compiler fuses.
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno".split()
# GCC 12's own AVX-512 headers set off maybe-uninitialized (GCC bug 105593); Clang does not know that name.
WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option".split()
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
ISAS = {  # base must exist; another is left out where the compiler does not know its flags (ARM, say)
    "base": [],
    "avx2": "-mavx2 -mfma -mf16c".split(),
    "avx512": AVX512.split(),
    "avx512vnni": f"{AVX512} -mavx512vnni".split(),
}
CUDA_ARCHS = "80 86 89 90a 100 120"
# No FMA but those that are written, as above; two threads of nvcc, since each architecture is a compilation of its own.
CUDA_FLAGS = "-O3 -std=c++17 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden -cudart static --threads 2".split()


class CannotBuild(Exception):
    """There is no compiled module; the message says why."""


def find_compiler() -> list[str]:
    """Command of a C++ compiler that works: $CXX, or the first of c++, g++, clang++."""
    if os.name == "nt":
        raise CannotBuild("the kernels need GCC or Clang; Windows is not supported yet")
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise CannotBuild(f"no C++ compiler: looked for {' '.join(chosen[:1]) or 'c++, g++, clang++'}")


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler builds a trivial program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, *flags, "-x", "c++", "-", "-o", f"{folder}/probe"]
        return subprocess.run(command, input="int main() {}", text=True, capture_output=True).returncode == 0


def ninja_file(compiler: list[str], isas: list[str], openmp: list[str], target: Path, folder: Path) -> str:
    """The build: kernels once per ISA, bindings once, one link. Sources relative to `folder`: a checkout can move."""
    import pybind11

    csrc = Path(os.path.relpath(ROOT / "csrc", folder))
    includes = [f"-I{path}" for path in (csrc, pybind11.get_include(), sysconfig.get_path("include"))]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,-s"]

    def words(*parts: str) -> str:
        return shlex.join(parts).replace("$", "$$")

    def path(name: Path | str) -> str:
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {words(*compiler, *FLAGS, *WARNINGS, *openmp)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {words(*compiler, *shared, *openmp)} $in -o $out",
        "  description = link $out",
    ]
    objects = []

    def compile_one(source: Path, stem: str, flags: str) -> None:
        objects.append(path(f"{stem}.o"))
        lines.extend([f"build {objects[-1]}: compile {path(source)}", f"  flags = {flags}"])

    for stem in sorted(source.stem for source in (ROOT / "csrc/cpu").glob("*.cpp")):
        for isa in isas:
            compile_one(csrc / f"cpu/{stem}.cpp", f"{stem}.{isa}", words(f"-I{csrc}", f"-DZO_ISA={isa}", *ISAS[isa]))
    has = [f"-DZO_HAS_{isa.upper()}" for isa in isas]
    compile_one(csrc / "bindings.cpp", "bindings", words(*includes, *has))
    lines.append(f"build {path(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def compile_module(target: Path, folder: Path) -> dict[str, object]:
    """Compile csrc into `target`, with objects in `folder`; returns the build record or raises CannotBuild."""
    try:
        import ninja  # noqa: F401
        import pybind11  # noqa: F401
    except ImportError as error:
        raise CannotBuild(f"a build requirement is missing: {error}") from None
    compiler = find_compiler()
    if not accepts(compiler, []):
        raise CannotBuild(f"the C++ compiler `{shlex.join(compiler)}` cannot build an empty program")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise CannotBuild(f"Python.h is missing; install the development files of {sys.executable} (python3-dev)")
    isas = [isa for isa, flags in ISAS.items() if accepts(compiler, flags)]
    openmp = ["-fopenmp"] if accepts(compiler, ["-fopenmp"]) else []
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(compiler, isas, openmp, target.resolve(), folder))
    run_ninja(folder)
    version = subprocess.run([*compiler, "--version"], text=True, capture_output=True).stdout.partition("\n")[0]
    return {"compiler": version, "isas": isas, "openmp": bool(openmp)}


def run_ninja(folder: Path) -> None:
    """Builds what folder/build.ninja says; raises CannotBuild with the first error."""
    import ninja

    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), f"-j{os.cpu_count() or 1}"]
    output = []
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line)
    if process.returncode:
        first = next((line for line in output if "error" in line), "".join(output[-3:])).strip()
        raise CannotBuild(f"compiling failed: {first}")


def cuda_ninja_file(nvcc: str, archs: list[str], target: Path, folder: Path) -> str:
    """The build of `_cuda.so`: every .cu once for all architectures, one link."""
    csrc = Path(os.path.relpath(ROOT / "csrc", folder))
    newest = archs[-1].rstrip("af")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")

    def path(name: Path | str) -> str:
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    command = shlex.join([nvcc, *CUDA_FLAGS]).replace("$", "$$")
    stems = sorted(source.stem for source in (ROOT / "csrc/cuda").glob("*.cu"))
    return "\n".join([
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {command} {shlex.join(codes)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {command} -shared $in -o $out",
        "  description = link $out",
        *(f"build {stem}.cuda.o: compile {path(csrc / f'cuda/{stem}.cu')}" for stem in stems),
        f"build {path(target)}: link {' '.join(f'{stem}.cuda.o' for stem in stems)}",
        "",
    ])  # fmt: skip


def known_archs(nvcc: str) -> str:
    """Those of CUDA_ARCHS that this nvcc compiles for; all of them if it does not say."""
    said = subprocess.run([nvcc, "--list-gpu-code"], text=True, capture_output=True).stdout.split()
    return " ".join(arch for arch in CUDA_ARCHS.split() if f"sm_{arch.rstrip('af')}" in said) or CUDA_ARCHS


def cuda_version(nvcc: str) -> str:
    """Of the toolkit, "13.0": its major is the least that the driver has to know."""
    said = subprocess.run([nvcc, "--version"], text=True, capture_output=True).stdout
    return said.partition("release ")[2].partition(",")[0]


def compile_cuda(target: Path, folder: Path, wish: str) -> dict[str, object]:
    """Compile csrc/cuda into `target`; returns what the record says of it."""
    try:
        if wish == "0":
            raise CannotBuild("switched off by ZOACT_BUILD_CUDA=0 at build time")
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise CannotBuild("no CUDA compiler: nvcc is not on the PATH")
        archs = os.environ.get("ZOACT_CUDA_ARCHS", known_archs(nvcc)).replace(",", " ").split()
        if not archs:
            raise CannotBuild("ZOACT_CUDA_ARCHS is empty")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(cuda_ninja_file(nvcc, archs, target.resolve(), folder))
        run_ninja(folder)
        return {"cuda_version": cuda_version(nvcc), "cuda_archs": archs}
    except CannotBuild as reason:
        if wish == "1":
            raise SystemExit(f"zoact_kernels: {reason} (ZOACT_BUILD_CUDA=1 asks for the CUDA kernels)") from None
        target.unlink(missing_ok=True)  # never one of an earlier build
        return {"why_no_cuda": str(reason)}


class BuildKernels(build_ext):
    """build_ext that runs ninja, and leaves `_build.json` either way."""

    def run(self) -> None:
        wish = os.environ.get("ZOACT_BUILD_CPU", "auto")
        if wish not in ("auto", "0", "1"):
            raise SystemExit(f"ZOACT_BUILD_CPU is {wish!r}; it must be auto, 0 or 1")
        cuda = os.environ.get("ZOACT_BUILD_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            raise SystemExit(f"ZOACT_BUILD_CUDA is {cuda!r}; it must be auto, 0 or 1")
        self.module = Path(self.get_ext_fullpath(self.extensions[0].name))
        try:
            if wish == "0":
                raise CannotBuild("switched off by ZOACT_BUILD_CPU=0 at build time")
            record = compile_module(self.module, ROOT / "build" / f"cpu-{sys.implementation.cache_tag}")
        except CannotBuild as reason:
            if wish == "1":
                raise SystemExit(f"zoact_kernels: {reason} (ZOACT_BUILD_CPU=1 asks for the compiled kernels)") from None
            print(f"\nWARNING: zoact_kernels is built WITHOUT its compiled CPU kernels: {reason}\n", file=sys.stderr)
            self.module.unlink(missing_ok=True)  # never one of an earlier build
            record = {"why_missing": str(reason)}
        if "why_missing" in record:  # a pure wheel holds no library
            self.library.unlink(missing_ok=True)
        else:
            record |= compile_cuda(self.library, ROOT / "build" / "cuda", cuda)
        self.module.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(record) + "\n")

    @property
    def record(self) -> Path:
        return self.module.with_name("_build.json")

    @property
    def library(self) -> Path:
        return self.module.with_name("_cuda.so")

    def get_outputs(self) -> list[str]:
        module = Path(self.get_ext_fullpath(self.extensions[0].name))
        paths = (module, module.with_name("_build.json"), module.with_name("_cuda.so"))
        return [str(path) for path in paths if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable build writes into the source tree


class Wheel(bdist_wheel):
    """bdist_wheel whose tag follows the outcome: without a module the wheel is pure (py3-none-any)."""

    def run(self) -> None:
        self.run_command("build")
        if not self.get_finalized_command("build_ext").module.exists():
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("zoact_kernels._C", sources=[])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )
