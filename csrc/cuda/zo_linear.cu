// zo_linear: y_g = x_g . D(W)^T + (x_g . A0) . C0^T + (x_g . A) . (C + C_g + sum_s sigmas[g, s] Z_s)^T + bias
//
//   x [M, K], y [M, N] fp16 | bf16;  W int4, nf4, fp4 or dense;  A [K, R], C [N, R] fp32;  Z_s [N, R] made here
//
//   project   h = x . A in fp32, where h is not given: chunks of CHUNK k, which whoever reads h sums in their order
//   product   x . D(W)^T on tensor cores, 64 rows of W times up to 64 of x; then the low-rank terms, where K is whole
//   finish    the splits of K in their order, then the low-rank terms, where K is split
//
// W is the left operand, m16n8k16: 16 rows of W times 8 of x, so that one row of x pays for eight, not sixteen. The
// low-rank terms go on in the same fp32 sums (low_rank.cuh), and y is rounded once (law 2.5). Splits of K follow from
// (N, K) alone, and how many rows of x share a block changes no order of summation: a row has the same bits beside any
// others (law 2.4). No atomics.
//
// Layout `cuda` of 4-bit codes: tiles of 16 rows (n) x 64 columns (k), tile after tile along k, 512 bytes each; lane
// 4 g + t of a warp owns 16 bytes of it, word i for k = 16 i ..: the fragment a[0 .. 3] of ptx.cuh, where nibble j is
// the low half of a[j] and nibble j + 4 the high one. N and K are filled up with the code that decodes to zero.
//
//   int4        lop3 puts a nibble into the mantissa of 1024.0 (fp16) or 128.0 (bf16), and one FMA leaves q - 8, exact.
//               Codes are multiplied as they are; the scale meets their sum at the end of a group, in fp32, and so does
//               offset + 8 scale the sum of x (by a product with ones).
//   nf4, fp4    table[q] * scale in fp32, rounded to the dtype of x: the bits of dequantize(dtype).
//
// Bound: the bytes of W up to about 64 rows, tensor cores above.
#include "low_rank.cuh"

