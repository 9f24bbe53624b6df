// zo_linear: y_g = x_g . D(W)^T + (x_g . A0) . C0^T + (x_g . A) . (C + C_g + sum_s sigmas[g, s] Z_s)^T + bias
//
//   x [M, K], y [M, N] fp16 | bf16;  W int4, int8, nf4, fp4 or dense;  A [K, R], C [N, R] fp32;  Z_s [N, R] made here
//
//   project   h = x . A in fp32, where h is not given: chunks of CHUNK k, which whoever reads h sums in their order
//   product   x . D(W)^T on tensor cores, 64 rows of W times up to 64 of x; then the low-rank terms, where K is whole
//   finish    the splits of K in their order, then the low-rank terms, where K is split
//
// The block's tile, its stages and the splits of K: tile.cuh. The codes and what they become: weight.cuh. The low-rank
// terms go on in the same fp32 sums (low_rank.cuh), and y is rounded once (law 2.5). No atomics.
//
//   int4        lop3 puts a nibble into the mantissa of 1024.0 (fp16) or 128.0 (bf16), and one FMA leaves q - 8, exact.
//               Codes are multiplied as they are; the scale meets their sum at the end of a group, in fp32, and so does
//               offset + 8 scale the sum of x (by a product with ones).
//   int8        the same with bytes, which lie in the mantissas of 1024.0 and 128.0 in one piece and in two.
//   nf4, fp4    table[q] * scale in fp32, rounded to the dtype of x: the bits of dequantize(dtype).
//
// Bound: the bytes of W up to about 64 rows, tensor cores above.
#include "low_rank.cuh"

