"""csrc/philox.h compiled for this machine: the scalar law on arrays, through tests/philox_driver.cpp and ctypes."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
FLAGS = "-std=c++17 -O2 -shared -fPIC -Wall -Wextra -Werror -Wno-unused-function -ffp-contract=off".split()


@functools.cache
def library() -> ctypes.CDLL:
    """Skips the test where there is no compiler."""
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler (c++, g++, clang++) to compile csrc/philox.h")
    with tempfile.TemporaryDirectory() as folder:  # a loaded library needs no file
        target = Path(folder) / "law.so"
        subprocess.run([compiler, *FLAGS, f"-I{CSRC}", str(HERE / "philox_driver.cpp"), "-o", str(target)], check=True)
        loaded = ctypes.CDLL(str(target))
    loaded.mask_threshold.restype = ctypes.c_uint64
    return loaded


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def words(seed: int, param_id: int, stream: int, block: int) -> list[int]:
    out = np.zeros(4, np.uint32)
    library().words(ctypes.c_int64(seed), ctypes.c_uint32(param_id), stream, ctypes.c_uint64(block), pointer(out))
    return out.tolist()


def noise(kind: str, seed: int, param_id: int, first: int, count: int) -> np.ndarray:
    out = np.zeros(count, np.float32)
    where = ctypes.c_int64(seed), ctypes.c_uint32(param_id), ctypes.c_uint64(first), ctypes.c_int64(count)
    library().noise(kind == "rademacher", *where, pointer(out))
    return out


def box_muller(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = a.astype(np.uint32), b.astype(np.uint32)
    even, odd = np.zeros(a.size, np.float32), np.zeros(a.size, np.float32)
    library().box_muller(pointer(a), pointer(b), ctypes.c_int64(a.size), pointer(even), pointer(odd))
    return even, odd


def stochastic(dtype: torch.dtype, bits: np.ndarray, word: np.ndarray) -> np.ndarray:
    bits, word, out = bits.astype(np.uint32), word.astype(np.uint32), np.zeros(bits.size, np.uint32)
    bf16 = dtype is torch.bfloat16
    library().stochastic(bf16, pointer(bits), pointer(word), ctypes.c_int64(bits.size), pointer(out))
    return out


def mask_threshold(share: float) -> int:
    return library().mask_threshold(ctypes.c_float(share))
