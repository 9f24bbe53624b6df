// The law of philox.h, many values at once: runs of consecutive elements, at any alignment.
//
//   noise_values(out, seed, param_id, kind, first, count)    elements e = first .. first + count - 1, as floats
//   words_run(out, seed, param_id, stream, first, count)     word e & 3 of block e >> 2: masks, rounding
//   weighted_noise(sum, seeds, weights, S, ...)              g = 0; for s: g = g + weights[s] * Z_s
//
// Philox runs in 64-bit lanes, one block each, because the product of two 32-bit words fills such a lane: a round is
// two multiplies, two shifts and two three-way xors. The upper halves hold left-overs that no multiply reads.
//
// One thread of Zen 4 (a shared virtual machine), ns a value, 4096 values in L1: normal 1.0 (avx512), 1.6 (avx2),
// 3.1 (base); rademacher 0.20, 0.26, 0.39. Tried, within 5 %: two groups at once, Philox one group ahead of Box-Muller.
#pragma once
#include "../philox.h"
#include "kernels.h"
#include "simd.h"

#if ZO_WIDTH == 4 && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ZO_NAMESPACE {
namespace {

constexpr int BLOCKS = W / 2;        // Philox blocks in a vector of 64-bit lanes
constexpr int GROUP = 4 * BLOCKS;    // words or normals they hold: two vectors

ZO_INLINE VU64 multiply_low(VU64 a, uint32_t b) {  // low word of each lane times b
#if ZO_WIDTH == 16
  return (VU64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif ZO_WIDTH == 8
  return (VU64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)  // by name: GCC 12 turns the product by a constant into shifts and adds, 30 % slower
  return (VU64)_mm_mul_epu32((__m128i)a, _mm_set1_epi32((int)b));
#else
  return (a & 0xffffffffu) * (uint64_t)b;
#endif
}

// Which block lane i holds: i / 2, and BLOCKS / 2 further where i is odd. Unpacking two vectors (of even and odd
// normals, of words) then leaves the first half of the group in one and the second half in the other, both in order.
ZO_INLINE VU64 lane_blocks() {
  VU64 v;
  for (int i = 0; i < BLOCKS; i++) v[i] = i / 2 + i % 2 * (BLOCKS / 2);
  return v;
}

template <class V>
ZO_INLINE void interleave32(V a, V b, V& low, V& high) {  // a0 b0 a1 b1 | a2 b2 a3 b3, in each 128 bits
#if ZO_WIDTH == 16
  low = (V)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b);
  high = (V)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b);
#elif ZO_WIDTH == 8
  low = (V)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
  high = (V)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
#else
  low = V{a[0], b[0], a[1], b[1]};
  high = V{a[2], b[2], a[3], b[3]};
#endif
}

ZO_INLINE void interleave64(VU64 a, VU64 b, VU64& low, VU64& high) {
#if ZO_WIDTH == 16
  low = (VU64)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
  high = (VU64)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif ZO_WIDTH == 8
  low = (VU64)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  high = (VU64)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  low = VU64{a[0], b[0]};
  high = VU64{a[1], b[1]};
#endif
}

ZO_INLINE VU even_odd(VU64 even, VU64 odd) {  // low words of `even` in the even 32-bit lanes, those of `odd` in the odd
  return (VU)((even & 0xffffffffu) | (odd << 32));
}

// Word j of blocks `block` + lane_blocks() is the low half of w[j].
ZO_INLINE void philox_blocks(VU64 w[4], int64_t seed, uint32_t param_id, uint32_t stream, uint64_t block) {
  VU64 c0 = lane_blocks() + block, c1 = c0 >> 32, c2 = VU64{} + (uint64_t)param_id, c3 = VU64{} + (uint64_t)stream;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
  for (int round = 0; round < zo::PHILOX_ROUNDS; round++) {
    const VU64 p0 = multiply_low(c0, zo::PHILOX_M0), p1 = multiply_low(c2, zo::PHILOX_M1);
    c0 = (p1 >> 32) ^ c1 ^ (uint64_t)k0;
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
    c3 = p0;
    k0 += zo::PHILOX_W0;
    k1 += zo::PHILOX_W1;
  }
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
}

struct Lanes {  // zo::Lane for W lanes
  typedef VF F;
  typedef VI I;
  typedef VU U;
  static ZO_INLINE F mul(F a, F b) { return a * b; }
  static ZO_INLINE F mul(F a, float b) { return a * b; }
  static ZO_INLINE F add(F a, F b) { return a + b; }
  static ZO_INLINE F add(F a, float b) { return a + b; }
  static ZO_INLINE F sqrt(F a) { return ZO_NAMESPACE::sqrt(a); }
  static ZO_INLINE F to_float(I a) { return ZO_NAMESPACE::to_float(a); }
  static ZO_INLINE U bits(F a) { return (U)a; }
  static ZO_INLINE F from_bits(U a) { return (F)a; }
};

