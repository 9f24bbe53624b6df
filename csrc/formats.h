// Stored weights, for host and device: what the bytes of a packed weight mean, one element at a time.
//
//   dense   fp32, bf16, fp16                     w = c
//   int8    int8                                 w = q * scale
//   int4    two codes a byte, low nibble first   w = (q - 8) * scale, or q * scale + offset
//   nf4     two codes a byte, low nibble first   w = table[q] * scale       codebook of QLoRA, arXiv 2305.14314
//   fp4     two codes a byte, low nibble first   w = table[q] * scale       sign, two exponent bits, one mantissa bit
//
// Layout `row` is canonical: codes [N, ceil(K / 2)] bytes (int8, dense: [N, K]), scale and offset [N, groups].
//
// Layout `cpu` puts output columns in vector lanes. N is padded to whole vectors of 16; blocks hold 64 columns, the last
// one whatever remains. Row r of a block is the r-th dword of each of its columns (a dword is eight 4-bit codes, lowest
// nibble = lowest k), the r-th code (int8, dense) or the r-th group (scale, offset), so that every tensor [N, C] has one
// address rule: block start + r * width + column. K is padded to 8 by codes that decode to zero.
//
// Kernels decode vectors of codes themselves; the accessors below state the meaning, serve odd corners and are what
// tests compare zoact_kernels/formats.py with (tests/test_formats.py). Everything here has internal linkage: a kernel
// source is compiled once per ISA, and the linker must not serve one ISA with the code of another.
#pragma once
#include <cstdint>
#include <cstring>

#include "philox.h"  // ZO_HD

namespace zo {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, u8 = 3, i8 = 4, i64 = 5 };
enum class Format : int32_t { dense = 0, int8 = 1, int4 = 2, nf4 = 3, fp4 = 4 };
enum class Layout : int32_t { row = 0, cpu = 1 };

// A stored weight W [N, K]. `codes` is null for W = 0 (a pure noise product).
struct Weight {
  const void* codes;
  const void* scale;    // [N, ceil(K / group_size)] row layout; [blocks, groups, width] cpu layout; flat for `flat`
  const void* offset;   // like scale, int4 only; null for w = (q - 8) * scale
  const float* nested;  // scale is u8: 256 code values, then one offset, then one absmax per 256 scales
  Format format;
  Layout layout;
  DType code_dtype;   // of a dense weight
  DType scale_dtype;  // f32, bf16, f16, or u8 with `nested`
  int64_t N, K;
  int64_t group_size;  // resolved: K for "one group per row"
  bool flat;           // nf4/fp4 whose blocks run across rows: element (n, k) belongs to scale (n * K + k) / group_size
};

// ---------------------------------------------------------------- decode tables

// The 16 values of a 4-bit format as floats: the centred code of int4, the codebook of nf4 and fp4.
#define ZO_INT4_TABLE {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}
#define ZO_NF4_TABLE                                                                                              \
  {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,               \
   -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,                \
   0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}
#define ZO_FP4_TABLE                                                                                        \
  {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12,                         \
   0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12}

static constexpr float int4_table[16] = ZO_INT4_TABLE;  // for vector kernels, which keep a table in registers
static constexpr float nf4_table[16] = ZO_NF4_TABLE;
static constexpr float fp4_table[16] = ZO_FP4_TABLE;

static inline const float* decode_table(Format format) {
  return format == Format::nf4 ? nf4_table : format == Format::fp4 ? fp4_table : int4_table;
}

// One entry of it, on host and device.
ZO_HD static inline float table_value(Format format, int code) {
  constexpr float table[3][16] = {ZO_INT4_TABLE, ZO_NF4_TABLE, ZO_FP4_TABLE};
  return table[(int)format - (int)Format::int4][code];
}

// The code that decodes to zero: it fills K up to a multiple of 8.
ZO_HD static inline int padding_code(Format format) {
  return format == Format::int4 ? 8 : format == Format::nf4 ? 7 : 0;
}

static_assert(int4_table[8] == 0 && nf4_table[7] == 0 && fp4_table[0] == 0, "padding codes decode to zero");

// ---------------------------------------------------------------- geometry of layout `cpu`

static constexpr int64_t VECTOR = 16;          // columns of a vector: one zmm of dwords
static constexpr int64_t BLOCK = 4 * VECTOR;   // columns of a block
static constexpr int64_t CODES_PER_DWORD = 8;  // consecutive k of one column

static_assert(4 * CODES_PER_DWORD == 8 * sizeof(int32_t), "a dword is eight 4-bit codes");
static_assert(BLOCK % VECTOR == 0 && VECTOR * sizeof(float) == 64, "a vector is a cache line of floats");

ZO_HD static inline bool is_4bit(Format format) { return format >= Format::int4; }
ZO_HD static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
ZO_HD static inline int64_t padded_columns(int64_t N) { return ceil_div(N, VECTOR) * VECTOR; }
ZO_HD static inline int64_t padded_codes(int64_t K) { return ceil_div(K, CODES_PER_DWORD) * CODES_PER_DWORD; }
ZO_HD static inline int64_t groups_of(const Weight& w) { return ceil_div(w.K, w.group_size); }

