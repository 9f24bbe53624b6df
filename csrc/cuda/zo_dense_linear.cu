// zo_dense_linear: y_g = x_g . (D(W) + f * sum_s sigmas[g, s] Z_s)^T + bias, f = mask * noise_scale
//
//   x [M, K], y [M, N] fp16 | bf16;  W int4, int8, nf4, fp4 or dense;  Z_s [N, K] made here, alive in registers only
//   sigmas [G, S], noise_scale [N, K] fp32;  mask: |D(W)| <= mask_value, or a share mask_value of all elements
//
//   product   x . D(W)^T: the kernel of zo_linear.cu
//   noise     sum_s sigmas[g, s] (x . (f Z_s)^T)
//   finish    the splits of both in their order and the bias, and y is rounded once (law 2.5): zo_linear.cu's again
//
// Sums of both kinds meet as splits of K do. One kernel for both would save a launch and 8 bytes of L2 traffic for an
// element of y and a split, and would pay for it with the registers of both: the noise, some 40 instructions an element
// of W where a 4-bit product has one, is what takes the time, and needs many warps.
//
// Noise is the left operand. A lane makes four neighbours of Z in one call of the generator, and they are slots 2 t,
// 2 t + 1, 2 t + 8, 2 t + 9 of its row: k = 4 t .. 4 t + 3 of sixteen. x takes the same order of k, so that nothing is
// exchanged and Z_s is made once for all row groups of up to 64 rows of x. sigma, a number a row of x, multiplies the
// sums of a seed in fp32.
//
// Z is not rounded to the dtype of x: it is a sum of parts that are, three of bf16 (24 bits) or two of fp16 (22 bits).
// 1 and -1 are one part. Behind a factor f, whose values may lie anywhere, fp16 is done in bf16 too, x in two parts.
//
// Bound: the generator, up to 64 rows. Tests: tests/test_cuda.py.
#include "noise.cuh"
#include "tile.cuh"

