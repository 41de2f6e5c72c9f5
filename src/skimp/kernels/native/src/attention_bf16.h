// Reading and softmax for bf16 operands: AVX512-BF16 and AMX use the same forms.
// Included inside a target that has avx512bf16.
#include "attention_avx512.h"
#include "attention_codes_bf16.h"

namespace skimp {
namespace {

struct Avx512Bf16 : Avx512 {
  static void store_bf16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
  }
};

inline void pack_query_bf16(const float* q, float sign, int dim, int padded, void* dst) {
  uint16_t* out = static_cast<uint16_t*>(dst);
  for (int d = 0; d < padded; d += 16)
    Avx512Bf16::store_bf16(out + d, _mm512_mul_ps(load16(q, dim, d), _mm512_set1_ps(sign)));
}

inline void copy_lines(const char* from, int64_t bytes, char* to) {
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
}

inline void read_keys_bf16(const void* block, DType, int dim, int padded, void* dst) {
  const char* in = static_cast<const char*>(block);
  char* out = static_cast<char*>(dst);
  const int pairs = dim / 2;
  copy_lines(in, 64 * pairs, out);
  if (dim % 2) {
    const __m256i last = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 64 * pairs));
    _mm512_storeu_si512(out + 64 * pairs, _mm512_cvtepu16_epi32(last));
  }
  for (int i = (dim + 1) / 2; i < padded / 2; ++i)
    _mm512_storeu_si512(out + 64 * i, _mm512_setzero_si512());
}

inline void read_values_bf16(const void* block, DType, int dim, int padded, int lo, int hi,
                             void* dst) {
  const char* in = static_cast<const char*>(block);
  char* out = static_cast<char*>(dst);
  if (dim == padded && lo == 0 && hi == kPanel) return copy_lines(in, 32 * dim, out);
  for (int j = 0; j < kPanel; j += 2, in += 4 * dim, out += 4 * padded) {
    const uint32_t even = j >= lo && j < hi ? 0xffffu : 0;
    const uint32_t odd = j + 1 >= lo && j + 1 < hi ? 0xffff0000u : 0;
    const __m512i seen = _mm512_set1_epi32(static_cast<int>(even | odd));
    for (int d = 0; d < padded; d += 16) {
      const __m512i x = _mm512_maskz_loadu_epi8(first_bytes(4 * (dim - d)), in + 4 * d);
      _mm512_storeu_si512(out + 4 * d, _mm512_and_si512(x, seen));
    }
  }
}

// Rows of a panel hold pairs of dimensions of each key, those of values pairs of keys of each
// dimension: pairs change places within 64 bits, which are then turned eight by eight.
inline void turn_bf16(const void* panel, int dim, int lo, int hi, void* dst) {
  const char* in = static_cast<const char*>(panel);
  char* out = static_cast<char*>(dst);
  const __m512i swap = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  for (int d = 0; d < dim; d += 16, in += 8 * 64, out += 64) {
    __m512i x[8], y[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      x[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(in + 64 * i), swap);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {  // of lines i and i + 1: key pairs 0 2 4 6, then 1 3 5 7
      y[i] = _mm512_unpacklo_epi64(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_epi64(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i a = _mm512_shuffle_i64x2(y[odd], y[2 + odd], 0x88);      // 0 4 | 0 4
      const __m512i b = _mm512_shuffle_i64x2(y[odd], y[2 + odd], 0xdd);      // 2 6 | 2 6
      const __m512i c = _mm512_shuffle_i64x2(y[4 + odd], y[6 + odd], 0x88);
      const __m512i e = _mm512_shuffle_i64x2(y[4 + odd], y[6 + odd], 0xdd);
      x[odd] = _mm512_shuffle_i64x2(a, c, 0x88);
      x[4 + odd] = _mm512_shuffle_i64x2(a, c, 0xdd);
      x[2 + odd] = _mm512_shuffle_i64x2(b, e, 0x88);
      x[6 + odd] = _mm512_shuffle_i64x2(b, e, 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const uint32_t even = 2 * i >= lo && 2 * i < hi ? 0xffffu : 0;
      const uint32_t odd = 2 * i + 1 >= lo && 2 * i + 1 < hi ? 0xffff0000u : 0;
      const __m512i seen = _mm512_set1_epi32(static_cast<int>(even | odd));
      _mm512_storeu_si512(out + int64_t{4} * i * dim, _mm512_and_si512(x[i], seen));
    }
  }
}

inline void pack_made_bf16(const float* scores, int count, void* lines) {
  char* out = static_cast<char*>(lines);
  for (int d = 0; d < count; d += 2, out += 64) {
    const __m512 even = _mm512_loadu_ps(scores + d * kScoreStride);
    const __m512 odd =
        d + 1 < count ? _mm512_loadu_ps(scores + (d + 1) * kScoreStride) : _mm512_setzero_ps();
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// What the two products share; `begin` and `end` set the unit of `score` and `weigh` up.
template <bool VBMI>
constexpr AttentionKernels kernels_bf16(decltype(AttentionKernels::begin) begin,
                                        decltype(AttentionKernels::end) end,
                                        decltype(AttentionKernels::score) score,
                                        decltype(AttentionKernels::weigh) weigh) {
  return {2,
          32,
          begin,
          end,
          pack_query_bf16,
          read_keys_bf16,
          read_values_bf16,
          turn_bf16,
          pack_made_bf16,
          VBMI ? decode_keys_vbmi : decode_keys_bf16,
          VBMI ? decode_values_vbmi : decode_values_bf16,
          score,
          softmax_row<Avx512Bf16, StoreBF16, 4>,
          weigh,
          merge_row<Avx512Bf16>};
}

}  // namespace
}  // namespace skimp
