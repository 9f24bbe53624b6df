// What the Python side hands to a CUDA kernel: pointers to device memory, sizes, a stream.
//
// What changes from step to step is read on the device (law 2.6), so that a captured graph replays with new noise:
// seeds, sigmas, weights, param_id, hyper, skip. Python has checked dtypes, shapes, strides and devices and keeps the
// tensors alive over the call; a function returns nullptr, or a message that becomes a Python error. Nothing here waits
// for the device. A kernel that declines a shape says why: dispatch asks before it chooses.
#pragma once
#include "../cpu/kernels.h"  // Noise, Mask, Rule; DType, Format of formats.h

// What the library shows, under its plain name: a C interface.
#define ZO_ENTRY extern "C" __attribute__((visibility("default")))

namespace zo {
namespace cuda {

// One launch over all layers of a model. Arrays of `layers` items lie in device memory, like all they point to.
struct ZoUpdate {
  int64_t layers, tiles;        // tiles = first_tiles[layers]
  float* const* coeffs;         // [layers] -> [rows, cols] contiguous
  float* const* exp_avgs;       // [layers] or null
  float* const* exp_avg_sqs;    // [layers] or null
  const int64_t* sizes;         // [layers] rows * cols
  const int64_t* first_counts;  // [layers] row_offset * cols: the counter of the first element
  const int64_t* first_tiles;   // [layers + 1] running sum of ceil(size / UPDATE_TILE)
  const int64_t* param_ids;     // [layers]
  const int64_t* seeds;         // [S]
  const float* weights;         // [S], or [layers, S] when weights_per_layer
  int64_t S;
  bool weights_per_layer;
  Noise noise;
  Rule rule;
  const float* hyper;           // lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, 1 - beta2^t
  const bool* skip;             // [1]: when true nothing is written
  void* stream;
};

constexpr int64_t UPDATE_TILE = 512;  // elements of a block of zo_update

struct ZoPerturb {
  void* w;  // [N, C] contiguous in the last axis, rows w_stride apart
  DType dtype;
  int64_t N, C, w_stride;
  const int64_t* seeds;  // [S]
  const float* weights;  // [S]
  int64_t S;
  Noise noise;
  const int64_t* param_id;  // [1]
  int64_t row_offset, cols;
  const float* basis;  // [C, R] or null for a dense direction
  int64_t R;
  Mask mask;
  const float* mask_value;       // [1] or null
  const int64_t* mask_seed;      // [1] or null
  const float* noise_scale;      // [N, C] or null
  const int64_t* rounding_seed;  // [1] or null: round to nearest
  void* stream;
};

struct ZoLinear {
  const void* x;  // [M, K], last axis contiguous, rows x_stride elements apart; 16-byte aligned rows
  void* y;        // [M, N] contiguous, dtype of x
  DType dtype;    // f16 or bf16
  int64_t M, x_stride;
  const void* codes;  // layout `cuda` (weight.cuh); dense: [N, K] row-major, dtype of x; null: W = 0
  const void* scale;  // [N, groups] row-major; null for dense
  const void* offset; // like scale, int4 only; null for w = (q - 8) * scale
  const float* nested;  // scale is u8: 256 code values, then one offset, then one absmax per 256 scales
  Format format;
  DType scale_dtype;
  int64_t N, K, group_size;  // group_size resolved: K for "one group per row"
  const void* bias;          // [N] or null
  DType bias_dtype;
  const float* base_basis;    // [K, base_rank] or null
  const float* base_coeff;    // [N, base_rank]
  int64_t base_rank;
  const float* basis;         // [K, R], or [G, K, R] when basis_per_group; null when projected is given or R = 0
  bool basis_per_group;
  const float* coeff;         // [N, R] or null
  const float* coeff_groups;  // [G, N, R] or null
  const float* projected;     // [M, R] or null
  int64_t R;
  const int64_t* seeds;     // [S]
  const float* sigmas;      // [G, S]
  int64_t S;
  Noise noise;
  const int64_t* param_id;  // [1]
  int64_t row_offset, cols;
  int64_t G;                // row groups: group g owns rows g * M / G ...
  float* workspace;         // zo_linear_workspace(p) floats, need not be zero
  void* stream;
};

struct ZoDenseLinear {
  ZoLinear linear;  // x, y, W, bias and the seeds of Z [N, K]; no basis, no coefficients, rank 0
  Mask mask;
  const float* mask_value;   // [1] or null
  const int64_t* mask_seed;  // [1] or null
  const float* noise_scale;  // [N, K] or null
};

struct Dequantize {
  const void* codes;  // as in ZoLinear; dense: of code_dtype
  const void* scale;
  const void* offset;
  const float* nested;
  Format format;
  DType scale_dtype, code_dtype;
  int64_t N, K, group_size;
  void* out;  // [rows, K] contiguous
  DType dtype;
  int64_t row_start, rows;
  void* stream;
};

ZO_ENTRY const char* dequantize(const Dequantize&);
ZO_ENTRY const char* zo_linear(const ZoLinear&);
ZO_ENTRY int64_t zo_linear_workspace(const ZoLinear&);
ZO_ENTRY const char* zo_dense_linear(const ZoDenseLinear&);
ZO_ENTRY int64_t zo_dense_linear_workspace(const ZoDenseLinear&);
ZO_ENTRY const char* zo_update(const ZoUpdate&);
ZO_ENTRY const char* zo_perturb(const ZoPerturb&);

}  // namespace cuda
}  // namespace zo
