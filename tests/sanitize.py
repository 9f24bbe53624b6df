"""`make sanitize`: compile the kernels and sanitize_driver.cpp under sanitizers, and run the calls that tests dumped.

    python tests/sanitize.py FOLDER [WORKERS]

FOLDER holds the dumps of `pytest --dump-calls FOLDER`, and takes the objects; WORKERS compilers run at a time.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import setup  # noqa: E402

# GCC has no float-cast-overflow in `undefined`, and a float too large for an integer is undefined all the same.
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all".split()
FLAGS = [*SANITIZERS, *"-g -O1 -fno-omit-frame-pointer -DZO_ALWAYS_THREADS".split()]  # the last -O wins


def build(csrc: Path, folder: Path, workers: int, isas: Sequence[str] = tuple(setup.ISAS)) -> Path:
    """The driver with the kernels of `csrc` for those `isas` that the compiler knows; raises setup.CannotBuild."""
    compiler = setup.find_compiler()
    if not setup.accepts(compiler, SANITIZERS):
        raise setup.CannotBuild(f"`{' '.join(compiler)}` cannot build with {SANITIZERS[0]}; CXX chooses another")
    isas = [isa for isa in isas if setup.accepts(compiler, setup.ISAS[isa])]
    openmp = ["-fopenmp"] if setup.accepts(compiler, ["-fopenmp"]) else []
    command = [*compiler, *setup.FLAGS, *setup.WARNINGS, *openmp, *FLAGS, f"-I{csrc}"]

    def compile_one(source: Path, stem: str, flags: list[str]) -> str:
        target = str(folder / f"{stem}.o")
        run = subprocess.run([*command, *flags, "-c", str(source), "-o", target], text=True, capture_output=True)
        if run.returncode:
            raise setup.CannotBuild(f"compiling {source} failed:\n{run.stderr}")
        return target

    jobs = [(ROOT / "tests/sanitize_driver.cpp", "driver", [f"-DZO_HAS_{isa.upper()}" for isa in isas])]
    for source in sorted((csrc / "cpu").glob("*.cpp")):
        jobs += [(source, f"{source.stem}.{isa}", [f"-DZO_ISA={isa}", *setup.ISAS[isa]]) for isa in isas]
    with ThreadPoolExecutor(workers) as pool:
        objects = list(pool.map(compile_one, *zip(*jobs, strict=True)))
    driver = folder / "driver"
    subprocess.run([*compiler, *SANITIZERS, *openmp, *objects, "-o", str(driver)], check=True)
    return driver


def main(folder: Path, workers: int = 2) -> int:
    calls = sorted(folder.glob("*.calls"))
    if not calls:
        sys.exit(f"no calls in {folder}: `pytest --dump-calls {folder}` comes first")
    try:
        driver = build(ROOT / "csrc", folder, workers)
    except setup.CannotBuild as reason:
        sys.exit(f"make sanitize needs a compiler with sanitizers: {reason}")
    return subprocess.run([driver, *calls]).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
