// The noise: a pure function of (seed, parameter, row, column), for g++ and nvcc. zoact_kernels/rng.py says the same in
// NumPy and torch, cpu/noise.h for W lanes; tests/test_rng.py compares all of them with ==.
//
//   key     = (seed & 0xffffffff, seed >> 32)
//   counter = (block & 0xffffffff, block >> 32, param_id, stream)     Philox4x32-10 (Salmon et al. 2011) -> w0 .. w3
//   element (row, col) of a parameter with `cols` columns: e = row * cols + col, 64 bits
//
//   stream  block   element e
//   0       e >> 2  normal: (w0, w1) -> e & 3 = 0, 1; (w2, w3) -> 2, 3; see box_muller
//   1       e >> 7  rademacher: bit e & 31 of word (e >> 5) & 3: 1 -> +1, 0 -> -1
//   2       e >> 2  stochastic rounding: word e & 3
//   3       e >> 2  mask: the element takes part where word e & 3 < floor(share * 2^32)
//
// Known answers (counter; key -> words), from Random123:
//   00000000 x 4; 00000000 x 2                                   -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8
//   ffffffff x 4; ffffffff x 2                                   -> 408f276d 41c83b0e a20bc7c6 6d5451fd
//   243f6a88 85a308d3 13198a2e 03707344; a4093822 299f31d0       -> d16cfe09 94fdcceb 5001e420 24126ea1
// and of the whole law (float64 truth in tests/golden_noise.json; bit patterns of ours):
//   words(seed 0, param_id 1c630b12 ("w"), stream 0, block 0) -> e94e556a 5e310b3f 3580e087 550a0a23
//   box_muller(00000000, 00000000) -> 40b89456 3610f7e5      box_muller(12345678, 3fffffff) -> 356727f8 40132898
//   box_muller(80000000, 9e3779b9) -> bf5e416b bf4b9aa9      box_muller(ffffffff, e0000000) -> 39800003 b97ffff8
//
// Every float operation below is one IEEE operation, rounded to nearest: compile with -ffp-contract=off. Where a
// multiply and the add behind it fuse, 5 % of the normals change, and NumPy, torch and the GPU no longer agree.
#pragma once
#include <cstdint>
#include <cstring>

#ifndef ZO_HD
#ifdef __CUDACC__
#define ZO_HD __host__ __device__
#else
#define ZO_HD
#endif
#endif

namespace zo {

enum Stream : uint32_t { STREAM_NORMAL = 0, STREAM_RADEMACHER = 1, STREAM_ROUNDING = 2, STREAM_MASK = 3 };

// ---------------------------------------------------------------- integers

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;  // multipliers of words 0 and 2
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;  // added to the key after each round
constexpr int PHILOX_ROUNDS = 10;

struct Words { uint32_t w[4]; };

ZO_HD static inline Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < PHILOX_ROUNDS; round++) {
    const uint64_t p0 = (uint64_t)PHILOX_M0 * c0, p1 = (uint64_t)PHILOX_M1 * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += PHILOX_W0;
    k1 += PHILOX_W1;
  }
  return {{c0, c1, c2, c3}};
}

ZO_HD static inline Words words(int64_t seed, uint32_t param_id, uint32_t stream, uint64_t block) {
  const uint64_t key = (uint64_t)seed;
  return philox((uint32_t)block, (uint32_t)(block >> 32), param_id, stream, (uint32_t)key, (uint32_t)(key >> 32));
}

ZO_HD static inline float rademacher(int64_t seed, uint32_t param_id, uint64_t e) {
  const uint32_t word = words(seed, param_id, STREAM_RADEMACHER, e >> 7).w[(e >> 5) & 3];
  return (word >> (e & 31)) & 1 ? 1.0f : -1.0f;
}

