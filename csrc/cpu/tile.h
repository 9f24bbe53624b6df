// Rows of x times a panel: the register-blocked product that zo_linear and zo_dense_linear share.
//
//   main[m][n] = fma(scale[n], sum_k x[m][k] * panel[k][n], main[m][n])        (k ascending, fma, one lane per n)
//   main[m][n] = fma(offset[n], sum_x[m], main[m][n])                          (int4 with an offset only)
//
// `main` is a thread's [rows][BLOCK] fp32 scratch; it stays in L2 over the chunks of K, the panel in L1. Every row meets
// the same operations in the same order whatever tile it falls into, so its bits depend on nothing else (law 2.4).
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
#include <cstdlib>

#include "panel.h"

namespace ZO_NAMESPACE {
namespace {

constexpr int ROWS = 6;                // rows of a tile: 6 x 4 zmm, or 6 x 2 ymm, fill the accumulator registers
constexpr int64_t ROW_BLOCK = 512;     // rows of `main`: 128 KB, well inside L2
constexpr int64_t X_BLOCK = 1 << 20;   // floats of x that a task reads: 4 MB, which stay in L3 over all columns

// ---------------------------------------------------------------- memory and threads

// 64-byte aligned scratch; get() is null when there is no memory.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : data_((float*)aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64 + 64)) {}
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};
constexpr const char* NO_MEMORY = "no memory for the kernel's workspace (one fp32 copy of x and 1 MB a thread)";

ZO_INLINE int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

ZO_INLINE int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// ---------------------------------------------------------------- rows

// M rows in `groups` equal groups, each split evenly into tiles: 8 rows are 4 + 4, not 6 + 2.
struct Tiles {
  int64_t groups, size, per_group;  // size: rows of a group; per_group: its tiles
  Tiles(int64_t M, int64_t groups) : groups(groups), size(M / groups), per_group(zo::ceil_div(size, ROWS)) {}
  int64_t begin(int64_t t) const { return t * size / per_group; }  // first row, within its group, of a group's tile t
};

// What a thread does at a time: 64 columns, and the tiles `first` .. `last` of each of the groups g0 .. g1.
struct Task {
  Block block;
  int64_t g0, g1, first, last;
};

// The tasks of a call, split statically over threads. All columns of some rows come before the next rows, so that these
// stay in cache (the other way round: 13 % slower at 512 rows, K = 4096).
struct Plan {
  int threads;
  int64_t blocks, batch, row_blocks;  // batch: groups of a task
  int64_t rows;                       // the most that a task has
  const Weight& w;
  const Tiles& tiles;

  Plan(const Weight& w, const Tiles& tiles, int max_threads, int64_t max_groups)
      : threads(max_threads), blocks(zo::ceil_div(w.N, BLOCK)), batch(min(tiles.groups, max_groups)), w(w), tiles(tiles) {
    const int64_t M = tiles.groups * tiles.size, K = max(w.K, 1);
    if (w.N * K * (M + 2) < 5000000) threads = 1;  // under 100 us: waking a thread costs more than it saves
    const int64_t limit = max(16 * ROWS, min(ROW_BLOCK, X_BLOCK / K));  // rows of a task
    row_blocks = zo::ceil_div(tiles.per_group, max(1, limit / (ROWS * batch)));
    // Few blocks of columns: more ranges of rows, until the busiest thread has at most 1/16 more than its share.
    while (16 * zo::ceil_div(tasks(), threads) * threads > 17 * tasks() && tiles.per_group >= 16 * row_blocks) row_blocks++;
    rows = 0;
    for (int64_t i = 0; i < row_blocks; i++) rows = max(rows, batch * (tiles.begin(tile(i + 1)) - tiles.begin(tile(i))));
  }
  int64_t tile(int64_t row_block) const { return row_block * tiles.per_group / row_blocks; }
  int64_t tasks() const { return blocks * row_blocks * zo::ceil_div(tiles.groups, batch); }
  Task task(int64_t i) const {
    const int64_t row_block = i / blocks % row_blocks, g0 = i / blocks / row_blocks * batch;
    return {block_at(w, i % blocks), g0, min(g0 + batch, tiles.groups), tile(row_block), tile(row_block + 1)};
  }
};

// Sixteen partial sums to one, by the same tree on every ISA.
ZO_INLINE float fold(const VF lanes[16 / W]) {
  float sums[16];
  for (int i = 0; i < 16 / W; i++) store(sums + i * W, lanes[i]);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  return sums[0];
}
inline float sum(const float* x, int64_t count) {
  VF lanes[16 / W] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16 / W; j++) lanes[j] += load(x + i + j * W);
  for (int j = 0; i + j * W < count; j++) lanes[j] += load(x + i + j * W, min(W, count - i - j * W));
  return fold(lanes);
}

// x in fp32, as the product reads it: packed [chunk][M][depth], so that the
// rows of a chunk stream through the cache. A few fp32 rows are read where they are.
struct X {
  const float* data;
  bool packed;
  int64_t stride;     // of rows in place
  int64_t M;
  const float* sums;  // [chunks][M]: the sum of x over each chunk, or null

  int64_t row_stride(const Chunk& chunk) const { return packed ? chunk.depth : stride; }
  const float* row(int64_t m, const Chunk& chunk) const {
    return packed ? data + chunk.k * M + m * chunk.depth : data + m * stride + chunk.k;
  }
  const float* sums_of(int64_t chunk, int64_t m) const { return sums ? sums + chunk * M + m : nullptr; }
};

