// zo_perturb: w <- w + sum_s weights[s] Z_s, in place, with Z made on the fly and at most a tile of it alive.
//
//   w  [N, C] fp32, bf16 or fp16, rows w_stride elements apart
//
//   dense      d = g;  noise_scale given: d = g * noise_scale[n, c]                  g = sum_s weights[s] Z_s[n, c]
//   basis      d = 0;  for r = 0 .. R - 1: d = d + g[n, r] * basis[c, r]                    Z is [N, R]
//   then       w = w + d in fp32, rounded once to the dtype of w: to nearest, or stochastically with has_rounding
//   mask       an element that takes no part keeps its value: magnitude takes |w| <= mask_value, random a share
//              mask_value of the elements (stream 3 of mask_seed), whatever w
//
// Every operation is rounded on its own (no FMA), so that all instruction sets and reference.py agree bit for bit. An
// element has counter e = (row_offset + n) * cols + c for its noise, mask and rounding; with a basis, where `cols`
// counts columns of Z, rounding uses (row_offset + n) * C + c. Stochastic rounding of fp32 is no rounding.
//
// Threads share tiles of 512 columns (dense) or blocks of four rows (basis). The basis is copied once into panels of W
// columns, [R][W] each, so that four rows share a load and w is read and written once.
#include <cstdlib>

#include "noise.h"

