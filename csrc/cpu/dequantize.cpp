// dequantize: D(W)[row_start .. row_start + rows - 1] as [rows, K] in fp32, bf16 or fp16, from any format and layout.
//
// 64 rows by 64 columns at a time: the fp32 panel of panel.h, transposed, rounded once. Tests: tests/test_dequantize.py.
#include "tile.h"

namespace ZO_NAMESPACE {

const char* dequantize(const zo::Dequantize& p) {
  const Weight& w = p.w;
  if (p.rows == 0 || w.K == 0) return nullptr;
  const int64_t first = p.row_start / BLOCK, blocks = zo::ceil_div(p.row_start + p.rows, BLOCK) - first;
  [[maybe_unused]] const int threads = is_short(p.rows * w.K, 200000) ? 1 : p.threads;

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < blocks; b++) {
    float panel[DEPTH * BLOCK], rows[BLOCK * DEPTH];
    const Block block = block_at(w, first + b);
    const int64_t from = max(block.n0, p.row_start), to = min(block.n0 + block.live, p.row_start + p.rows);
    for (Chunk chunk = chunk_at(w, 0); chunk.k < w.K; chunk = chunk_at(w, chunk.k + chunk.depth)) {
      weights_panel(w, block, chunk, panel);
      transpose(panel, block.columns, chunk.depth, block.columns, rows, DEPTH);
      with_type(p.dtype, [&](auto type) {
        auto* out = (decltype(type)*)p.out + (from - p.row_start) * w.K + chunk.k;
        for (int64_t n = from; n < to; n++, out += w.K) from_floats(out, rows + (n - block.n0) * DEPTH, chunk.depth);
      });
    }
  }
  return nullptr;
}

}  // namespace ZO_NAMESPACE
