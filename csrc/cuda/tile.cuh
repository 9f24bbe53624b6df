// The tile of y that a block computes: 64 rows of W times up to 64 rows of x, sums in registers, x and W on their way
// through a ring of stages in shared memory. zo_linear.cu and zo_dense_linear.cu are made of it.
//
// W, or the noise, is the left operand of m16n8k16: 16 rows of W times 8 of x, so that one row of x pays for eight, not
// sixteen. How many rows of x share a block changes no order of summation, and splits of K follow from (N, K) alone: a
// row has the same bits beside any others (law 2.4).
#pragma once
#include <type_traits>

#include "weight.cuh"

namespace zo {
namespace cuda {

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int BN = TILE_N * WARPS;  // rows of W of a block
constexpr int BK = TILE_K;          // k of a stage: one 16-byte load of 4-bit codes a lane
constexpr int STAGES = 4;

// A call of zo_linear with what the launcher worked out.
struct Call {
  ZoLinear z;
  Stored w;
  int M, R, base_rank, S;
  int group_rows;            // rows of x of a row group
  int parts, base_parts;     // of h and base_h
  int splits, split_blocks;  // split i takes blocks of BK from i * split_blocks on
  int sums;                  // that make y: the splits, and those of the noise behind them (zo_dense_linear)
  const float* h;            // [parts, M, R]
  const float* base_h;       // [base_parts, M, base_rank]
  float* partial;            // the sums of each split as threads hold them; null when K is whole
};

// What zo_dense_linear.cu uses of zo_linear.cu: why a call is declined or null, W's own sums into p.partial, and all
// p.sums of them, with the bias, into y.
const char* refusal(const ZoLinear&);
Call call_of(const ZoLinear&);
const char* launch_product(const Call&);
const char* launch_finish(const Call&);

namespace {

ZO_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Tiles of 8 rows of x that a block multiplies: three sizes, so that few kernels have to be compiled. No bit follows
// it.
int tiles_of(int64_t M) { return M <= 8 ? 1 : M <= 32 ? 4 : 8; }  // MT

// Splits of K: `blocks` blocks at one block of x, where there is K for them: none shorter than 512, 16 at most.
int splits_of(const ZoLinear& z, int64_t blocks, int& split_blocks) {
  const int64_t wish = blocks * BN / z.N, most = z.K / 512, whole = ceil_div(z.K, BK);
  int64_t count = wish < most ? wish : most;
  count = count > 16 ? 16 : count < 1 ? 1 : count;
  split_blocks = whole ? (int)ceil_div(whole, count) : 1;
  return whole ? (int)ceil_div(whole, split_blocks) : 1;
}

// Blocks of W's rows, blocks of x's rows, splits of K.
template <int MT>
dim3 grid_of(const ZoLinear& z, int splits) {
  return dim3((unsigned)ceil_div(z.N, BN), (unsigned)ceil_div(z.M, 8 * MT), (unsigned)splits);
}

// f(a value of the type of x, a constant MT).
template <class F>
const char* with_tile(const ZoLinear& z, const F& f) {
  const auto with = [&](auto type) {
    switch (tiles_of(z.M)) {
      case 1: return f(type, std::integral_constant<int, 1>());
      case 4: return f(type, std::integral_constant<int, 4>());
      default: return f(type, std::integral_constant<int, 8>());
    }
  };
  return z.dtype == DType::f16 ? with(f16()) : with(bf16());
}

// Floats of the sums of one split.
int64_t partial_floats(const ZoLinear& z) {
  const int64_t rows = 8 * tiles_of(z.M);
  return ceil_div(z.N, BN) * BN * ceil_div(z.M, rows) * rows;
}

// ---------------------------------------------------------------- the sums of a block

// Which part of y this thread holds: acc[j] is C [16, 8] of ptx.cuh for rows n, n + 8 of W and rows m0 + 8 j .. of x.
template <int MT>
struct Place {
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  int row = warp * TILE_N + g;                         // of the block's 64
  int n0 = blockIdx.x * BN, n = n0 + row, m0 = blockIdx.y * 8 * MT;
  ZO_DEVICE int column(int j, int i) const { return 8 * j + 2 * t + (i & 1); }  // of the block's 8 MT, of acc[j][i]
};

// y = acc + bias, rounded once; lanes of equal t write neighbouring columns.
template <class T, int MT>
ZO_DEVICE void store_y(const Call& p, const Place<MT>& at, const float (&acc)[MT][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int n = at.n + 8 * half;
    if (n >= p.w.N) continue;
    const float bias = p.z.bias ? scalar_at(p.z.bias, p.z.bias_dtype, n) : 0.0f;
#pragma unroll
    for (int j = 0; j < MT; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int m = at.m0 + at.column(j, i);
        if (m < p.M) ((T*)p.z.y)[(int64_t)m * p.w.N + n] = from_float<T>(acc[j][2 * half + i] + bias);
      }
  }
}

// Sums as threads hold them, [sums][blocks][4 MT][THREADS]: who reads them stands where who wrote them stood.
template <int MT>
ZO_DEVICE float* partial_of(const Call& p, int sum) {
  const int64_t block = ((int64_t)sum * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  return p.partial + block * 4 * MT * THREADS + threadIdx.x;
}
template <int MT>
ZO_DEVICE void store_partial(float* to, const float (&acc)[MT][4]) {
#pragma unroll
  for (int j = 0; j < MT; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) to[(4 * j + i) * THREADS] = acc[j][i];
}
template <int MT>
ZO_DEVICE void add_partial(const float* from, float (&acc)[MT][4]) {
#pragma unroll
  for (int j = 0; j < MT; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[j][i] = acc[j][i] + from[(4 * j + i) * THREADS];
}

// ---------------------------------------------------------------- stages

// How many of the 16 bytes of chunk `chunk` are there, where a row goes on for `left` 16-bit values.
ZO_DEVICE int chunk_bytes(int left, int chunk) {
  const int bytes = 2 * left - 16 * chunk;
  return bytes <= 0 ? 0 : smaller(bytes, 16);
}

// Where chunk `chunk` (of 8) of row `row` lies in a tile with rows of 128 bytes: eight rows of a chunk, eight banks.
ZO_DEVICE int swizzled(int row, int chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }

// Copies ROWS rows of a matrix of 16-bit values into such a tile, BK columns at a time; all threads of the block share
// the work. A row that is not there is copied from the last one: its sums are stored nowhere, and no other row meets
// them. Addresses are worked out once, 32 bits a row: a turn of the K loop adds and copies.
template <int ROWS>
struct RowCopies {
  static constexpr int STEP = THREADS / 8, COUNT = (ROWS + STEP - 1) / STEP;
  const char* matrix;       // its row `first`
  uint32_t from[COUNT];     // of this thread's chunks, in 16 bytes
  int row = threadIdx.x / 8, chunk = threadIdx.x % 8, K;
  ZO_DEVICE RowCopies(const void* start, int64_t stride, int first, int rows, int K)
      : matrix((const char*)start + 2 * first * stride), K(K) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      from[i] = (uint32_t)smaller(row + i * STEP, rows - 1 - first) * (uint32_t)(stride / 8) + chunk;
  }
  ZO_DEVICE void fetch(int kb, char* tile) const {
    if (ROWS < STEP && row >= ROWS) return;
    char* const to = tile + swizzled(row, chunk);  // STEP is a multiple of 8: the rows of a thread swizzle alike
    const char* const block = matrix + (int64_t)kb * BK * 2;
    if ((kb + 1) * BK <= K) {
#pragma unroll
      for (int i = 0; i < COUNT; i++) async_copy16(to + i * STEP * 128, block + (uint64_t)from[i] * 16);
    } else {
      const int bytes = chunk_bytes(K - kb * BK, chunk);
#pragma unroll
      for (int i = 0; i < COUNT; i++)
        async_copy16(to + i * STEP * 128, bytes ? block + (uint64_t)from[i] * 16 : matrix, bytes);
    }
  }
};

// use(stage) for blocks first .. last - 1 of k, each of which fetch(block, stage) has sent for. STAGES - 1 copies are
// under way at any time; one barrier a turn says both that a stage has arrived for all and that the one before has been
// read by all.
template <int STAGE, class Fetch, class Use>
ZO_DEVICE void pipeline(int first, int last, char* memory, const Fetch& fetch, const Use& use) {
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) {
    if (first + i < last) fetch(first + i, memory + i * STAGE);
    async_commit();
  }
  int slot = 0;
  for (int kb = first; kb < last; kb++) {
    async_wait<STAGES - 2>();
    __syncthreads();  // the block's copies are there, and the stage before is free
    const int free = slot == 0 ? STAGES - 1 : slot - 1;
    if (kb + STAGES - 1 < last) fetch(kb + STAGES - 1, memory + free * STAGE);
    async_commit();
    use(kb, memory + slot * STAGE);
    slot = slot == STAGES - 1 ? 0 : slot + 1;
  }
  async_wait<0>();
  __syncthreads();  // the memory is free
}

}  // namespace
}  // namespace cuda
}  // namespace zo
