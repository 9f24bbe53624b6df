"""csrc/formats.h says the same as formats.py: tables, addresses, values."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from weights import SHAPES, VARIANTS, weight

from zoact_kernels import formats, layouts
from zoact_kernels.formats import FORMATS, PackedWeight

DRIVER = """
#include "formats.h"
extern "C" void constants(int64_t* out, float* tables) {
  using namespace zo;
  const int64_t values[] = {VECTOR, BLOCK, CODES_PER_DWORD, (int64_t)DType::f32, (int64_t)DType::bf16,
                            (int64_t)DType::f16, (int64_t)Layout::cpu};
  memcpy(out, values, sizeof values);
  const Format formats[] = {Format::int4, Format::nf4, Format::fp4};
  for (int f = 0; f < 3; f++)
    for (int q = 0; q < 16; q++) {
      tables[f * 16 + q] = decode_table(formats[f])[q];
      if (table_value(formats[f], q) != decode_table(formats[f])[q]) tables[0] = 99;
    }
}
extern "C" void decode(const void* codes, const void* scale, const void* offset, const float* nested, int format,
                       int layout, int code_dtype, int scale_dtype, int64_t N, int64_t K, int64_t group_size, int flat,
                       float* out, float* factors, float* scales) {
  const zo::Weight w = {codes, scale, offset, nested, (zo::Format)format, (zo::Layout)layout, (zo::DType)code_dtype,
                        (zo::DType)scale_dtype, N, K, group_size, flat != 0};
  for (int64_t n = 0; n < N; n++)
    for (int64_t k = 0; k < K; k++) {
      out[n * K + k] = zo::weight_at(w, n, k);
      factors[n * K + k] = zo::code_at(w, n, k);
      scales[n * K + k] = zo::scale_at(w, n, k);
    }
}
extern "C" int64_t stored(int format, int64_t N, int64_t K) {
  return zo::padded_columns(N) * zo::code_rows((zo::Format)format, K);
}
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++)")
    folder = tmp_path_factory.mktemp("formats")
    (folder / "driver.cpp").write_text(DRIVER)
    include = str(Path(__file__).parents[1] / "csrc")
    command = [
        compiler,
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O1",
        "-ffp-contract=off",
        "-fPIC",
        "-I",
        include,
    ]
    subprocess.run([*command, "-c", "driver.cpp", "-o", "driver.o"], cwd=folder, check=True)
    subprocess.run([compiler, "-shared", "driver.o", "-o", "driver.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "driver.so"))


DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int8: 4}
FORMAT = {name: number for number, name in enumerate(("dense", "int8", "int4", "nf4", "fp4"))}


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def test_header_has_the_tables(header: ctypes.CDLL) -> None:
    values, tables = (ctypes.c_int64 * 7)(), (ctypes.c_float * 48)()
    header.constants(values, tables)
    assert list(values) == [layouts.VECTOR, layouts.BLOCK, 8, 0, 1, 2, 1]
    assert list(FORMATS) == list(FORMAT)
    for i, name in enumerate(("int4", "nf4", "fp4")):
        assert tuple(tables[16 * i : 16 * i + 16]) == FORMATS[name].table
        assert FORMATS[name].table[FORMATS[name].padding] == 0


def decode(header: ctypes.CDLL, p: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """weight_at, code_at and scale_at of every element, [N, K] each."""
    N, K = p.out_features, p.in_features
    results = torch.empty(N, K), torch.empty(N, K), torch.empty(N, K)
    header.decode(
        pointer(p.weight), pointer(p.scale), pointer(p.offset), pointer(p.nested), FORMAT[p.format],
        formats.LAYOUTS.index(p.layout), DTYPE.get(p.weight.dtype, 0), 0 if p.scale is None else DTYPE[p.scale.dtype],
        ctypes.c_int64(N), ctypes.c_int64(K), ctypes.c_int64(p.span), int(p.flat), *map(pointer, results),
    )  # fmt: skip
    return results


@pytest.mark.parametrize("variant", VARIANTS)
def test_header_decodes_the_same(header: ctypes.CDLL, variant: str) -> None:
    """The bits of formats.py, over both layouts."""
    header.stored.restype = ctypes.c_int64
    for N, K in SHAPES:
        row = VARIANTS[variant](weight(N, K, mean=0.3))
        for p in (row,) if row.flat else (row, row.to_layout("cpu")):
            out, factors, scales = decode(header, p)
            assert torch.equal(out, p.dequantize()), (N, K, p.layout)
            if p.scale is not None:
                spread = p.scales() if p.flat else p.scales().repeat_interleave(p.span, 1)[:, :K]
                assert torch.equal(scales, spread)
                table = FORMATS[p.format].table
                assert torch.equal(factors, torch.tensor(table)[p.codes().int()] if table else p.codes().float())
            if p.layout == "cpu":
                assert header.stored(FORMAT[p.format], ctypes.c_int64(N), ctypes.c_int64(K)) == p.weight.numel()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_header_half_floats(header: ctypes.CDLL, dtype: torch.dtype) -> None:
    """All 65536 bit patterns, as dense weights; NaN stays NaN."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(256, 256)
    packed = PackedWeight("dense", "row", -1, 256, 256, bits.view(dtype))
    torch.testing.assert_close(decode(header, packed)[0], packed.weight.float(), rtol=0, atol=0, equal_nan=True)


def test_header_shares_no_symbol(tmp_path: Path) -> None:
    """A function of the header that another translation unit could see would carry AVX-512 code to old CPUs."""
    compiler, nm = shutil.which("g++") or shutil.which("clang++"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("no C++ compiler (g++ or clang++) or no nm")
    (tmp_path / "driver.cpp").write_text(DRIVER)
    include = str(Path(__file__).parents[1] / "csrc")
    subprocess.run([compiler, "-std=c++17", "-O0", "-I", include, "-c", "driver.cpp"], cwd=tmp_path, check=True)
    symbols = subprocess.run([nm, "driver.o"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    shared = [line for line in symbols.splitlines() if "_ZN2zo" in line and line.split()[-2].isupper()]
    assert "weight_at" in symbols and not shared, shared


def test_header_compiles_for_a_gpu(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no CUDA compiler (nvcc)")
    body = (
        "__global__ void f(zo::Weight w, float* out) { out[threadIdx.x] = zo::weight_at(w, blockIdx.x, threadIdx.x); }"
    )
    (tmp_path / "f.cu").write_text(f'#include "formats.h"\n{body}\n')
    include = str(Path(__file__).parents[1] / "csrc")
    subprocess.run([nvcc, "-std=c++17", "-cubin", "-arch=sm_90", "-I", include, "f.cu"], cwd=tmp_path, check=True)
    assert (tmp_path / "f.cubin").stat().st_size > 0