namespace zo {
namespace cuda {
namespace {

constexpr int BK = 64;          // k of a stage: one 16-byte load of codes a lane
constexpr int STAGES = 4;       // of the copy pipeline
constexpr int CHUNK = 512;      // k of a partial sum of h

// How many of the 16 bytes from column k on are there, in a row of K 16-bit values or outside of all rows.
ZO_DEVICE int chunk_bytes(bool row, int K, int k) {
  const int bytes = 2 * (K - k);
  return !row || bytes <= 0 ? 0 : bytes < 16 ? bytes : 16;
}

// Where chunk `chunk` (of 8) of row `row` lies in a tile with rows of 128 bytes: eight rows of a chunk, eight banks.
ZO_DEVICE int swizzled(int row, int chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }

// ---------------------------------------------------------------- decoding

// Eight codes of a word as the left operand: nibbles j and j + 4 become the halves of a[j].
template <class T>
ZO_DEVICE void int4_fragment(uint32_t word, uint32_t (&a)[4]);
template <>
ZO_DEVICE void int4_fragment<f16>(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2, word >>= 8) {
    a[i] = fma2<f16>(and_or<0x000f000fu>(word, 0x64006400u), 0x3c003c00u, 0xe408e408u);      // (1024 + q) - 1032
    a[i + 1] = fma2<f16>(and_or<0x00f000f0u>(word, 0x64006400u), 0x2c002c00u, 0xd480d480u);  // (1024 + 16 q) / 16 - 72
  }
}
template <>
ZO_DEVICE void int4_fragment<bf16>(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++, word >>= 4)
    a[i] = fma2<bf16>(and_or<0x000f000fu>(word, 0x43004300u), 0x3f803f80u, 0xc308c308u);  // (128 + q) - 136
}

// The same through a codebook in shared memory: 16 words in 16 banks, so that lanes never wait for one another.
// scales[0] is of row g, scales[1] of row g + 8.
template <class T>
ZO_DEVICE void table_fragment(uint32_t word, const float* table, const float (&scales)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    a[i] = pack<T>(table[word >> 4 * i & 15] * scales[i & 1], table[word >> (4 * i + 16) & 15] * scales[i & 1]);
}

// The scale (offset) of row n and group `group`, 0 outside. Nested scales as bitsandbytes decodes them: a product
// rounded, then a sum rounded.
ZO_DEVICE float scale_at(const Call& p, const void* stored, int n, int group) {
  const ZoLinear& z = p.z;
  const int64_t i = (int64_t)n * p.groups + group;
  if (n >= p.N || group >= p.groups) return 0.0f;
  if (z.scale_dtype != DType::u8) return scalar_at(stored, z.scale_dtype, i);
  return z.nested[((const uint8_t*)stored)[i]] * z.nested[257 + (i >> 8)] + z.nested[256];
}

// ---------------------------------------------------------------- product

template <Format FORMAT>
ZO_HD constexpr int code_bytes() {  // of a stage of a warp
  return FORMAT == Format::dense ? 16 * BK * 2 : 16 * BK / 2;
}
template <Format FORMAT, int MT>
ZO_HD constexpr int stage_bytes() {
  return WARPS * code_bytes<FORMAT>() + 8 * MT * BK * 2;
}
template <Format FORMAT, int MT>
ZO_HD constexpr int product_bytes() {
  return STAGES * stage_bytes<FORMAT, MT>() + 16 * (int)sizeof(float);  // and the table of a codebook
}

// Block `kb` of k on its way to a stage: the codes of this warp's 16 rows, and all rows of x.
template <class T, Format FORMAT, int MT>
ZO_DEVICE void fetch(const Call& p, const Place<MT>& at, int kb, char* stage) {
  const ZoLinear& z = p.z;
  char* const codes = stage + at.warp * code_bytes<FORMAT>();
  if constexpr (FORMAT == Format::dense) {
#pragma unroll
    for (int i = at.lane; i < 16 * 8; i += WARP) {
      const int row = i / 8, chunk = i % 8;
      const int n = at.n0 + at.warp * 16 + row, k = kb * BK + chunk * 8;
      const int bytes = chunk_bytes(n < p.N, p.K, k);
      async_copy16(codes + swizzled(row, chunk), bytes ? (const T*)z.codes + (int64_t)n * p.K + k : z.codes, bytes);
    }
  } else {
    const int tile = at.n0 / 16 + at.warp;
    const bool there = tile * 16 < p.N;
    const char* const from = (const char*)z.codes + ((int64_t)tile * p.blocks + kb) * 512 + at.lane * 16;
    async_copy16(codes + at.lane * 16, there ? (const void*)from : z.codes, there ? 16 : 0);
  }
  char* const x = stage + WARPS * code_bytes<FORMAT>();
#pragma unroll
  for (int i = threadIdx.x; i < 8 * MT * 8; i += THREADS) {
    const int row = i / 8, chunk = i % 8;
    const int m = at.m0 + row, k = kb * BK + chunk * 8;
    const int bytes = chunk_bytes(m < p.M, p.K, k);
    async_copy16(x + swizzled(row, chunk), bytes ? (const T*)z.x + m * z.x_stride + k : z.x, bytes);
  }
}

// The scale of this thread's two rows, and how many halves of a block of k they still hold for.
struct Scales {
  float scale[2], offset[2];
  int group, left;
};

// For int4 they are needed at the end of their group, which hides the load. Codes are centred, so the offset is too.
template <bool OFFSET>
ZO_DEVICE void load_scales(const Call& p, int n, Scales& s) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    s.scale[i] = scale_at(p, p.z.scale, n + 8 * i, s.group);
    s.offset[i] = OFFSET ? fmaf(8.0f, s.scale[i], scale_at(p, p.z.offset, n + 8 * i, s.group)) : 0.0f;
  }
}

