// Every instruction and every name of CUDA that the kernels use, each with a host twin, so that a kernel is one text:
// nvcc compiles it for the GPU, and a host compiler compiles it against tests/cuda_shim.h, where fibers are the threads
// of a block. Only this file and philox.h know which compiler reads them. Compile with -fmad=false: an FMA is written
// fmaf, and everything else is rounded on its own, as on the CPU.
//
// Fragments of a warp, lane = 4 * g + t (g = 0 .. 7, t = 0 .. 3); a register holds two 16-bit values, low half first:
//
//   mma m16n8k16     A [16, 16]  a[0] (g, 2t..)  a[1] (g + 8, 2t..)  a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)
//                    B [16, 8]   b[0] (2t.., g)  b[1] (2t + 8.., g)
//                    C [16, 8]   c[0] (g, 2t)    c[1] (g, 2t + 1)    c[2] (g + 8, 2t)    c[3] (g + 8, 2t + 1)
//   ldmatrix x4      lane 8 i + j gives the address of row j of matrix i, 8 values; r[i] gets (g, 2t..) of matrix i
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define ZO_DEVICE __device__ __forceinline__
#else
#include "cuda_shim.h"
#define ZO_DEVICE inline
#endif

#include "../philox.h"

namespace zo {
namespace cuda {

// Bits only: arithmetic on 16-bit floats happens in fma2 and mma, all other in fp32. The toolkit's own types would need
// its headers on a host that has no toolkit.
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

// What one access moves.
struct alignas(16) Word4 { uint32_t w[4]; };
struct alignas(8) Word2 { uint32_t w[2]; };

constexpr int WARP = 32;

// ---------------------------------------------------------------- 16-bit floats

// Narrowing rounds to nearest, ties to even; a NaN stays one, with the bits of the hardware's canonical NaN for bf16.
#ifdef __CUDACC__
ZO_DEVICE float to_float(f16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
ZO_DEVICE f16 to_f16(float f) {
  f16 v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
  return v;
}
ZO_DEVICE bf16 to_bf16(float f) {
  bf16 v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
  return v;
}
#else
inline float to_float(f16 v) {
  _Float16 half;
  memcpy(&half, &v, 2);
  return (float)half;
}
inline f16 to_f16(float f) {
  const _Float16 half = (_Float16)f;
  f16 v;
  memcpy(&v, &half, 2);
  return v;
}
inline bf16 to_bf16(float f) {
  const uint32_t bits = Lane::bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
#endif
ZO_DEVICE float to_float(bf16 v) { return Lane::from_bits((uint32_t)v.bits << 16); }
ZO_DEVICE float to_float(float v) { return v; }

template <class T>
ZO_DEVICE T from_float(float f);
template <>
ZO_DEVICE float from_float<float>(float f) { return f; }
template <>
ZO_DEVICE f16 from_float<f16>(float f) { return to_f16(f); }
template <>
ZO_DEVICE bf16 from_float<bf16>(float f) { return to_bf16(f); }

// Two values rounded into one register, `low` in the low half.
template <class T>
ZO_DEVICE uint32_t pack(float low, float high) {
  return (uint32_t)from_float<T>(low).bits | (uint32_t)from_float<T>(high).bits << 16;
}

// a * b + c on both halves, rounded once each.
#ifdef __CUDACC__
template <class T>
ZO_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
ZO_DEVICE uint32_t fma2<f16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
ZO_DEVICE uint32_t fma2<bf16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
#else
template <class T>
inline float half_of(uint32_t pair, int i) {
  return to_float(T{(uint16_t)(pair >> 16 * i)});
}
template <class T>
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {  // exact in fp32 for the small integers it is used on
  return pack<T>(half_of<T>(a, 0) * half_of<T>(b, 0) + half_of<T>(c, 0),
                 half_of<T>(a, 1) * half_of<T>(b, 1) + half_of<T>(c, 1));
}
#endif

// (a & MASK) | c in one instruction: 0xea is the truth table of (0xf0 & 0xcc) | 0xaa.
template <uint32_t MASK>
ZO_DEVICE uint32_t and_or(uint32_t a, uint32_t c) {
#ifdef __CUDACC__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "n"(MASK), "r"(c));
  return d;
#else
  return (a & MASK) | c;
#endif
}

// Byte i of the result is byte (SELECTOR >> 4 i & 15) of the eight bytes of a, then b.
template <uint32_t SELECTOR>
ZO_DEVICE uint32_t permute(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "n"(SELECTOR));
  return d;
#else
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; i++) d |= (uint32_t)(bytes >> 8 * (SELECTOR >> 4 * i & 15) & 255) << 8 * i;
  return d;
#endif
}

// ---------------------------------------------------------------- memory

// 16 or 8 bytes at once, at an address that they divide.
ZO_DEVICE Word4 load16(const void* p) {
#ifndef __CUDACC__
  shim::aligned(p, 16, "load16");
#endif
  return *(const Word4*)p;
}
ZO_DEVICE void store16(void* p, Word4 v) {
#ifndef __CUDACC__
  shim::aligned(p, 16, "store16");
#endif
  *(Word4*)p = v;
}
ZO_DEVICE Word2 load8(const void* p) {
#ifndef __CUDACC__
  shim::aligned(p, 8, "load8");
#endif
  return *(const Word2*)p;
}
ZO_DEVICE void store8(void* p, Word2 v) {
#ifndef __CUDACC__
  shim::aligned(p, 8, "store8");
#endif
  *(Word2*)p = v;
}

// The block's dynamic shared memory.
ZO_DEVICE char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) char zo_shared_memory[];
  return zo_shared_memory;
#else
  return shim::shared_memory();
#endif
}