// A mask of share p keeps the words below this; p is an fp32 and is clamped to [0, 1], NaN keeps nothing.
ZO_HD static inline uint64_t mask_threshold(float share) {
  return share >= 1.0f ? 1ull << 32 : share > 0.0f ? (uint64_t)((double)share * 4294967296.0) : 0;
}

// ---------------------------------------------------------------- normals

// The operations of box_muller on one lane. cpu/noise.h has the same for W lanes, so that the law is written once.
namespace {  // internal linkage: the linker must not serve one instruction set with the code of another
struct Lane {
  typedef float F;
  typedef int32_t I;
  typedef uint32_t U;
#ifdef __CUDA_ARCH__
  ZO_HD static F mul(F a, F b) { return __fmul_rn(a, b); }
  ZO_HD static F add(F a, F b) { return __fadd_rn(a, b); }
  ZO_HD static F sqrt(F a) { return __fsqrt_rn(a); }
#else
  ZO_HD static F mul(F a, F b) { return a * b; }
  ZO_HD static F add(F a, F b) { return a + b; }
  ZO_HD static F sqrt(F a) { return __builtin_sqrtf(a); }
#endif
  ZO_HD static F to_float(I a) { return (F)a; }  // exact below: 24 bits at most
  ZO_HD static U bits(F a) {
    U u;
    memcpy(&u, &a, 4);
    return u;
  }
  ZO_HD static F from_bits(U a) {
    F f;
    memcpy(&f, &a, 4);
    return f;
  }
};
}  // namespace

// -2 ln(1 + f) = f (L0 + f (L1 + ...)) on [sqrt(1/2) - 1, sqrt(2) - 1], minimax for r = sqrt(-2 ln u): 5.3e-8 in r.
constexpr float LOG_0 = -0x1.000000p+1f, LOG_1 = 0x1.00007ep+0f, LOG_2 = -0x1.555b1ep-1f, LOG_3 = 0x1.ff5b7cp-2f,
                LOG_4 = -0x1.97379ep-2f, LOG_5 = 0x1.615b4cp-2f, LOG_6 = -0x1.4ec72ap-2f, LOG_7 = 0x1.a3644cp-3f;
constexpr float LOG_E = -0x1.62e430p+0f;  // -2 ln 2
// sin(pi/2 t) = t (S0 + t^2 (S1 + ...)) and cos(pi/2 t) = C0 + t^2 (C1 + ...) on [-1/2, 1/2]: error 1.2e-9 and 3.2e-8.
constexpr float SIN_0 = 0x1.921fb4p+0f, SIN_1 = -0x1.4abb68p-1f, SIN_2 = 0x1.46496cp-4f, SIN_3 = -0x1.2a7638p-8f;
constexpr float COS_0 = 1.0f, COS_1 = -0x1.3bd3a2p+0f, COS_2 = 0x1.03b18ep-2f, COS_3 = -0x1.4eb112p-6f;

