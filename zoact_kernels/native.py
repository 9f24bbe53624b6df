"""The compiled CPU kernels: found once, when first asked for; or the reason why there are none.

`setup.py` compiles csrc into `zoact_kernels._C` (arguments: `_C.pyi`) and records what it built, or why it built
nothing, in `_build.json` beside it. Importing this file loads neither.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any


def module() -> Any:
    """The compiled module `zoact_kernels._C`, or None (then `why_missing()` tells the reason)."""
    return _load()[0]


def why_missing() -> str:
    """Why there is no compiled module; "" when there is one."""
    return _load()[1]


@functools.cache
def isas() -> tuple[str, ...]:
    """What this CPU can run of "avx512vnni", "avx512", "avx2", "base", best first; () without a compiled module."""
    compiled = module()
    return compiled.isas() if compiled else ()


def threads() -> int:
    """Threads a kernel may use: torch's own setting, `torch.set_num_threads`."""
    import torch

    return torch.get_num_threads()


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
