// The noise of four neighbouring elements in the registers of a thread: philox.h with one generator call for the four
// where the first counter is a multiple of four, two calls elsewhere.
#pragma once
#include "kernels.h"
#include "ptx.cuh"

namespace zo {
namespace cuda {

// v[0 .. 3] = v[by .. by + 3] for by = 0 .. 3 without an index that varies: registers have none.
template <class T>
ZO_DEVICE void shift_down(T (&v)[8], int by) {
#pragma unroll
  for (int i = 0; i < 6; i++) v[i] = by & 1 ? v[i + 1] : v[i];
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = by & 2 ? v[i + 2] : v[i];
}

// Words of elements e .. e + 3 of a stream that has one word an element (rounding, masks).
ZO_DEVICE void words4(int64_t seed, uint32_t param_id, uint32_t stream, uint64_t e, uint32_t (&out)[4]) {
  uint32_t v[8] = {};
  const Words low = words(seed, param_id, stream, e >> 2);
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = low.w[i];
  if (e & 3) {
    const Words high = words(seed, param_id, stream, (e >> 2) + 1);
#pragma unroll
    for (int i = 0; i < 4; i++) v[4 + i] = high.w[i];
    shift_down(v, (int)(e & 3));
  }
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = v[i];
}

// The four values of a block of the normal stream.
ZO_DEVICE void normals(int64_t seed, uint32_t param_id, uint64_t block, float* v) {
  const Words w = words(seed, param_id, STREAM_NORMAL, block);
  box_muller<Lane>(w.w[0], w.w[1], v[0], v[1]);
  box_muller<Lane>(w.w[2], w.w[3], v[2], v[3]);
}

// Z[e .. e + 63] of the rademacher stream as bits, 1 for +1: of one block of 128, or its end and the next one's start.
ZO_DEVICE uint64_t signs64(int64_t seed, uint32_t param_id, uint64_t e) {
  const int bit = (int)(e & 127);
  const Words v = words(seed, param_id, STREAM_RADEMACHER, e >> 7);
  const uint64_t low = v.w[0] | (uint64_t)v.w[1] << 32, high = v.w[2] | (uint64_t)v.w[3] << 32;
  uint64_t next = high;
  if (bit > 64) {
    const Words w = words(seed, param_id, STREAM_RADEMACHER, (e >> 7) + 1);
    next = w.w[0] | (uint64_t)w.w[1] << 32;
  }
  const uint64_t first = bit < 64 ? low : high;
  return bit & 63 ? first >> (bit & 63) | next << (64 - (bit & 63)) : first;
}
// The first four of them as floats.
ZO_DEVICE void signs4(uint64_t bits, float (&z)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) z[i] = bits >> i & 1 ? 1.0f : -1.0f;
}

// Z[e .. e + 3].
template <Noise NOISE>
ZO_DEVICE void noise4(int64_t seed, uint32_t param_id, uint64_t e, float (&z)[4]) {
  if (NOISE == Noise::normal) {
    float v[8] = {};
    normals(seed, param_id, e >> 2, v);
    if (e & 3) {
      normals(seed, param_id, (e >> 2) + 1, v + 4);
      shift_down(v, (int)(e & 3));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) z[i] = v[i];
  } else {
    signs4(signs64(seed, param_id, e), z);
  }
}

// sum_s weights[s] Z_s[e .. e + 3] from zero in ascending order, every operation rounded on its own: the order of
// reference.py. The seeds of a call lie in one cache line or two, and all threads read the same one.
template <Noise NOISE>
ZO_DEVICE void weighted_noise4(const int64_t* seeds, const float* weights, int64_t S, uint32_t param_id, uint64_t e,
                               float (&g)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) g[i] = 0.0f;
  for (int64_t s = 0; s < S; s++) {
    float z[4];
    noise4<NOISE>(seeds[s], param_id, e, z);
    const float weight = weights[s];
#pragma unroll
    for (int i = 0; i < 4; i++) g[i] = g[i] + weight * z[i];
  }
}

// ---------------------------------------------------------------- four neighbouring elements in memory

// p[0 .. count), count <= 4; the others are zero. One access where `whole` says that all four are there and aligned.
ZO_DEVICE void load4(const float* p, bool whole, int count, float (&v)[4]) {
  if (whole) {
    const Word4 bits = load16(p);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = Lane::from_bits(bits.w[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = i < count ? p[i] : 0.0f;
  }
}
ZO_DEVICE void store4(float* p, bool whole, int count, const float (&v)[4]) {
  if (whole) {
    store16(p, {{Lane::bits(v[0]), Lane::bits(v[1]), Lane::bits(v[2]), Lane::bits(v[3])}});
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) p[i] = v[i];
  }
}
template <class T>
ZO_DEVICE void load4(const T* p, bool whole, int count, float (&v)[4]) {
  if (whole) {
    const Word2 bits = load8(p);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = to_float(T{(uint16_t)(bits.w[i / 2] >> 16 * (i % 2))});
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = i < count ? to_float(p[i]) : 0.0f;
  }
}
template <class T>
ZO_DEVICE void store4(T* p, bool whole, int count, const T (&v)[4]) {
  if (whole) {
    store8(p, {{(uint32_t)v[0].bits | (uint32_t)v[1].bits << 16, (uint32_t)v[2].bits | (uint32_t)v[3].bits << 16}});
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) p[i] = v[i];
  }
}

// Whether four elements from p on may go in one access.
template <class T>
ZO_DEVICE bool is_whole(const T* p, int64_t count) {
  return count >= 4 && (uintptr_t)p % (4 * sizeof(T)) == 0;
}

}  // namespace cuda
}  // namespace zo
