// Register-blocked products with low-bit panels in AVX-512, whatever multiplies: the including
// file says with `Product` what sums are and how they grow, and has readers for its weights.
//
// A reader has: LINES of 64 bytes to every 8 inputs; LINE_VECTORS, operands that a line holds;
// take<i>(line), operand i, each of which meets the next four bytes of a row; SHIFT, by how many
// bits of each lane operands lie apart, or 0 if that is not how to take them; OFFSET, whether the
// stored numbers have one.
#pragma once
#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "lowbit.h"
#include "target.h"

namespace skimp {
namespace {

#define SKIMP_FORCE static inline __attribute__((always_inline))

// Bytes ahead of the product at which each panel is prefetched. The hardware stops at every page
// and does not see the next group of panels coming.
constexpr int64_t LOW_AHEAD = 512;
// Blocks up to so many inputs are flushed so often that the totals had better stay in registers.
constexpr int SHORT_BLOCK = 64;

struct Tile {
  const LowSpan* span;
  const char* x;  // at k0
  int64_t x_stride;
  const int32_t* sums;
  int64_t blocks;
  const uint8_t* weights;  // at k0
  int64_t stride;
  float* acc;
};

SKIMP_FORCE __m512 scale_at(const LowBit& low, int64_t index) {
  if (low.scale_dtype == BF16) {
    const auto* at = static_cast<const uint16_t*>(low.scales) + index;
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  return _mm512_loadu_ps(static_cast<const float*>(low.scales) + index);
}

SKIMP_FORCE __m512i zero_at(const LowBit& low, int64_t index) {
  return _mm512_cvtepu8_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(low.zeros + index)));
}

template <class Product, int R, int P>
SKIMP_FORCE void multiply(const char* x, int64_t x_stride, const __m512i (&weights)[P],
                          typename Product::Sum (&sum)[R][P]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    int four;
    std::memcpy(&four, x + r * x_stride, 4);
    const __m512i value = _mm512_set1_epi32(four);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[r][p] = Product::add(sum[r][p], weights[p], value);
  }
}

template <class Reader, int R, int P, int C, int I = 0>
SKIMP_FORCE void operands(const char* x, int64_t x_stride, const __m512i (&line)[P],
                          typename Reader::Product::Sum (&sum)[C][R][P]) {
  __m512i weights[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) weights[p] = Reader::template take<I>(line[p]);
  multiply<typename Reader::Product, R, P>(x, x_stride, weights, sum[I % C]);
  if constexpr (I + 1 < Reader::LINE_VECTORS)
    operands<Reader, R, P, C, I + 1>(x + 4, x_stride, line, sum);
}

