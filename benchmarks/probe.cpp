// What one core of this machine can do: fused multiply-adds a second, bytes read from memory a second.
#include <cstdint>
#include <cstdlib>
#include <ctime>

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float V __attribute__((vector_size(4 * WIDTH)));

// CPU time of this thread: neighbours on the machine hardly show in it.
static double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Flop/s of 12 independent chains of fma, enough to hide a latency of 4 on two pipes. Named one by one: in an array they
// would live on the stack.
#define CHAINS(F) F(c0) F(c1) F(c2) F(c3) F(c4) F(c5) F(c6) F(c7) F(c8) F(c9) F(c10) F(c11)
#define DECLARE(c) V c = {};
#define STEP(c) c = c * a + b; asm volatile("" : "+v"(c));
#define TAKE(c) sink = sink + c[0];

extern "C" double fma_peak() {
  CHAINS(DECLARE)
  const V a = V{} + 0.999f, b = V{} + 1e-3f;
  const int64_t rounds = 4000000;
  double best = 1e9;
  for (int repeat = 0; repeat < 5; repeat++) {
    const double start = now();
    for (int64_t i = 0; i < rounds; i++) { CHAINS(STEP) }
    const double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  volatile float sink = 0;
  CHAINS(TAKE)
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
