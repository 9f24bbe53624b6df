// What one core of this machine can do: fused multiply-adds a second, bytes read from memory a second.
#include <chrono>
#include <cstdint>
#include <cstdlib>

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float V __attribute__((vector_size(4 * WIDTH)));

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Flop/s of 12 independent chains of fma, enough to hide a latency of 4 on two pipes.
extern "C" double fma_peak() {
  V acc[12] = {};
  const V a = acc[0] + 1.0000001f, b = acc[0] + 1e-9f;
  const int64_t rounds = 4000000;
  double best = 1e9;
  for (int repeat = 0; repeat < 5; repeat++) {
    const double start = now();
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
      for (int j = 0; j < 12; j++) acc[j] = acc[j] * a + b;
      asm volatile("" : "+v"(acc[0]), "+v"(acc[1]), "+v"(acc[2]), "+v"(acc[3]));
    }
    const double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  volatile float sink = 0;
  for (int j = 0; j < 12; j++) sink = sink + acc[j][0];
  return 2.0 * 12 * WIDTH * rounds / best;
}

// Bytes/s of reading `bytes` of memory once, the best of five passes.
extern "C" double read_bandwidth(int64_t bytes) {
  const int64_t count = bytes / sizeof(V);
  V* data = (V*)aligned_alloc(64, count * sizeof(V));
  if (!data) return 0;
  for (int64_t i = 0; i < count; i++) data[i] = V{} + 1.0f;
  V sum[8] = {};
  double best = 1e9;
  for (int repeat = 0; repeat < 5; repeat++) {
    const double start = now();
    for (int64_t i = 0; i + 8 <= count; i += 8)
      for (int j = 0; j < 8; j++) sum[j] += data[i + j];
    const double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  volatile float sink = 0;
  for (int j = 0; j < 8; j++) sink = sink + sum[j][0];
  free(data);
  return double(count * sizeof(V)) / best;
}
