// zo_linear: y_g = x_g . D(W)^T + (x_g . base_basis) . base_coeff^T + (x_g . A) . (C + C_g + sum_s sigmas[g, s] Z_s)^T + bias
//
//   x [M, K], y [M, N] fp32 | bf16 | fp16;  W packed, any format and layout;  A [K, R], C [N, R] fp32;  Z_s made here
//
// A thread owns 64 columns of y and a range of rows at a time, in fp32 scratch (tile.h). Up to SMALL rows, 4-bit codes of
// layout `cpu` are decoded in registers, one permute per 16 weights, and never stored; above that, or in any other
// layout or format, chunks of K become fp32 panels in L1. Both do the same arithmetic. The low-rank terms follow as more
// panels, K being R: C, C_g and the noise are never added to one another before they are multiplied (law 2.5), and the
// noise of a block of columns is made once for all groups. h = x . A is computed once per call.
//
// Bound: decoding and bandwidth up to a few rows, fma above. Tests: tests/test_zo_linear.py.
#include "noise.h"
#include "tile.h"

namespace ZO_NAMESPACE {
namespace {

constexpr int SMALL = W == 16 ? 12 : 4;   // rows up to which codes are decoded in registers, again for each tile
constexpr int SMALL_TILE = 4;            // rows of such a tile: 6 fit, but 3 + 3 is as fast
constexpr int64_t SPAN = 256;            // k that `project` takes at a time
constexpr int64_t RANKS = 32;            // columns of h that one panel takes: sums of 64 rounded twice as far as torch's
constexpr int64_t NOISE_FLOATS = 131072; // 512 KB a thread for the noise panels of a batch of groups

// ---------------------------------------------------------------- few rows: codes straight into fma

template <class Decode, int R, int V>
void multiply_codes(const float* x, int64_t x_stride, const uint32_t* dwords, int64_t columns, int64_t depth,
                    const float* values, const Factors& f, float* main) {
  const Decode decode(values);
  for (int64_t n = 0; n < columns; n += V * W) {
    VF acc[R][V] = {};
    const uint32_t* row = dwords + n;
    for (int64_t k = 0; k < depth; k += 8, row += columns) {
      VU code[V];
      for (int v = 0; v < V; v++) code[v] = Decode::prepare(load(row + v * W));
      const auto step = [&](int i) __attribute__((always_inline)) {
        for (int v = 0; v < V; v++) {
          const VF c = decode(code[v], i);
          for (int r = 0; r < R; r++) acc[r][v] = fma(set1(x[r * x_stride + k + i]), c, acc[r][v]);
        }
      };
      if (depth - k >= 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) step(i);
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
          if (i < depth - k) step(i);
      }
    }
    add_to_main<R, V>(acc, f, n, main);
  }
}

typedef void (*MultiplyCodes)(const float*, int64_t, const uint32_t*, int64_t, int64_t, const float*, const Factors&,
                              float*);
template <class D>
ZO_INLINE MultiplyCodes pick(int64_t columns, int64_t rows) {
  constexpr MultiplyCodes kernels[2][SMALL_TILE] = {
      {multiply_codes<D, 1, narrow>, multiply_codes<D, 2, narrow>, multiply_codes<D, 3, narrow>, multiply_codes<D, 4, narrow>},
      {multiply_codes<D, 1, wide(1)>, multiply_codes<D, 2, wide(2)>, multiply_codes<D, 3, wide(3)>,
       multiply_codes<D, 4, wide(4)>}};
  return kernels[columns == BLOCK][rows - 1];
}

// All rows of x times the codes of one chunk.
void multiply_codes(const Weight& w, const X& x, const Block& block, const Chunk& chunk, int64_t index, Factors f,
                    float* main) {
  const uint32_t* dwords = (const uint32_t*)w.codes + block.n0 * zo::code_rows(w.format, w.K) +
                           chunk.k / zo::CODES_PER_DWORD * block.columns;
  const int64_t tiles = zo::ceil_div(x.M, SMALL_TILE);
  for (int64_t t = 0, m = 0; t < tiles; t++) {
    const int64_t next = (t + 1) * x.M / tiles;
    f.sums = x.sums_of(index, m);
    (w.format == zo::Format::int4 ? pick<Centred> : pick<Codebook>)(block.columns, next - m)(
        x.row(m, chunk), x.row_stride(chunk), dwords, block.columns, chunk.depth, zo::decode_table(w.format), f,
        main + m * BLOCK);
    m = next;
  }
}

// ---------------------------------------------------------------- h = x . basis

template <int J>
void project_row(const float* x, const float* basis, int64_t padded, float* h) {  // J columns of the basis
  VF lanes[J][16 / W] = {};
  for (int64_t k = 0; k < padded; k += 16)
    for (int i = 0; i < 16 / W; i++) {
      const VF a = load(x + k + i * W);
      for (int j = 0; j < J; j++) lanes[j][i] = fma(a, load(basis + j * SPAN + k + i * W), lanes[j][i]);
    }
  for (int j = 0; j < J; j++) h[j] += fold(lanes[j]);
}

// Rows m0 .. m1 - 1 of h [M, R]: 16 partial sums over k, folded every SPAN. `scratch` holds (DEPTH + 1) * SPAN floats.
template <class T>
void project(const T* x, int64_t x_stride, int64_t m0, int64_t m1, int64_t K, const float* basis, int64_t R, float* h,
             float* scratch) {
  if (m0 == m1) return;
  float* across = scratch;  // [R][SPAN]: the basis with k along lanes
  float* row = scratch + DEPTH * SPAN;
  memset(h + m0 * R, 0, (m1 - m0) * R * sizeof(float));
  for (int64_t r0 = 0; r0 < R; r0 += DEPTH) {
    const int64_t ranks = min(DEPTH, R - r0);
    for (int64_t k = 0; k < K; k += SPAN) {
      const int64_t depth = min(SPAN, K - k), padded = (depth + 15) / 16 * 16;
      transpose(basis + k * R + r0, R, depth, ranks, across, SPAN);
      for (int64_t r = 0; r < ranks; r++) memset(across + r * SPAN + depth, 0, (padded - depth) * sizeof(float));
      memset(row + depth, 0, (padded - depth) * sizeof(float));
      for (int64_t m = m0; m < m1; m++) {
        to_floats(row, x + m * x_stride + k, depth);
        int64_t r = 0;
        for (; r + 4 <= ranks; r += 4) project_row<4>(row, across + r * SPAN, padded, h + m * R + r0 + r);
        for (; r < ranks; r++) project_row<1>(row, across + r * SPAN, padded, h + m * R + r0 + r);
      }
    }
  }
}

// ---------------------------------------------------------------- the low-rank terms of one block of columns

struct Rows {  // m0 .. m1 - 1, and where main starts
  int64_t m0, m1;
  float* main;
};

// main += h . matrix^T for matrix [N, R], on the rows `from` .. `to` of the task.
void add_product(const Rows& rows, int64_t from, int64_t to, const float* h, int64_t R, const float* matrix,
                 const Block& block, const float* ones, float* panel) {
  from = max(from, rows.m0), to = min(to, rows.m1);
  for (int64_t r = 0; r < R && from < to; r += RANKS) {
    const int64_t ranks = min(RANKS, R - r);
    columns_panel(matrix, R, block, r, ranks, panel);
    multiply_rows(to - from, h + from * R + r, R, panel, block.columns, ranks, ones,
                  rows.main + (from - rows.m0) * BLOCK);
  }
}

ZO_INLINE bool is_active(const zo::Direction& z, int64_t g) {
  for (int64_t s = 0; s < z.S; s++)
    if (z.sigmas[g * z.S + s] != 0) return true;
  return false;
}

// main += h . (sum_s sigmas[g, s] Z_s)^T. `scratch`: two tiles of RANKS * BLOCK and NOISE_FLOATS.
void add_noise(const Rows& rows, int64_t group_rows, const float* h, int64_t R, const zo::Direction& z,
               const Block& block, const float* ones, float* scratch) {
  float *values = scratch, *tile = values + RANKS * BLOCK, *panels = tile + RANKS * BLOCK;
  for (int64_t r = 0; r < R; r += RANKS) {
    const int64_t ranks = min(RANKS, R - r), size = ranks * block.columns;
    const int64_t end = zo::ceil_div(rows.m1, group_rows), batch = max(1, NOISE_FLOATS / size);
    for (int64_t g0 = rows.m0 / group_rows; g0 < end; g0 += batch) {
      const int64_t g1 = min(end, g0 + batch);
      memset(panels, 0, (g1 - g0) * size * sizeof(float));
      for (int64_t s = 0; s < z.S; s++) {
        const uint64_t first = (uint64_t)(z.row_offset + block.n0) * z.cols + r;
        if (ranks == z.cols) {
          noise_values(values, z.seeds[s], z.param_id, z.noise, first, block.live * ranks);
        } else {
          for (int64_t n = 0; n < block.live; n++)
            noise_values(values + n * ranks, z.seeds[s], z.param_id, z.noise, first + n * z.cols, ranks);
        }
        columns_panel(values, ranks, {0, block.columns, block.live}, 0, ranks, tile);
        for (int64_t g = g0; g < g1; g++) {
          const VF sigma = set1(z.sigmas[g * z.S + s]);
          float* panel = panels + (g - g0) * size;
          for (int64_t i = 0; i < size; i += W) store(panel + i, fma(sigma, load(tile + i), load(panel + i)));
        }
      }
      for (int64_t g = g0; g < g1; g++) {
        const int64_t from = max(g * group_rows, rows.m0), to = min((g + 1) * group_rows, rows.m1);
        if (is_active(z, g))
          multiply_rows(to - from, h + from * R + r, R, panels + (g - g0) * size, block.columns, ranks, ones,
                        rows.main + (from - rows.m0) * BLOCK);
      }
    }
  }
}

// ---------------------------------------------------------------- the base product of one block of columns

void add_base(const Weight& w, const X& x, const Tiles& tiles, const Task& task, float* panel, float* main) {
  float scale[BLOCK], offset[BLOCK];
  const Block& block = task.block;
  const bool in_registers = zo::is_4bit(w.format) && w.layout == zo::Layout::cpu && x.M <= SMALL;
  Factors f = {scale, w.offset ? offset : nullptr, nullptr};
  int64_t index = 0;
  for (Chunk chunk = chunk_at(w, 0); chunk.k < w.K; chunk = chunk_at(w, chunk.k + chunk.depth), index++) {
    chunk_scales(w, block, chunk, scale, offset);
    if (in_registers) multiply_codes(w, x, block, chunk, index, f, main);
    else multiply_chunk(x, tiles, task, 0, chunk, index, codes_panel(w, block, chunk, panel), f, main);
  }
}

}  // namespace

