// zo_perturb: w <- w + sum_s weights[s] Z_s, in place, with Z made on the fly and alive in registers only.
//
//   w  [N, C] fp32, bf16 or fp16, rows w_stride elements apart
//
//   dense      d = g;  noise_scale given: d = g * noise_scale[n, c]                  g = sum_s weights[s] Z_s[n, c]
//   basis      d = 0;  for r = 0 .. R - 1: d = d + g[n, r] * basis[c, r]                    Z is [N, R]
//   then       w = w + d in fp32, rounded once to the dtype of w: to nearest, or stochastically with rounding_seed
//   mask       an element that takes no part keeps its value: magnitude takes |w| <= mask_value, random a share
//              mask_value of the elements (stream 3 of mask_seed), whatever w
//
// Every operation is rounded on its own (-fmad=false) in the order of csrc/cpu/zo_perturb.cpp: the bits are those of
// reference.py. An element has counter e = (row_offset + n) * cols + c for its noise, mask and rounding; with a basis,
// where `cols` counts columns of Z, rounding uses (row_offset + n) * C + c.
//
// A thread owns four neighbouring columns. Dense: of one row; rows that follow one another are taken as one long row,
// so that all four come from one generator call. Basis: of ROWS rows, whose g [ROWS, RANKS] the block makes in shared
// memory and which share each load of the basis. Bound: the generator (dense), the basis from L2 (basis).
#include "noise.cuh"

