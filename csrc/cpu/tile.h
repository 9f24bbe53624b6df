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
#ifdef __linux__
#include <sys/mman.h>
#endif
#include <cstdlib>

#include "panel.h"

namespace ZO_NAMESPACE {
namespace {

constexpr int ROWS = 6;                // rows of a tile: 6 x 4 zmm, or 6 x 2 ymm, fill the accumulator registers
constexpr int64_t X_BLOCK = 1 << 20;   // floats of x that a task reads: 4 MB, which stay in L3 over all columns

// ---------------------------------------------------------------- memory and threads

// 64-byte aligned scratch; get() is null when there is no memory. Fresh pages cost as much as packing x into them does
// (512 rows of K = 4097 for 7 columns: 3.9 ms, kept 1.3), so a thread keeps what it took last, up to KEPT; more comes
// in huge pages where the system has them.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : data_(take((floats * sizeof(float) + 63) / 64 * 64 + 64)) {}
  ~Scratch() {
    if (data_ != kept().data) free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t KEPT = 0;  // so that a shorter call's overrun is seen
#else
  static constexpr size_t KEPT = 16 << 20;
#endif
  struct Kept {
    float* data = nullptr;
    size_t bytes = 0;
    ~Kept() { free(data); }
  };
  static Kept& kept() {
    static thread_local Kept buffer;
    return buffer;
  }
  static float* take(size_t bytes) {
    if (bytes > KEPT) return fresh(bytes);
    Kept& buffer = kept();
    if (buffer.bytes < bytes) {
      free(buffer.data);
      buffer.data = fresh(bytes);
      buffer.bytes = buffer.data ? bytes : 0;
    }
    return buffer.data;
  }
  static float* fresh(size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr size_t HUGE_PAGE = 2 << 20;
    if (bytes > KEPT && KEPT) {
      void* data = aligned_alloc(HUGE_PAGE, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
      if (data) madvise(data, bytes, MADV_HUGEPAGE);  // only advice: any answer will do
      return (float*)data;
    }
#endif
    return (float*)aligned_alloc(64, bytes);
  }
  float* data_;
};
constexpr const char* NO_MEMORY = "no memory for the kernel's workspace (one fp32 copy of x and 1 MB a thread)";

ZO_INLINE int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// This thread's part of 0 .. count, in a parallel region; OpenMP may have given it fewer threads than it asked for.
struct Share {
  int thread = 0, threads = 1;
  Share() {
#ifdef _OPENMP
    thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
  }
  int64_t begin(int64_t count) const { return thread * count / threads; }
  int64_t end(int64_t count) const { return (thread + 1) * count / threads; }
};

// Whether one thread does so little (under about 100 us) that waking others would cost more than it saves.
ZO_INLINE bool is_short(int64_t work, int64_t limit) {
#ifdef ZO_ALWAYS_THREADS  // tests/sanitize.py: small problems take the paths of large ones
  limit = 0;
#endif
  return work < limit;
}

// What a thread does at a time: 64 columns, and the rows m0 .. m1 - 1 of each of the groups g0 .. g1 - 1.
struct Task {
  Block block;
  int64_t g0, g1, m0, m1;
};

// The tasks of a call, split statically over threads. All columns of some rows come before the next rows, so that these
// stay in cache (the other way round: 13 % slower at 512 rows, K = 4096).
struct Plan {
  const Weight& w;
  int threads;
  int64_t groups, size;               // row groups, rows of each
  int64_t blocks, batch, row_blocks;  // of columns; groups of a task; ranges of a group's rows
  int64_t rows;                       // the most that a task has

  // At most max_groups groups and about max_rows rows a task.
  Plan(const Weight& w, int64_t M, int64_t groups, int max_threads, int64_t max_groups, int64_t max_rows)
      : w(w), threads(max_threads < 1 ? 1 : max_threads), groups(groups), size(M / groups), blocks(zo::ceil_div(w.N, BLOCK)),
        batch(min(groups, max_groups)) {
    const int64_t K = max(w.K, 1);
    if (is_short(w.N * K * (M + 2), 5000000)) threads = 1;
    row_blocks = zo::ceil_div(size, max(ROWS, max_rows / batch));
    // Few blocks of columns: more ranges of rows, until the busiest thread has at most 1/16 more than its share.
    while (16 * zo::ceil_div(tasks(), threads) * threads > 17 * tasks() && size >= 16 * ROWS * row_blocks) row_blocks++;
    rows = batch * zo::ceil_div(size, row_blocks);
    threads = (int)min(threads, tasks());
  }
  int64_t tasks() const { return blocks * row_blocks * zo::ceil_div(groups, batch); }
  Task task(int64_t i) const {
    const int64_t range = i / blocks % row_blocks, g0 = i / blocks / row_blocks * batch;
    return {block_at(w, i % blocks), g0, min(g0 + batch, groups), range * size / row_blocks,
            (range + 1) * size / row_blocks};
  }
};

// ---------------------------------------------------------------- rows of x

// Sixteen partial sums to one, by the same tree on every ISA: halves are added until one is left.
ZO_INLINE float fold(const VF lanes[16 / W]) {
  V4 four[4];
  memcpy(four, lanes, sizeof four);
  const V4 sum = (four[0] + four[2]) + (four[1] + four[3]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
inline float sum(const float* x, int64_t count) {
  VF lanes[16 / W] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16 / W; j++) lanes[j] += load(x + i + j * W);
  for (int j = 0; i + j * W < count; j++) lanes[j] += load(x + i + j * W, min(W, count - i - j * W));
  return fold(lanes);
}

// x in fp32, as the product reads it: where it lies, or converted into [chunk][M][depth], whose rows stream through the
// cache. (Packing fp32 x too: no faster from 32 to 512 rows, 3 % slower at K = 576, and a copy of x.)
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

constexpr int64_t PACK_ROWS = 16;  // at a time: more, and each row of a chunk is a page of its own

// Rows m0 .. m1 - 1 of x into `packed` and their sums into `sums`; either may be null.
template <class T>
void pack_rows(const Weight& w, const T* x, int64_t x_stride, int64_t m0, int64_t m1, int64_t M, float* packed,
               float* sums) {
  float buffer[DEPTH];
  for (int64_t from = m0; from < m1; from += PACK_ROWS) {
    const int64_t end = min(m1, from + PACK_ROWS);
    int64_t i = 0;
    for (Chunk chunk = chunk_at(w, 0); chunk.k < w.K; chunk = chunk_at(w, chunk.k + chunk.depth), i++) {
      for (int64_t m = from; m < end; m++) {
        float* out = packed ? packed + chunk.k * M + m * chunk.depth : buffer;
        to_floats(out, x + m * x_stride + chunk.k, chunk.depth);
        if (sums) sums[i * M + m] = sum(out, chunk.depth);
      }
    }
  }
}

// ---------------------------------------------------------------- the product

struct Factors {
  const float* scale;   // [columns]
  const float* offset;  // [columns] or null
  const float* sums;    // [rows] with offset
};
struct Ones {
  float values[BLOCK];
  constexpr Ones() : values() {
    for (float& value : values) value = 1;
  }
};
constexpr Ones ones;
constexpr Factors PLAIN = {ones.values, nullptr, nullptr};  // the panel is the matrix itself

template <int R, int V>
ZO_INLINE void add_to_main(const VF acc[R][V], const Factors& f, int64_t n, float* __restrict main) {
  VF sums[R];
  if (f.offset)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = set1(f.sums[r]);
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    const VF scale = load(f.scale + n + v * W);
    if (f.offset) {
      const VF offset = load(f.offset + n + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        float* to = main + r * BLOCK + n + v * W;
        store(to, fma(offset, sums[r], fma(scale, acc[r][v], load(to))));
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        float* to = main + r * BLOCK + n + v * W;
        store(to, fma(scale, acc[r][v], load(to)));
      }
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

// Any number of rows, split evenly into tiles: 8 rows are 4 + 4, not 6 + 2.
inline void multiply_rows(int64_t rows, const float* x, int64_t x_stride, const float* panel, int64_t columns,
                          int64_t depth, Factors f, float* main) {
  const int64_t tiles = zo::ceil_div(rows, ROWS);
  for (int64_t t = 0, m = 0; t < tiles; t++) {
    const int64_t next = (t + 1) * rows / tiles, count = next - m;
    multiply(count, x + m * x_stride, x_stride, panel, columns, depth, f, main + m * BLOCK);
    if (f.sums) f.sums += count;
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
