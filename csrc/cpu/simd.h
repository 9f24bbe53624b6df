// Vectors of W 32-bit lanes for the ISA this translation unit is compiled for (-DZO_ISA=base|avx2|avx512|avx512vnni).
//
//   VF, VI, VU      W floats, int32s, uint32s: W = 16 (avx512, avx512vnni), 8 (avx2), 4 (base). Operators + - * / & | ^ ~ << >>,
//                   comparisons (a VI of 0 / -1) and `mask ? a : b` are those of GCC's vector extensions.
//   load, store     any alignment, from and to float, bf16 and f16 memory (load: int8 too), whole vectors or the first n
//                   lanes; stores round to nearest even and keep NaN
//   fma             fused on avx2 and avx512, so that these two agree bit for bit; multiply, then add on base
//   Table16         look-up of 16 floats by the low four bits of each lane
//
// Contraction is off (-ffp-contract=off): nothing is fused unless it says fma. Everything lives in an anonymous
// namespace inside zo_<isa>, so that the linker never serves one ISA with the code of another; `base` has no
// intrinsics and runs on any little-endian CPU.
#pragma once
#include <cstdint>
#include <cstring>

#ifndef ZO_ISA
#error "compile with -DZO_ISA=base, avx2 or avx512"
#endif
#define ZO_CAT_(a, b) a##b
#define ZO_CAT(a, b) ZO_CAT_(a, b)
#define ZO_NAMESPACE ZO_CAT(zo_, ZO_ISA)
#define ZO_WIDTH_base 4
#define ZO_WIDTH_avx2 8
#define ZO_WIDTH_avx512 16
#define ZO_WIDTH_avx512vnni 16
#define ZO_WIDTH ZO_CAT(ZO_WIDTH_, ZO_ISA)

#if ZO_WIDTH > 4
#include <immintrin.h>
#endif
#if ZO_WIDTH == 16  // the intrinsic of the ISA, by the end of its name
#define ZO_MM(name) _mm512_##name
#elif ZO_WIDTH == 8
#define ZO_MM(name) _mm256_##name
#endif

#define ZO_INLINE inline __attribute__((always_inline))

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed weights are little-endian");