// Two words -> two normals: even = r cos(2 pi u(b)), odd = r sin(2 pi u(b)), r = sqrt(-2 ln u(a)), where
// u(w) = ((w >> 9) + 1/2) 2^-23.
// Over all 2^23 values of each word: |r - r64| <= 4.7e-7, |sin - sin64| and |cos - cos64| <= 9.7e-8, and so
// |value - float64| <= 1.2e-6 for every pair of words.
template <class T>
ZO_HD static inline void box_muller(typename T::U a, typename T::U b, typename T::F& even, typename T::F& odd) {
  typedef typename T::F F;
  typedef typename T::I I;
  typedef typename T::U U;
  // u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); u is exact: an odd integer below 2^24, times 2^-24
  const F u = T::mul(T::to_float((I)((a >> 8) | 1u)), 0x1p-24f);
  const I shifted = (I)(T::bits(u) - 0x3f3504f3u);  // the pattern of sqrt(1/2) becomes zero
  const F e = T::to_float(shifted >> 23);           // -24 .. 0
  const F f = T::add(T::from_bits(((U)shifted & 0x7fffffu) + 0x3f3504f3u), -1.0f);
  F q = T::add(T::mul(f, LOG_7), LOG_6);
  q = T::add(T::mul(q, f), LOG_5);
  q = T::add(T::mul(q, f), LOG_4);
  q = T::add(T::mul(q, f), LOG_3);
  q = T::add(T::mul(q, f), LOG_2);
  q = T::add(T::mul(q, f), LOG_1);
  q = T::add(T::mul(q, f), LOG_0);
  const F r = T::sqrt(T::add(T::mul(q, f), T::mul(e, LOG_E)));

  // 4 u = quarter + t, t in (-1/2, 1/2): the two top bits rounded by the third, and the signed 21 bits below, exact
  const F t = T::mul(T::to_float(((I)(b << 2) >> 10) | 1), 0x1p-22f);
  const F t2 = T::mul(t, t);
  F s = T::add(T::mul(t2, SIN_3), SIN_2);
  s = T::add(T::mul(s, t2), SIN_1);
  s = T::add(T::mul(s, t2), SIN_0);
  s = T::mul(s, t);
  F c = T::add(T::mul(t2, COS_3), COS_2);
  c = T::add(T::mul(c, t2), COS_1);
  c = T::add(T::mul(c, t2), COS_0);
  const U quarter = b + (1u << 29);  // top two bits: the quarter, 0 .. 3
  const auto swap = (I)(quarter << 1) < 0;  // quarters 1 and 3
  const F x = swap ? s : c, y = swap ? c : s;
  even = T::mul(r, T::from_bits(T::bits(x) ^ ((quarter + (1u << 30)) & 0x80000000u)));  // -cos in quarters 1 and 2
  odd = T::mul(r, T::from_bits(T::bits(y) ^ (quarter & 0x80000000u)));                  // -sin in quarters 2 and 3
}

ZO_HD static inline float normal(int64_t seed, uint32_t param_id, uint64_t e) {
  const Words v = words(seed, param_id, STREAM_NORMAL, e >> 2);
  const bool second = (e & 2) != 0;
  float even, odd;
  box_muller<Lane>(second ? v.w[2] : v.w[0], second ? v.w[3] : v.w[1], even, odd);
  return e & 1 ? odd : even;
}

// ---------------------------------------------------------------- stochastic rounding
//
// From the pattern of an fp32 to the 16 bits of a narrower float: add random bits below its last place and truncate.
// A finite value becomes infinite only where rounding to nearest makes it so; infinity and NaN stay. U is uint32_t, or
// a vector of them.

template <class U>
ZO_HD static inline U stochastic_bf16(U bits, U word) {
  const U sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  U h = (magnitude + (word & 0xffffu)) >> 16;
  h = h > 0x7f7fu ? U{} + 0x7f7fu : h;
  h = magnitude >= 0x7f7f8000u ? U{} + 0x7f80u : h;
  return sign | (magnitude > 0x7f800000u ? U{} + 0x7fc0u : h);
}

// fp16 counts in 2^-24 below 2^-14, so that 126 - exponent bits go instead of 13; below 2^-32 (more than 31 bits) to 0.
template <class U>
ZO_HD static inline U stochastic_f16(U bits, U word) {
  const U sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu, exponent = magnitude >> 23;
  const U drop = (126u - exponent) & 31u;  // of a subnormal
  const U small = (((magnitude & 0x7fffffu) | 0x800000u) + (word & (((U{} + 1u) << drop) - 1u))) >> drop;
  const U large = (magnitude - 0x38000000u + (word & 0x1fffu)) >> 13;
  U h = exponent >= 113u ? large : exponent >= 95u ? small : U{};
  h = h > 0x7bffu ? U{} + 0x7bffu : h;
  h = magnitude >= 0x477ff000u ? U{} + 0x7c00u : h;  // 65520 and above
  return sign | (magnitude > 0x7f800000u ? U{} + 0x7e00u : h);
}

}  // namespace zo
