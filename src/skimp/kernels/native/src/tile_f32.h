// Register-blocked products in float32 arithmetic: one accumulator an output, k in order, so an
// element's value depends on its row and column only. BF16 weights are widened by shifts.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace skimp {
namespace {

// Words ahead of the product at which each panel is prefetched. The hardware stops at every page
// and does not see the next group of panels coming.
constexpr int64_t AHEAD_WORDS = 1536 / 4;

// sum += x w over lines [first, last) of every panel: one k a line, or two if BF16_W.
template <bool BF16_W, int R, int P>
SKIMP_INLINE void accumulate_f32(const float* x, int64_t x_stride, const uint32_t* w,
                                 int64_t panel_stride, int first, int last, int64_t ahead,
                                 vf (&sum)[R][P * VP]) {
  for (int line = first; line < last; ++line) {
#pragma GCC unroll 16
    for (int pv = 0; pv < P * VP; ++pv) {
      const uint32_t* at =
          w + pv / VP * panel_stride + int64_t{line} * PANEL + pv % VP * VW;
      if (pv % VP == 0) __builtin_prefetch(at + ahead);
      if constexpr (BF16_W) {
        const vu pair = load<vu>(at);
        const vf even = (vf)(pair << 16), odd = (vf)(pair & 0xffff0000u);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r][pv] = fma(even, x[r * x_stride + 2 * line], sum[r][pv]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
          sum[r][pv] = fma(odd, x[r * x_stride + 2 * line + 1], sum[r][pv]);
      } else {
        const vf value = load<vf>(at);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
          sum[r][pv] = fma(value, x[r * x_stride + line], sum[r][pv]);
      }
    }
  }
}

// R rows by P panels. The vectors that an instruction set has must hold R * P * VP sums. Near
// its end a panel's stream goes on in the next group of panels.
template <bool BF16_W, int R, int P>
void micro(const float* x, int64_t x_stride, const uint32_t* w, int64_t panel_stride, int k,
           float* acc) {
  vf sum[R][P * VP] = {};
  const int lines = BF16_W ? k / 2 : k;
  constexpr int AHEAD = AHEAD_WORDS / PANEL;
  const int turn = lines > AHEAD ? lines - AHEAD : 0;
  accumulate_f32<BF16_W, R, P>(x, x_stride, w, panel_stride, 0, turn, AHEAD_WORDS, sum);
  accumulate_f32<BF16_W, R, P>(x, x_stride, w, panel_stride, turn, lines,
                               AHEAD_WORDS + (P - 1) * panel_stride, sum);
  for (int r = 0; r < R; ++r)
    for (int pv = 0; pv < P * VP; ++pv) store(acc + r * ACC_STRIDE + pv * VW, sum[r][pv]);
}

// Few rows take many panels, so that there are always enough independent sums to hide the
// latency of a multiply-add, and few enough to stay in registers. Returns the panels done.
template <bool BF16_W, int R>
int micro_call(const float* x, int64_t x_stride, const uint32_t* w, int64_t panel_stride,
               int panels, int k, float* acc) {
  constexpr int MOST = SKIMP_MAX_SUMS / (R * VP);
  if constexpr (MOST >= 4)
    if (panels >= 4) return micro<BF16_W, R, 4>(x, x_stride, w, panel_stride, k, acc), 4;
  if constexpr (MOST >= 2)
    if (panels >= 2) return micro<BF16_W, R, 2>(x, x_stride, w, panel_stride, k, acc), 2;
  return micro<BF16_W, R, 1>(x, x_stride, w, panel_stride, k, acc), 1;
}

template <bool BF16_W>
void tile(const void* x_, int64_t x_stride, int rows, const void* panels, int64_t panel_stride,
          int num_panels, int k, float* acc) {
  using Call = int (*)(const float*, int64_t, const uint32_t*, int64_t, int, int, float*);
  static constexpr Call calls[] = {
      micro_call<BF16_W, 1>, micro_call<BF16_W, 2>, micro_call<BF16_W, 3>, micro_call<BF16_W, 4>,
#if SKIMP_MAX_R > 4
      micro_call<BF16_W, 5>, micro_call<BF16_W, 6>,
#endif
#if SKIMP_MAX_R > 6
      micro_call<BF16_W, 7>, micro_call<BF16_W, 8>, micro_call<BF16_W, 9>, micro_call<BF16_W, 10>,
      micro_call<BF16_W, 11>, micro_call<BF16_W, 12>,
#endif
  };
  const auto* x = static_cast<const float*>(x_);
  const int64_t words = BF16_W ? panel_stride / 2 : panel_stride;  // of 4 bytes to a panel
  const int blocks = (rows + SKIMP_MAX_R - 1) / SKIMP_MAX_R;
  for (int b = 0; b < blocks; ++b) {
    const int first = rows * b / blocks, count = rows * (b + 1) / blocks - first;
    for (int p = 0; p < num_panels;)
      p += calls[count - 1](x + first * x_stride, x_stride,
                            static_cast<const uint32_t*>(panels) + p * words, words,
                            num_panels - p, k, acc + first * ACC_STRIDE + p * PANEL);
  }
}

}  // namespace
}  // namespace skimp
