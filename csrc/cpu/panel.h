// The stored weight as fp32 panels: [depth][columns], one vector lane per output column.
//
// K is walked in chunks: pieces of at most DEPTH inside each scale group (of the whole row for dense and flat weights),
// so that a chunk has one scale per column and the order of every sum follows from (N, K, format) alone (law 2.4).
//
//   codes_panel    the centred code, codebook value or dense value c of a chunk
//   chunk_scales   its scale and, for int4 with an offset, offset + 8 * scale (1 for dense)
//   weights_panel  D(W) itself, rounded once to fp32: the same bits as dequantize(float32)
//
// A dense fp32 weight in layout `cpu` is its own panel; other cpu layouts decode in vectors. Layout `row` decodes a code
// at a time and transposes, to the same values. A flat weight has no scale per column: its panel is c * scale, scale 1.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace ZO_NAMESPACE {
namespace {

using zo::BLOCK;
using zo::Weight;

constexpr int64_t DEPTH = 64;  // a panel of DEPTH x BLOCK floats is 16 KB: half of L1

ZO_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
ZO_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// 64 columns of the weight: n0 .. n0 + live - 1 exist, `columns` (a multiple of 16) are computed.
struct Block {
  int64_t n0, columns, live;
};
ZO_INLINE Block block_at(const Weight& w, int64_t index) {
  const int64_t n0 = index * BLOCK;
  return {n0, zo::block_width(w.N, index), min(BLOCK, w.N - n0)};
}

struct Chunk {
  int64_t k, depth;  // k .. k + depth - 1
};
ZO_INLINE int64_t span_of(const Weight& w) {  // of one scale, where it bounds a chunk
  return w.format == zo::Format::dense || w.flat || !w.codes ? max(w.K, 1) : w.group_size;
}
// Shorter sums where 64 products in a row would round twice as far as torch's (law 2.3): rows of few k, which torch adds
// in many parts, and codes with an offset, whose zero point of 7.5 or 3 lets sum c * x drift where x has a mean.
ZO_INLINE int64_t depth_of(const Weight& w) {
  return w.K <= 128 ? DEPTH / 8 : w.K <= 256 ? DEPTH / 4 : w.offset ? DEPTH / 2 : DEPTH;
}

ZO_INLINE Chunk chunk_at(const Weight& w, int64_t k) {  // the chunk that starts at k
  const int64_t span = span_of(w), end = min((k / span + 1) * span, w.K);
  return {k, min(depth_of(w), end - k)};
}
ZO_INLINE bool starts_group(const Weight& w, const Chunk& chunk) { return chunk.k % span_of(w) == 0; }
ZO_INLINE int64_t chunk_count(const Weight& w) {
  const int64_t span = span_of(w), depth = depth_of(w);
  return w.K / span * zo::ceil_div(span, depth) + zo::ceil_div(w.K % span, depth);
}

// Calls f with a value of the C++ type of `dtype`: f([](auto type) { typedef decltype(type) T; ... }).
template <class F>
ZO_INLINE void with_type(zo::DType dtype, F f) {
  switch (dtype) {
    case zo::DType::bf16: return f(bf16{});
    case zo::DType::f16: return f(f16{});
    default: return f(float{});
  }
}

template <class T>
void to_floats(float* out, const T* in, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load(in + i));
  for (; i < count; i++) out[i] = to_float(in[i]);
}
inline void to_floats(float* out, zo::DType dtype, const void* in, int64_t first, int64_t count) {
  with_type(dtype, [&](auto type) { to_floats(out, (const decltype(type)*)in + first, count); });
}

template <class T>
void from_floats(T* out, const float* in, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load(in + i));
  for (; i < count; i++) round_to(out + i, in[i]);
}

// ---------------------------------------------------------------- transposition

typedef float V4 __attribute__((vector_size(16), may_alias));

// The 4 x 4 floats at `in` to `out`, transposed.
ZO_INLINE void transpose4(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#ifdef __clang__
#define ZO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ZO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VI4){__VA_ARGS__})
  typedef int32_t VI4 __attribute__((vector_size(16)));
#endif
  const V4 r0 = load_raw<V4>(in), r1 = load_raw<V4>(in + in_stride);
  const V4 r2 = load_raw<V4>(in + 2 * in_stride), r3 = load_raw<V4>(in + 3 * in_stride);
  const V4 a = ZO_SHUFFLE(r0, r1, 0, 4, 1, 5), b = ZO_SHUFFLE(r0, r1, 2, 6, 3, 7);
  const V4 c = ZO_SHUFFLE(r2, r3, 0, 4, 1, 5), d = ZO_SHUFFLE(r2, r3, 2, 6, 3, 7);
  store_raw(out, ZO_SHUFFLE(a, c, 0, 1, 4, 5));
  store_raw(out + out_stride, ZO_SHUFFLE(a, c, 2, 3, 6, 7));
  store_raw(out + 2 * out_stride, ZO_SHUFFLE(b, d, 0, 1, 4, 5));
  store_raw(out + 3 * out_stride, ZO_SHUFFLE(b, d, 2, 3, 6, 7));
#undef ZO_SHUFFLE
}