// acc += scale * part + offset * sum of x, and part starts anew.
template <bool OFFSET, int MT>
ZO_DEVICE void fold(const Scales& s, float (&part)[MT][4], float (&sums)[OFFSET ? MT : 1][4], float (&acc)[MT][4]) {
#pragma unroll
  for (int j = 0; j < MT; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      acc[j][i] = fmaf(s.scale[i / 2], part[j][i], acc[j][i]);
      if (OFFSET) acc[j][i] = fmaf(s.offset[i / 2], sums[OFFSET ? j : 0][i & 1], acc[j][i]);
      part[j][i] = 0.0f;
    }
  if (OFFSET)
#pragma unroll
    for (int j = 0; j < MT; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[OFFSET ? j : 0][i] = 0.0f;
}

// x . D(W)^T of the block over blocks first .. last - 1 of k. STAGES - 1 copies are under way at any time; one barrier
// a turn says both that a stage has arrived for all and that the one before has been read by all.
template <class T, Format FORMAT, bool OFFSET, int MT>
ZO_DEVICE void multiply(const Call& p, const Place<MT>& at, int first, int last, char* memory, float (&acc)[MT][4]) {
  constexpr bool GROUPED = FORMAT == Format::int4;  // codes as they are, the scale at the end of a group
  constexpr int STAGE = stage_bytes<FORMAT, MT>();
  const uint32_t one = (uint32_t)from_float<T>(1.0f).bits * 0x10001u, ones[4] = {one, one, one, one};
  float* const table = (float*)(memory + STAGES * STAGE);
  if (FORMAT == Format::nf4 && threadIdx.x < 16) table[threadIdx.x] = p.table[threadIdx.x];
  float part[MT][4] = {}, sums[OFFSET ? MT : 1][4] = {};
  Scales s = {};
  if (FORMAT != Format::dense) {
    s.group = first * BK / p.group_size;
    // rounded up: the one group of a row may end anywhere
    s.left = (p.group_size - first * BK % p.group_size + BK / 2 - 1) / (BK / 2);
    load_scales<OFFSET>(p, at.n, s);
  }
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (first + i < last) fetch<T, FORMAT, MT>(p, at, first + i, memory + i * STAGE);
    async_commit();
  }
  int slot = 0;
  for (int kb = first; kb < last; kb++) {
    async_wait<STAGES - 2>();
    __syncthreads();  // the block's copies are there, and the stage before is free
    const int free = slot == 0 ? STAGES - 1 : slot - 1;
    if (kb + STAGES - 1 < last) fetch<T, FORMAT, MT>(p, at, kb + STAGES - 1, memory + free * STAGE);
    async_commit();
    const char* const codes = memory + slot * STAGE + at.warp * code_bytes<FORMAT>();
    const char* const x = memory + slot * STAGE + WARPS * code_bytes<FORMAT>();
    Word4 words = {};
    if constexpr (FORMAT != Format::dense) words = load16(codes + at.lane * 16);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int step = 2 * half + i;
        if constexpr (FORMAT == Format::dense) {
          const int matrix = at.lane / 8;
          ldmatrix4(a[i], codes + swizzled(at.lane % 8 + 8 * (matrix & 1), 2 * step + matrix / 2));
        } else if constexpr (FORMAT == Format::int4) {
          int4_fragment<T>(words.w[step], a[i]);
        } else {
          table_fragment<T>(words.w[step], table, s.scale, a[i]);
        }
      }
#pragma unroll
      for (int j = 0; j < MT; j++) {
        uint32_t b[4];
        ldmatrix4(b, x + swizzled(8 * j + at.lane % 8, 4 * half + at.lane / 8));
        float(&sum)[4] = GROUPED ? part[j] : acc[j];
        mma<T>(sum, a[0], b[0], b[1]);
        mma<T>(sum, a[1], b[2], b[3]);
        if (OFFSET) mma<T>(sums[OFFSET ? j : 0], ones, b[0], b[1]);
        if (OFFSET) mma<T>(sums[OFFSET ? j : 0], ones, b[2], b[3]);
      }
      if (FORMAT != Format::dense && --s.left == 0) {
        if (GROUPED) fold<OFFSET, MT>(s, part, sums, acc);
        s.group++, s.left = p.group_size / (BK / 2);
        load_scales<OFFSET>(p, at.n, s);
      }
    }
    slot = slot == STAGES - 1 ? 0 : slot + 1;
  }
  if (GROUPED) fold<OFFSET, MT>(s, part, sums, acc);
  async_wait<0>();
  __syncthreads();  // the pipeline's memory is free
}

