// Register-blocked products with low-bit panels in AVX-512, whatever multiplies: the including
// file says with `Product` what sums are and how they grow, and has readers for its weights.
//
// A reader has: LINE_VECTORS, operands that a 64-byte line holds; LINES to every 8 inputs;
// FROM_MEMORY, whether lines come from far; OFFSET, whether the stored numbers have one; and
// take<i>(line), operand i. An operand meets four bytes of a row, LINES * LINE_VECTORS of them
// to every 8 inputs: operand i of line n the (n + LINES * i)th.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lowbit.h"
#include "target.h"

namespace skimp {
namespace {

#define SKIMP_FORCE static inline __attribute__((always_inline))

// Bytes ahead of the product at which each panel is prefetched. The hardware stops at every page
// and does not see the next group of panels coming.
constexpr int64_t LOW_AHEAD = 1536;

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

template <class Reader, int R, int P, int C, int I>
SKIMP_FORCE void operand(const char* x, int64_t x_stride, const __m512i (&line)[P],
                         typename Reader::Product::Sum (&sum)[C][R][P]) {
  __m512i weights[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) weights[p] = Reader::template take<I>(line[p]);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    int four;
    std::memcpy(&four, x + r * x_stride, 4);
    const __m512i value = _mm512_set1_epi32(four);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
      sum[I % C][r][p] = Reader::Product::add(sum[I % C][r][p], weights[p], value);
  }
  if constexpr (I + 1 < Reader::LINE_VECTORS)
    operand<Reader, R, P, C, I + 1>(x + Reader::LINES * 4, x_stride, line, sum);
}

// R rows by P panels over a span, block after block.
template <class Reader, int R, int P>
int micro(const Tile& t) {
  using Product = typename Reader::Product;
  // Integers may be summed in any order: with few sums two chains hide the latency.
  constexpr int C = Product::EXACT && Reader::LINE_VECTORS > 1 && R * P <= 6 ? 2 : 1;
  constexpr int VECTORS = Reader::LINES * Reader::LINE_VECTORS;
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
    for (; k < end; k += LOW_ALIGN) {
#pragma GCC unroll 4
      for (int n = 0; n < Reader::LINES; ++n) {
        __m512i line[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          const uint8_t* at = w + p * t.stride;
          line[p] = _mm512_loadu_si512(at);
          if constexpr (Reader::FROM_MEMORY)
            _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
        }
        operand<Reader, R, P, C, 0>(x + n * 4, t.x_stride, line, sum);
        w += 64;
      }
      x += VECTORS * 4;
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const __m512 scale = scale_at(low, place + p * groups);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if constexpr (C == 2) sum[0][r][p] = Product::join(sum[0][r][p], sum[1][r][p]);
        float* at = t.acc + r * ACC_STRIDE + p * PANEL;
        _mm512_storeu_ps(at, _mm512_fmadd_ps(Product::to_float(sum[0][r][p]), scale,
                                             _mm512_loadu_ps(at)));
      }
    }
    if (k == group_end) group_end += low.group, place += PANEL;
  }
  return P;
}

// Few rows take many panels, so that there are enough sums to hide the latency of a product.
template <class Reader, int R>
int micro_call(const Tile& t, int panels) {
  if constexpr (R <= 5)
    if (panels >= 4) return micro<Reader, R, 4>(t);
  if (panels >= 2) return micro<Reader, R, 2>(t);
  return micro<Reader, R, 1>(t);
}

template <class Reader>
void low_tile(const LowSpan& span, const LowRows& x, int row, int rows, const void* weights,
              int64_t stride, float* acc) {
  using Call = int (*)(const Tile&, int);
  static constexpr Call calls[] = {
      micro_call<Reader, 1>, micro_call<Reader, 2>,  micro_call<Reader, 3>,
      micro_call<Reader, 4>, micro_call<Reader, 5>,  micro_call<Reader, 6>,
      micro_call<Reader, 7>, micro_call<Reader, 8>,  micro_call<Reader, 9>,
      micro_call<Reader, 10>, micro_call<Reader, 11>, micro_call<Reader, 12>};
  constexpr int MOST = 12;
  constexpr int ITEM = Reader::LINES * Reader::LINE_VECTORS * 4 / LOW_ALIGN;
  const int parts = (rows + MOST - 1) / MOST;
  for (int i = 0; i < parts; ++i) {
    const int first = rows * i / parts, count = rows * (i + 1) / parts - first;
    LowSpan here = span;
    for (int p = 0; p < span.num_panels;) {
      here.panel = span.panel + p;
      const Tile tile{&here,
                      x.data + (row + first) * x.stride + span.k0 * ITEM,
                      x.stride,
                      x.sums + (row + first) * x.blocks,
                      x.blocks,
                      static_cast<const uint8_t*>(weights) + p * stride,
                      stride,
                      acc + first * ACC_STRIDE + p * PANEL};
      p += calls[count - 1](tile, span.num_panels - p);
    }
  }
}

}  // namespace
}  // namespace skimp
