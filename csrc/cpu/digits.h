// The product with int4 codes in integers, for AVX-512 VNNI: x as three digits of base 256, four products a lane.
//
//   x[m][k] = 2^e (65536 d2 + 256 d1 + d0) + r        |r| <= 2^(e-1), d in -128 .. 127, e per row and chunk of K
//   sum_k x[m][k] c[k][n] = 2^e (65536 S2 + 256 S1 + S0),   S_i = sum_k d_i[m][k] (q[k][n] - 8)      exact in int32
//
// vpdpbusd adds four of these products in a lane, so three digits take 3/4 of the time of an fma, and decoding is two
// operations for 64 codes. Nothing is rounded inside a chunk but x: by at most 2^-23 of its largest value there, where
// fp32 sums round at the size of their terms as well (law 2.3; tests/test_zo_linear.py, outliers). x in one or two
// digits (8 or 16 bits) would not do: finite differences by sigma = 1e-3 drown in it.
//
// A chunk with an infinity keeps only the signs of the infinities, times infinity; one with a NaN is NaN.
#pragma once
#include "tile.h"

#ifdef __AVX512VNNI__
namespace ZO_NAMESPACE {
namespace {

constexpr int64_t PIECE = 16;             // k whose digits lie together: [3][16] bytes, k in the order of ORDER
constexpr int64_t PIECE_BYTES = 3 * PIECE;
constexpr int32_t LARGEST = 0x7f7f00;     // three digits reach 0x7f7f7f; the rest is for the rounding of x / LARGEST

// What else belongs to the digits of a row and chunk.
struct DigitRow {
  int32_t high, low;  // -8 * sum of x in units of 2^e: 65536 * high + low
  float scale;        // 2^e
  float sum;          // of x
};

ZO_INLINE bool has_digits(const Weight& w) {
  return w.format == zo::Format::int4 && w.codes;
}

// Rows of digits, one after the other in each chunk; a chunk is at most DEPTH of one scale group.
struct Digits {
  int8_t* bytes;    // [chunk][M][row_bytes]
  DigitRow* rows;   // [chunk][M]
  int64_t M, depth, row_bytes;

  static int64_t depth_of(const Weight& w) { return min(DEPTH, min(w.group_size, w.K)); }
  static int64_t row_bytes_of(const Weight& w) { return zo::ceil_div(depth_of(w), PIECE) * PIECE_BYTES; }
  static int64_t chunks(const Weight& w) {
    const int64_t depth = depth_of(w);
    return w.K / w.group_size * zo::ceil_div(w.group_size, depth) + zo::ceil_div(w.K % w.group_size, depth);
  }
  static int64_t floats(const Weight& w, int64_t M) {  // of memory
    return aligned(chunks(w) * M * 4) + aligned(zo::ceil_div(chunks(w) * M * row_bytes_of(w), 4));
  }