namespace ZO_NAMESPACE {
namespace {

constexpr int W = ZO_WIDTH;

typedef float VF __attribute__((vector_size(4 * W), may_alias));
typedef int32_t VI __attribute__((vector_size(4 * W), may_alias));
typedef uint32_t VU __attribute__((vector_size(4 * W), may_alias));
typedef uint64_t VU64 __attribute__((vector_size(4 * W), may_alias));
typedef uint16_t VH __attribute__((vector_size(2 * W), may_alias));  // W 16-bit lanes: memory of bf16 and f16

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// ---------------------------------------------------------------- integers and plain floats

template <class V, class T>
ZO_INLINE V load_raw(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
ZO_INLINE void store_raw(T* p, V v) { memcpy(p, &v, sizeof v); }

ZO_INLINE VF load(const float* p) { return load_raw<VF>(p); }
ZO_INLINE VI load(const int32_t* p) { return load_raw<VI>(p); }
ZO_INLINE VU load(const uint32_t* p) { return load_raw<VU>(p); }
ZO_INLINE void store(float* p, VF v) { store_raw(p, v); }
ZO_INLINE void store(int32_t* p, VI v) { store_raw(p, v); }
ZO_INLINE void store(uint32_t* p, VU v) { store_raw(p, v); }

ZO_INLINE VF set1(float a) { return a - VF{}; }
ZO_INLINE VI set1(int32_t a) { return a - VI{}; }
ZO_INLINE VU set1(uint32_t a) { return a - VU{}; }
ZO_INLINE VU iota() {  // 0, 1, 2, ... W - 1
  VU v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}

ZO_INLINE VU float_to_bits(VF v) { return (VU)v; }
ZO_INLINE VF to_float(VI v) { return __builtin_convertvector(v, VF); }

ZO_INLINE VF abs(VF a) { return (VF)((VU)a & 0x7fffffffu); }

#if ZO_WIDTH > 4
ZO_INLINE VF fma(VF a, VF b, VF c) { return ZO_MM(fmadd_ps)(a, b, c); }
ZO_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
ZO_INLINE VF sqrt(VF a) { return ZO_MM(sqrt_ps)(a); }
#else
ZO_INLINE VF fma(VF a, VF b, VF c) { return a * b + c; }
ZO_INLINE float fma(float a, float b, float c) { return a * b + c; }
ZO_INLINE VF sqrt(VF a) {
  for (int i = 0; i < W; i++) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
#endif

// ---------------------------------------------------------------- bf16, f16 and int8 in memory

ZO_INLINE float to_float(float a) { return a; }
ZO_INLINE float to_float(bf16 a) {
  const uint32_t bits = (uint32_t)a.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
ZO_INLINE void round_to(float* p, float a) { *p = a; }
ZO_INLINE void round_to(bf16* p, float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  p->bits = (bits & 0x7fffffffu) > 0x7f800000u ? (uint16_t)(bits >> 16 | 0x40)
                                               : (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Widening loads. GCC 12 makes three instructions of convertvector from 16 bits, and a hundred from 8.
#if ZO_WIDTH == 16
ZO_INLINE VU widen(const uint16_t* p) { return (VU)_mm512_cvtepu16_epi32(load_raw<__m256i>(p)); }
ZO_INLINE VI widen(const int8_t* p) { return (VI)_mm512_cvtepi8_epi32(load_raw<__m128i>(p)); }
#elif ZO_WIDTH == 8
ZO_INLINE VU widen(const uint16_t* p) { return (VU)_mm256_cvtepu16_epi32(load_raw<__m128i>(p)); }
ZO_INLINE VI widen(const int8_t* p) { return (VI)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
ZO_INLINE VU widen(const uint16_t* p) { return __builtin_convertvector(load_raw<VH>(p), VU); }
ZO_INLINE VI widen(const int8_t* p) { return VI{p[0], p[1], p[2], p[3]}; }
#endif

ZO_INLINE float to_float(int8_t a) { return a; }
ZO_INLINE VF load(const int8_t* p) { return to_float(widen(p)); }

ZO_INLINE VF load(const bf16* p) { return (VF)(widen(&p->bits) << 16); }
ZO_INLINE void store(bf16* p, VF v) {
  const VU bits = (VU)v;
  const VU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_raw(p, __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded, VH));
}

#if ZO_WIDTH > 4
constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
ZO_INLINE float to_float(f16 a) { return _cvtsh_ss(a.bits); }
ZO_INLINE void round_to(f16* p, float a) { p->bits = _cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT); }
#if ZO_WIDTH == 16
ZO_INLINE VF load(const f16* p) { return _mm512_cvtph_ps(load_raw<__m256i>(p)); }
ZO_INLINE void store(f16* p, VF v) { store_raw(p, _mm512_cvtps_ph(v, NEAREST)); }
#else
ZO_INLINE VF load(const f16* p) { return _mm256_cvtph_ps(load_raw<__m128i>(p)); }
ZO_INLINE void store(f16* p, VF v) { store_raw(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#endif
#else
ZO_INLINE float to_float(f16 a) {
  const uint32_t sign = (uint32_t)(a.bits & 0x8000u) << 16, rest = a.bits & 0x7fffu;
  uint32_t bits;
  float f;
  if (rest >= 0x7c00u) {  // infinity and NaN
    bits = sign | 0x7f800000u | rest << 13;
  } else if (rest >= 0x0400u) {
    bits = sign | ((rest << 13) + 0x38000000u);
  } else {  // subnormal: rest * 2^-24, exact
    f = (float)rest * 0x1p-24f;
    memcpy(&bits, &f, 4);
    bits |= sign;
  }
  memcpy(&f, &bits, 4);
  return f;
}
ZO_INLINE void round_to(f16* p, float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t h;
  if (bits > 0x7f800000u) {
    h = 0x7e00u | (bits >> 13 & 0x3ffu);  // NaN stays NaN
  } else if (bits >= 0x477ff000u) {       // 65520 and above round to infinity
    h = 0x7c00u;
  } else if (bits >= 0x38800000u) {       // normal
    h = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13;
  } else {                                // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    float f;
    memcpy(&f, &bits, 4);
    f += 0.5f;
    memcpy(&h, &f, 4);
    h -= 0x3f000000u;
  }
  p->bits = (uint16_t)(sign | h);
}
ZO_INLINE VF load(const f16* p) {
  VF v;
  for (int i = 0; i < W; i++) v[i] = to_float(p[i]);
  return v;
}
ZO_INLINE void store(f16* p, VF v) {
  for (int i = 0; i < W; i++) round_to(p + i, v[i]);
}
#endif

// The first n <= W lanes; the others read as zero and are not written.
template <class T>
ZO_INLINE VF load(const T* p, int64_t n) {
  T lanes[W] = {};
  memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
ZO_INLINE void store(T* p, VF v, int64_t n) {
  T lanes[W];
  store(lanes, v);
  memcpy(p, lanes, n * sizeof(T));
}

// ---------------------------------------------------------------- table look-up

// 16 floats, read by the low four bits of each lane; the other bits are ignored.
struct Table16 {
#if ZO_WIDTH == 16
  VF values;
  explicit ZO_INLINE Table16(const float* t) : values(load(t)) {}
  ZO_INLINE VF operator()(VU i) const { return _mm512_permutexvar_ps((__m512i)i, values); }
#elif ZO_WIDTH == 8
  VF low, high;
  explicit ZO_INLINE Table16(const float* t) : low(load(t)), high(load(t + 8)) {}
  ZO_INLINE VF operator()(VU i) const {
    const __m256i index = (__m256i)i;
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                            (VF)(i << 28));
  }
#else
  float values[16];
  explicit ZO_INLINE Table16(const float* t) { memcpy(values, t, sizeof values); }
  ZO_INLINE VF operator()(VU i) const {
    VF v;
    for (int lane = 0; lane < W; lane++) v[lane] = values[i[lane] & 15];
    return v;
  }
#endif
};

// The value of code i of each lane's eight 4-bit codes; `prepare` is called once per vector of dwords.
struct Codebook {  // any 16 values
  Table16 table;
  explicit ZO_INLINE Codebook(const float* values) : table(values) {}
  static ZO_INLINE VU prepare(VU dwords) { return dwords; }
  ZO_INLINE VF operator()(VU dwords, int i) const { return table(dwords >> 4 * i); }
};
#if ZO_WIDTH == 16
typedef Codebook Centred;  // a permute, 15 % faster at one row than gluing the code into a mantissa
#else
struct Centred {  // int4's q - 8: shifts and a conversion; a look-up takes 1.4 times as long on avx2, 3.5 times on base
  explicit ZO_INLINE Centred(const float*) {}
  static ZO_INLINE VU prepare(VU dwords) { return dwords ^ 0x88888888u; }  // q - 8 in two's complement
  ZO_INLINE VF operator()(VU dwords, int i) const { return to_float((VI)(dwords << (28 - 4 * i)) >> 28); }
};
#endif

}  // namespace
}  // namespace ZO_NAMESPACE
