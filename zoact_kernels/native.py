"""The compiled kernels, of the CPU and of CUDA: found once, when first asked for; or the reason why there are none.

`setup.py` compiles csrc into `zoact_kernels._C` (arguments: `_C.pyi`) and `_cuda.so`, and records what it built, or why
it built nothing, in `_build.json` beside them. Importing this file loads neither.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "uint8": "u8", "int8": "i8", "int64": "i64"}
CUDA_FUNCTIONS = ("zo_linear", "zo_dense_linear", "zo_update", "zo_perturb", "dequantize")


def module() -> Any:
    """The compiled module `zoact_kernels._C`, or None (then `why_missing()` tells the reason)."""
    return _load()[0]


def why_missing() -> str:
    """Why there is no compiled module; "" when there is one."""
    return _load()[1]


@functools.cache
def enum(kind: str, name: str) -> int:
    """The number of an enum value in csrc: enum("DType", "bf16")."""
    return module().ENUMS[kind][name]


@functools.cache
def dtype(dtype: Any) -> int:
    """The number of a torch.dtype in csrc."""
    return enum("DType", DTYPES[str(dtype).removeprefix("torch.")])


@functools.cache
def isas() -> tuple[str, ...]:
    """What this CPU can run of "avx512vnni", "avx512", "avx2", "base", best first; () without a compiled module."""
    compiled = module()
    return compiled.isas() if compiled else ()


def threads() -> int:
    """Threads a kernel may use: torch's own setting, `torch.set_num_threads`."""
    import torch

    return torch.get_num_threads()


def cuda() -> ctypes.CDLL | None:
    """The compiled CUDA kernels (csrc/cuda/kernels.h); None without them, and where torch sees no CUDA device."""
    return _load_cuda()[0]


def why_no_cuda() -> str:
    """Why the CUDA kernels cannot be had; "" when they are loaded, or are there and torch sees no CUDA device."""
    return _load_cuda()[1]


def cuda_archs() -> tuple[str, ...]:
    """What the CUDA kernels are compiled for, "80", "90a", ...; they hold PTX of the last one, for GPUs to come."""
    archs = build().get("cuda_archs", ())
    assert isinstance(archs, list | tuple)
    return tuple(archs)


def build() -> dict[str, object]:
    """The record of the build: compiler, isas and openmp, or why_missing; {} if setup.py never ran."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    import torch  # noqa: F401  first: the module then shares torch's libgomp, hence its threads

    try:
        return importlib.import_module("zoact_kernels._C"), ""
    except ModuleNotFoundError:
        reason = build().get("why_missing", "it was never built; run `make build` or `pip install .`")
        return None, f"the CPU kernels are not compiled: {reason}"
    except ImportError as error:  # another Python, a missing libgomp or libstdc++
        return None, f"the compiled CPU kernels do not load: {error}"


def _driver_version() -> int:
    """Major version of CUDA that the driver knows; 0 without one."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value // 1000


@functools.cache
def _load_cuda() -> tuple[ctypes.CDLL | None, str]:
    import torch

    path = Path(__file__).with_name("_cuda.so")
    if module() is None:
        return None, why_missing()  # it knows the numbers of the enums
    if not path.exists():
        reason = build().get("why_no_cuda", "they were never built; run `ZOACT_BUILD_CUDA=1 pip install .`")
        return None, f"the CUDA kernels are not compiled: {reason}"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None, ""
    needs, driver = str(build().get("cuda_version", "")), _driver_version()
    if needs and 0 < driver < int(needs.partition(".")[0]):
        return None, f"the CUDA kernels are compiled by CUDA {needs}, and the driver of this GPU knows CUDA {driver}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:  # of another platform, cut short, a missing libstdc++
        return None, f"the compiled CUDA kernels do not load: {error}"
    missing = [name for name in CUDA_FUNCTIONS if not hasattr(library, name)]
    if missing:
        return None, f"the compiled CUDA kernels are of another version, without {', '.join(missing)}: build them anew"
    return library, ""
