// The low-rank terms that a block adds to the sums it holds in registers:
//
//   acc += h0 . C0^T + h . C^T + h . C_g^T + (sigmas[g, s] h) . Z_s^T                h [M, R], C [N, R], Z_s [N, R]
//
// fp32 FMA over RANKS columns at a time from shared memory. C, C_g and Z are never added to one another and sigma
// multiplies h, so that the probe survives (law 2.5). Z_s is made once a block for all row groups. A row of x meets
// only its own sigmas and C_g: what another row or group adds to it is a product with zero.
#pragma once
#include "noise.cuh"
#include "tile.cuh"

namespace zo {
namespace cuda {
namespace {

constexpr int RANKS = 16;         // columns of h, C or Z in shared memory at a time
constexpr int PITCH = RANKS + 1;  // floats from row to row there: eight rows in different banks

// acc += left [BN, RANKS] . right [8 MT, RANKS]^T, both in shared memory.
template <int MT>
ZO_DEVICE void add_ranks(const Place<MT>& at, const float* left, const float* right, float (&acc)[MT][4]) {
#pragma unroll 2
  for (int r = 0; r < RANKS; r++) {
    const float low = left[at.row * PITCH + r], high = left[(at.row + 8) * PITCH + r];
#pragma unroll
    for (int j = 0; j < MT; j++) {
      const float even = right[at.column(j, 0) * PITCH + r], odd = right[at.column(j, 1) * PITCH + r];
      acc[j][0] = fmaf(low, even, acc[j][0]);
      acc[j][1] = fmaf(low, odd, acc[j][1]);
      acc[j][2] = fmaf(high, even, acc[j][2]);
      acc[j][3] = fmaf(high, odd, acc[j][3]);
    }
  }
}

// matrix [N, R] from column r0 on, zero outside.
ZO_DEVICE void stage_matrix(const float* matrix, int n0, int N, int r0, int R, float* left) {
  for (int i = threadIdx.x; i < BN * RANKS; i += THREADS) {
    const int n = n0 + i / RANKS, r = r0 + i % RANKS;
    left[i / RANKS * PITCH + i % RANKS] = n < N && r < R ? matrix[(int64_t)n * R + r] : 0.0f;
  }
}

// Z_s from column r0 on; past N and R it meets h = 0, or rows of y that nobody stores.
ZO_DEVICE void stage_noise(const ZoLinear& z, int64_t seed, int n0, int r0, float* left) {
  const uint32_t param_id = (uint32_t)*z.param_id;
  for (int i = threadIdx.x; i < BN * RANKS / 4; i += THREADS) {
    const int row = i / (RANKS / 4), r = i % (RANKS / 4) * 4;
    const uint64_t e = (uint64_t)(z.row_offset + n0 + row) * (uint64_t)z.cols + (uint64_t)(r0 + r);
    float four[4];
    if (z.noise == Noise::normal) {
      noise4<Noise::normal>(seed, param_id, e, four);
    } else {
      noise4<Noise::rademacher>(seed, param_id, e, four);
    }
#pragma unroll
    for (int k = 0; k < 4; k++) left[row * PITCH + r + k] = four[k];
  }
}

// h [parts, M, R] from column r0 on, its parts summed, zero outside.
template <int MT>
ZO_DEVICE void stage_h(const float* h, int parts, int m0, int M, int r0, int R, float* right) {
  for (int i = threadIdx.x; i < 8 * MT * RANKS; i += THREADS) {
    const int m = m0 + i / RANKS, r = r0 + i % RANKS;
    float sum = 0.0f;
    for (int part = 0; m < M && r < R && part < parts; part++) sum = sum + h[((int64_t)part * M + m) * R + r];
    right[i / RANKS * PITCH + i % RANKS] = sum;
  }
}

// own[m] = factor(row m of x) * right[m].
template <int MT, class Factor>
ZO_DEVICE void stage_own(const float* right, int m0, int M, const Factor& factor, float* own) {
  for (int i = threadIdx.x; i < 8 * MT * RANKS; i += THREADS) {
    const int m = m0 + i / RANKS;
    const int at = i / RANKS * PITCH + i % RANKS;
    own[at] = m < M ? factor(m) * right[at] : 0.0f;
  }
}

template <int MT>
ZO_HD constexpr int low_rank_bytes() {
  return (BN + 2 * 8 * MT) * PITCH * (int)sizeof(float);
}

// All low-rank terms of the block; `memory` holds low_rank_bytes and is free for use by all threads.
template <int MT>
ZO_DEVICE void low_rank(const Call& p, const Place<MT>& at, float* memory, float (&acc)[MT][4]) {
  const ZoLinear& z = p.z;
  float *left = memory, *right = left + BN * PITCH, *own = right + 8 * MT * PITCH;
  for (int r0 = 0; p.base_h && r0 < p.base_rank; r0 += RANKS) {
    stage_h<MT>(p.base_h, p.base_parts, at.m0, p.M, r0, p.base_rank, right);
    stage_matrix(z.base_coeff, at.n0, p.w.N, r0, p.base_rank, left);
    __syncthreads();
    add_ranks<MT>(at, left, right, acc);
    __syncthreads();
  }
  const int group_rows = p.group_rows, last = smaller(at.m0 + 8 * MT, p.M) - 1;
  // `right` stays for all that meets h; `left` and `own` are filled anew for each C_g and each seed.
  for (int r0 = 0; p.h && r0 < p.R; r0 += RANKS) {
    stage_h<MT>(p.h, p.parts, at.m0, p.M, r0, p.R, right);
    if (z.coeff) stage_matrix(z.coeff, at.n0, p.w.N, r0, p.R, left);
    __syncthreads();
    if (z.coeff) add_ranks<MT>(at, left, right, acc);
    for (int g = at.m0 / group_rows; z.coeff_groups && g <= last / group_rows; g++) {
      __syncthreads();  // before `left` and `own` are filled anew
      stage_matrix(z.coeff_groups + (int64_t)g * p.w.N * p.R, at.n0, p.w.N, r0, p.R, left);
      stage_own<MT>(right, at.m0, p.M, [&](int m) { return m / group_rows == g ? 1.0f : 0.0f; }, own);
      __syncthreads();
      add_ranks<MT>(at, left, own, acc);
    }
    for (int s = 0; s < p.S; s++) {
      __syncthreads();
      stage_noise(z, z.seeds[s], at.n0, r0, left);
      stage_own<MT>(right, at.m0, p.M, [&](int m) { return z.sigmas[m / group_rows * p.S + s]; }, own);
      __syncthreads();
      add_ranks<MT>(at, left, own, acc);
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace cuda
}  // namespace zo