// Rows m0 .. m1 - 1 of x into `packed` and their sums into `sums`; either may be null.
template <class T>
void pack_rows(const Weight& w, const T* x, int64_t x_stride, int64_t m0, int64_t m1, int64_t M, float* packed,
               float* sums) {
  float buffer[DEPTH];
  int64_t i = 0;
  for (Chunk chunk = chunk_at(w, 0); chunk.k < w.K; chunk = chunk_at(w, chunk.k + chunk.depth), i++) {
    for (int64_t m = m0; m < m1; m++) {
      float* out = packed ? packed + chunk.k * M + m * chunk.depth : buffer;
      to_floats(out, x + m * x_stride + chunk.k, chunk.depth);
      if (sums) sums[i * M + m] = sum(out, chunk.depth);
    }
  }
}

// ---------------------------------------------------------------- the product

struct Factors {
  const float* scale;   // [columns]
  const float* offset;  // [columns] or null
  const float* sums;    // [rows] with offset
};

template <int R, int V>
ZO_INLINE void add_to_main(const VF acc[R][V], const Factors& f, int64_t n, float* main) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      VF m = fma(load(f.scale + n + v * W), acc[r][v], load(main + r * BLOCK + n + v * W));
      if (f.offset) m = fma(load(f.offset + n + v * W), set1(f.sums[r]), m);
      store(main + r * BLOCK + n + v * W, m);
    }
  }
}

template <int R, int V>
void multiply_tile(const float* x, int64_t x_stride, const float* panel, int64_t columns, int64_t depth,
                   const Factors& f, float* main) {
  for (int64_t n = 0; n < columns; n += V * W) {
    VF acc[R][V] = {};
    const float* b = panel + n;
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k++, b += columns) {
      VF row[V];
      for (int v = 0; v < V; v++) row[v] = load(b + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const VF a = set1(x[r * x_stride + k]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[r][v] = fma(a, row[v], acc[r][v]);
      }
    }
    add_to_main<R, V>(acc, f, n, main);
  }
}

// Vectors of columns that R rows take at a time: 4 zmm; with 16 registers, enough sums to hide the latency of fma.
constexpr int wide(int R) { return W == 16 ? 4 : R == 1 ? 8 : R <= 3 ? 4 : 2; }
constexpr int narrow = W == 16 ? 1 : 2;  // in a last block of 16, 32 or 48 columns

typedef void (*Multiply)(const float*, int64_t, const float*, int64_t, int64_t, const Factors&, float*);
constexpr Multiply multiply_wide_block[ROWS] = {multiply_tile<1, wide(1)>, multiply_tile<2, wide(2)>,
                                                multiply_tile<3, wide(3)>, multiply_tile<4, wide(4)>,
                                                multiply_tile<5, wide(5)>, multiply_tile<6, wide(6)>};
constexpr Multiply multiply_narrow_block[ROWS] = {multiply_tile<1, narrow>, multiply_tile<2, narrow>,
                                                  multiply_tile<3, narrow>, multiply_tile<4, narrow>,
                                                  multiply_tile<5, narrow>, multiply_tile<6, narrow>};

ZO_INLINE void multiply(int64_t rows, const float* x, int64_t x_stride, const float* panel, int64_t columns,
                        int64_t depth, const Factors& f, float* main) {
  (columns == BLOCK ? multiply_wide_block : multiply_narrow_block)[rows - 1](x, x_stride, panel, columns, depth, f, main);
}

// The task's rows of group g times one chunk's panel.
inline void multiply_chunk(const X& x, const Tiles& tiles, const Task& task, int64_t g, const Chunk& chunk, int64_t index,
                           const float* panel, Factors f, float* main) {
  int64_t m0 = tiles.begin(task.first);
  for (int64_t t = task.first; t < task.last; t++) {
    const int64_t next = tiles.begin(t + 1), m = g * tiles.size + m0;
    f.sums = x.sums_of(index, m);
    multiply(next - m0, x.row(m, chunk), x.row_stride(chunk), panel, task.block.columns, chunk.depth, f, main);
    main += (next - m0) * BLOCK, m0 = next;
  }
}

// `rows` rows of a row-major fp32 matrix (h) times a panel, added.
inline void multiply_rows(int64_t rows, const float* h, int64_t h_stride, const float* panel, int64_t columns, int64_t depth,
                   const float* ones, float* main) {
  const int64_t tiles = zo::ceil_div(rows, ROWS);
  for (int64_t t = 0, m = 0; t < tiles; t++) {
    const int64_t next = (t + 1) * rows / tiles;
    multiply(next - m, h + m * h_stride, h_stride, panel, columns, depth, {ones, nullptr, nullptr}, main + m * BLOCK);
    m = next;
  }
}

// y = main + bias, rounded once.
inline void store_block(float* main, int64_t m0, int64_t rows, const Block& block, const void* bias,
                 zo::DType bias_dtype, void* y, zo::DType dtype, int64_t N) {
  float added[BLOCK] = {};
  if (bias) to_floats(added, bias_dtype, bias, block.n0, block.live);
  with_type(dtype, [&](auto type) {
    auto* out = (decltype(type)*)y + m0 * N + block.n0;
    for (int64_t m = 0; m < rows; m++, main += BLOCK, out += N) {
      for (int64_t n = 0; n < block.columns; n += W) store(main + n, load(main + n) + load(added + n));
      from_floats(out, main, block.live);
    }
  });
}

}  // namespace
}  // namespace ZO_NAMESPACE
