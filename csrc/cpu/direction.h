// The direction of one parameter (kernels.h), 64 of its rows at a time: weighted sums of the noise of its seeds.
//
// Z_s is made once per task and tile for all groups; a group's sum takes the seeds whose sigma is not zero, in ascending
// order: sigma * z, then fma(sigma, z, sum). So a group has the same bits alone and beside others, with their seeds in
// the call or not. More than MAX_SEEDS seeds would not stay in cache: then each group makes those it needs.
#pragma once
#include "noise.h"
#include "panel.h"

namespace ZO_NAMESPACE {
namespace {

constexpr int64_t MAX_SEEDS = 24;  // 384 KB of tiles of zo_dense_linear

class SeededTiles {
 public:
  // `floats` in a tile, at most DEPTH * BLOCK; `memory` holds memory_floats(z, floats).
  SeededTiles(const zo::Direction& z, int64_t floats, float* memory) : z_(z), floats_(floats), tiles_(memory) {}
  static int64_t memory_floats(const zo::Direction& z, int64_t floats) {
    return z.noise == zo::Noise::none || z.S == 0 ? 0 : floats * (z.S <= MAX_SEEDS ? z.S : 1);
  }

  static bool is_active(const zo::Direction& z, int64_t g) {
    for (int64_t s = 0; z.noise != zo::Noise::none && s < z.S; s++)
      if (z.sigmas[g * z.S + s] != 0) return true;
    return false;
  }

  // From here on: columns c .. c + count - 1 of the direction, for the rows n of `block`, as panels [count][block.columns].
  void move_to(const Block& block, int64_t c, int64_t count) {
    block_ = block, c_ = c, count_ = count;
    for (int64_t s = 0; z_.S <= MAX_SEEDS && s < z_.S; s++) make(s, tiles_ + s * floats_);
  }

  // sum = sum_s sigmas[g, s] Z_s of an active group.
  void weigh(int64_t g, float* sum) {
    const int64_t size = count_ * block_.columns;
    bool first = true;
    for (int64_t s = 0; s < z_.S; s++) {
      const float sigma = z_.sigmas[g * z_.S + s];
      if (sigma == 0) continue;
      const float* tile = z_.S <= MAX_SEEDS ? tiles_ + s * floats_ : tiles_;
      if (z_.S > MAX_SEEDS) make(s, tiles_);
      for (int64_t i = 0; i < size; i += W)
        store(sum + i, first ? set1(sigma) * load(tile + i) : fma(set1(sigma), load(tile + i), load(sum + i)));
      first = false;
    }
  }

 private:
  void make(int64_t s, float* tile) const {
    float values[DEPTH * BLOCK];  // [live][count]
    const uint64_t first = (uint64_t)(z_.row_offset + block_.n0) * z_.cols + c_;
    if (count_ == z_.cols) {
      noise_values(values, z_.seeds[s], z_.param_id, z_.noise, first, block_.live * count_);
    } else {
      for (int64_t n = 0; n < block_.live; n++)
        noise_values(values + n * count_, z_.seeds[s], z_.param_id, z_.noise, first + n * z_.cols, count_);
    }
    columns_panel(values, count_, {0, block_.columns, block_.live}, 0, count_, tile);
  }

  const zo::Direction& z_;
  int64_t floats_, c_ = 0, count_ = 0;
  float* tiles_;
  Block block_ = {};
};

}  // namespace
}  // namespace ZO_NAMESPACE
