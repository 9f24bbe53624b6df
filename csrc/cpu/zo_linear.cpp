// zo_linear: y_g = x_g . D(W)^T + (x_g . base_basis) . base_coeff^T + (x_g . A) . (C + C_g + sum_s sigmas[g, s] Z_s)^T + bias
//
//   x [M, K], y [M, N] fp32 | bf16 | fp16;  W packed, any format and layout;  A [K, R], C [N, R] fp32;  Z_s made here
//
// A thread owns 64 columns of y and a range of rows at a time, in fp32 scratch (tile.h). Chunks of K are decoded in the
// registers of the product of the first FIRST rows, one permute per 16 codes, and left behind as an fp32 panel in L1 for
// the other rows, if there are any. The low-rank terms follow as more panels, K being R: C, C_g and the noise are never
// added to one another before they are multiplied (law 2.5), and the noise of a block of columns is made once for all
// groups. h = x . A is computed once per call.
//
// Bound: decoding and bandwidth up to a few rows, fma above. Tests: tests/test_zo_linear.py.
#include "digits.h"
#include "direction.h"
#include "tile.h"

namespace ZO_NAMESPACE {
namespace {

constexpr int FIRST = 4;                 // rows of the tile that decodes; a fused decode is hidden behind four fma
constexpr int64_t SPAN = 256;            // k that `project` takes at a time
constexpr int64_t RANKS = 32;            // columns of h that one panel takes: sums of 64 rounded twice as far as torch's

// ---------------------------------------------------------------- the tile that decodes

// `multiply` of tile.h for R rows, decoding on the way; with KEEP the codes go to `panel` too.
template <int R, int V, bool KEEP, class Source>
void multiply_codes(const float* x, int64_t x_stride, const Source& source, int64_t columns, int64_t depth,
                    const Factors& f, float* panel, float* main) {
  for (int64_t n = 0; n < columns; n += V * W) {
    VF acc[R][V] = {};
    for (int64_t k = 0; k < depth; k += 8) {
      decltype(source.at(0, 0)) codes[V];
      for (int v = 0; v < V; v++) codes[v] = source.at(k, n + v * W);
      const auto step = [&](int i) __attribute__((always_inline)) {
        for (int v = 0; v < V; v++) {
          const VF c = source.value(codes[v], i);
          if (KEEP) store(panel + (k + i) * columns + n + v * W, c);
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

// The first rows of x times a chunk's codes; returns how many. Up to 2 * FIRST rows that is all of them, which decodes
// twice (8 rows: 10 % faster than a panel for four); else FIRST, and the panel is there for the others.
template <class Source>
ZO_INLINE int64_t multiply_first(int64_t rows, const float* x, int64_t x_stride, const Source& source, int64_t columns,
                                 int64_t depth, Factors f, float* panel, float* main) {
  typedef void (*Multiply)(const float*, int64_t, const Source&, int64_t, int64_t, const Factors&, float*, float*);
  constexpr Multiply kernels[2][FIRST + 1] = {
      {multiply_codes<4, narrow, true, Source>, multiply_codes<1, narrow, false, Source>,
       multiply_codes<2, narrow, false, Source>, multiply_codes<3, narrow, false, Source>,
       multiply_codes<4, narrow, false, Source>},
      {multiply_codes<4, wide(4), true, Source>, multiply_codes<1, wide(1), false, Source>,
       multiply_codes<2, wide(2), false, Source>, multiply_codes<3, wide(3), false, Source>,
       multiply_codes<4, wide(4), false, Source>}};
  const auto& kernel = kernels[columns == BLOCK];
  if (rows > 2 * FIRST) {
    kernel[0](x, x_stride, source, columns, depth, f, panel, main);
    return FIRST;
  }
  const int64_t half = rows <= FIRST ? rows : rows / 2;
  kernel[half](x, x_stride, source, columns, depth, f, panel, main);
  if (half == rows) return rows;
  if (f.sums) f.sums += half;
  kernel[rows - half](x + half * x_stride, x_stride, source, columns, depth, f, panel, main + half * BLOCK);
  return rows;
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

// ---------------------------------------------------------------- the low-rank terms of a task

// main += h . matrix^T for matrix [N, R], on those of the rows `from` .. `to` - 1 that the task has.
void add_product(const Task& task, int64_t from, int64_t to, const float* h, int64_t R, const float* matrix,
                 float* panel, float* main) {
  from = max(from, task.m0), to = min(to, task.m1);
  for (int64_t r = 0; r < R && from < to; r += RANKS) {
    const int64_t ranks = min(RANKS, R - r);
    columns_panel(matrix, R, task.block, r, ranks, panel);
    multiply_rows(to - from, h + from * R + r, R, panel, task.block.columns, ranks, PLAIN,
                  main + (from - task.m0) * BLOCK);
  }
}

// main += h . (sum_s sigmas[g, s] Z_s)^T for each group g of `group_rows` rows.
void add_noise(const Task& task, int64_t group_rows, const float* h, int64_t R, const zo::Direction& z, float* panel,
               float* tiles, float* main) {
  SeededTiles noise(z, RANKS * BLOCK, tiles);
  for (int64_t r = 0; r < R; r += RANKS) {
    const int64_t ranks = min(RANKS, R - r);
    noise.move_to(task.block, r, ranks);
    for (int64_t g = task.m0 / group_rows; g * group_rows < task.m1; g++) {
      if (!SeededTiles::is_active(z, g)) continue;
      const int64_t from = max(g * group_rows, task.m0), to = min((g + 1) * group_rows, task.m1);
      noise.weigh(g, panel);
      multiply_rows(to - from, h + from * R + r, R, panel, task.block.columns, ranks, PLAIN,
                    main + (from - task.m0) * BLOCK);
    }
  }
}

// ---------------------------------------------------------------- the base product of a task

void add_base(const Weight& w, const X& x, const Task& task, float* panel, float* main) {
  float scale[BLOCK], offset[BLOCK];
  const int64_t rows = task.m1 - task.m0, columns = task.block.columns;
  int64_t index = 0;
  for (Chunk chunk = chunk_at(w, 0); chunk.k < w.K; chunk = chunk_at(w, chunk.k + chunk.depth), index++) {
    if (starts_group(w, chunk)) chunk_scales(w, task.block, chunk, scale, offset);
    Factors f = {scale, w.offset ? offset : nullptr, x.sums_of(index, task.m0)};
    const float* in = x.row(task.m0, chunk);
    const int64_t stride = x.row_stride(chunk);
    const float* codes = panel;
    int64_t done = 0;
    if (W > 4 && has_source(w)) {  // base: its decode is too long to hide
      with_source(w, task.block, chunk, [&](const auto& source) {
        done = multiply_first(rows, in, stride, source, columns, chunk.depth, f, panel, main);
      });
      if (f.sums) f.sums += done;
    } else {
      codes = codes_panel(w, task.block, chunk, panel);
    }
    multiply_rows(rows - done, in + done * stride, stride, codes, columns, chunk.depth, f, main + done * BLOCK);
  }
}

}  // namespace

const char* zo_linear(const zo::ZoLinear& p) {
  const int64_t M = p.M, K = p.w.K, N = p.w.N;
  if (M == 0 || N == 0) return nullptr;
  if (p.G < 1 || M % p.G) return "`x` has a number of rows that its row groups do not divide";
  const int64_t R = p.R, base_rank = p.base_basis ? p.base_rank : 0, group_rows = M / p.G;
  const bool has_noise = R > 0 && p.z.S > 0 && p.z.noise != zo::Noise::none;
  const bool in_digits = has_digits(p.w), in_place = p.dtype == zo::DType::f32;
  // 512 rows of main: 128 KB of L2
  const Plan plan(p.w, M, 1, p.threads, 1, max(96, min(512, X_BLOCK / max(K, 1))));

  // Shared: packed x, its sums, h, base h. Per thread: panel, main, noise; before that, the scratch of `project`.
  const int64_t x_floats = in_digits ? Digits::floats(p.w, M) : in_place || !p.w.codes ? 0 : aligned(M * K);
  const int64_t sums_floats = p.w.offset && !in_digits ? aligned(chunk_count(p.w) * M) : 0;
  const int64_t h_floats = p.projected ? 0 : aligned(M * R), base_floats = aligned(M * base_rank);
  const int64_t noise_floats = has_noise ? SeededTiles::memory_floats(p.z, RANKS * BLOCK) : 0;
  const int64_t main_floats = plan.rows * BLOCK;
  const int64_t thread_floats = max((DEPTH + 1) * SPAN, DEPTH * BLOCK + main_floats + noise_floats);
  const Scratch memory(x_floats + sums_floats + h_floats + base_floats + plan.threads * thread_floats);
  if (!memory.get()) return NO_MEMORY;
  float* const packed = memory.get();
  float* const sums = packed + x_floats;
  float* const h_made = sums + sums_floats;
  float* const base_h = h_made + h_floats;
  float* const threads = base_h + base_floats;
  const float* const h = p.projected ? p.projected : h_made;
  const Digits digits(p.w, M, packed);
  const X x = {in_place ? (const float*)p.x : packed, !in_place, p.x_stride, M, p.w.offset ? sums : nullptr};

#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
    const Share share;
    float* const scratch = threads + share.thread * thread_floats;
    with_type(p.dtype, [&](auto type) {
      const auto* rows = (const decltype(type)*)p.x;
      const int64_t m0 = share.begin(M), m1 = share.end(M);
      if (base_rank) project(rows, p.x_stride, m0, m1, K, p.base_basis, base_rank, base_h, scratch);
      if (R && p.basis && !p.basis_per_group) project(rows, p.x_stride, m0, m1, K, p.basis, R, h_made, scratch);
      for (int64_t g = 0; R && p.basis && p.basis_per_group && g < p.G; g++) {
        const int64_t from = max(m0, g * group_rows), to = min(m1, (g + 1) * group_rows);
        if (from < to) project(rows, p.x_stride, from, to, K, p.basis + g * K * R, R, h_made, scratch);
      }
      if (in_digits) pack_digits(p.w, rows, p.x_stride, m0, m1, digits);
      else if (x_floats || sums_floats)
        pack_rows(p.w, rows, p.x_stride, m0, m1, M, x_floats ? packed : nullptr, sums_floats ? sums : nullptr);
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < plan.tasks(); i++) {
      const Task task = plan.task(i);
      const int64_t rows = task.m1 - task.m0;
      float *panel = scratch, *main = panel + DEPTH * BLOCK, *tiles = main + main_floats;
      memset(main, 0, rows * BLOCK * sizeof(float));
      if (in_digits) add_base_digits(p.w, digits, task, main);
      else if (p.w.codes) add_base(p.w, x, task, panel, main);
      if (base_rank) add_product(task, 0, M, base_h, base_rank, p.base_coeff, panel, main);
      if (R && p.coeff) add_product(task, 0, M, h, R, p.coeff, panel, main);
      for (int64_t g = 0; R && p.coeff_groups && g < p.G; g++)
        add_product(task, g * group_rows, (g + 1) * group_rows, h, R, p.coeff_groups + g * N * R, panel, main);
      if (has_noise) add_noise(task, group_rows, h, R, p.z, panel, tiles, main);
      store_block(main, task.m0, rows, task.block, p.bias, p.bias_dtype, p.y, p.dtype, N);
    }
  }
  return nullptr;
}

}  // namespace ZO_NAMESPACE
