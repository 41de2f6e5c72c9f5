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
          VBMI ? decode_keys_vbmi : decode_keys_bf16,
          VBMI ? decode_values_vbmi : decode_values_bf16,
          score,
          softmax_row<Avx512Bf16, StoreBF16, 4>,
          weigh,
          merge_row<Avx512Bf16>};
}

}  // namespace
}  // namespace skimp
