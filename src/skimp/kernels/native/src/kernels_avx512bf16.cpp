// Kernels for CPUs with AVX512-BF16: as AVX-512, but BF16 pairs are multiplied directly.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "target.h"

SKIMP_TARGET(
    "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")

#define SKIMP_VW 16
#define SKIMP_MAX_R 12
#define SKIMP_MAX_SUMS 24
#include "lowbit_f32.h"
#include "rows.h"
#include "tile_f32.h"

namespace skimp {
namespace {

// Bytes ahead of the product at which each panel is prefetched. The hardware stops at every page
// and does not see the next group of panels coming.
constexpr int64_t AHEAD = 1536 / 2;  // in elements

// sum += x w over [first, last) of k: one accumulator an output, pairs of k in order.
template <int R, int P>
SKIMP_INLINE void accumulate(const uint16_t* x, int64_t x_stride, const uint16_t* w,
                             int64_t panel_stride, int first, int last, int64_t ahead,
                             __m512 (&sum)[R][P]) {
  for (int i = first; i < last; i += 2) {
    __m512bh weights[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const uint16_t* line = w + p * panel_stride + int64_t{i} * PANEL;
      weights[p] = (__m512bh)_mm512_loadu_si512(line);
      _mm_prefetch(reinterpret_cast<const char*>(line + ahead), _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int pair;
      std::memcpy(&pair, x + r * x_stride + i, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], weights[p], value);
    }
  }
}

// R rows by P panels. Near its end a panel's stream goes on in the next group of panels.
template <int R, int P>
int micro_bf16(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t panel_stride, int k,
               float* acc) {
  __m512 sum[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) sum[r][p] = _mm512_setzero_ps();
  const int turn = k > AHEAD / PANEL ? k - static_cast<int>(AHEAD / PANEL) : 0;
  accumulate<R, P>(x, x_stride, w, panel_stride, 0, turn, AHEAD, sum);
  accumulate<R, P>(x, x_stride, w, panel_stride, turn, k, AHEAD + (P - 1) * panel_stride, sum);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) _mm512_storeu_ps(acc + r * ACC_STRIDE + p * PANEL, sum[r][p]);
  return P;
}

template <int R>
int micro_bf16_call(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t panel_stride,
                    int panels, int k, float* acc) {
  if constexpr (R <= 6)
    if (panels >= 4) return micro_bf16<R, 4>(x, x_stride, w, panel_stride, k, acc);
  if (panels >= 2) return micro_bf16<R, 2>(x, x_stride, w, panel_stride, k, acc);
  return micro_bf16<R, 1>(x, x_stride, w, panel_stride, k, acc);
}

void tile_dpbf16(const void* x_, int64_t x_stride, int rows, const void* panels,
                 int64_t panel_stride, int num_panels, int k, float* acc) {
  using Call = int (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, int, int, float*);
  static constexpr Call calls[] = {micro_bf16_call<1>,  micro_bf16_call<2>,  micro_bf16_call<3>,
                                   micro_bf16_call<4>,  micro_bf16_call<5>,  micro_bf16_call<6>,
                                   micro_bf16_call<7>,  micro_bf16_call<8>,  micro_bf16_call<9>,
                                   micro_bf16_call<10>, micro_bf16_call<11>, micro_bf16_call<12>,
                                   micro_bf16_call<13>, micro_bf16_call<14>};
  constexpr int MOST = 14;
  const auto* x = static_cast<const uint16_t*>(x_);
  const int blocks = (rows + MOST - 1) / MOST;
  for (int b = 0; b < blocks; ++b) {
    const int first = rows * b / blocks, count = rows * (b + 1) / blocks - first;
    for (int p = 0; p < num_panels;)
      p += calls[count - 1](x + first * x_stride, x_stride,
                            static_cast<const uint16_t*>(panels) + p * panel_stride, panel_stride,
                            num_panels - p, k, acc + first * ACC_STRIDE + p * PANEL);
  }
}

// ---- low-bit panels widened ---------------------------------------------------------------------

// Neighbours in k, to the nearest BF16, in the halves of each output's word.
SKIMP_INLINE vu to_bf16_pairs(vf even, vf odd) {
  alignas(64) static constexpr uint16_t ORDER[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (vu)_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), (__m512i)both);
}

template <int KIND>
SKIMP_INLINE void decode_bf16_as(const LowSpan& span, int panel, const uint8_t* w, uint32_t* to) {
  const LowBit& low = *span.low;
  constexpr int BITS = KIND == LOW_INT4 ? 4 : 8;
  constexpr uint32_t MASK = (1u << BITS) - 1;
  const auto value = [](vu q, vf zero) {
    if constexpr (KIND == LOW_FP8) return fp8_to_float(q & MASK);
    return __builtin_convertvector((vi)(q & MASK), vf) - zero;
  };
  for (int k = span.k0; k < span.k1;) {
    const int group = k / low.group;
    const int64_t group_end = int64_t{group + 1} * low.group;
    const int end = group_end < span.k1 ? static_cast<int>(group_end) : span.k1;
    const int64_t place = (int64_t{panel} * low.groups + group) * PANEL;
    const int lines = (end - k) / LOW_ALIGN * (BITS / 4);
    for (int v = 0; v < VP; ++v) {
      const vf scale = load_scale(low, place + v * VW);
      const vf zero = load_zero(low, place + v * VW);
      uint32_t* pair = to + v * VW;
      for (int line = 0; line < lines; ++line) {
        const vu words = load<vu>(w + line * 64 + v * VW * 4);
#pragma GCC unroll 4
        for (int i = 0; i < 16 / BITS; ++i, pair += PANEL) {
          const vf even = value(words >> (i * BITS), zero) * scale;
          const vf odd = value(words >> (16 + i * BITS), zero) * scale;
          store(pair, to_bf16_pairs(even, odd));
        }
      }
    }
    w += lines * 64;
    to += (end - k) / 2 * PANEL;
    k = end;
  }
}

// (q - zero) * scale rounded to BF16, as a dense matrix's panels [k / 2][16][2].
void decode_bf16(const LowSpan& span, const uint8_t* panels, int64_t panel_stride, void* out,
                 int64_t out_stride) {
  for (int p = 0; p < span.num_panels; ++p) {
    const uint8_t* w = panels + p * panel_stride;
    auto* to = reinterpret_cast<uint32_t*>(static_cast<char*>(out) + p * out_stride);
    if (span.low->kind == LOW_INT4)
      decode_bf16_as<LOW_INT4>(span, span.panel + p, w, to);
    else if (span.low->kind == LOW_INT8)
      decode_bf16_as<LOW_INT8>(span, span.panel + p, w, to);
    else
      decode_bf16_as<LOW_FP8>(span, span.panel + p, w, to);
  }
}

}  // namespace

const KernelSet& avx512bf16_kernels() {
  static constexpr KernelSet set{Isa::Avx512Bf16, true,   tile<false>, tile_dpbf16,
                                 prepare,         finish, norm, embed, round_row, decode_f32,
                                 decode_bf16};
  return set;
}

}  // namespace skimp

SKIMP_TARGET_END
#endif