// Blocks that have to fit on a multiprocessor: registers enough, where ptxas left alone spills some for one block more.
ZO_HD constexpr int blocks_of(int MT, bool offset) { return MT < 8 ? 4 : offset ? 2 : 3; }

// Sums as threads hold them, [splits][blocks][4 MT][THREADS].
template <int MT>
ZO_DEVICE float* partial_of(const Call& p, int split) {
  const int64_t block = ((int64_t)split * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  return p.partial + block * 4 * MT * THREADS + threadIdx.x;
}

// Grid: blocks of W's rows, blocks of x's rows, splits of K.
template <class T, Format FORMAT, bool OFFSET, int MT>
__global__ void __launch_bounds__(THREADS, blocks_of(MT, OFFSET)) product_kernel(const __grid_constant__ Call p) {
  const Place<MT> at;
  char* const memory = shared_memory();
  float acc[MT][4] = {};
  const int first = blockIdx.z * p.split_blocks;
  if (p.z.codes)
    multiply<T, FORMAT, OFFSET, MT>(p, at, first, smaller(first + p.split_blocks, p.blocks), memory, acc);
  if (p.partial) {
    float* const to = partial_of<MT>(p, blockIdx.z);
#pragma unroll
    for (int j = 0; j < MT; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) to[(4 * j + i) * THREADS] = acc[j][i];
  } else {
    low_rank<MT>(p, at, (float*)memory, acc);
    store_y<T, MT>(p, at, acc);
  }
}

// The same grid without splits, and the same threads: each reads back what it stored.
template <class T, int MT>
__global__ void __launch_bounds__(THREADS, blocks_of(MT, false)) finish_kernel(const __grid_constant__ Call p) {
  const Place<MT> at;
  float acc[MT][4] = {};
  for (int split = 0; split < p.splits; split++) {
    const float* const from = partial_of<MT>(p, split);
#pragma unroll
    for (int j = 0; j < MT; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[j][i] = acc[j][i] + from[(4 * j + i) * THREADS];
  }
  low_rank<MT>(p, at, (float*)shared_memory(), acc);
  store_y<T, MT>(p, at, acc);
}

// ---------------------------------------------------------------- h = x . basis

constexpr int ROWS = 4;  // of x that share a load of the basis

struct Projection {
  const void* x;
  const float* basis;  // [K, R], or [G, K, R] when group_rows > 0
  float* h;            // [chunks, M, R]
  int64_t x_stride;
  int M, K, R, group_rows;
};

// A warp takes ROWS rows, one chunk of k and every fourth quad of ranks; lanes stand side by side along k.
template <class T>
__global__ void __launch_bounds__(THREADS) project_kernel(Projection p) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int m0 = blockIdx.x * ROWS, first = blockIdx.y * CHUNK, last = smaller(first + CHUNK, p.K);
  for (int r0 = 4 * warp; r0 < p.R; r0 += 4 * WARPS) {
    float sum[ROWS][4] = {};
    for (int k = first + lane; k < last; k += WARP)
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        const int m = smaller(m0 + row, p.M - 1);
        const float x = to_float(((const T*)p.x)[m * p.x_stride + k]);
        const float* const basis = p.basis + ((int64_t)(p.group_rows ? m / p.group_rows : 0) * p.K + k) * p.R;
#pragma unroll
        for (int i = 0; i < 4; i++) sum[row][i] = fmaf(x, r0 + i < p.R ? basis[r0 + i] : 0.0f, sum[row][i]);
      }
#pragma unroll
    for (int row = 0; row < ROWS; row++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float v = sum[row][i];
#pragma unroll
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) v = v + shuffle_xor(v, lanes);
        if (lane == 0 && m0 + row < p.M && r0 + i < p.R) p.h[((int64_t)blockIdx.y * p.M + m0 + row) * p.R + r0 + i] = v;
      }
  }
}