namespace zo {
namespace cuda {
namespace {

constexpr int THREADS = 128;
constexpr int64_t COLUMNS = 4 * THREADS;  // of a block
constexpr int ROWS = 8;                   // of a block with a basis
constexpr int RANKS = 32;                 // of g in shared memory at a time

// fp32 sums to the dtype of w: to nearest, or up where the random word below the last place says so.
template <class T>
ZO_DEVICE T round_by(float v, bool stochastic, uint32_t word);
template <>
ZO_DEVICE float round_by<float>(float v, bool, uint32_t) { return v; }
template <>
ZO_DEVICE bf16 round_by<bf16>(float v, bool stochastic, uint32_t word) {
  return stochastic ? bf16{(uint16_t)stochastic_bf16(Lane::bits(v), word)} : to_bf16(v);
}
template <>
ZO_DEVICE f16 round_by<f16>(float v, bool stochastic, uint32_t word) {
  return stochastic ? f16{(uint16_t)stochastic_f16(Lane::bits(v), word)} : to_f16(v);
}

// w[0 .. count) += d for elements from counter e on; `left` elements of the row are there.
template <class T>
ZO_DEVICE void add4(const ZoPerturb& p, T* w, const float (&d)[4], uint64_t e, int64_t left) {
  const uint32_t param_id = (uint32_t)*p.param_id;
  const bool whole = is_whole(w, left);
  const int count = left < 4 ? (int)left : 4;
  float clean[4];
  load4(w, whole, count, clean);
  uint32_t mask_words[4] = {}, rounding_words[4] = {};
  uint64_t threshold = 0;
  if (p.mask == Mask::random) {
    threshold = mask_threshold(*p.mask_value);
    words4(*p.mask_seed, param_id, STREAM_MASK, e, mask_words);
  }
  const bool stochastic = sizeof(T) == 2 && p.rounding_seed != nullptr;
  if (stochastic) words4(*p.rounding_seed, param_id, STREAM_ROUNDING, e, rounding_words);
  T out[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    bool part = true;
    if (p.mask == Mask::magnitude) part = fabsf(clean[i]) <= *p.mask_value;
    if (p.mask == Mask::random) part = mask_words[i] < threshold;
    out[i] = round_by<T>(part ? clean[i] + d[i] : clean[i], stochastic, rounding_words[i]);
  }
  store4(w, whole, count, out);
}

// A block is one tile of COLUMNS columns of one row.
template <class T, Noise NOISE>
__global__ void __launch_bounds__(THREADS) dense_kernel(ZoPerturb p) {
  const int64_t tiles = ceil_div(p.C, COLUMNS);
  const int64_t n = blockIdx.x / tiles, c = blockIdx.x % tiles * COLUMNS + 4 * threadIdx.x, left = p.C - c;
  if (left <= 0) return;
  const uint64_t e = (uint64_t)(p.row_offset + n) * (uint64_t)p.cols + (uint64_t)c;
  float d[4];
  weighted_noise4<NOISE>(p.seeds, p.weights, p.S, (uint32_t)*p.param_id, e, d);
  if (p.noise_scale) {
    const float* const from = p.noise_scale + n * p.C + c;
    float factor[4];
    load4(from, is_whole(from, left), left < 4 ? (int)left : 4, factor);
#pragma unroll
    for (int i = 0; i < 4; i++) d[i] = d[i] * factor[i];
  }
  add4(p, (T*)p.w + n * p.w_stride + c, d, e, left);
}

// A block is COLUMNS columns of ROWS rows. Threads past the last column stay for the barriers and store nothing.
template <class T, Noise NOISE>
__global__ void __launch_bounds__(THREADS) basis_kernel(ZoPerturb p) {
  float* const g = (float*)shared_memory();  // [ROWS][RANKS]
  const int64_t tiles = ceil_div(p.C, COLUMNS);
  const int64_t n0 = blockIdx.x / tiles * ROWS, c = blockIdx.x % tiles * COLUMNS + 4 * threadIdx.x, left = p.C - c;
  float d[ROWS][4] = {};
  for (int64_t r0 = 0; r0 < p.R; r0 += RANKS) {
    const int ranks = p.R - r0 < RANKS ? (int)(p.R - r0) : RANKS;
    if (threadIdx.x < ROWS * RANKS / 4) {  // four values each; those past R or N are made and never used
      const int row = threadIdx.x / (RANKS / 4), r = threadIdx.x % (RANKS / 4) * 4;
      float four[4];
      const uint64_t e = (uint64_t)(p.row_offset + n0 + row) * (uint64_t)p.cols + (uint64_t)(r0 + r);
      weighted_noise4<NOISE>(p.seeds, p.weights, p.S, (uint32_t)*p.param_id, e, four);
#pragma unroll
      for (int i = 0; i < 4; i++) g[row * RANKS + r + i] = four[i];
    }
    __syncthreads();
    for (int r = 0; r < ranks; r++) {
      float b[4];
#pragma unroll
      for (int i = 0; i < 4; i++) b[i] = i < left ? p.basis[(c + i) * p.R + r0 + r] : 0.0f;
#pragma unroll
      for (int row = 0; row < ROWS; row++)
#pragma unroll
        for (int i = 0; i < 4; i++) d[row][i] = d[row][i] + g[row * RANKS + r] * b[i];
    }
    __syncthreads();  // before g is made anew
  }
  if (left <= 0) return;
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    const int64_t n = n0 + row;
    const uint64_t e = (uint64_t)(p.row_offset + n) * (uint64_t)p.C + (uint64_t)c;
    if (n < p.N) add4(p, (T*)p.w + n * p.w_stride + c, d[row], e, left);
  }
}

template <class T>
const char* add(ZoPerturb p) {
  const bool normal = p.noise == Noise::normal;
  if (!p.basis && p.w_stride == p.C && p.cols == p.C) {  // rows that follow one another in memory and in counters
    p.row_offset *= p.cols;
    p.C *= p.N, p.N = 1, p.cols = 1;
  }
  const int64_t blocks = ceil_div(p.C, COLUMNS) * (p.basis ? ceil_div(p.N, ROWS) : p.N);
  if (blocks > 0x7fffffff) return "zo_perturb: more than 2^31 blocks of 512 columns";
  const dim3 grid((unsigned)blocks);
  if (p.basis)
    return launch(normal ? basis_kernel<T, Noise::normal> : basis_kernel<T, Noise::rademacher>, grid, THREADS,
                  ROWS * RANKS * sizeof(float), p.stream, p);
  return launch(normal ? dense_kernel<T, Noise::normal> : dense_kernel<T, Noise::rademacher>, grid, THREADS, 0,
                p.stream, p);
}

}  // namespace

const char* zo_perturb(const ZoPerturb& p) {
  if (p.noise == Noise::none) return "zo_perturb: `noise` is none; it has to be normal or rademacher";
  if (p.basis && (p.mask != Mask::none || p.noise_scale))
    return "zo_perturb: `basis` does not go with a mask or `noise_scale`; those act on a dense direction";
  if (p.N <= 0 || p.C <= 0) return nullptr;
  switch (p.dtype) {
    case DType::f32: return add<float>(p);
    case DType::bf16: return add<bf16>(p);
    case DType::f16: return add<f16>(p);
    default: return "zo_perturb: `w` has a dtype other than float32, bfloat16 and float16";
  }
}

}  // namespace cuda
}  // namespace zo