  Digits(const Weight& w, int64_t M, float* memory)
      : bytes((int8_t*)(memory + aligned(chunks(w) * M * 4))), rows((DigitRow*)memory), M(M), depth(depth_of(w)),
        row_bytes(row_bytes_of(w)) {}
  const int8_t* at(int64_t chunk, int64_t m) const { return bytes + (chunk * M + m) * row_bytes; }
  const DigitRow* row(int64_t chunk, int64_t m) const { return rows + chunk * M + m; }
};

ZO_INLINE Chunk digit_chunk(const Weight& w, int64_t depth, int64_t k) {  // the one that starts at k
  return {k, min(depth, min((k / w.group_size + 1) * w.group_size, w.K) - k)};
}

// Sixteen x in units of 2^e, as three digits of 16 bytes. Even k of eight come first, then the odd ones: the low
// nibbles of a dword of codes are the even k.
ZO_INLINE void store_digits(VI x, int8_t* out) {
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i digits = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const VI biased = (x + 0x808080) ^ 0x808080;  // adding 128 to each digit carries as balanced digits need
  const __m512i sorted = _mm512_permutexvar_epi32(order, (__m512i)biased);
  _mm512_mask_storeu_epi32(out, 0x0fff, _mm512_permutexvar_epi32(digits, _mm512_shuffle_epi8(sorted, bytes)));
}

// `depth` x of a row as digits, and what else belongs to them.
template <class T>
ZO_INLINE void digits_of(const T* x, int64_t depth, int8_t* out, DigitRow& row) {
  const int64_t pieces = zo::ceil_div(depth, PIECE);
  VF values[DEPTH / W];
  VU largest = {};
  for (int64_t i = 0; i < pieces; i++) {
    values[i] = depth - i * W >= W ? load(x + i * W) : load(x + i * W, depth - i * W);
    largest = (VU)_mm512_max_epu32((__m512i)largest, (__m512i)(float_to_bits(values[i]) & 0x7fffffffu));
  }
  const uint32_t bits = _mm512_reduce_max_epu32((__m512i)largest);
  VI total = {};
  if (bits >= 0x7f800000u) {
    row.scale = __builtin_inff() * (bits > 0x7f800000u ? 0 : 1);
    for (int64_t i = 0; i < pieces; i++) {
      const VU b = float_to_bits(values[i]);
      const VI sign = (VI)((b & 0x7fffffffu) == 0x7f800000u) & ((VI)(b >> 31) * -2 + 1);
      total += sign;
      store_digits(sign, out + i * PIECE_BYTES);
    }
  } else {
    float size, factor;
    memcpy(&size, &bits, 4);
    size = size * ((float)0x800000 / LARGEST) + 0x1p-104f;  // its exponent is the least that every x fits, and 2^e normal
    uint32_t exponent;
    memcpy(&exponent, &size, 4);
    exponent >>= 23;
    const uint32_t scale = (exponent - 22) << 23, inverse = (254 + 22 - exponent) << 23;
    memcpy(&row.scale, &scale, 4), memcpy(&factor, &inverse, 4);
    for (int64_t i = 0; i < pieces; i++) {
      const VI rounded = (VI)_mm512_cvtps_epi32((__m512)(values[i] * set1(factor)));
      total += rounded;
      store_digits(rounded, out + i * PIECE_BYTES);
    }
  }
  const int32_t sum = _mm512_reduce_add_epi32((__m512i)total);
  row.high = -8 * (sum >> 16), row.low = -8 * (sum & 0xffff), row.sum = (float)sum * row.scale;
}

// Rows m0 .. m1 - 1 of x as digits.
template <class T>
void pack_digits(const Weight& w, const T* x, int64_t x_stride, int64_t m0, int64_t m1, const Digits& to) {
  for (int64_t from = m0; from < m1; from += PACK_ROWS) {
    const int64_t end = min(m1, from + PACK_ROWS);
    int64_t i = 0;
    for (Chunk chunk = digit_chunk(w, to.depth, 0); chunk.k < w.K;
         chunk = digit_chunk(w, to.depth, chunk.k + chunk.depth), i++) {
      const auto pack = [&](int64_t depth) __attribute__((always_inline)) {
        for (int64_t m = from; m < end; m++)
          digits_of(x + m * x_stride + chunk.k, depth, (int8_t*)to.at(i, m), to.rows[i * to.M + m]);
      };
      if (chunk.depth == DEPTH) pack(DEPTH);  // unrolled
      else pack(chunk.depth);
    }
  }
}

// main[r][n] += scale[n] * sum_k x[r][k] (q[k][n] - 8) + offset[n] * sum_k x[r][k]
template <int R, int V>
void multiply_digits(const int8_t* digits, int64_t row_bytes, const DigitRow* rows, const uint32_t* codes,
                     int64_t columns, int64_t depth, const float* scale, const float* offset, float* main) {
  for (int64_t n = 0; n < columns; n += V * W) {
    VI acc[R][V][3];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v][0] = set1(rows[r].low), acc[r][v][1] = VI{}, acc[r][v][2] = set1(rows[r].high);
    const uint32_t* from = codes + n;
    const int8_t* at[R];
    for (int r = 0; r < R; r++) at[r] = digits + r * row_bytes;
    const auto eight = [&](int first) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; odd++) {
        VU q[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) q[v] = (load(from + v * W) >> 4 * odd) & 0x0f0f0f0fu;
        from += odd ? columns : 0;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 3
          for (int i = 0; i < 3; i++) {
            int32_t four;
            memcpy(&four, at[r] + i * PIECE + first + 4 * odd, 4);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
              acc[r][v][i] = (VI)_mm512_dpbusd_epi32((__m512i)acc[r][v][i], (__m512i)q[v], (__m512i)set1(four));
          }
        }
      }
    };
    for (int64_t k = 0; k < depth; k += PIECE) {
      eight(0);
      if (k + 8 < depth) eight(8);
      for (int r = 0; r < R; r++) at[r] += PIECE_BYTES;
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const VF s = load(scale + n + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        float* to = main + r * BLOCK + n + v * W;
        const VF sum = fma(to_float(acc[r][v][2]), set1(65536.0f), to_float((acc[r][v][1] << 8) + acc[r][v][0]));
        VF y = fma(sum * set1(rows[r].scale), s, load(to));
        if (offset) y = fma(load(offset + n + v * W), set1(rows[r].sum), y);
        store(to, y);
      }
    }
  }
}

