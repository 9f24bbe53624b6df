// csrc/philox.h behind a C interface, for tests/test_rng.py: the scalar law, which the CPU kernels use W lanes wide and
// the CUDA kernels as it stands. Also compiled by nvcc, where `law_kernel` takes every function to the device.
#include "philox.h"

extern "C" {

void words(int64_t seed, uint32_t param_id, uint32_t stream, uint64_t block, uint32_t* out) {
  const zo::Words v = zo::words(seed, param_id, stream, block);
  for (int i = 0; i < 4; i++) out[i] = v.w[i];
}

void noise(int rademacher, int64_t seed, uint32_t param_id, uint64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++)
    out[i] = rademacher ? zo::rademacher(seed, param_id, first + i) : zo::normal(seed, param_id, first + i);
}

void box_muller(const uint32_t* a, const uint32_t* b, int64_t count, float* even, float* odd) {
  for (int64_t i = 0; i < count; i++) zo::box_muller<zo::Lane>(a[i], b[i], even[i], odd[i]);
}

void stochastic(int bf16, const uint32_t* bits, const uint32_t* word, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; i++)
    out[i] = bf16 ? zo::stochastic_bf16(bits[i], word[i]) : zo::stochastic_f16(bits[i], word[i]);
}

uint64_t mask_threshold(float share) { return zo::mask_threshold(share); }

}  // extern "C"

#ifdef __CUDACC__
__global__ void law_kernel(int64_t seed, uint32_t param_id, uint64_t e, float share, float* out) {
  const uint32_t word = zo::words(seed, param_id, zo::STREAM_MASK, e >> 2).w[e & 3];
  out[0] = zo::normal(seed, param_id, e) + zo::rademacher(seed, param_id, e);
  out[1] = word < zo::mask_threshold(share) ? 1.0f : 0.0f;
  out[2] = (float)(zo::stochastic_bf16(word, word) + zo::stochastic_f16(word, word));
}
#endif
