// Products with fp8 weights: exact in BF16, to which they are widened by looking them up.
#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "lowbit.h"
#include "target.h"

SKIMP_TARGET(
    "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,prefer-vector-width=512")

#include "code_bytes.h"
#include "lowbit_avx512.h"

namespace skimp {
namespace {

struct Bf16Pairs {
  using Sum = __m512;
  static constexpr bool EXACT = false;
  SKIMP_FORCE Sum zero() { return _mm512_setzero_ps(); }
  SKIMP_FORCE Sum add(Sum sum, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
  SKIMP_FORCE __m512 to_float(Sum sum) { return sum; }
};

constexpr CodeBytes TABLE = e4m3_bytes(true);

struct Fp8Pairs {
  using Product = Bf16Pairs;
  static constexpr int LINES = 2, LINE_VECTORS = 2, SHIFT = 0;
  static constexpr bool OFFSET = false;
  template <int I>
  SKIMP_FORCE __m512i take(__m512i line) {
    constexpr __mmask64 ODD = 0xaaaaaaaaaaaaaaaaull;
    const __m512i low = look_up(TABLE.low, line), high = look_up_high(TABLE, line, line);
    if constexpr (I == 0) return _mm512_mask_blend_epi8(ODD, low, _mm512_slli_epi16(high, 8));
    return _mm512_mask_blend_epi8(ODD, _mm512_srli_epi16(low, 8), high);
  }
};

void store_bf16(const LowBit& low, float* row, int k, int k_padded, int, const LowRows& out,
                int index) {
  out.scale[index] =
      low.rounding == ROUND_NONE ? 1.0f : avx512_kernels().round_row(row, k, low.rounding);
  auto* to = reinterpret_cast<uint16_t*>(out.data + index * out.stride);
  for (int i = 0; i < k_padded; i += 16) {
    const int left = k - i, room = k_padded - i;
    const auto in = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    const auto mask = static_cast<__mmask16>(room >= 16 ? 0xffff : (1 << room) - 1);
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(in, row + i));
    _mm256_mask_storeu_epi16(to + i, mask, (__m256i)half);
  }
}

}  // namespace

const LowKernels* fp8_low_kernels() {
  static constexpr LowKernels kernels{2, 4096, store_bf16, nullptr, low_tile<Fp8Pairs>};
  return &kernels;
}

}  // namespace skimp

SKIMP_TARGET_END
#endif