// ---------------------------------------------------------------- launch

int64_t chunks_of(int64_t K) { return ceil_div(K, CHUNK); }

// Splits of K: enough blocks of 64 rows of W to fill a device at one block of x, none shorter than CHUNK, 16 at most.
int64_t splits_of(const ZoLinear& z, int64_t& split_blocks) {
  const int64_t wish = 128 * BN / z.N, most = z.K / CHUNK, blocks = ceil_div(z.K, BK);
  int64_t count = wish < most ? wish : most;
  count = count > 16 ? 16 : count < 1 ? 1 : count;
  split_blocks = blocks ? ceil_div(blocks, count) : 1;
  return z.codes && blocks ? ceil_div(blocks, split_blocks) : 1;
}

// Tiles of 8 rows of x that a block multiplies: three sizes, so that few kernels have to be compiled. No bit follows
// it.
int tiles_of(int64_t M) { return M <= 8 ? 1 : M <= 32 ? 4 : 8; }  // MT

struct Sizes {
  int64_t h, base_h, partial;  // floats of the workspace
};
Sizes sizes_of(const ZoLinear& z) {
  int64_t split_blocks;
  const int64_t splits = splits_of(z, split_blocks), rows = 8 * tiles_of(z.M);
  return {z.basis ? chunks_of(z.K) * z.M * z.R : 0, z.base_basis ? chunks_of(z.K) * z.M * z.base_rank : 0,
          splits > 1 ? splits * ceil_div(z.N, BN) * BN * ceil_div(z.M, rows) * rows : 0};
}

// Launches `project_kernel`; h [chunks, M, R] lies in the workspace.
template <class T>
const char* project(const ZoLinear& z, const float* basis, int64_t R, bool per_group, float* h) {
  const Projection p = {z.x, basis, h, z.x_stride, (int)z.M, (int)z.K, (int)R, per_group ? (int)(z.M / z.G) : 0};
  const dim3 grid((unsigned)ceil_div(z.M, ROWS), (unsigned)chunks_of(z.K));
  return launch(project_kernel<T>, grid, THREADS, 0, z.stream, p);
}

template <class T, int MT>
const char* launch_product(const Call& p) {
  const ZoLinear& z = p.z;
  const unsigned x = (unsigned)ceil_div(z.N, BN), y = (unsigned)ceil_div(z.M, 8 * MT);
  const dim3 grid(x, y, (unsigned)p.splits);
  const char* message;
  if (z.format == Format::dense) {
    message = launch(product_kernel<T, Format::dense, false, MT>, grid, THREADS, product_bytes<Format::dense, MT>(),
                     z.stream, p);
  } else if (z.format != Format::int4) {
    message = launch(product_kernel<T, Format::nf4, false, MT>, grid, THREADS, product_bytes<Format::nf4, MT>(),
                     z.stream, p);
  } else {
    message = launch(z.offset ? product_kernel<T, Format::int4, true, MT> : product_kernel<T, Format::int4, false, MT>,
                     grid, THREADS, product_bytes<Format::int4, MT>(), z.stream, p);
  }
  static_assert(product_bytes<Format::int4, MT>() >= low_rank_bytes<MT>(), "the low-rank terms fit into the pipeline");
  if (message || !p.partial) return message;
  return launch(finish_kernel<T, MT>, dim3(x, y), THREADS, low_rank_bytes<MT>(), z.stream, p);
}