namespace zo {
namespace cuda {
namespace {

constexpr int CHUNK = 512;  // k of a partial sum of h

// ---------------------------------------------------------------- product

// A stage in shared memory: what a warp has of its 16 rows of W, warp after warp, then the rows of x, 128 bytes each.
template <Format FORMAT>
ZO_HD constexpr int code_bytes() {  // of a warp
  return FORMAT == Format::dense ? 16 * BK * 2 : tile_bytes(FORMAT);
}
template <Format FORMAT, int MT>
ZO_HD constexpr int stage_bytes() {
  return WARPS * code_bytes<FORMAT>() + 8 * MT * BK * 2;
}
template <Format FORMAT, int MT>
ZO_HD constexpr int product_bytes() {
  return STAGES * stage_bytes<FORMAT, MT>() + 16 * (int)sizeof(float);  // and the table of a codebook
}

// Blocks of k on their way to a stage: 16 or 32 bytes of codes a lane, or the rows of a dense W; and the rows of x.
template <Format FORMAT, int MT>
struct Copies {
  RowCopies<8 * MT> x;                                // [8 MT, BK]
  RowCopies<FORMAT == Format::dense ? BN : 0> dense;  // [BN, BK]
  const char* codes;  // of this lane, in the first tile of its warp's 16 rows
  int to;             // where they go in a stage
  ZO_DEVICE Copies(const Call& p, const Place<MT>& at)
      : x(p.z.x, p.z.x_stride, at.m0, p.M, p.w.K), dense(p.w.codes, p.w.K, at.n0, p.w.N, p.w.K) {
    const int tile = smaller(at.n0 / TILE_N + at.warp, (p.w.N - 1) / TILE_N);  // a tile too many: as in RowCopies
    codes = (const char*)p.w.codes + (int64_t)tile * p.w.blocks * tile_bytes(FORMAT) + at.lane * 16;
    to = at.warp * code_bytes<FORMAT>() + at.lane * 16;
  }
  ZO_DEVICE void fetch(int kb, char* stage) const {
    if constexpr (FORMAT == Format::dense) {
      dense.fetch(kb, stage);
    } else {
      const char* const tile = codes + (int64_t)kb * tile_bytes(FORMAT);
      async_copy16(stage + to, tile);
      if (FORMAT == Format::int8) async_copy16(stage + to + 512, tile + 512);
    }
    x.fetch(kb, stage + WARPS * code_bytes<FORMAT>());
  }
};

// The scale of this thread's two rows, and how many halves of a block of k they still hold for.
struct Scales {
  float scale[2], offset[2];  // of rows n and n + 8
  int group, left;            // left: halves, 32 k each
};

// For int4 they are needed at the end of their group, which hides the load. Codes are centred, so the offset is too.
template <bool OFFSET>
ZO_DEVICE void load_scales(const Call& p, int n, Scales& s) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    s.scale[i] = scale_at(p.w, n + 8 * i, s.group);
    s.offset[i] = OFFSET ? fmaf(8.0f, s.scale[i], offset_at(p.w, n + 8 * i, s.group)) : 0.0f;
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

// acc += x . D(W)^T of the block over blocks first .. last - 1 of k.
template <class T, Format FORMAT, bool OFFSET, int MT>
ZO_DEVICE void multiply(const Call& p, const Place<MT>& at, int first, int last, char* memory, float (&acc)[MT][4]) {
  // Codes as they are, the scale at the end of a group.
  constexpr bool GROUPED = FORMAT == Format::int4 || FORMAT == Format::int8;
  constexpr int STAGE = stage_bytes<FORMAT, MT>();
  // As the left operand, ones give the sum of each row of x in all rows of C.
  const uint32_t one = (uint32_t)from_float<T>(1.0f).bits * 0x10001u, ones[4] = {one, one, one, one};
  float* const table = (float*)(memory + STAGES * STAGE);
  if (FORMAT == Format::nf4 && threadIdx.x < 16) table[threadIdx.x] = p.w.table[threadIdx.x];
  float part[MT][4] = {}, sums[OFFSET ? MT : 1][4] = {};  // of codes times x, and of x, in the group at hand
  Scales s = {};
  if (FORMAT != Format::dense) {
    s.group = first * BK / p.w.group_size;
    // rounded up: the one group of a row may end anywhere
    s.left = (p.w.group_size - first * BK % p.w.group_size + BK / 2 - 1) / (BK / 2);
    load_scales<OFFSET>(p, at.n, s);
  }
  const Copies<FORMAT, MT> copies(p, at);
  const auto send = [&](int kb, char* stage) { copies.fetch(kb, stage); };
  pipeline<STAGE>(first, last, memory, send, [&](int, const char* stage) {
    const char* const codes = stage + at.warp * code_bytes<FORMAT>();
    const char* const x = stage + WARPS * code_bytes<FORMAT>();
#pragma unroll(FORMAT == Format::dense ? 2 : 1)  // the end of a group is long
    for (int half = 0; half < 2; half++) {
      Word2 words = {};
      Word4 bytes = {};
      if constexpr (FORMAT == Format::int8) {
        bytes = load16(codes + at.lane * 16 + half * 512);
      } else if constexpr (FORMAT != Format::dense) {
        words = load8(codes + at.lane * 16 + half * 8);
      }
      uint32_t a[2][4];  // W [16 rows, 2 x 16 k]
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if constexpr (FORMAT == Format::dense) {
          const int matrix = at.lane / 8;
          ldmatrix4(a[i], codes + swizzled(at.lane % 8 + 8 * (matrix & 1), 4 * half + 2 * i + matrix / 2));
        } else if constexpr (FORMAT == Format::int8) {
          int8_fragment<T>(bytes.w[2 * i], bytes.w[2 * i + 1], a[i]);
        } else if constexpr (FORMAT == Format::int4) {
          int4_fragment<T>(words.w[i], a[i]);
        } else {
          table_fragment<T>(words.w[i], table, s.scale, a[i]);
        }
      }
#pragma unroll
      for (int j = 0; j < MT; j++) {
        uint32_t b[4];  // x [8 rows, 32 k]
        ldmatrix4(b, x + swizzled(8 * j + at.lane % 8, 4 * half + at.lane / 8));
        float(&sum)[4] = GROUPED ? part[j] : acc[j];
        mma<T>(sum, a[0], b[0], b[1]);
        mma<T>(sum, a[1], b[2], b[3]);
        if (OFFSET) mma<T>(sums[OFFSET ? j : 0], ones, b[0], b[1]);
        if (OFFSET) mma<T>(sums[OFFSET ? j : 0], ones, b[2], b[3]);
      }
      if (FORMAT != Format::dense && --s.left == 0) {
        if (GROUPED) fold<OFFSET, MT>(s, part, sums, acc);
        s.group++, s.left = p.w.group_size / (BK / 2);
        load_scales<OFFSET>(p, at.n, s);
      }
    }
  });
  if (GROUPED) fold<OFFSET, MT>(s, part, sums, acc);
}

// Blocks that have to fit on a multiprocessor: registers enough, where ptxas left alone spills some for one block more.
ZO_HD constexpr int blocks_of(int MT, bool offset) { return MT < 8 ? 4 : offset ? 2 : 3; }

// Grid: blocks of W's rows, blocks of x's rows, splits of K.
template <class T, Format FORMAT, bool OFFSET, int MT>
__global__ void __launch_bounds__(THREADS, blocks_of(MT, OFFSET)) product_kernel(const __grid_constant__ Call p) {
  const Place<MT> at;
  char* const memory = shared_memory();
  float acc[MT][4] = {};
  const int first = blockIdx.z * p.split_blocks;
  if (p.w.codes)
    multiply<T, FORMAT, OFFSET, MT>(p, at, first, smaller(first + p.split_blocks, p.w.blocks), memory, acc);
  if (p.partial) {
    store_partial<MT>(partial_of<MT>(p, blockIdx.z), acc);
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
  for (int sum = 0; sum < p.sums; sum++) add_partial<MT>(partial_of<MT>(p, sum), acc);
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
    float sum[ROWS][4] = {};  // of this lane's k, for ranks r0 .. r0 + 3
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
        float v = sum[row][i];  // of all lanes, in an order that no size changes
#pragma unroll
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) v = v + shuffle_xor(v, lanes);
        if (lane == 0 && m0 + row < p.M && r0 + i < p.R) p.h[((int64_t)blockIdx.y * p.M + m0 + row) * p.R + r0 + i] = v;
      }
  }
}

