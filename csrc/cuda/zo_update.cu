// zo_update: one optimizer step over all layers of a model in one launch, C <- rule(C, g), g = sum_s weights[s] Z_s.
//
//   C, exp_avg, exp_avg_sq  [rows, cols] fp32 of each layer, in place;  element i has counter first_counts[layer] + i
//   seeds [S], weights [S] or [layers, S], hyper [7], skip [1]: on the device
//
// The formulas and the order of operations of csrc/cpu/zo_update.cpp, every operation rounded on its own (-fmad=false),
// so that the bits are those of reference.py. A block owns UPDATE_TILE elements of one layer, a thread four neighbours:
// one generator call and one 16-byte access each, where counter and address allow. No shared memory, no barrier.
//
// Bound: the generator for one seed already; bandwidth only for rademacher.
#include "noise.cuh"

namespace zo {
namespace cuda {
namespace {

constexpr int THREADS = (int)UPDATE_TILE / 4;

// What does not depend on the element, worked out by every thread: cheaper than a launch that would do it once.
struct Hyper {
  float lr, beta1, beta2, eps, weight_decay, rise1, rise2, step, root, decay;
};

ZO_DEVICE Hyper hyper_of(const float* h) {
  const float lr = h[0], beta1 = h[1], beta2 = h[2], weight_decay = h[4];
  return {lr, beta1, beta2, h[3], weight_decay, 1.0f - beta1, 1.0f - beta2, lr / h[5], Lane::sqrt(h[6]),
          lr * weight_decay};
}

// One element; m and v are left alone where the rule has none.
template <Rule RULE>
ZO_DEVICE void advance(const Hyper& h, float g, float& c, float& m, float& v) {
  if (RULE == Rule::adamw) {
    c = c - h.decay * c;
  } else {
    g = g + h.weight_decay * c;
  }
  if (RULE == Rule::sgd) {
    c = c - h.lr * g;
  } else if (RULE == Rule::momentum) {
    m = h.beta1 * m + g;
    c = c - h.lr * m;
  } else {
    m = h.beta1 * m + h.rise1 * g;
    v = h.beta2 * v + (h.rise2 * g) * g;
    c = c - h.step * (m / (Lane::sqrt(v) / h.root + h.eps));
  }
}

// The layer of a tile: the last one whose first tile is not behind it (layers without elements have no tile).
ZO_DEVICE int64_t layer_of(const ZoUpdate& p, int64_t tile) {
  int64_t low = 0, high = p.layers - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (p.first_tiles[middle] <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Four neighbours are loaded, moved and stored whole where they are all there and aligned, one by one elsewhere:
// windows into larger buffers may begin anywhere.
template <Rule RULE, Noise NOISE>
__global__ void __launch_bounds__(THREADS) update_kernel(ZoUpdate p) {
  constexpr bool has_m = RULE != Rule::sgd, has_v = RULE == Rule::adam || RULE == Rule::adamw;
  if (*p.skip) return;
  const int64_t layer = layer_of(p, blockIdx.x);
  const int64_t i = ((int64_t)blockIdx.x - p.first_tiles[layer]) * UPDATE_TILE + 4 * threadIdx.x;
  const int64_t left = p.sizes[layer] - i;
  if (left <= 0) return;
  const int count = left < 4 ? (int)left : 4;
  float g[4], c[4], m[4] = {}, v[4] = {};
  weighted_noise4<NOISE>(p.seeds, p.weights + (p.weights_per_layer ? layer * p.S : 0), p.S,
                         (uint32_t)p.param_ids[layer], (uint64_t)(p.first_counts[layer] + i), g);
  float* const to_c = p.coeffs[layer] + i;
  float* const to_m = has_m ? p.exp_avgs[layer] + i : nullptr;
  float* const to_v = has_v ? p.exp_avg_sqs[layer] + i : nullptr;
  load4(to_c, is_whole(to_c, left), count, c);
  if (has_m) load4(to_m, is_whole(to_m, left), count, m);
  if (has_v) load4(to_v, is_whole(to_v, left), count, v);
  const Hyper h = hyper_of(p.hyper);
#pragma unroll
  for (int j = 0; j < 4; j++) advance<RULE>(h, g[j], c[j], m[j], v[j]);
  store4(to_c, is_whole(to_c, left), count, c);
  if (has_m) store4(to_m, is_whole(to_m, left), count, m);
  if (has_v) store4(to_v, is_whole(to_v, left), count, v);
}

template <Rule RULE>
const char* launch_rule(const ZoUpdate& p) {
  const bool normal = p.noise == Noise::normal;
  return launch(normal ? update_kernel<RULE, Noise::normal> : update_kernel<RULE, Noise::rademacher>,
                dim3((unsigned)p.tiles), THREADS, 0, p.stream, p);
}

}  // namespace

const char* zo_update(const ZoUpdate& p) {
  if (p.noise == Noise::none) return "zo_update: `noise` is none; it has to be normal or rademacher";
  if (p.rule != Rule::sgd && !p.exp_avgs) return "zo_update: this rule needs `exp_avgs`";
  if ((p.rule == Rule::adam || p.rule == Rule::adamw) && !p.exp_avg_sqs)
    return "zo_update: this rule needs `exp_avg_sqs`";
  if (p.tiles > 0x7fffffff) return "zo_update: more than 2^31 tiles of 512 elements";
  if (p.tiles == 0) return nullptr;
  switch (p.rule) {
    case Rule::sgd: return launch_rule<Rule::sgd>(p);
    case Rule::momentum: return launch_rule<Rule::momentum>(p);
    case Rule::adam: return launch_rule<Rule::adam>(p);
    case Rule::adamw: return launch_rule<Rule::adamw>(p);
  }
  return "zo_update: unknown rule";
}

}  // namespace cuda
}  // namespace zo