// R rows by P panels over a span, block after block.
template <class Reader, int R, int P>
void micro(const Tile& t) {
  using Product = typename Reader::Product;
  // Integers may be summed in any order: with few sums two chains hide the latency.
  constexpr int C = Product::EXACT && Reader::LINE_VECTORS > 1 && R * P <= 6 ? 2 : 1;
  // Many sums and an unrolled line are more than the compiler keeps in registers.
  constexpr bool ROLLED = Reader::SHIFT > 0 && R * P > 10;
  constexpr bool HELD = R * P <= 12;  // totals stay in registers
  const LowSpan& span = *t.span;
  const LowBit& low = *span.low;
  const char* x = t.x;
  const uint8_t* w = t.weights;
  int group = span.k0 / low.group;
  int64_t index = int64_t{group} * span.blocks_a_group +
                  (span.k0 - group * low.group) / span.block;
  const int64_t groups = int64_t{low.groups} * PANEL;
  int64_t place = (int64_t{span.panel} * low.groups + group) * PANEL;
  int64_t group_end = int64_t{group + 1} * low.group;
  const uint8_t* turn = w + t.stride - LOW_AHEAD;
  __mmask16 before = span.k0 ? 0xffff : 0;
  const auto at = [&](int r, int p) __attribute__((always_inline)) {
    return t.acc + r * ACC_STRIDE + p * PANEL;
  };
  __m512 total[HELD ? R : 1][P];
  if constexpr (HELD) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) total[r][p] = _mm512_maskz_loadu_ps(before, at(r, p));
  }
  for (int k = span.k0; k < span.k1; ++index) {
    int end = k + span.block;
    if (end > group_end) end = static_cast<int>(group_end);
    if (end > span.k1) end = span.k1;
    typename Product::Sum sum[C][R][P];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        sum[0][r][p] = Product::zero();
        if constexpr (C == 2) sum[1][r][p] = Product::zero();
        if constexpr (Reader::OFFSET) {
          sum[0][r][p] = _mm512_set1_epi32(t.sums[r * t.blocks + index]);
          if (low.zeros)
            sum[0][r][p] = _mm512_mullo_epi32(sum[0][r][p], zero_at(low, place + p * groups));
        }
      }
    }
    // Near its end a panel's stream goes on in the next group of panels.
    const int64_t ahead = LOW_AHEAD + (w < turn ? 0 : (P - 1) * t.stride);
    for (int n = (end - k) / LOW_ALIGN * Reader::LINES; n > 0; --n) {
      __m512i line[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = w + p * t.stride;
        line[p] = _mm512_loadu_si512(at);
        _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
      }
      if constexpr (ROLLED) {
#pragma GCC unroll 1
        for (int i = 0; i < Reader::LINE_VECTORS; ++i, x += 4) {
          __m512i weights[P];
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) {
            weights[p] = Reader::template take<0>(line[p]);
            line[p] = _mm512_srli_epi16(line[p], Reader::SHIFT);
          }
          multiply<Product, R, P>(x, t.x_stride, weights, sum[0]);
        }
      } else {
        operands<Reader, R, P, C>(x, t.x_stride, line, sum);
        x += Reader::LINE_VECTORS * 4;
      }
      w += 64;
    }
    k = end;
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const __m512 scale = scale_at(low, place + p * groups);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if constexpr (C == 2) sum[0][r][p] = Product::join(sum[0][r][p], sum[1][r][p]);
        const __m512 part = Product::to_float(sum[0][r][p]);
        if constexpr (HELD)
          total[r][p] = _mm512_fmadd_ps(part, scale, total[r][p]);
        else
          _mm512_storeu_ps(at(r, p), _mm512_fmadd_ps(part, scale,
                                                     _mm512_maskz_loadu_ps(before, at(r, p))));
      }
    }
    before = 0xffff;
    if (k == group_end) group_end += low.group, place += PANEL;
  }
  if constexpr (HELD) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) _mm512_storeu_ps(at(r, p), total[r][p]);
  }
}

template <class Reader, int P>
void row_blocks(const LowSpan& span, const LowRows& x, int row, int rows, const uint8_t* weights,
                int64_t stride, float* acc) {
  using Call = void (*)(const Tile&);
  // Sums, weights and an input must fit 32 registers, and few rows take many panels, so that
  // there are enough sums to hide the latency of a product.
  constexpr int MOST = P == 4 ? 5 : 12;
  const int most = P == 2 && span.block <= SHORT_BLOCK ? 6 : MOST;
  static constexpr auto calls = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array<Call, MOST>{micro<Reader, R + 1, P>...};
  }(std::make_integer_sequence<int, MOST>());
  constexpr int ITEM = Reader::LINES * Reader::LINE_VECTORS * 4 / LOW_ALIGN;
  const int parts = (rows + most - 1) / most;
  for (int i = 0; i < parts; ++i) {
    const int first = rows * i / parts, count = rows * (i + 1) / parts - first;
    calls[count - 1]({&span, x.data + (row + first) * x.stride + span.k0 * ITEM, x.stride,
                      x.sums + (row + first) * x.blocks, x.blocks, weights, stride,
                      acc + first * ACC_STRIDE});
  }
}

template <class Reader>
void low_tile(const LowSpan& span, const LowRows& x, int row, int rows, const void* weights,
              int64_t stride, float* acc) {
  LowSpan here = span;
  for (int p = 0; p < span.num_panels; p += here.num_panels) {
    const int left = span.num_panels - p;
    here.panel = span.panel + p;
    here.num_panels = rows <= 5 && left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto* w = static_cast<const uint8_t*>(weights) + p * stride;
    const auto blocks = here.num_panels == 4   ? row_blocks<Reader, 4>
                        : here.num_panels == 2 ? row_blocks<Reader, 2>
                                               : row_blocks<Reader, 1>;
    blocks(here, x, row, rows, w, stride, acc + p * PANEL);
  }
}

}  // namespace
}  // namespace skimp
