// zo_update: one optimizer step over all layers of a model, C <- rule(C, g), g = sum_s weights[s] Z_s made on the fly.
//
//   C, exp_avg, exp_avg_sq  [rows, cols] fp32 of each layer, in place;  element i has counter row_offset * cols + i
//   seeds [S], weights [S] or [layers, S]
//   hyper: lr, beta1, beta2, eps, weight_decay, c1 = 1 - beta1^t, c2 = 1 - beta2^t
//
// The formulas of torch.optim, every operation rounded on its own (no FMA), so that all instruction sets and
// reference.py agree bit for bit. Once a call: rise1 = 1 - beta1, rise2 = 1 - beta2, step = lr / c1, root = sqrt(c2),
// decay = lr * weight_decay. An element:
//
//   sgd       g = g + weight_decay * C;  C = C - lr * g
//   momentum  g = g + weight_decay * C;  m = beta1 * m + g;  C = C - lr * m
//   adam      g = g + weight_decay * C;  m = beta1 * m + rise1 * g;  v = beta2 * v + (rise2 * g) * g;
//             C = C - step * (m / (sqrt(v) / root + eps))
//   adamw     C = C - decay * C, then like adam without weight_decay
//
// Layers are cut into tiles of 512 elements, and threads share the tiles of all layers: a model of many small C keeps
// them all busy, and where a tile is cut changes no bit.
#include "noise.h"

namespace ZO_NAMESPACE {
namespace {

using zo::Rule;

struct Hyper {
  float lr, beta1, beta2, eps, weight_decay, rise1, rise2, step, root, decay;

  explicit Hyper(const float* h) : lr(h[0]), beta1(h[1]), beta2(h[2]), eps(h[3]), weight_decay(h[4]) {
    rise1 = 1.0f - beta1;
    rise2 = 1.0f - beta2;
    step = lr / h[5];
    root = __builtin_sqrtf(h[6]);
    decay = lr * weight_decay;
  }
};

template <Rule rule>
ZO_INLINE void advance(const Hyper& h, VF g, VF& c, VF& m, VF& v) {
  if (rule == Rule::adamw) {
    c = c - h.decay * c;
  } else {
    g = g + h.weight_decay * c;
  }
  if (rule == Rule::sgd) {
    c = c - h.lr * g;
  } else if (rule == Rule::momentum) {
    m = h.beta1 * m + g;
    c = c - h.lr * m;
  } else {
    m = h.beta1 * m + h.rise1 * g;
    v = h.beta2 * v + (h.rise2 * g) * g;
    c = c - h.step * (m / (sqrt(v) / h.root + h.eps));
  }
}

// `count` <= TILE elements; m and v are null where the rule has none.
template <Rule rule>
void advance_tile(const Hyper& h, const float* g, float* c, float* m, float* v, int64_t count) {
  const bool has_m = rule != Rule::sgd, has_v = rule == Rule::adam || rule == Rule::adamw;
  VF cs, ms{}, vs{};
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    cs = load(c + i);
    if (has_m) ms = load(m + i);
    if (has_v) vs = load(v + i);
    advance<rule>(h, load(g + i), cs, ms, vs);
    store(c + i, cs);
    if (has_m) store(m + i, ms);
    if (has_v) store(v + i, vs);
  }
  if (i == count) return;
  const int64_t n = count - i;
  cs = load(c + i, n);
  if (has_m) ms = load(m + i, n);
  if (has_v) vs = load(v + i, n);
  advance<rule>(h, load(g + i), cs, ms, vs);
  store(c + i, cs, n);
  if (has_m) store(m + i, ms, n);
  if (has_v) store(v + i, vs, n);
}

ZO_INLINE int64_t tiles_of(const zo::ZoUpdate& p, int64_t layer) {
  return (p.rows[layer] * p.cols[layer] + TILE - 1) / TILE;
}

// Tiles begin .. end - 1, counted over all layers.
template <Rule rule>
void advance_tiles(const zo::ZoUpdate& p, int64_t begin, int64_t end) {
  const Hyper h(p.hyper);
  alignas(64) float g[TILE];
  for (int64_t layer = 0; layer < p.layers && end > 0; layer++) {
    const int64_t tiles = tiles_of(p, layer), size = p.rows[layer] * p.cols[layer];
    const float* weights = p.weights + (p.weights_per_layer ? layer * p.S : 0);
    const uint64_t first = (uint64_t)p.row_offsets[layer] * (uint64_t)p.cols[layer];
    for (int64_t tile = begin > 0 ? begin : 0; tile < tiles && tile < end; tile++) {
      const int64_t at = tile * TILE, count = size - at < TILE ? size - at : TILE;
      weighted_noise(g, p.seeds, weights, p.S, (uint32_t)p.param_ids[layer], p.noise, first + at, count);
      advance_tile<rule>(h, g, p.coeffs[layer] + at, rule == Rule::sgd ? nullptr : p.exp_avgs[layer] + at,
                         rule == Rule::adam || rule == Rule::adamw ? p.exp_avg_sqs[layer] + at : nullptr, count);
    }
    begin -= tiles, end -= tiles;
  }
}

}  // namespace

const char* zo_update(const zo::ZoUpdate& p) {
  if (p.noise == zo::Noise::none) return "zo_update: `noise` is none; it has to be normal or rademacher";
  if (p.rule != Rule::sgd && !p.exp_avgs) return "zo_update: this rule needs `exp_avgs`";
  if ((p.rule == Rule::adam || p.rule == Rule::adamw) && !p.exp_avg_sqs)
    return "zo_update: this rule needs `exp_avg_sqs`";
  int64_t tiles = 0;
  for (int64_t layer = 0; layer < p.layers; layer++) tiles += tiles_of(p, layer);
  const int64_t parts = p.threads < 1 ? 1 : p.threads < tiles ? p.threads : tiles;
#pragma omp parallel for num_threads((int)parts) if (parts > 1)
  for (int64_t part = 0; part < parts; part++) {
    const int64_t begin = tiles * part / parts, end = tiles * (part + 1) / parts;
    switch (p.rule) {
      case Rule::sgd: advance_tiles<Rule::sgd>(p, begin, end); break;
      case Rule::momentum: advance_tiles<Rule::momentum>(p, begin, end); break;
      case Rule::adam: advance_tiles<Rule::adam>(p, begin, end); break;
      case Rule::adamw: advance_tiles<Rule::adamw>(p, begin, end); break;
    }
  }
  return nullptr;
}

}  // namespace ZO_NAMESPACE
