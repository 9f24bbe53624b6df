// How a call reaches a kernel: the instruction sets compiled in, and each struct of kernels.h as a flat list of
// arguments. The Python module (csrc/bindings.cpp) and the sanitizers' driver (tests/sanitize_driver.cpp) both read
// calls by these functions, so the order has one definition.
//
// A Reader has `into(fields...)`, which takes the next arguments; `items(field)`, which takes one argument that is a
// list, keeps it, points the field at it (null when empty) and returns its length; and `fail(message)`.
#pragma once
#include "kernels.h"

namespace zo {

struct Isa {
  const char* name;
  bool (*runs)();  // on this CPU and its operating system
  decltype(&zo_base::zo_linear) zo_linear;
  decltype(&zo_base::zo_dense_linear) zo_dense_linear;
  decltype(&zo_base::zo_update) zo_update;
  decltype(&zo_base::zo_perturb) zo_perturb;
  decltype(&zo_base::dequantize) dequantize;
  decltype(&zo_base::noise_run) noise_run;
};

#define ZO_KERNELS(isa)                                                                      \
  zo_##isa::zo_linear, zo_##isa::zo_dense_linear, zo_##isa::zo_update, zo_##isa::zo_perturb, \
      zo_##isa::dequantize, zo_##isa::noise_run

[[maybe_unused]] static bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

// What was compiled, best first; setup.py defines ZO_HAS_<ISA> for each instruction set its compiler knows.
static const Isa isas[] = {
#ifdef ZO_HAS_AVX512VNNI
    {"avx512vnni", [] { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }, ZO_KERNELS(avx512vnni)},
#endif
#ifdef ZO_HAS_AVX512
    {"avx512", runs_avx512, ZO_KERNELS(avx512)},
#endif
#ifdef ZO_HAS_AVX2
    // F16C came with the generation before AVX2, and Clang 14 cannot ask for it by name.
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, ZO_KERNELS(avx2)},
#endif
    {"base", [] { return true; }, ZO_KERNELS(base)},
};

template <class Reader>
void read(Reader& in, Weight& w) {
  in.into(w.codes, w.scale, w.offset, w.nested, w.format, w.layout, w.code_dtype, w.scale_dtype, w.N, w.K, w.group_size,
          w.flat);
}

template <class Reader>
void read(Reader& in, Direction& z) {
  in.into(z.seeds, z.sigmas, z.S, z.G, z.noise, z.param_id, z.row_offset, z.cols);
}

template <class Reader>
void read(Reader& in, ZoLinear& p) {
  in.into(p.x, p.y, p.dtype, p.M, p.x_stride);
  read(in, p.w);
  in.into(p.bias, p.bias_dtype, p.base_basis, p.base_coeff, p.base_rank, p.basis, p.basis_per_group, p.coeff,
          p.coeff_groups, p.projected, p.R);
  read(in, p.z);
  in.into(p.G, p.threads);
}

template <class Reader>
void read(Reader& in, ZoDenseLinear& p) {
  in.into(p.x, p.y, p.dtype, p.M, p.x_stride);
  read(in, p.w);
  in.into(p.bias, p.bias_dtype);
  read(in, p.z);
  in.into(p.on_scale, p.mask, p.mask_value, p.mask_seed, p.noise_scale, p.G, p.threads);
}

template <class Reader>
void read(Reader& in, ZoUpdate& p) {
  p.layers = in.items(p.coeffs);
  const int64_t exp_avgs = in.items(p.exp_avgs), exp_avg_sqs = in.items(p.exp_avg_sqs);
  const int64_t rows = in.items(p.rows), cols = in.items(p.cols), row_offsets = in.items(p.row_offsets);
  if ((exp_avgs && exp_avgs != p.layers) || (exp_avg_sqs && exp_avg_sqs != p.layers) || rows != p.layers ||
      cols != p.layers || row_offsets != p.layers)
    in.fail("coeffs, exp_avgs, exp_avg_sqs, rows, cols, row_offsets must have one item per layer");
  in.into(p.param_ids, p.seeds, p.weights, p.S, p.weights_per_layer, p.noise, p.rule, p.hyper, p.threads);
}

template <class Reader>
void read(Reader& in, ZoPerturb& p) {
  in.into(p.w, p.dtype, p.N, p.C, p.w_stride, p.seeds, p.weights, p.S, p.noise, p.param_id, p.row_offset, p.cols,
          p.basis, p.R, p.mask, p.mask_value, p.mask_seed, p.noise_scale, p.has_rounding, p.rounding_seed, p.threads);
}

template <class Reader>
void read(Reader& in, Dequantize& p) {
  read(in, p.w);
  in.into(p.row_start, p.rows, p.out, p.dtype, p.threads);
}

}  // namespace zo