// Groups of words and of normals from block `block` on. A group is two vectors.
inline void words_groups(uint32_t* out, int64_t seed, uint32_t param_id, uint32_t stream, uint64_t block,
                         int64_t groups) {
  for (int64_t g = 0; g < groups; g++, block += BLOCKS, out += GROUP) {
    VU64 w[4], low, high;
    philox_blocks(w, seed, param_id, stream, block);
    interleave64((VU64)even_odd(w[0], w[1]), (VU64)even_odd(w[2], w[3]), low, high);
    store_raw(out, low);
    store_raw(out + W, high);
  }
}

inline void normal_groups(float* out, int64_t seed, uint32_t param_id, uint64_t block, int64_t groups) {
  for (int64_t g = 0; g < groups; g++, block += BLOCKS, out += GROUP) {
    VU64 w[4];
    VF even, odd, low, high;
    philox_blocks(w, seed, param_id, zo::STREAM_NORMAL, block);
    zo::box_muller<Lanes>(even_odd(w[0], w[2]), even_odd(w[1], w[3]), even, odd);
    interleave32(even, odd, low, high);
    store(out, low);
    store(out + W, high);
  }
}

// Items first .. first + count - 1, where make(to, block, groups) makes whole groups: the two ends are cut from one.
template <class T, class Make>
inline void run_of_groups(T* out, uint64_t first, int64_t count, Make make) {
  T cut[GROUP];
  const int64_t skip = first % 4;
  uint64_t block = first / 4;
  if (skip && count > 0) {
    const int64_t n = count < GROUP - skip ? count : GROUP - skip;
    make(cut, block, 1);
    memcpy(out, cut + skip, n * sizeof(T));
    out += n, count -= n, block += BLOCKS;
  }
  if (count <= 0) return;
  const int64_t groups = count / GROUP, rest = count % GROUP;
  make(out, block, groups);
  if (rest == 0) return;
  make(cut, block + groups * BLOCKS, 1);
  memcpy(out + groups * GROUP, cut, rest * sizeof(T));
}

inline void words_run(uint32_t* out, int64_t seed, uint32_t param_id, uint32_t stream, uint64_t first, int64_t count) {
  run_of_groups(out, first, count, [=](uint32_t* to, uint64_t block, int64_t groups) {
    words_groups(to, seed, param_id, stream, block, groups);
  });
}

inline void normal_run(float* out, int64_t seed, uint32_t param_id, uint64_t first, int64_t count) {
  run_of_groups(out, first, count, [=](float* to, uint64_t block, int64_t groups) {
    normal_groups(to, seed, param_id, block, groups);
  });
}

ZO_INLINE VF signs(uint32_t bits) {  // bit i -> lane i: 1 -> +1, 0 -> -1
#if ZO_WIDTH == 16
  return _mm512_mask_blend_ps((__mmask16)bits, set1(-1.0f), set1(1.0f));
#else
  const VU minus = (VU)((set1(bits) & (set1(1u) << iota())) == 0u);
  return (VF)((minus & 0x80000000u) | 0x3f800000u);
#endif
}

inline void rademacher_run(float* out, int64_t seed, uint32_t param_id, uint64_t first, int64_t count) {
  uint32_t words[GROUP + 1] = {};  // the bits of 32 * GROUP elements; the last word is only ever read
  while (count > 0) {
    words_groups(words, seed, param_id, zo::STREAM_RADEMACHER, first / 128, 1);
    int64_t bit = first % 128;
    const int64_t n = count < 32 * GROUP - bit ? count : 32 * GROUP - bit, whole = n / W * W;
    const auto lanes = [&](int64_t i) {
      uint32_t bits;
      memcpy(&bits, (const char*)words + (bit + i) / 8, 4);
      return signs(bits >> (bit + i) % 8);
    };
    for (int64_t i = 0; i < whole; i += W) store(out + i, lanes(i));
    if (whole < n) store(out + whole, lanes(whole), n - whole);
    out += n, first += n, count -= n;
  }
}

inline void noise_values(float* out, int64_t seed, uint32_t param_id, zo::Noise kind, uint64_t first, int64_t count) {
  if (kind == zo::Noise::normal) return normal_run(out, seed, param_id, first, count);
  if (kind == zo::Noise::rademacher) return rademacher_run(out, seed, param_id, first, count);
  if (count > 0) memset(out, 0, count * sizeof(float));
}

constexpr int64_t TILE = 512;  // values a kernel handles at once: noise, words and sums of a tile stay in L1

// Sum over the seeds for `count` <= TILE elements, in the order of the seeds, every product and every sum rounded.
// Whole vectors of `sum` are written.
inline void weighted_noise(float sum[TILE], const int64_t* seeds, const float* weights, int64_t S, uint32_t param_id,
                           zo::Noise kind, uint64_t first, int64_t count) {
  alignas(64) float z[TILE];
  const int64_t whole = (count + W - 1) / W * W;
  if (S < 1) memset(sum, 0, whole * sizeof(float));
  for (int64_t s = 0; s < S; s++) {
    float* const to = s ? z : sum;  // the first in place: 0 + weight * z
    noise_values(to, seeds[s], param_id, kind, first, whole);
    const VF weight = set1(weights[s]);
    for (int64_t i = 0; i < whole; i += W) store(sum + i, (s ? load(sum + i) : VF{}) + weight * load(to + i));
  }
}

}  // namespace
}  // namespace ZO_NAMESPACE
