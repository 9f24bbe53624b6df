// What the Python side hands to a CPU kernel: raw pointers and sizes, nothing else.
//
// Every kernel is one function per ISA, declared here and compiled from one source (csrc/cpu/<op>.cpp) into the
// namespaces zo_base, zo_avx2, zo_avx512 and zo_avx512vnni. Python has checked dtypes, shapes, strides and devices and keeps the
// tensors alive over the call; a kernel returns nullptr, or a message that becomes a Python error.
#pragma once
#include <cstdint>

#include "../formats.h"  // DType, Format, Layout, Weight

namespace zo {

enum class Noise : int32_t { none = 0, normal = 1, rademacher = 2 };
enum class Mask : int32_t { none = 0, magnitude = 1, random = 2 };
enum class Rule : int32_t { sgd = 0, momentum = 1, adam = 2, adamw = 3 };

// The seeded direction of one parameter (design 2.1). Element (n, c) has counter (row_offset + n) * cols + c.
struct Direction {
  const int64_t* seeds;  // [S]
  const float* sigmas;   // [G, S]
  int64_t S, G;
  Noise noise;
  uint32_t param_id;
  int64_t row_offset, cols;
};

struct ZoLinear {
  const void* x;  // [M, K], last axis contiguous, rows x_stride elements apart
  void* y;        // [M, N] contiguous, dtype of x
  DType dtype;
  int64_t M, x_stride;
  Weight w;
  const void* bias;  // [N] or null
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
  Direction z;                // over [N, R]; noise = none when there is none
  int64_t G;                  // row groups: group g owns rows g * M / G ...
  int32_t threads;
};

struct ZoDenseLinear {
  const void* x;
  void* y;
  DType dtype;
  int64_t M, x_stride;
  Weight w;
  const void* bias;
  DType bias_dtype;
  Direction z;  // over [N, K], or over the scales [N, groups] when on_scale
  bool on_scale;
  Mask mask;
  float mask_value;            // magnitude: |w| <= value takes part; random: the share of entries that take part
  int64_t mask_seed;
  const float* noise_scale;    // [N, K] elementwise factor of the noise, or null
  int64_t G;
  int32_t threads;
};

// One launch over all layers of a model.
struct ZoUpdate {
  int64_t layers;
  float* const* coeffs;        // [layers] -> [rows, cols] contiguous
  float* const* exp_avgs;      // [layers] or null
  float* const* exp_avg_sqs;   // [layers] or null
  const int64_t* rows;         // [layers]
  const int64_t* cols;         // [layers]; also the `cols` of the noise
  const int64_t* row_offsets;  // [layers]
  const int64_t* param_ids;    // [layers]
  const int64_t* seeds;        // [S]
  const float* weights;        // [S], or [layers, S] when weights_per_layer
  int64_t S;
  bool weights_per_layer;
  Noise noise;
  Rule rule;
  const float* hyper;  // lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, 1 - beta2^t
  int32_t threads;
};

struct ZoPerturb {
  void* w;  // [N, C] contiguous in the last axis, rows w_stride apart
  DType dtype;
  int64_t N, C, w_stride;
  const int64_t* seeds;  // [S]
  const float* weights;  // [S]
  int64_t S;
  Noise noise;
  uint32_t param_id;
  int64_t row_offset, cols;
  const float* basis;  // [C, R]: w += sum weights * Z [N, R] . basis^T, with cols = R; null for a dense direction
  int64_t R;
  Mask mask;
  float mask_value;
  int64_t mask_seed;
  const float* noise_scale;  // [N, C] or null
  bool has_rounding;         // stochastic rounding of a bf16/f16 w by stream 2 of rounding_seed
  int64_t rounding_seed;
  int32_t threads;
};

struct Dequantize {
  Weight w;
  int64_t row_start, rows;
  void* out;  // [rows, K] contiguous
  DType dtype;
  int32_t threads;
};

#define ZO_DECLARE(isa)                              \
  namespace zo_##isa {                               \
  const char* zo_linear(const zo::ZoLinear&);        \
  const char* zo_dense_linear(const zo::ZoDenseLinear&); \
  const char* zo_update(const zo::ZoUpdate&);        \
  const char* zo_perturb(const zo::ZoPerturb&);      \
  const char* dequantize(const zo::Dequantize&);     \
  void noise_run(float* out, int64_t seed, uint32_t param_id, zo::Noise kind, uint64_t first, int64_t count); \
  }

}  // namespace zo

ZO_DECLARE(base)
ZO_DECLARE(avx2)
ZO_DECLARE(avx512)
ZO_DECLARE(avx512vnni)