// Columns that block `block` stores: 64, or 16, 32, 48 or 64 for the last one.
ZO_HD static inline int64_t block_width(int64_t N, int64_t block) {
  const int64_t rest = padded_columns(N) - block * BLOCK;
  return rest < BLOCK ? rest : BLOCK;
}

// Rows r of a block of codes: dwords of a 4-bit format, codes of int8 (both padded to 8), values of dense.
ZO_HD static inline int64_t code_rows(Format format, int64_t K) {
  return is_4bit(format) ? padded_codes(K) / CODES_PER_DWORD : format == Format::int8 ? padded_codes(K) : K;
}

// Where column n, row r of a tensor with C rows a block lies: in dwords, bytes, values or scales alike.
ZO_HD static inline int64_t cpu_index(int64_t N, int64_t C, int64_t n, int64_t r) {
  const int64_t block = n / BLOCK;
  return block * BLOCK * C + r * block_width(N, block) + (n - block * BLOCK);
}

// ---------------------------------------------------------------- scalars in memory

ZO_HD static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
ZO_HD static inline float f16_value(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest < 0x0400u) return (sign ? -0x1p-24f : 0x1p-24f) * (float)rest;  // subnormal
  return float_of_bits(sign | ((rest << 13) + (rest < 0x7c00u ? 0x38000000u : 0x70000000u)));
}
ZO_HD static inline float load_scalar(DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case DType::f32: return ((const float*)p)[i];
    case DType::bf16: return float_of_bits((uint32_t)((const uint16_t*)p)[i] << 16);
    case DType::f16: return f16_value(((const uint16_t*)p)[i]);
    case DType::u8: return (float)((const uint8_t*)p)[i];
    case DType::i8: return (float)((const int8_t*)p)[i];
    default: return (float)((const int64_t*)p)[i];
  }
}

// ---------------------------------------------------------------- elements, 0 <= n < N, 0 <= k < K

// The factor of the scale: q - 8, the codebook's value, the int8 code, the dense value.
ZO_HD static inline float code_at(const Weight& w, int64_t n, int64_t k) {
  const int64_t C = code_rows(w.format, w.K);
  if (is_4bit(w.format)) {
    int code;
    if (w.layout == Layout::cpu) {
      const uint32_t dword = ((const uint32_t*)w.codes)[cpu_index(w.N, C, n, k / CODES_PER_DWORD)];
      code = dword >> 4 * (k % CODES_PER_DWORD) & 15;
    } else {
      const int64_t e = w.flat ? n * w.K + k : n * (2 * ceil_div(w.K, 2)) + k;  // in nibbles
      code = ((const uint8_t*)w.codes)[e / 2] >> 4 * (e % 2) & 15;
    }
    return table_value(w.format, code);
  }
  const int64_t i = w.layout == Layout::cpu ? cpu_index(w.N, C, n, k) : n * w.K + k;
  return load_scalar(w.format == Format::int8 ? DType::i8 : w.code_dtype, w.codes, i);
}

// Index of the scale of element (n, k) in row layout: also what selects the absmax of a nested scale.
ZO_HD static inline int64_t scale_index(const Weight& w, int64_t n, int64_t k) {
  return w.flat ? (n * w.K + k) / w.group_size : n * groups_of(w) + k / w.group_size;
}
ZO_HD static inline int64_t stored_scale_index(const Weight& w, int64_t n, int64_t k) {
  return w.layout == Layout::cpu ? cpu_index(w.N, groups_of(w), n, k / w.group_size) : scale_index(w, n, k);
}

// bitsandbytes' 8-bit absmax number i: a product rounded to fp32, then a sum rounded to fp32. `volatile` keeps the two
// roundings apart where a compiler would contract them (nvcc does), at no cost that counts: one scale per group.
ZO_HD static inline float nested_scale(const float* nested, uint8_t code, int64_t i) {
  volatile float product = nested[code] * nested[257 + (i >> 8)];
  return product + nested[256];
}

// The scale of element (n, k); a group's kernel passes the first k of the group. 1 for dense.
ZO_HD static inline float scale_at(const Weight& w, int64_t n, int64_t k) {
  if (w.format == Format::dense) return 1.0f;
  const int64_t i = stored_scale_index(w, n, k);
  if (w.scale_dtype == DType::u8) return nested_scale(w.nested, ((const uint8_t*)w.scale)[i], scale_index(w, n, k));
  return load_scalar(w.scale_dtype, w.scale, i);
}

// The offset of element (n, k), of w = q * scale + offset; without one, that of w = (q - 8) * scale is -8 * scale.
ZO_HD static inline bool has_offset(const Weight& w) { return w.offset != nullptr; }
ZO_HD static inline float offset_at(const Weight& w, int64_t n, int64_t k) {
  return load_scalar(w.scale_dtype, w.offset, stored_scale_index(w, n, k));
}

// D(W)[n, k] rounded to fp32, formats.py `dequantize`: a product alone is rounded once; with an offset the sum is formed
// in fp64. fmaf(q, scale, offset) has the same bits unless 0 < |offset| < 2^-52 * |q * scale|.
ZO_HD static inline float weight_at(const Weight& w, int64_t n, int64_t k) {
  const float c = code_at(w, n, k), scale = scale_at(w, n, k);
  if (!has_offset(w)) return c * scale;
  return (float)((double)(c + 8.0f) * (double)scale + (double)offset_at(w, n, k));
}

}  // namespace zo