constexpr int DIGIT_ROWS = 4;  // of a tile: 4 x 2 zmm of three digits each fill the accumulator registers

typedef void (*MultiplyDigits)(const int8_t*, int64_t, const DigitRow*, const uint32_t*, int64_t, int64_t, const float*,
                               const float*, float*);
constexpr MultiplyDigits multiply_digits_wide[DIGIT_ROWS] = {multiply_digits<1, 4>, multiply_digits<2, 4>,
                                                             multiply_digits<3, 2>, multiply_digits<4, 2>};
constexpr MultiplyDigits multiply_digits_narrow[DIGIT_ROWS] = {multiply_digits<1, 1>, multiply_digits<2, 1>,
                                                               multiply_digits<3, 1>, multiply_digits<4, 1>};

// Dwords of eight codes of a chunk, [depth / 8][columns], as layout `cpu` has them; `buffer` is for layout `row`.
inline const uint32_t* dwords_of(const Weight& w, const Block& block, const Chunk& chunk, uint32_t* buffer) {
  const int64_t row = chunk.k / zo::CODES_PER_DWORD, rows = zo::ceil_div(chunk.depth, zo::CODES_PER_DWORD);
  if (w.layout == zo::Layout::cpu)
    return (const uint32_t*)w.codes + block.n0 * zo::code_rows(w.format, w.K) + row * block.columns;
  const int64_t bytes = zo::ceil_div(w.K, 2);  // of a column; the last dword may be cut short
  for (int64_t n = 0; n < block.columns; n++) {
    const uint8_t* from = (const uint8_t*)w.codes + (block.n0 + n) * bytes;
    for (int64_t i = 0; i < rows; i++) {
      uint32_t dword = 0;
      if (n < block.live) memcpy(&dword, from + 4 * (row + i), min(4, bytes - 4 * (row + i)));
      buffer[i * block.columns + n] = dword;
    }
  }
  return buffer;
}

void add_base_digits(const Weight& w, const Digits& x, const Task& task, float* main) {
  float scale[BLOCK], offset[BLOCK];
  const int64_t rows = task.m1 - task.m0, columns = task.block.columns, tiles = zo::ceil_div(rows, DIGIT_ROWS);
  uint32_t buffer[DEPTH / zo::CODES_PER_DWORD * BLOCK];
  int64_t index = 0;
  for (Chunk chunk = digit_chunk(w, x.depth, 0); chunk.k < w.K; chunk = digit_chunk(w, x.depth, chunk.k + chunk.depth), index++) {
    if (starts_group(w, chunk)) chunk_scales(w, task.block, chunk, scale, offset);
    const uint32_t* codes = dwords_of(w, task.block, chunk, buffer);
    for (int64_t t = 0, r = 0; t < tiles; t++) {  // 6 rows are 3 + 3
      const int64_t next = (t + 1) * rows / tiles;
      (columns == BLOCK ? multiply_digits_wide : multiply_digits_narrow)[next - r - 1](
          x.at(index, task.m0 + r), x.row_bytes, x.row(index, task.m0 + r),
          codes, columns, chunk.depth, scale, w.offset ? offset : nullptr, main + r * BLOCK);
      r = next;
    }
  }
}

}  // namespace
}  // namespace ZO_NAMESPACE
#else  // no such product on this ISA
namespace ZO_NAMESPACE {
namespace {

struct Digits {
  Digits(const Weight&, int64_t, float*) {}
  static int64_t floats(const Weight&, int64_t) { return 0; }
};
ZO_INLINE bool has_digits(const Weight&) { return false; }
template <class T>
void pack_digits(const Weight&, const T*, int64_t, int64_t, int64_t, const Digits&) {}
ZO_INLINE void add_base_digits(const Weight&, const Digits&, const Task&, float*) {}

}  // namespace
}  // namespace ZO_NAMESPACE
#endif