namespace ZO_NAMESPACE {
namespace {

constexpr int64_t ROWS = 4;  // rows of w that share a pass over the basis: 4 sums, a load and a broadcast fit any ISA

ZO_INLINE void store_stochastic(bf16* p, VF v, VU word) {
  store_raw(p, __builtin_convertvector(zo::stochastic_bf16(float_to_bits(v), word), VH));
}
ZO_INLINE void store_stochastic(f16* p, VF v, VU word) {
  store_raw(p, __builtin_convertvector(zo::stochastic_f16(float_to_bits(v), word), VH));
}

// w[0 .. count) += delta for `count` <= TILE elements from counter e on; delta is readable to whole vectors.
template <class T>
void add_tile(const zo::ZoPerturb& p, T* w, const float* delta, const float* noise_scale, uint64_t e, int64_t count) {
  alignas(64) uint32_t mask_words[TILE], rounding_words[TILE];
  const int64_t whole = (count + W - 1) / W * W;
  const uint64_t threshold = zo::mask_threshold(p.mask_value);
  const bool random = p.mask == zo::Mask::random && threshold <= 0xffffffffu;  // above: all take part
  if (random) words_run(mask_words, p.mask_seed, p.param_id, zo::STREAM_MASK, e, whole);
  const bool rounding = p.has_rounding && sizeof(T) == 2;
  if (rounding) words_run(rounding_words, p.rounding_seed, p.param_id, zo::STREAM_ROUNDING, e, whole);
  for (int64_t i = 0; i < count; i += W) {
    const int64_t n = count - i;
    const VF clean = n >= W ? load(w + i) : load(w + i, n);
    VF d = load(delta + i);
    if (noise_scale) d = d * (n >= W ? load(noise_scale + i) : load(noise_scale + i, n));
    VF v = clean + d;
    if (p.mask == zo::Mask::magnitude) v = abs(clean) <= p.mask_value ? v : clean;
    if (random) v = load(mask_words + i) < (uint32_t)threshold ? v : clean;
    T lanes[W];
    T* to = n >= W ? w + i : lanes;
    if constexpr (sizeof(T) == 2) {
      if (rounding) {
        store_stochastic(to, v, load(rounding_words + i));
      } else {
        store(to, v);
      }
    } else {
      store(to, v);
    }
    if (n < W) memcpy(w + i, lanes, n * sizeof(T));
  }
}

template <class T>
void add_dense(const zo::ZoPerturb& p) {
  // Rows that follow one another in memory and in counters are one long row.
  const bool one_run = p.w_stride == p.C && p.cols == p.C;
  const int64_t N = one_run ? 1 : p.N, C = one_run ? p.N * p.C : p.C, tiles = (C + TILE - 1) / TILE;
  const int64_t items = N * tiles;
  [[maybe_unused]] const int64_t parts = p.threads < 1 ? 1 : p.threads < items ? p.threads : items;
#pragma omp parallel for num_threads((int)parts) if (parts > 1)
  for (int64_t item = 0; item < items; item++) {
    const int64_t n = item / tiles, c = item % tiles * TILE, count = C - c < TILE ? C - c : TILE;
    const uint64_t e = (uint64_t)(p.row_offset + n) * (uint64_t)p.cols + (uint64_t)c;
    alignas(64) float g[TILE];
    weighted_noise(g, p.seeds, p.weights, p.S, p.param_id, p.noise, e, count);
    add_tile(p, (T*)p.w + n * p.w_stride + c, g, p.noise_scale ? p.noise_scale + n * C + c : nullptr, e, count);
  }
}

// d[row][c] for ROWS rows and `count` columns: panels [count / W][R][W] of the basis, g [ROWS][g_stride].
ZO_INLINE void multiply_tile(float d[ROWS][TILE], const float* panels, const float* g, int64_t g_stride, int64_t R,
                             int64_t count) {
  for (int64_t c = 0; c < count; c += W, panels += R * W) {
    VF sum[ROWS] = {};
    for (int64_t r = 0; r < R; r++) {
      const VF b = load(panels + r * W);
      for (int64_t row = 0; row < ROWS; row++) sum[row] = sum[row] + g[row * g_stride + r] * b;
    }
    for (int64_t row = 0; row < ROWS; row++) store(d[row] + c, sum[row]);
  }
}

template <class T>
const char* add_basis(const zo::ZoPerturb& p) {
  const int64_t panels = (p.C + W - 1) / W, blocks = (p.N + ROWS - 1) / ROWS;
  const int64_t parts = p.threads < 1 ? 1 : p.threads < blocks ? p.threads : blocks;
  const int64_t g_stride = (p.R + TILE - 1) / TILE * TILE;  // weighted_noise writes whole vectors
  void* memory = calloc(panels * p.R * W + parts * ROWS * g_stride + W, sizeof(float));
  if (!memory) return "zo_perturb: no memory for a copy of `basis`";
  float* const basis = (float*)(((uintptr_t)memory + 4 * W - 1) / (4 * W) * (4 * W));  // whole vectors are aligned
  float* const gs = basis + panels * p.R * W;
  for (int64_t c = 0; c < p.C; c++)
    for (int64_t r = 0; r < p.R; r++) basis[c / W * W * p.R + r * W + c % W] = p.basis[c * p.R + r];
#pragma omp parallel for num_threads((int)parts) if (parts > 1)
  for (int64_t part = 0; part < parts; part++) {
    float* g = gs + part * ROWS * g_stride;
    alignas(64) float d[ROWS][TILE];
    for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; block++) {
      const int64_t n = block * ROWS, rows = p.N - n < ROWS ? p.N - n : ROWS;
      for (int64_t row = 0; row < rows; row++)
        for (int64_t r = 0; r < p.R; r += TILE) {
          const uint64_t e = (uint64_t)(p.row_offset + n + row) * (uint64_t)p.cols + (uint64_t)r;
          weighted_noise(g + row * g_stride + r, p.seeds, p.weights, p.S, p.param_id, p.noise, e,
                         p.R - r < TILE ? p.R - r : TILE);
        }
      for (int64_t c = 0; c < p.C; c += TILE) {
        const int64_t count = p.C - c < TILE ? p.C - c : TILE;
        multiply_tile(d, basis + c * p.R, g, g_stride, p.R, count);
        for (int64_t row = 0; row < rows; row++) {
          const uint64_t e = (uint64_t)(p.row_offset + n + row) * (uint64_t)p.C + (uint64_t)c;
          add_tile(p, (T*)p.w + (n + row) * p.w_stride + c, d[row], nullptr, e, count);
        }
      }
    }
  }
  free(memory);
  return nullptr;
}

template <class T>
const char* add(const zo::ZoPerturb& p) {
  if (p.basis) return add_basis<T>(p);
  add_dense<T>(p);
  return nullptr;
}

}  // namespace

const char* zo_perturb(const zo::ZoPerturb& p) {
  if (p.noise == zo::Noise::none) return "zo_perturb: `noise` is none; it has to be normal or rademacher";
  if (p.basis && (p.mask != zo::Mask::none || p.noise_scale))
    return "zo_perturb: `basis` does not go with a mask or `noise_scale`; those act on a dense direction";
  if (p.N <= 0 || p.C <= 0) return nullptr;
  switch (p.dtype) {
    case zo::DType::f32: return add<float>(p);
    case zo::DType::bf16: return add<bf16>(p);
    case zo::DType::f16: return add<f16>(p);
    default: return "zo_perturb: `w` has a dtype other than float32, bfloat16 and float16";
  }
}

void noise_run(float* out, int64_t seed, uint32_t param_id, zo::Noise kind, uint64_t first, int64_t count) {
  noise_values(out, seed, param_id, kind, first, count);
}

}  // namespace ZO_NAMESPACE