// ---------------------------------------------------------------- launch

int64_t chunks_of(int64_t K) { return ceil_div(K, CHUNK); }

// A launch that fills a device: 128 blocks at one block of x.
int clean_splits(const ZoLinear& z, int& split_blocks) { return z.codes ? splits_of(z, 128, split_blocks) : 1; }

struct Sizes {
  int64_t h, base_h, partial;  // floats of the workspace
};
Sizes sizes_of(const ZoLinear& z) {
  int split_blocks;
  const int splits = clean_splits(z, split_blocks);
  return {z.basis ? chunks_of(z.K) * z.M * z.R : 0, z.base_basis ? chunks_of(z.K) * z.M * z.base_rank : 0,
          splits > 1 ? splits * partial_floats(z) : 0};
}

// Launches `project_kernel`; h [chunks, M, R] lies in the workspace.
const char* project(const ZoLinear& z, const float* basis, int64_t R, bool per_group, float* h) {
  const Projection p = {z.x, basis, h, z.x_stride, (int)z.M, (int)z.K, (int)R, per_group ? (int)(z.M / z.G) : 0};
  const dim3 grid((unsigned)ceil_div(z.M, ROWS), (unsigned)chunks_of(z.K));
  return launch(z.dtype == DType::f16 ? project_kernel<f16> : project_kernel<bf16>, grid, THREADS, 0, z.stream, p);
}

template <class T, int MT>
const char* launch_product(const Call& p) {
  const dim3 grid = grid_of<MT>(p.z, p.splits);
  const auto run = [&](void (*kernel)(Call), int bytes) { return launch(kernel, grid, THREADS, bytes, p.z.stream, p); };
  static_assert(product_bytes<Format::int4, MT>() >= low_rank_bytes<MT>(), "the low-rank terms fit into the pipeline");
  if (p.w.format == Format::dense)
    return run(product_kernel<T, Format::dense, false, MT>, product_bytes<Format::dense, MT>());
  if (p.w.format == Format::int8)
    return run(product_kernel<T, Format::int8, false, MT>, product_bytes<Format::int8, MT>());
  if (p.w.format != Format::int4)
    return run(product_kernel<T, Format::nf4, false, MT>, product_bytes<Format::nf4, MT>());
  return run(p.w.offset ? product_kernel<T, Format::int4, true, MT> : product_kernel<T, Format::int4, false, MT>,
             product_bytes<Format::int4, MT>());
}

}  // namespace