// out[c][r] = in[r][c] for r < rows, c < cols.
inline void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t cols, float* out, int64_t out_stride) {
  const int64_t whole_rows = rows & ~3, whole_cols = cols & ~3;
  for (int64_t c = 0; c < whole_cols; c += 4)
    for (int64_t r = 0; r < whole_rows; r += 4)
      transpose4(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = r < whole_rows ? whole_cols : 0; c < cols; c++) out[c * out_stride + r] = in[r * in_stride + c];
}

// Rows n0 .. of a row-major [N, row_stride] matrix, columns c .. c + depth - 1, as a panel; absent columns are zero.
inline void columns_panel(const float* matrix, int64_t row_stride, const Block& block, int64_t c, int64_t depth, float* panel) {
  if (block.live < block.columns) memset(panel, 0, depth * block.columns * sizeof(float));
  transpose(matrix + block.n0 * row_stride + c, row_stride, block.live, depth, panel, block.columns);
}

// ---------------------------------------------------------------- codes

// Where a chunk's codes come from in layout `cpu`, eight k at a time: value(at(k, n), i) is c of row k + i, columns n ..
// n + W - 1, for k a multiple of 8.
template <class Decode>
struct Nibbles {
  const uint32_t* dwords;
  int64_t columns;
  Decode decode;
  ZO_INLINE VU at(int64_t k, int64_t n) const { return Decode::prepare(load(dwords + k / 8 * columns + n)); }
  ZO_INLINE VF value(VU codes, int i) const { return decode(codes, i); }
};
template <class T>
struct Values {  // int8, bf16, f16
  const T* values;
  int64_t columns;
  ZO_INLINE const T* at(int64_t k, int64_t n) const { return values + k * columns + n; }
  ZO_INLINE VF value(const T* from, int i) const { return load(from + i * columns); }
};

// Calls f with the source of a chunk; not for layout `row` and not for dense fp32, which needs no decoding.
template <class F>
ZO_INLINE void with_source(const Weight& w, const Block& block, const Chunk& chunk, F f) {
  const int64_t first = block.n0 * zo::code_rows(w.format, w.K), columns = block.columns;
  if (zo::is_4bit(w.format)) {
    const uint32_t* dwords = (const uint32_t*)w.codes + first + chunk.k / zo::CODES_PER_DWORD * columns;
    const float* table = zo::decode_table(w.format);
    if (w.format == zo::Format::int4) f(Nibbles<Centred>{dwords, columns, Centred(table)});
    else f(Nibbles<Codebook>{dwords, columns, Codebook(table)});
  } else {
    const int64_t at = first + chunk.k * columns;
    if (w.format == zo::Format::int8) f(Values<int8_t>{(const int8_t*)w.codes + at, columns});
    else if (w.code_dtype == zo::DType::bf16) f(Values<bf16>{(const bf16*)w.codes + at, columns});
    else f(Values<f16>{(const f16*)w.codes + at, columns});
  }
}
ZO_INLINE bool has_source(const Weight& w) {
  return w.layout == zo::Layout::cpu && !(w.format == zo::Format::dense && w.code_dtype == zo::DType::f32);
}

template <class Source>
void decode_panel(const Source& source, int64_t columns, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; k += 8, panel += 8 * columns) {
    for (int64_t n = 0; n < columns; n += W) {
      const auto codes = source.at(k, n);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++)
        if (k + i < depth) store(panel + i * columns + n, source.value(codes, i));
    }
  }
}

// Codes k .. k + depth - 1 of row n of a weight in layout `row`.
inline void decode_row(const Weight& w, int64_t n, const Chunk& chunk, float* out) {
  const int64_t at = n * w.K + chunk.k;
  if (w.format == zo::Format::dense) return to_floats(out, w.code_dtype, w.codes, at, chunk.depth);
  if (w.format == zo::Format::int8) return to_floats(out, (const int8_t*)w.codes + at, chunk.depth);
  const float* table = zo::decode_table(w.format);
  const uint8_t* bytes = (const uint8_t*)w.codes;
  const int64_t first = w.flat ? at : n * (2 * zo::ceil_div(w.K, 2)) + chunk.k;  // in nibbles
  for (int64_t i = 0; i < chunk.depth; i++) out[i] = table[bytes[(first + i) / 2] >> 4 * ((first + i) % 2) & 15];
  if (!w.flat) return;
  for (int64_t i = 0; i < chunk.depth;) {  // one scale at a time
    const float scale = zo::scale_at(w, n, chunk.k + i);
    for (int64_t end = min(chunk.depth, i + w.group_size - (first + i) % w.group_size); i < end; i++) out[i] *= scale;
  }
}