namespace zo {
namespace cuda {
namespace {

struct Noisy {
  Call call;  // splits and partial are those of the noise
  Mask mask;
  const float* mask_value;
  const int64_t* mask_seed;
  const float* noise_scale;
};

// How Z and x become operands. SHAPED: there is a factor f.
template <class T, Noise NOISE, bool SHAPED>
struct Operands {
  using Type = std::conditional_t<SHAPED, bf16, T>;
  static constexpr bool NARROW = std::is_same<Type, bf16>::value;
  static constexpr int Z_PARTS = NOISE == Noise::rademacher && !SHAPED ? 1 : NARROW ? 3 : 2;
  static constexpr int X_PARTS = std::is_same<Type, T>::value ? 1 : 2;
};

// The two values of a register as values of P, and what is left of them; P may be their own type.
template <class P, class T>
ZO_DEVICE uint32_t take_part(uint32_t& pair) {
  if constexpr (std::is_same<P, T>::value) return pair;
  const float low = to_float(T{(uint16_t)pair}), high = to_float(T{(uint16_t)(pair >> 16)});
  const uint32_t part = pack<P>(low, high);
  pair = pack<T>(low - to_float(P{(uint16_t)part}), high - to_float(P{(uint16_t)(part >> 16)}));  // exact
  return part;
}

// The same of four values in fp32, of each of two rows, as the left operand.
template <class P>
ZO_DEVICE void take_part(float (&z)[2][4], uint32_t (&a)[4]) {
#pragma unroll
  for (int row = 0; row < 2; row++)
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      float &low = z[row][2 * pair], &high = z[row][2 * pair + 1];
      const uint32_t part = a[row + 2 * pair] = pack<P>(low, high);
      low = low - to_float(P{(uint16_t)part});
      high = high - to_float(P{(uint16_t)(part >> 16)});
    }
}

// z = f * z for elements (n, k .. k + 3) with counters from e on; `table` is that of the codebook.
template <class T>
ZO_DEVICE void shape(const Noisy& p, const float* table, int n, int k, uint64_t e, float (&z)[4]) {
  const Stored& w = p.call.w;
  const bool there = n < w.N && k < w.K;
  float by[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  if (p.noise_scale && there) {
    const float* const from = p.noise_scale + (int64_t)n * w.K + k;
    load4(from, is_whole(from, w.K - k), smaller(w.K - k, 4), by);
  }
  if (p.mask == Mask::magnitude && w.codes && there) {
    float weight[4];
    if (w.format == Format::dense) {
      const T* const from = (const T*)w.codes + (int64_t)n * w.K + k;
      load4(from, true, 4, weight);
    } else {
      four_weights(w, table, n, k, weight);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) by[i] = fabsf(weight[i]) <= *p.mask_value ? by[i] : 0.0f;
  }
  if (p.mask == Mask::random) {
    uint32_t word[4];
    words4(*p.mask_seed, (uint32_t)*p.call.z.param_id, STREAM_MASK, e, word);
    const uint64_t threshold = mask_threshold(*p.mask_value);
#pragma unroll
    for (int i = 0; i < 4; i++) by[i] = word[i] < threshold ? by[i] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) z[i] = by[i] * z[i];
}

// Grid: blocks of W's rows, blocks of x's rows, splits of K of the noise's own.
template <class T, Noise NOISE, bool SHAPED, int MT>
__global__ void __launch_bounds__(THREADS, SHAPED ? 2 : MT > 1 ? 3 : 4) noise_kernel(const __grid_constant__ Noisy p) {
  using O = Operands<T, NOISE, SHAPED>;
  using P = typename O::Type;
  constexpr int STAGE = 8 * MT * BK * 2;
  const Call& c = p.call;
  const Place<MT> at;
  char* const memory = shared_memory();
  float* const table = (float*)(memory + STAGES * STAGE);  // read behind the first barrier of the pipeline
  if (threadIdx.x < 16) table[threadIdx.x] = c.w.table[threadIdx.x];
  const uint32_t param_id = (uint32_t)*c.z.param_id;
  const int first = blockIdx.z * c.split_blocks, last = smaller(first + c.split_blocks, c.w.blocks);
  uint64_t e[2];  // counter of the first element of rows n and n + 8
#pragma unroll
  for (int row = 0; row < 2; row++) e[row] = (uint64_t)(c.z.row_offset + at.n + 8 * row) * (uint64_t)c.z.cols;
  const RowCopies<8 * MT> copies(c.z.x, c.z.x_stride, at.m0, c.M, c.w.K);
  const auto send = [&](int kb, char* stage) { copies.fetch(kb, stage); };
  float acc[MT][4] = {};  // of all seeds
  for (int s = 0; s < c.S; s++) {
    const int64_t seed = c.z.seeds[s];
    float sums[MT][4] = {};  // x . (f Z_s)^T
    pipeline<STAGE>(first, last, memory, send, [&](int kb, const char* x) {
      uint64_t signs[2] = {};  // of this stage's 64 k, from this lane's first on
#pragma unroll
      for (int row = 0; row < 2 && NOISE == Noise::rademacher; row++)
        signs[row] = signs64(seed, param_id, e[row] + kb * BK) >> 4 * at.t;
#pragma unroll 1  // the generator is long
      for (int step = 0; step < BK / 16; step++) {
        const int k = kb * BK + 16 * step + 4 * at.t;
        float z[2][4];  // rows n and n + 8, k .. k + 3
#pragma unroll
        for (int row = 0; row < 2; row++) {
          if (NOISE == Noise::normal) {
            noise4<NOISE>(seed, param_id, e[row] + k, z[row]);
          } else {
            signs4(signs[row] >> 16 * step, z[row]);
          }
          if (SHAPED) shape<T>(p, table, at.n + 8 * row, k, e[row] + k, z[row]);
        }
        Word2 right[MT];  // x [8 MT rows, 16 k], four neighbours a lane
#pragma unroll
        for (int j = 0; j < MT; j++)
          right[j] = load8(x + swizzled(8 * j + at.g, 2 * step + at.t / 2) + at.t % 2 * 8);
#pragma unroll
        for (int part = 0; part < O::Z_PARTS; part++) {
          uint32_t a[4];
          take_part<P>(z, a);
#pragma unroll
          for (int j = 0; j < MT; j++) {
            uint32_t b0 = right[j].w[0], b1 = right[j].w[1];
#pragma unroll
            for (int of_x = 0; of_x < O::X_PARTS; of_x++) {
              const uint32_t low = take_part<P, T>(b0), high = take_part<P, T>(b1);
              mma<P>(sums[j], a, low, high);
            }
          }
        }
      }
    });
#pragma unroll
    for (int j = 0; j < MT; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int m = at.m0 + at.column(j, i);
        const float sigma = m < c.M ? c.z.sigmas[(int64_t)(m / c.group_rows) * c.S + s] : 0.0f;
        acc[j][i] = fmaf(sigma, sums[j][i], acc[j][i]);
      }
  }
  store_partial<MT>(partial_of<MT>(c, blockIdx.z), acc);
}

// ---------------------------------------------------------------- launch

template <class T, bool SHAPED, int MT>
const char* launch_noise(const Noisy& p) {
  const bool normal = p.call.z.noise == Noise::normal;
  return launch(normal ? noise_kernel<T, Noise::normal, SHAPED, MT> : noise_kernel<T, Noise::rademacher, SHAPED, MT>,
                grid_of<MT>(p.call.z, p.call.splits), THREADS, STAGES * 8 * MT * BK * 2 + 16 * sizeof(float),
                p.call.z.stream, p);
}

// Splits of the product and, for a call with noise, of the noise: four times the blocks, which hide its latency.
struct Splits {
  int clean, clean_blocks, noise, noise_blocks;
  Splits(const ZoLinear& z) {
    clean = z.codes ? splits_of(z, 128, clean_blocks) : 0;
    noise = z.noise == Noise::none || z.S == 0 ? 0 : splits_of(z, 512, noise_blocks);
  }
};

}  // namespace

int64_t zo_dense_linear_workspace(const ZoDenseLinear& d) {
  const ZoLinear& z = d.linear;
  if (z.M == 0 || z.N == 0) return 0;
  const Splits splits(z);
  return (splits.clean + splits.noise) * partial_floats(z);
}

const char* zo_dense_linear(const ZoDenseLinear& d) {
  const ZoLinear& z = d.linear;
  if (z.M == 0 || z.N == 0) return nullptr;
  if (const char* message = refusal(z)) return message;
  if (z.R || z.base_rank || z.projected) return "a dense direction has no basis";
  const Splits splits(z);
  Call p = call_of(z);
  p.sums = splits.clean + splits.noise;
  p.partial = z.workspace;
  const char* message = nullptr;
  if (splits.clean) {
    p.splits = splits.clean, p.split_blocks = splits.clean_blocks;
    message = launch_product(p);
  }
  if (splits.noise && !message) {
    Noisy noisy = {p, d.mask, d.mask_value, d.mask_seed, d.noise_scale};
    noisy.call.splits = splits.noise, noisy.call.split_blocks = splits.noise_blocks;
    noisy.call.partial += splits.clean * partial_floats(z);
    message = with_tile(z, [&](auto type, auto tiles) {
      const bool shaped = d.noise_scale || d.mask != Mask::none;
      return shaped ? launch_noise<decltype(type), true, tiles.value>(noisy)
                    : launch_noise<decltype(type), false, tiles.value>(noisy);
    });
  }
  return message ? message : launch_finish(p);
}

}  // namespace cuda
}  // namespace zo