const char* launch_product(const Call& p) {
  return with_tile(p.z, [&](auto type, auto tiles) { return launch_product<decltype(type), tiles.value>(p); });
}

const char* launch_finish(const Call& p) {
  return with_tile(p.z, [&](auto type, auto tiles) {
    constexpr int MT = tiles.value;
    return launch(finish_kernel<decltype(type), MT>, grid_of<MT>(p.z, 1), THREADS, low_rank_bytes<MT>(), p.z.stream, p);
  });
}

Call call_of(const ZoLinear& z) {
  Call p = {};
  p.z = z, p.w = stored_of(z);
  p.M = (int)z.M, p.R = (int)z.R, p.base_rank = (int)z.base_rank, p.S = z.noise == Noise::none ? 0 : (int)z.S;
  p.group_rows = (int)(z.M / z.G);
  p.splits = p.sums = clean_splits(z, p.split_blocks);
  return p;
}

// What this kernel declines, in words; dispatch then takes another implementation.
const char* refusal(const ZoLinear& z) {
  if (z.dtype != DType::f16 && z.dtype != DType::bf16) return "`x` is not float16 or bfloat16";
  if ((uintptr_t)z.x % 16 || z.x_stride % 8) return "rows of `x` are not aligned to 16 bytes";
  if (z.codes && (uintptr_t)z.codes % 16) return "`weight` is not aligned to 16 bytes";
  if (z.codes && z.format == Format::dense && z.K % 8) return "a dense weight needs K to be a multiple of 8";
  if (z.codes && z.format != Format::dense && z.group_size % 32 && z.group_size < z.K)
    return "`group_size` is not a multiple of 32";
  if (z.G < 1 || z.M % z.G) return "`x` has a number of rows that its row groups do not divide";
  if (ceil_div(z.M, 64) > 65535) return "more than 4194240 rows";
  if (z.x_stride >> 28) return "rows of `x` are more than 2^28 elements apart";
  const int64_t most = 1 << 24;  // what 32-bit sizes and the grid bear
  if (z.N > most || z.K > most || z.R > most || z.base_rank > most || z.S > most)
    return "N, K, a rank or the number of seeds is above 2^24";
  return nullptr;
}

int64_t zo_linear_workspace(const ZoLinear& z) {
  if (z.M == 0 || z.N == 0) return 0;
  const Sizes sizes = sizes_of(z);
  return sizes.h + sizes.base_h + sizes.partial;
}

const char* zo_linear(const ZoLinear& z) {
  if (z.M == 0 || z.N == 0) return nullptr;
  if (const char* message = refusal(z)) return message;
  const Sizes sizes = sizes_of(z);
  float* const h = z.workspace;
  float* const base_h = h + sizes.h;
  Call p = call_of(z);
  p.partial = sizes.partial ? base_h + sizes.base_h : nullptr;
  p.h = z.R == 0 ? nullptr : z.projected ? z.projected : z.basis ? h : nullptr;
  p.parts = z.projected ? 1 : (int)chunks_of(z.K);
  p.base_h = z.base_basis && z.base_rank ? base_h : nullptr;
  p.base_parts = (int)chunks_of(z.K);
  const char* message = nullptr;
  if (p.h == h && p.h) message = project(z, z.basis, z.R, z.basis_per_group, h);
  if (!message && p.base_h) message = project(z, z.base_basis, z.base_rank, false, base_h);
  if (!message) message = launch_product(p);
  return message || !p.partial ? message : launch_finish(p);
}

}  // namespace cuda
}  // namespace zo