// 16 bytes from global to shared memory behind the thread's back, past L1: a weight is read once. They have arrived,
// for this thread, after async_wait; for others, after a barrier on top.
ZO_DEVICE void async_copy16(void* shared, const void* global) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
               "l"(global)
               : "memory");
#else
  shim::async_copy16(shared, global, 16);
#endif
}
// The same with zeros from byte `bytes` on, where nothing is read.
ZO_DEVICE void async_copy16(void* shared, const void* global, int bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(bytes)
               : "memory");
#else
  shim::async_copy16(shared, global, bytes);
#endif
}
// Closes a group of copies; a group may be empty, so that every turn of a loop commits one.
ZO_DEVICE void async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  shim::async_commit();
#endif
}
// Waits until at most PENDING of the groups that this thread committed are under way.
template <int PENDING>
ZO_DEVICE void async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  shim::async_wait(PENDING);
#endif
}

// ---------------------------------------------------------------- a warp together

// The v of lane `lane ^ lanes`. All lanes of the warp call it, as they do the others below.
ZO_DEVICE float shuffle_xor(float v, int lanes) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, v, lanes);
#else
  float all[WARP];
  shim::exchange("shuffle_xor", v, all);
  return all[threadIdx.x % WARP ^ lanes];
#endif
}

// Four matrices of 8 x 8 values from shared memory; see above. `row` is the row that this lane addresses.
ZO_DEVICE void ldmatrix4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((uint32_t)__cvta_generic_to_shared(row))
               : "memory");
#else
  shim::aligned(row, 16, "ldmatrix");
  const void* rows[WARP];
  shim::exchange("ldmatrix", row, rows);
  const int lane = threadIdx.x % WARP;
  for (int i = 0; i < 4; i++) memcpy(&r[i], (const char*)rows[8 * i + lane / 4] + lane % 4 * 4, 4);
#endif
}

// c += A . B, products of 16-bit floats, sums in fp32. The twin adds in ascending k; hardware has an order, and a
// rounding of the partial sums, of its own, so that shim and GPU agree within law 2.3 and not bit for bit.
template <class T>
ZO_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#ifdef __CUDACC__
template <>
ZO_DEVICE void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
ZO_DEVICE void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
template <class T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments { uint32_t a[4], b[2]; } all[WARP];
  shim::exchange("mma", Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, all);
  const int lane = threadIdx.x % WARP;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const float left = half_of<T>(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
      c[i] += left * half_of<T>(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
    }
  }
}
#endif

// ---------------------------------------------------------------- launch

typedef void* Stream;  // cudaStream_t

// kernel(p) on grid x threads; returns null or what went wrong. `shared` bytes of dynamic shared memory.
template <class P>
inline const char* launch(void (*kernel)(P), dim3 grid, int threads, size_t shared, Stream stream, P p) {
#ifdef __CUDACC__
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024)
    error = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  void* arguments[] = {&p};
  if (error == cudaSuccess)
    error = cudaLaunchKernel((const void*)kernel, grid, dim3(threads), arguments, shared, (cudaStream_t)stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  (void)stream;
  return shim::launch(grid, threads, shared, [&] { kernel(p); });
#endif
}

}  // namespace cuda
}  // namespace zo
