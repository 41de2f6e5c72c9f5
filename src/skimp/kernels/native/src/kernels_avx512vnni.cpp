// Integer products for low-bit matrices (AVX512-VNNI). Rows that the format leaves as they are
// become 16-bit fixed point, a scale a row: closer to them than BF16 is, at the same pace.
#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "lowbit.h"
#include "target.h"

SKIMP_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")

#include "lowbit_avx512.h"

namespace skimp {
namespace {

struct Integer {
  using Sum = __m512i;
  static constexpr bool EXACT = true;
  SKIMP_FORCE Sum zero() { return _mm512_setzero_si512(); }
  SKIMP_FORCE Sum join(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  SKIMP_FORCE __m512 to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// The instructions by name: from their intrinsics GCC 12 makes many needless copies and spills.
// Pairs of 16-bit integers; no product of sums wraps, since a block is short enough.
struct Pairs : Integer {
  SKIMP_FORCE Sum add(Sum sum, __m512i w, __m512i x) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};

// Fours of unsigned weights and signed inputs.
struct Fours : Integer {
  SKIMP_FORCE Sum add(Sum sum, __m512i w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};

struct NibblePairs {
  using Product = Pairs;
  static constexpr int LINES = 1, LINE_VECTORS = 4, SHIFT = 4;
  static constexpr bool OFFSET = true;
  template <int I>
  SKIMP_FORCE __m512i take(__m512i line) {
    if constexpr (I == 3) return _mm512_srli_epi16(line, 12);
    const __m512i low = I == 0 ? line : _mm512_srli_epi16(line, 4 * I);
    return _mm512_and_si512(low, _mm512_set1_epi16(15));
  }
};

struct BytePairs {
  using Product = Pairs;
  static constexpr int LINES = 2, LINE_VECTORS = 2, SHIFT = 8;
  static constexpr bool OFFSET = true;
  template <int I>
  SKIMP_FORCE __m512i take(__m512i line) {
    if constexpr (I == 1) return _mm512_srli_epi16(line, 8);
    return _mm512_and_si512(line, _mm512_set1_epi16(255));
  }
};

struct NibbleFours {
  using Product = Fours;
  static constexpr int LINES = 1, LINE_VECTORS = 2, SHIFT = 4;
  static constexpr bool OFFSET = true;
  template <int I>
  SKIMP_FORCE __m512i take(__m512i line) {
    const __m512i low = I == 0 ? line : _mm512_srli_epi16(line, 4);
    return _mm512_and_si512(low, _mm512_set1_epi8(15));
  }
};

struct ByteFours {
  using Product = Fours;
  static constexpr int LINES = 2, LINE_VECTORS = 1, SHIFT = 0;
  static constexpr bool OFFSET = true;
  template <int I>
  SKIMP_FORCE __m512i take(__m512i line) { return line; }
};

// ---- rows --------------------------------------------------------------------------------------

SKIMP_FORCE __mmask16 lanes(int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

// The largest absolute value; a NaN is larger than anything.
float largest(const float* row, int k) {
  __m512i top = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  for (int i = 0; i < k; i += 16)
    top = _mm512_max_epi32(
        top, _mm512_and_si512(_mm512_maskz_loadu_epi32(lanes(k - i), row + i), mask));
  const int bits = _mm512_reduce_max_epi32(top);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
void sum_blocks(const LowBit& low, const T* row, int k, int block, int32_t* sums) {
  const int factor = low.zeros ? 1 : low.kind == LOW_INT4 ? 8 : 128;
  const int group = low.group < k ? low.group : k;
  for (int k0 = 0, group_end = group; k0 < k;) {
    int end = k0 + block < group_end ? k0 + block : group_end;
    end = end < k ? end : k;
    int32_t sum = 0;
    for (int i = k0; i < end; ++i) sum += row[i];
    *sums++ = -factor * sum;
    k0 = end;
    if (k0 == group_end) group_end += group;
  }
}

void store_int16(const LowBit& low, float* row, int k, int k_padded, int block,
                 const LowRows& out, int index) {
  constexpr float STEPS = 32767.0f;
  const float most = largest(row, k);
  const bool nothing = most < 1e-30f;  // whose inverse would be infinite
  out.scale[index] = nothing ? 0.0f : most / STEPS;
  const __m512 factor = _mm512_set1_ps(nothing ? 0.0f : STEPS / most);
  auto* to = reinterpret_cast<int16_t*>(out.data + index * out.stride);
  for (int i = 0; i < k_padded; i += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(lanes(k - i), row + i);
    const __m256i q = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x, factor)));
    _mm256_mask_storeu_epi16(to + i, lanes(k_padded - i), q);
  }
  sum_blocks(low, to, k_padded, block, out.sums + index * out.blocks);
}

void store_int8(const LowBit& low, float* row, int k, int k_padded, int block, const LowRows& out,
                int index) {
  const float most = largest(row, k);
  const float scale = most == 0.0f ? 1.0f : most / INT8_STEPS;
  out.scale[index] = scale;
  auto* to = reinterpret_cast<int8_t*>(out.data + index * out.stride);
  const __m512 divisor = _mm512_set1_ps(scale);
  const __m128i order =
      low.kind == LOW_INT4 ? _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                           : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  for (int i = 0; i < k_padded; i += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(lanes(k - i), row + i);
    const __m128i q = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_div_ps(x, divisor)));
    _mm_mask_storeu_epi8(to + i, lanes(k_padded - i), _mm_shuffle_epi8(q, order));
  }
  sum_blocks(low, to, k_padded, block, out.sums + index * out.blocks);
}

// A block's sum must fit 32 bits. |q - zero| is at most 128 or, with zero points, 255; or 15.
// Inputs are at most 2^15 - 1, or 2^7.
constexpr LowKernels INT4_X16{2, 4096, store_int16, nullptr, low_tile<NibblePairs>};
constexpr LowKernels INT8_X16{2, 512, store_int16, nullptr, low_tile<BytePairs>};
constexpr LowKernels INT8_ZEROS_X16{2, 256, store_int16, nullptr, low_tile<BytePairs>};
constexpr LowKernels INT4_X8{1, 4096, store_int8, nullptr, low_tile<NibbleFours>};
constexpr LowKernels INT8_X8{1, 4096, store_int8, nullptr, low_tile<ByteFours>};

}  // namespace

const LowKernels* vnni_low_kernels(const LowBit& low) {
  const bool four = low.kind == LOW_INT4;
  if (low.rounding == ROUND_INT8) return four ? &INT4_X8 : &INT8_X8;
  if (low.rounding != ROUND_NONE) return nullptr;  // fp8 inputs span more than 16 bits
  return four ? &INT4_X16 : low.zeros ? &INT8_ZEROS_X16 : &INT8_X16;
}

}  // namespace skimp

SKIMP_TARGET_END
#endif
