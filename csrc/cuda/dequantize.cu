// dequantize: out [rows, K] fp32 | fp16 | bf16 = D(W)[row_start .. row_start + rows], W int4, int8, nf4, fp4 or dense
//
// The bits of reference.dequantize: the weight in fp32 (weight.cuh), rounded once more to the dtype of out.
//
//   codes   a thread takes what four neighbouring lanes of a tile of layout `cuda` have of 16 k of rows g and g + 8, in
//           stores of 16 bytes. A warp takes a tile, whose bytes leave memory once.
//   dense   eight neighbours a thread; rows that follow one another are one long row.
//
// Bound: bandwidth, mostly that of out.
#include "noise.cuh"
#include "weight.cuh"

namespace zo {
namespace cuda {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// ---------------------------------------------------------------- eight neighbours

ZO_DEVICE void load_eight(const float* from, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = Lane::from_bits(load16(from + i / 4 * 4).w[i % 4]);
}
template <class T>
ZO_DEVICE void load_eight(const T* from, float (&v)[8]) {
  const Word4 bits = load16(from);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = to_float(T{(uint16_t)(bits.w[i / 2] >> 16 * (i % 2))});
}
ZO_DEVICE void store_eight(float* to, const float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4)
    store16(to + i, {{Lane::bits(v[i]), Lane::bits(v[i + 1]), Lane::bits(v[i + 2]), Lane::bits(v[i + 3])}});
}
template <class T>
ZO_DEVICE void store_eight(T* to, const float (&v)[8]) {
  store16(to, {{pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])}});
}

// Whether all eight are there, at an address that 16 bytes divide.
ZO_DEVICE bool are_whole(const void* p, int64_t left) { return left >= 8 && (uintptr_t)p % 16 == 0; }

// to[0 .. 8) = v, or the first `left` of them.
template <class T>
ZO_DEVICE void store_some(T* to, int64_t left, const float (&v)[8]) {
  if (are_whole(to, left)) {
    store_eight(to, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < left) to[i] = from_float<T>(v[i]);
  }
}

// ---------------------------------------------------------------- kernels

struct Unpack {
  Stored w;
  void* out;
  int row_start, stop;  // rows
};

// A warp is a tile, counted along k from the one that holds row_start.
template <class T, bool BYTES>
__global__ void __launch_bounds__(THREADS) unpack_kernel(const __grid_constant__ Unpack p) {
  const Stored& w = p.w;
  float* const table = (float*)shared_memory();
  if (threadIdx.x < 16) table[threadIdx.x] = w.table[threadIdx.x];
  __syncthreads();  // the table is there
  const int lane = threadIdx.x % WARP, g = lane / 4, step = lane % 4;
  const int tile = blockIdx.x * WARPS + threadIdx.x / WARP;
  const int row = p.row_start / TILE_N + tile / w.blocks, column = tile % w.blocks;  // of tiles
  if (row * TILE_N >= p.stop) return;
  const char* const from =
      tile_at(w, row * TILE_N, column * TILE_K) + g * 64 + (BYTES ? step / 2 * 512 + step % 2 * 8 : step * 4);
  Word2 words[4];  // k = 2 t, 2 t + 1 and 8 more, of both rows: four bytes and four, or eight nibbles
#pragma unroll
  for (int t = 0; t < 4; t++) {
    if (BYTES) words[t] = load8(from + t * 16);
    else words[t].w[0] = *(const uint32_t*)(from + t * 16);
  }
#pragma unroll
  for (int low = 0; low < 2; low++) {
    const int n = row * TILE_N + g + 8 * low;
    if (n < p.row_start || n >= p.stop) continue;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int k = column * TILE_K + step * 16 + half * 8, group = k / w.group_size;  // groups are multiples of 8
      if (k >= w.K) continue;
      const float scale = scale_at(w, n, group), offset = offset_at(w, n, group);
      float v[8];  // W[n, k .. k + 7]
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float c = BYTES ? byte_at(words[i / 2].w[half], 2 * low + i % 2)
                              : table[words[i / 2].w[0] >> 4 * (low + 2 * half + 4 * (i % 2)) & 15];
        v[i] = weight_of(w, c, scale, offset);
      }
      store_some((T*)p.out + (int64_t)(n - p.row_start) * w.K + k, w.K - k, v);
    }
  }
}

struct Copy {
  const void* from;
  void* out;
  int64_t count;  // of elements
};

// Dense: from S to T through fp32, which holds both.
template <class S, class T>
__global__ void __launch_bounds__(THREADS) copy_kernel(Copy p) {
  const int64_t first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8, left = p.count - first;
  if (left <= 0) return;
  const S* const from = (const S*)p.from + first;
  float v[8] = {};
  if (are_whole(from, left)) {
    load_eight(from, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < left) v[i] = to_float(from[i]);
  }
  store_some((T*)p.out + first, left, v);
}

// ---------------------------------------------------------------- launch

template <class T>
const char* unpack(const Dequantize& d) {
  const Stored w = stored_of(d);
  // Whole tiles of rows, so that the first and the last may hold rows that nobody asked for.
  const int64_t tiles = (ceil_div(d.row_start + d.rows, TILE_N) - d.row_start / TILE_N) * w.blocks;
  if (tiles > 0x7fffffff) return "more than 2^31 tiles of 16 x 64";
  const dim3 grid((unsigned)ceil_div(tiles, WARPS));
  return launch(d.format == Format::int8 ? unpack_kernel<T, true> : unpack_kernel<T, false>, grid, THREADS,
                16 * sizeof(float), d.stream, Unpack{w, d.out, (int)d.row_start, (int)(d.row_start + d.rows)});
}

template <class S, class T>
const char* copy(const Dequantize& d) {
  const int64_t count = d.rows * d.K, blocks = ceil_div(count, 8 * THREADS);
  if (blocks > 0x7fffffff) return "more than 2^41 elements";
  return launch(copy_kernel<S, T>, dim3((unsigned)blocks), THREADS, 0, d.stream,
                Copy{(const S*)d.codes + d.row_start * d.K, d.out, count});
}

template <class T>
const char* run(const Dequantize& d) {
  if (d.format != Format::dense) return unpack<T>(d);
  switch (d.code_dtype) {
    case DType::f32: return copy<float, T>(d);
    case DType::f16: return copy<f16, T>(d);
    case DType::bf16: return copy<bf16, T>(d);
    default: return "`weight` has a dtype other than float32, bfloat16 and float16";
  }
}

}  // namespace

const char* dequantize(const Dequantize& d) {
  const int64_t most = 1 << 24;  // what 32-bit sizes bear
  if (d.rows <= 0 || d.K <= 0) return nullptr;
  if (d.N > most || d.K > most) return "N or K is above 2^24";
  switch (d.dtype) {
    case DType::f32: return run<float>(d);
    case DType::f16: return run<f16>(d);
    case DType::bf16: return run<bf16>(d);
    default: return "`dtype` is not float32, bfloat16 or float16";
  }
}

}  // namespace cuda
}  // namespace zo
