// Packing and softmax for bf16 operands: AVX512-BF16 and AMX use the same packed forms.
// Included inside a target that has avx512bf16.
#include "attention_avx512.h"

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
    Avx512Bf16::store_bf16(out + d, _mm512_mul_ps(load16(q, F32, dim, d), _mm512_set1_ps(sign)));
}

inline void pack_keys_bf16(const void* const* keys, DType, int dim, int padded, void* panel) {
  pack_words(keys, 2 * dim, 2 * padded, panel);
}

// Two keys' values side by side, dimension by dimension.
inline void pack_values_bf16(const void* const* values, DType, int dim, int padded, void* dst) {
  char* out = static_cast<char*>(dst);
  // Unpacking works within 128-bit lanes; this order makes its result contiguous.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int j = 0; j < kPanel; j += 2, out += 4 * padded) {
    const char* x = static_cast<const char*>(values[j]);
    const char* y = static_cast<const char*>(values[j + 1]);
    for (int d = 0; d < padded; d += 32) {
      const __mmask64 mask = first_bytes(2 * (dim - d));
      const __m512i a =
          _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(mask, x + 2 * d));
      const __m512i b =
          _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(mask, y + 2 * d));
      _mm512_storeu_si512(out + 4 * d, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(out + 4 * d + 64, _mm512_unpackhi_epi16(a, b));
    }
  }
}

}  // namespace
}  // namespace skimp
