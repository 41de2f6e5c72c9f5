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
  static constexpr bool FROM_MEMORY = true, OFFSET = true;
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
  static constexpr bool FROM_MEMORY = true, OFFSET = true;
  template <int I>
  SKIMP_FORCE __m512i take(__m512i line) {
    if constexpr (I == 1) return _mm512_srli_epi16(line, 8);
    return _mm512_and_si512(line, _mm512_set1_epi16(255));
  }
};

struct DecodedPairs {
  using Product = Pairs;
  static constexpr int LINES = 4, LINE_VECTORS = 1, SHIFT = 0;
  static constexpr bool FROM_MEMORY = false, OFFSET = false;
  template <int I>
  SKIMP_FORCE __m512i take(__m512i line) { return line; }
};

struct NibbleFours {
  using Product = Fours;
  static constexpr int LINES = 1, LINE_VECTORS = 2, SHIFT = 4;
  static constexpr bool FROM_MEMORY = true, OFFSET = true;
  template <int I>
  SKIMP_FORCE __m512i take(__m512i line) {
    const __m512i low = I == 0 ? line : _mm512_srli_epi16(line, 4);
    return _mm512_and_si512(low, _mm512_set1_epi8(15));
  }
};

struct ByteFours {
  using Product = Fours;
  static constexpr int LINES = 2, LINE_VECTORS = 1, SHIFT = 0;
  static constexpr bool FROM_MEMORY = true, OFFSET = true;
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

// ---- weights for many rows ---------------------------------------------------------------------

// q - zero as 16-bit pairs.
template <class Reader>
void decode_pairs(const LowSpan& span, const uint8_t* panels, int64_t panel_stride, void* out,
                  int64_t out_stride) {
  const LowBit& low = *span.low;
  __m512i zero = _mm512_set1_epi16(Reader::LINES == 1 ? 8 : 128);
  for (int p = 0; p < span.num_panels; ++p) {
    const uint8_t* w = panels + p * panel_stride;
    char* to = static_cast<char*>(out) + p * out_stride;
    for (int k = span.k0; k < span.k1; k += LOW_ALIGN) {
      if (low.zeros && (k == span.k0 || k % low.group == 0)) {
        const int64_t place = ((int64_t{span.panel} + p) * low.groups + k / low.group) * PANEL;
        zero = zero_at(low, place);
        zero = _mm512_or_si512(zero, _mm512_slli_epi32(zero, 16));
      }
      for (int n = 0; n < Reader::LINES; ++n, w += 64) {
        const __m512i line = _mm512_loadu_si512(w);
        _mm_prefetch(reinterpret_cast<const char*>(w + LOW_AHEAD), _MM_HINT_T0);
        const auto store = [&](int i, __m512i weights) __attribute__((always_inline)) {
          _mm512_storeu_si512(to + (n * Reader::LINE_VECTORS + i) * 64,
                              _mm512_sub_epi16(weights, zero));
        };
        store(0, Reader::template take<0>(line));
        store(1, Reader::template take<1>(line));
        if constexpr (Reader::LINE_VECTORS == 4) {
          store(2, Reader::template take<2>(line));
          store(3, Reader::template take<3>(line));
        }
      }
      to += 256;
    }
  }
}

// Nibbles to bytes.
void decode_fours(const LowSpan& span, const uint8_t* panels, int64_t panel_stride, void* out,
                  int64_t out_stride) {
  for (int p = 0; p < span.num_panels; ++p) {
    const uint8_t* w = panels + p * panel_stride;
    char* to = static_cast<char*>(out) + p * out_stride;
    for (int k = span.k0; k < span.k1; k += LOW_ALIGN, w += 64, to += 128) {
      const __m512i line = _mm512_loadu_si512(w);
      _mm_prefetch(reinterpret_cast<const char*>(w + LOW_AHEAD), _MM_HINT_T0);
      _mm512_storeu_si512(to, NibbleFours::take<0>(line));
      _mm512_storeu_si512(to + 64, NibbleFours::take<1>(line));
    }
  }
}

// A block's sum must fit 32 bits: |q - zero| < 256 or 16, inputs below 2^15 or 2^7.
constexpr int BLOCK8_X16 = 256, BLOCK4_X16 = 2048, BLOCK_X8 = 4096;
constexpr int DIRECT = 12;

constexpr LowKernels INT4_X16{
    2,           BLOCK4_X16,            2, DIRECT, store_int16, decode_pairs<NibblePairs>,
    low_tile<NibblePairs>, low_tile<DecodedPairs>};
constexpr LowKernels INT8_X16{
    2,           BLOCK8_X16,          2, DIRECT, store_int16, decode_pairs<BytePairs>,
    low_tile<BytePairs>, low_tile<DecodedPairs>};
constexpr LowKernels INT4_X8{
    1,           BLOCK_X8,             1, DIRECT, store_int8, decode_fours,
    low_tile<NibbleFours>, low_tile<ByteFours>};
constexpr LowKernels INT8_X8{
    1,           BLOCK_X8, 0, 0, store_int8, nullptr, low_tile<ByteFours>, nullptr};

}  // namespace

const LowKernels* vnni_low_kernels(const LowBit& low) {
  const bool four = low.kind == LOW_INT4;
  if (low.rounding == ROUND_INT8) return four ? &INT4_X8 : &INT8_X8;
  if (low.rounding == ROUND_NONE) return four ? &INT4_X16 : &INT8_X16;
  return nullptr;  // fp8 inputs span more than 16 bits
}

}  // namespace skimp

SKIMP_TARGET_END
#endif
