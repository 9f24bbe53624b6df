// zo_dense_linear: y_g = x_g . (D(W) + mask * noise_scale * sum_s sigmas[g, s] Z_s)^T + bias
//
//   x [M, K], y [M, N] fp32 | bf16 | fp16;  W packed, any format and layout;  Z_s [N, K] made here, never stored
//
// A chunk of K of 64 columns becomes an fp32 panel of D(W), and the noise of each seed another; D(W) plus a group's
// weighted noise, in fp32, multiplies the rows of that group (tile.h). A task takes a slice of every group, so + and -
// share the noise. A group whose sigmas are all zero is clean: it has the arithmetic, hence the bits, of zo_linear without
// a direction. That W + sigma Z is rounded to fp32 leaves the probe 2^-24 |W| / sigma |Z| uncertain, per element and at
// random; two separate products would cost twice the time.
//
// on_scale: Z [N, groups of K] moves the scales, and the offset as -zero * scale with the zero point kept (QZO). That
// only changes what the sums over a chunk are multiplied with.
//
// Bound: the noise up to some 100 rows, then fma. Tests: tests/test_zo_dense_linear.py.
#include "digits.h"
#include "direction.h"
#include "tile.h"

namespace ZO_NAMESPACE {
namespace {

constexpr int64_t PANEL = DEPTH * BLOCK;  // floats
constexpr int64_t MAX_GROUPS = 64;        // of a task
constexpr int64_t MAX_ROWS = 1024;        // of a task: `main` is 256 KB; each task makes the noise of its columns anew
constexpr int64_t SCALES = 16;            // consecutive scales of a row whose noise is made at a time

struct Workspace {  // of a thread
  float *codes, *weights, *factor, *sum, *main, *tiles;
  static int64_t floats(const zo::ZoDenseLinear& p, const Plan& plan) {
    return 4 * PANEL + plan.rows * BLOCK + SeededTiles::memory_floats(p.z, PANEL);
  }
  Workspace(float* at, const Plan& plan)
      : codes(at), weights(codes + PANEL), factor(weights + PANEL), sum(factor + PANEL), main(sum + PANEL),
        tiles(main + plan.rows * BLOCK) {}
};

// work.factor: what multiplies the noise of a chunk elementwise, or null for 1.
const float* noise_factor(const zo::ZoDenseLinear& p, const Block& block, const Chunk& chunk, const Workspace& work) {
  const bool by_size = p.mask == zo::Mask::magnitude && p.w.codes, at_random = p.mask == zo::Mask::random;
  if (!p.noise_scale && !by_size && !at_random) return nullptr;
  const int64_t size = chunk.depth * block.columns;
  for (int64_t i = 0; i < size; i += W) store(work.factor + i, set1(1.0f));
  if (p.noise_scale) columns_panel(p.noise_scale, p.w.K, block, chunk.k, chunk.depth, work.factor);
  if (by_size) {
    for (int64_t i = 0; i < size; i += W) {
      const VF keep = abs(load(work.weights + i)) <= p.mask_value ? load(work.factor + i) : VF{};
      store(work.factor + i, keep);
    }
  }
  if (at_random) {
    const uint64_t threshold = zo::mask_threshold(p.mask_value);
    uint32_t words[DEPTH];
    for (int64_t n = 0; n < block.live; n++) {
      const uint64_t first = (uint64_t)(p.z.row_offset + block.n0 + n) * p.z.cols + chunk.k;
      words_run(words, p.mask_seed, p.z.param_id, zo::STREAM_MASK, first, chunk.depth);
      for (int64_t k = 0; k < chunk.depth; k++)
        if (words[k] >= threshold) work.factor[k * block.columns + n] = 0;
    }
  }
  return work.factor;
}

// The groups without noise, where they have a product of their own; the others follow in add_weight.
void add_clean(const zo::ZoDenseLinear& p, const Digits& x, const Plan& plan, const Task& task, const Workspace& work) {
  const int64_t rows = task.m1 - task.m0;
  for (int64_t g = task.g0; g < task.g1; g++) {
    if (SeededTiles::is_active(p.z, g)) continue;
    const int64_t m = g * plan.size + task.m0;
    add_base_digits(p.w, x, {task.block, g, g + 1, m, m + rows}, work.main + (g - task.g0) * rows * BLOCK);
  }
}

void add_weight(const zo::ZoDenseLinear& p, const X& x, const Plan& plan, const Task& task, const Workspace& work) {
  const Weight& w = p.w;
  const Block& block = task.block;
  const int64_t columns = block.columns, rows = task.m1 - task.m0;  // of each group
  float scale[BLOCK], offset[BLOCK];
  SeededTiles noise(p.z, PANEL, work.tiles);
  bool any_clean = false, any_active = false;
  for (int64_t g = task.g0; g < task.g1; g++) (SeededTiles::is_active(p.z, g) ? any_active : any_clean) = true;
  if (has_digits(w)) any_clean = false;  // add_clean's

  int64_t index = 0;
  for (Chunk chunk = chunk_at(w, 0); chunk.k < w.K; chunk = chunk_at(w, chunk.k + chunk.depth), index++) {
    const float* codes = nullptr;
    const float* factor = nullptr;
    if (w.codes && (any_clean || p.on_scale)) {
      codes = codes_panel(w, block, chunk, work.codes);
      if (starts_group(w, chunk)) chunk_scales(w, block, chunk, scale, offset);
    }
    if (any_active && p.on_scale) {
      const int64_t group = chunk.k / w.group_size;
      if (starts_group(w, chunk) && group % SCALES == 0)
        noise.move_to(block, group, min(SCALES, zo::groups_of(w) - group));
    } else if (any_active) {
      if (w.codes) weights_panel(w, block, chunk, work.weights);
      else memset(work.weights, 0, chunk.depth * columns * sizeof(float));
      factor = noise_factor(p, block, chunk, work);
      noise.move_to(block, chunk.k, chunk.depth);
    }
    for (int64_t g = task.g0; g < task.g1; g++) {
      const int64_t m = g * plan.size + task.m0;
      const auto multiply = [&](const float* panel, const float* scale, const float* offset) {
        multiply_rows(rows, x.row(m, chunk), x.row_stride(chunk), panel, columns, chunk.depth,
                      {scale, offset, offset ? x.sums_of(index, m) : nullptr},
                      work.main + (g - task.g0) * rows * BLOCK);
      };
      if (!SeededTiles::is_active(p.z, g)) {
        if (any_clean && codes) multiply(codes, scale, w.offset ? offset : nullptr);
      } else if (p.on_scale) {
        float moved[BLOCK], moved_offset[BLOCK];
        noise.weigh(g, work.sum);
        const float* z = work.sum + chunk.k / w.group_size % SCALES * columns;
        for (int64_t n = 0; n < columns; n++) {
          moved[n] = scale[n] + z[n];  // offset holds offset + 8 * scale, so that this keeps offset / scale
          if (w.offset) moved_offset[n] = offset[n] + (scale[n] == 0 ? 8 : offset[n] / scale[n]) * z[n];
        }
        multiply(codes, moved, w.offset ? moved_offset : nullptr);
      } else {
        noise.weigh(g, work.sum);
        for (int64_t i = 0; i < chunk.depth * columns; i += W) {
          const VF z = load(work.sum + i), weight = load(work.weights + i);
          store(work.sum + i, factor ? fma(load(factor + i), z, weight) : weight + z);
        }
        multiply(work.sum, ones.values, nullptr);
      }
    }
  }
}

}  // namespace

const char* zo_dense_linear(const zo::ZoDenseLinear& p) {
  const int64_t M = p.M, K = p.w.K;
  if (M == 0 || p.w.N == 0) return nullptr;
  if (p.G < 1 || M % p.G) return "`x` has a number of rows that its row groups do not divide";
  if (p.on_scale) {
    if (!p.w.codes || !has_scale(p.w))
      return "`noise_on` is 'scale', which needs a weight with scales of its own per row (not dense, not flat blocks)";
    if (p.mask != zo::Mask::none || p.noise_scale) return "`noise_on` is 'scale', which takes no mask and no noise_scale";
  }
  bool any_active = false, any_clean = false;
  for (int64_t g = 0; g < p.G; g++) (SeededTiles::is_active(p.z, g) ? any_active : any_clean) = true;
  if (!any_active) {
    zo::ZoLinear clean = {};
    clean.x = p.x, clean.y = p.y, clean.dtype = p.dtype, clean.M = M, clean.x_stride = p.x_stride, clean.w = p.w;
    clean.bias = p.bias, clean.bias_dtype = p.bias_dtype, clean.G = 1, clean.threads = p.threads;
    return zo_linear(clean);
  }
  const Plan plan(p.w, M, p.G, p.threads, MAX_GROUPS, MAX_ROWS);
  const bool in_place = p.dtype == zo::DType::f32;
  const int64_t x_floats = in_place ? 0 : aligned(M * K), sums_floats = p.w.offset ? aligned(chunk_count(p.w) * M) : 0;
  const bool clean_digits = any_clean && has_digits(p.w);
  const int64_t digit_floats = clean_digits ? Digits::floats(p.w, M) : 0;
  const int64_t thread_floats = Workspace::floats(p, plan);
  const Scratch memory(x_floats + sums_floats + digit_floats + plan.threads * thread_floats);
  if (!memory.get()) return NO_MEMORY;
  float* const packed = memory.get();
  float* const sums = packed + x_floats;
  const X x = {in_place ? (const float*)p.x : packed, !in_place, p.x_stride, M, p.w.offset ? sums : nullptr};
  const Digits digits(p.w, M, sums + sums_floats);

#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
    const Share share;
    const Workspace work(sums + sums_floats + digit_floats + share.thread * thread_floats, plan);
    with_type(p.dtype, [&](auto type) {
      if (clean_digits)
        pack_digits(p.w, (const decltype(type)*)p.x, p.x_stride, share.begin(M), share.end(M), digits);
      if (x_floats || sums_floats)
        pack_rows(p.w, (const decltype(type)*)p.x, p.x_stride, share.begin(M), share.end(M), M,
                  x_floats ? packed : nullptr, sums_floats ? sums : nullptr);
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < plan.tasks(); i++) {
      const Task task = plan.task(i);
      const int64_t rows = task.m1 - task.m0;
      memset(work.main, 0, (task.g1 - task.g0) * rows * BLOCK * sizeof(float));
      if (clean_digits) add_clean(p, digits, plan, task, work);
      add_weight(p, x, plan, task, work);
      for (int64_t g = task.g0; g < task.g1; g++)
        store_block(work.main + (g - task.g0) * rows * BLOCK, g * plan.size + task.m0, rows, task.block, p.bias,
                    p.bias_dtype, p.y, p.dtype, p.w.N);
    }
  }
  return nullptr;
}

}  // namespace ZO_NAMESPACE