// c of a chunk, [depth][block.columns], in `buffer` (DEPTH * BLOCK floats) or in the weight itself.
inline const float* codes_panel(const Weight& w, const Block& block, const Chunk& chunk, float* buffer) {
  if (w.layout == zo::Layout::row) {
    float rows[BLOCK * DEPTH];
    for (int64_t n = 0; n < block.live; n++) decode_row(w, block.n0 + n, chunk, rows + n * DEPTH);
    columns_panel(rows, DEPTH, {0, block.columns, block.live}, 0, chunk.depth, buffer);
  } else if (!has_source(w)) {
    return (const float*)w.codes + block.n0 * w.K + chunk.k * block.columns;
  } else {
    with_source(w, block, chunk, [&](const auto& source) { decode_panel(source, block.columns, chunk.depth, buffer); });
  }
  return buffer;
}

// ---------------------------------------------------------------- scales

ZO_INLINE bool has_scale(const Weight& w) { return w.format != zo::Format::dense && !w.flat; }

// Scale and offset as stored, of the group that column k belongs to: [block.columns] each. `offset` only if there is one.
inline void stored_scales(const Weight& w, const Block& block, int64_t k, float* scale, float* offset) {
  if (!has_scale(w)) {
    for (int64_t n = 0; n < block.columns; n++) scale[n] = 1;
  } else if (w.layout == zo::Layout::cpu && w.scale_dtype != zo::DType::u8) {
    const int64_t first = block.n0 * zo::groups_of(w) + k / w.group_size * block.columns;
    to_floats(scale, w.scale_dtype, w.scale, first, block.columns);
    if (w.offset) to_floats(offset, w.scale_dtype, w.offset, first, block.columns);
  } else {
    for (int64_t n = 0; n < block.columns; n++) {
      const bool live = n < block.live;
      scale[n] = live ? zo::scale_at(w, block.n0 + n, k) : 0;
      if (w.offset) offset[n] = live ? zo::offset_at(w, block.n0 + n, k) : 0;
    }
  }
}

// What multiplies the chunk's sum of c * x and, with an offset, its sum of x: scale and offset + 8 * scale.
inline void chunk_scales(const Weight& w, const Block& block, const Chunk& chunk, float* scale, float* offset) {
  stored_scales(w, block, chunk.k, scale, offset);
  if (!w.offset) return;
  for (int64_t n = 0; n < block.columns; n += W) store(offset + n, set1(8.0f) * load(scale + n) + load(offset + n));
}

// D(W) of int4 with an offset: the sum in fp64, rounded once.
typedef float VFHalf __attribute__((vector_size(2 * W)));
typedef double VD __attribute__((vector_size(4 * W)));

ZO_INLINE VF affine(VF c, VF scale, VF offset) {
  struct Halves { VFHalf half[2]; };
  c += 8.0f;
  Halves q, s, o, out;
  memcpy(&q, &c, sizeof q), memcpy(&s, &scale, sizeof s), memcpy(&o, &offset, sizeof o);
  for (int i = 0; i < 2; i++) {
    const VD exact = __builtin_convertvector(q.half[i], VD) * __builtin_convertvector(s.half[i], VD);
    out.half[i] = __builtin_convertvector(exact + __builtin_convertvector(o.half[i], VD), VFHalf);
  }
  memcpy(&c, &out, sizeof c);
  return c;
}

// D(W) of a chunk in fp32, [depth][block.columns], in `panel`.
inline void weights_panel(const Weight& w, const Block& block, const Chunk& chunk, float* panel) {
  float scale[BLOCK], offset[BLOCK];
  const float* codes = codes_panel(w, block, chunk, panel);
  stored_scales(w, block, chunk.k, scale, offset);
  for (int64_t k = 0; k < chunk.depth; k++) {
    for (int64_t n = 0; n < block.columns; n += W) {
      const VF c = load(codes + k * block.columns + n), s = load(scale + n);
      store(panel + k * block.columns + n, w.offset ? affine(c, s, load(offset + n)) : c * s);
    }
  }
}

}  // namespace
}  // namespace ZO_NAMESPACE