const char* zo_linear(const zo::ZoLinear& p) {
  const int64_t M = p.M, K = p.w.K, R = p.R, base_rank = p.base_basis ? p.base_rank : 0;
  if (M == 0 || p.w.N == 0) return nullptr;
  if (p.G < 1 || M % p.G) return "`x` has a number of rows that its row groups do not divide";
  const bool has_noise = R > 0 && p.z.S > 0 && p.z.noise != zo::Noise::none;
  const bool in_place = p.dtype == zo::DType::f32 && M <= ROWS;
  const Tiles tiles(M, 1);
  const Plan plan(p.w, tiles, p.threads, 1);

  // Shared: packed x, its sums, h, base h. Per thread: panel, main, noise; before that, the scratch of `project`.
  const int64_t x_floats = in_place || !p.w.codes ? 0 : aligned(M * K);
  const int64_t sums_floats = p.w.offset ? aligned(chunk_count(p.w) * M) : 0;
  const int64_t h_floats = p.projected ? 0 : aligned(M * R), base_floats = aligned(M * base_rank);
  const int64_t noise_floats = has_noise ? 2 * RANKS * BLOCK + NOISE_FLOATS : 0;
  const int64_t thread_floats =
      max(aligned((DEPTH + 1) * SPAN), DEPTH * BLOCK + plan.rows * BLOCK + noise_floats);
  const Scratch memory(x_floats + sums_floats + h_floats + base_floats + plan.threads * thread_floats);
  if (!memory.get()) return NO_MEMORY;
  float* const packed = memory.get();
  float* const sums = packed + x_floats;
  float* const h_made = sums + sums_floats;
  float* const base_h = h_made + h_floats;
  float* const threads = base_h + base_floats;
  const float* const h = p.projected ? p.projected : h_made;
  const X x = {in_place ? (const float*)p.x : packed, !in_place, p.x_stride, M, p.w.offset ? sums : nullptr};
  float ones[BLOCK];
  for (float& one : ones) one = 1;

#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
    const int thread = thread_index();
    float* const scratch = threads + thread * thread_floats;
    with_type(p.dtype, [&](auto type) {
      const auto* rows = (const decltype(type)*)p.x;
      const int64_t m0 = thread * M / plan.threads, m1 = (thread + 1) * M / plan.threads;
      if (base_rank) project(rows, p.x_stride, m0, m1, K, p.base_basis, base_rank, base_h, scratch);
      if (R && p.basis && !p.basis_per_group) project(rows, p.x_stride, m0, m1, K, p.basis, R, h_made, scratch);
      for (int64_t g = 0; R && p.basis && p.basis_per_group && g < p.G; g++) {
        const int64_t from = max(m0, g * (M / p.G)), to = min(m1, (g + 1) * (M / p.G));
        if (from < to) project(rows, p.x_stride, from, to, K, p.basis + g * K * R, R, h_made, scratch);
      }
      if (x_floats || sums_floats)
        pack_rows(p.w, rows, p.x_stride, m0, m1, M, x_floats ? packed : nullptr, sums_floats ? sums : nullptr);
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < plan.tasks(); i++) {
      const Task task = plan.task(i);
      const Block& block = task.block;
      float *panel = scratch, *main = panel + DEPTH * BLOCK, *noise = main + plan.rows * BLOCK;
      const Rows rows = {tiles.begin(task.first), tiles.begin(task.last), main};
      memset(main, 0, (rows.m1 - rows.m0) * BLOCK * sizeof(float));
      if (p.w.codes) add_base(p.w, x, tiles, task, panel, main);
      if (base_rank) add_product(rows, 0, M, base_h, base_rank, p.base_coeff, block, ones, panel);
      if (R && p.coeff) add_product(rows, 0, M, h, R, p.coeff, block, ones, panel);
      for (int64_t g = 0; R && p.coeff_groups && g < p.G; g++)
        add_product(rows, g * (M / p.G), (g + 1) * (M / p.G), h, R, p.coeff_groups + g * p.w.N * R, block, ones, panel);
      if (has_noise) add_noise(rows, M / p.G, h, R, p.z, block, ones, noise);
      store_block(main, rows.m0, rows.m1 - rows.m0, block, p.bias, p.bias_dtype, p.y, p.dtype, p.w.N);
    }
  }
  return nullptr;
}

}  // namespace ZO_NAMESPACE
