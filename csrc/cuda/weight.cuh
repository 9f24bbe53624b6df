// A stored weight W [N, K] on the device: where its codes lie, what they are worth in fp32, and how they become the
// left operand of a tensor core.
//
// Layout `cuda` of 4-bit codes: tiles of 16 rows (n) x 64 columns (k), tile after tile along k, 512 bytes each; lane
// 4 g + t of a warp owns 16 bytes of it, word i for k = 16 i ..: the fragment a[0 .. 3] of ptx.cuh, where nibble j is
// the low half of a[j] and nibble j + 4 the high one. N and K are filled up with the code that decodes to zero.
//
// Layout `cuda` of int8: tiles of 1024 bytes, first their k < 32, then the others. A lane owns 16 bytes of each half:
// words 2 i and 2 i + 1 for k = 16 i .., four bytes for a[0] and a[1], four for a[2] and a[3].
//
// A dense weight is [N, K] row-major, scales and offsets are [N, groups].
#pragma once
#include "kernels.h"
#include "ptx.cuh"

namespace zo {
namespace cuda {

constexpr int TILE_N = 16, TILE_K = 64;
ZO_HD constexpr int tile_bytes(Format format) { return format == Format::int8 ? TILE_N * TILE_K : TILE_N * TILE_K / 2; }

// What a kernel is told of it. Sizes are 32 bits wide: a GPU divides 64 bits by calling a subroutine.
struct Stored {
  const void *codes, *scale, *offset;
  const float* nested;
  Format format;
  DType scale_dtype;
  int N, K;
  int group_size, groups;  // of a scale; scales of a row
  int blocks;              // tiles along k
  float table[16];         // the value of a code before the scale, q - 8 for int4
};

namespace {

// From the fields that ZoLinear and Dequantize have in common.
template <class P>
Stored stored_of(const P& p) {
  Stored w = {p.codes, p.scale, p.offset, p.nested, p.format, p.scale_dtype, (int)p.N, (int)p.K, (int)p.group_size,
              (int)ceil_div(p.K, p.group_size), (int)ceil_div(p.K, TILE_K), {}};
  for (int i = 0; i < 16 && is_4bit(p.format); i++) w.table[i] = table_value(p.format, i);
  return w;
}

// ---------------------------------------------------------------- scales

// Element i of an array of fp32, fp16 or bf16: biases and scales, few enough for a branch that all threads take alike.
ZO_DEVICE float scalar_at(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return ((const float*)p)[i];
  if (dtype == DType::f16) return to_float(((const f16*)p)[i]);
  return to_float(((const bf16*)p)[i]);
}

// The scale of row n and group `group`, 0 outside. Nested scales as bitsandbytes decodes them: a product rounded, then
// a sum rounded.
ZO_DEVICE float scale_at(const Stored& w, int n, int group) {
  const int64_t i = (int64_t)n * w.groups + group;
  if (n >= w.N || group >= w.groups) return 0.0f;
  if (w.scale_dtype != DType::u8) return scalar_at(w.scale, w.scale_dtype, i);
  return w.nested[((const uint8_t*)w.scale)[i]] * w.nested[257 + (i >> 8)] + w.nested[256];
}
ZO_DEVICE float offset_at(const Stored& w, int n, int group) {
  const bool there = w.offset && n < w.N && group < w.groups;
  return there ? scalar_at(w.offset, w.scale_dtype, (int64_t)n * w.groups + group) : 0.0f;
}

// ---------------------------------------------------------------- codes

// Eight codes of a word as the left operand: nibbles j and j + 4 become the halves of a[j].
template <class T>
ZO_DEVICE void int4_fragment(uint32_t word, uint32_t (&a)[4]);
template <>
ZO_DEVICE void int4_fragment<f16>(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2, word >>= 8) {
    a[i] = fma2<f16>(and_or<0x000f000fu>(word, 0x64006400u), 0x3c003c00u, 0xe408e408u);      // (1024 + q) - 1032
    a[i + 1] = fma2<f16>(and_or<0x00f000f0u>(word, 0x64006400u), 0x2c002c00u, 0xd480d480u);  // (1024 + 16 q) / 16 - 72
  }
}
template <>
ZO_DEVICE void int4_fragment<bf16>(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++, word >>= 4)
    a[i] = fma2<bf16>(and_or<0x000f000fu>(word, 0x43004300u), 0x3f803f80u, 0xc308c308u);  // (128 + q) - 136
}

// The same of eight bytes.
template <class T>
ZO_DEVICE void int8_fragment(uint32_t low, uint32_t high, uint32_t (&a)[4]);
template <>
ZO_DEVICE void int8_fragment<f16>(uint32_t low, uint32_t high, uint32_t (&a)[4]) {
  const uint32_t pairs[4] = {permute<0x4140>(low ^ 0x80808080u, 0x64646464u),
                             permute<0x4342>(low ^ 0x80808080u, 0x64646464u),
                             permute<0x4140>(high ^ 0x80808080u, 0x64646464u),
                             permute<0x4342>(high ^ 0x80808080u, 0x64646464u)};
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = fma2<f16>(pairs[i], 0x3c003c00u, 0xe480e480u);  // (1024 + q + 128) - 1152
}
template <>
ZO_DEVICE void int8_fragment<bf16>(uint32_t low, uint32_t high, uint32_t (&a)[4]) {
  const uint32_t pairs[4] = {permute<0x4140>(low, 0x43434343u), permute<0x4342>(low, 0x43434343u),
                             permute<0x4140>(high, 0x43434343u), permute<0x4342>(high, 0x43434343u)};
#pragma unroll
  for (int i = 0; i < 4; i++)  // q = low seven bits - 128 sign: (128 + seven bits) - 128, or - 256
    a[i] = fma2<bf16>(pairs[i] & 0xff80ff80u, 0xbf80bf80u, pairs[i] & 0xff7fff7fu);
}

// The same through a codebook in shared memory: 16 words in 16 banks, so that lanes never wait for one another.
// scales[0] is of row g, scales[1] of row g + 8.
template <class T>
ZO_DEVICE void table_fragment(uint32_t word, const float* table, const float (&scales)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    a[i] = pack<T>(table[word >> 4 * i & 15] * scales[i & 1], table[word >> (4 * i + 16) & 15] * scales[i & 1]);
}

// The tile of row n and column k.
ZO_DEVICE const char* tile_at(const Stored& w, int n, int k) {
  return (const char*)w.codes + ((int64_t)(n / TILE_N) * w.blocks + k / TILE_K) * tile_bytes(w.format);
}

// Byte i of a word of int8.
ZO_DEVICE float byte_at(uint32_t word, int i) { return (float)(int8_t)(word >> 8 * i & 255); }

// D(W) of a code whose value in the table is c, the bits of reference.dequantize in fp32. An offset is added in one
// rounding; the reference adds in fp64 first, which is the same but for offsets of less than 2^-52 of the weight.
ZO_DEVICE float weight_of(const Stored& w, float c, float scale, float offset) {
  return w.offset ? fmaf(c + 8.0f, scale, offset) : c * scale;
}

// D(W)[n, k .. k + 3] in layout `cuda`; n < N, k a multiple of 4 below K. `table` is w.table in shared memory.
ZO_DEVICE void four_weights(const Stored& w, const float* table, int n, int k, float (&v)[4]) {
  const int lane = n % 8 * 4 + k % 8 / 2, column = k % TILE_K, row = n / 8 % 2, high = column % 16 / 8;  // of a[..]
  const bool bytes = w.format == Format::int8;
  const char* const word =
      tile_at(w, n, k) + lane * 16 + (bytes ? column / 32 * 512 + column % 32 / 16 * 8 + high * 4 : column / 16 * 4);
  const uint32_t words[2] = {*(const uint32_t*)word, *(const uint32_t*)(word + 16)};  // k, k + 1; k + 2, k + 3
  const int group = k / w.group_size;
  const float scale = scale_at(w, n, group), offset = offset_at(w, n, group);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float c = bytes ? byte_at(words[i / 2], 2 * row + i % 2)
                          : table[words[i / 2] >> 4 * (row + 2 * high + 4 * (i % 2)) & 15];
    v[i] = weight_of(w, c, scale, offset);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace zo