template <class T>
const char* run(const ZoLinear& z) {
  const Sizes sizes = sizes_of(z);
  Call p = {};
  p.z = z;
  p.M = (int)z.M, p.N = (int)z.N, p.K = (int)z.K, p.R = (int)z.R, p.base_rank = (int)z.base_rank;
  p.S = z.noise == Noise::none ? 0 : (int)z.S;
  p.group_rows = (int)(z.M / z.G);
  p.group_size = (int)z.group_size, p.groups = (int)ceil_div(z.K, z.group_size), p.blocks = (int)ceil_div(z.K, BK);
  int64_t split_blocks;
  p.splits = (int)splits_of(z, split_blocks), p.split_blocks = (int)split_blocks;
  for (int i = 0; i < 16 && is_4bit(z.format); i++) p.table[i] = table_value(z.format, i);
  float* const h = z.workspace;
  float* const base_h = h + sizes.h;
  p.partial = sizes.partial ? base_h + sizes.base_h : nullptr;
  p.h = z.R == 0 ? nullptr : z.projected ? z.projected : z.basis ? h : nullptr;
  p.parts = z.projected ? 1 : (int)chunks_of(z.K);
  p.base_h = z.base_basis && z.base_rank ? base_h : nullptr;
  p.base_parts = (int)chunks_of(z.K);
  const char* message = nullptr;
  if (p.h == h && p.h) message = project<T>(z, z.basis, z.R, z.basis_per_group, h);
  if (!message && p.base_h) message = project<T>(z, z.base_basis, z.base_rank, false, base_h);
  if (message) return message;
  switch (tiles_of(z.M)) {
    case 1: return launch_product<T, 1>(p);
    case 4: return launch_product<T, 4>(p);
    default: return launch_product<T, 8>(p);
  }
}

// What this kernel declines, in words; dispatch then takes another implementation.
const char* refusal(const ZoLinear& z) {
  if (z.dtype != DType::f16 && z.dtype != DType::bf16) return "zo_linear: `x` is not float16 or bfloat16";
  if ((uintptr_t)z.x % 16 || z.x_stride % 8) return "zo_linear: rows of `x` are not aligned to 16 bytes";
  if (z.format == Format::int8) return "zo_linear: int8 weights have no CUDA kernel";
  if (z.codes && (uintptr_t)z.codes % 16) return "zo_linear: `weight` is not aligned to 16 bytes";
  if (z.codes && z.format == Format::dense && z.K % 8) return "zo_linear: a dense weight needs K to be a multiple of 8";
  if (z.codes && z.format != Format::dense && z.group_size % 32 && z.group_size < z.K)
    return "zo_linear: `group_size` is not a multiple of 32";
  if (z.G < 1 || z.M % z.G) return "zo_linear: `x` has a number of rows that its row groups do not divide";
  if (ceil_div(z.M, 64) > 65535) return "zo_linear: more than 4194240 rows";
  const int64_t most = 1 << 24;  // what 32-bit sizes and the grid bear
  if (z.N > most || z.K > most || z.R > most || z.base_rank > most || z.S > most)
    return "zo_linear: N, K, a rank or the number of seeds is above 2^24";
  return nullptr;
}

}  // namespace

int64_t zo_linear_workspace(const ZoLinear& z) {
  if (z.M == 0 || z.N == 0) return 0;
  const Sizes sizes = sizes_of(z);
  return sizes.h + sizes.base_h + sizes.partial;
}

const char* zo_linear(const ZoLinear& z) {
  if (z.M == 0 || z.N == 0) return nullptr;
  if (const char* message = refusal(z)) return message;
  return z.dtype == DType::f16 ? run<f16>(z) : run<bf16>(z);
}

}  // namespace cuda
}  // namespace zo
