// Attention with AVX2 and FMA, in float32; bf16 caches are widened as they are packed.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "target.h"

SKIMP_TARGET("avx2,fma")
#include "attention_f32.h"

namespace skimp {
namespace {

struct Avx2 {
  static constexpr int W = 8;
  using F = __m256;
  static F set(float a) { return _mm256_set1_ps(a); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F scale2(F a, F n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
  }
  static F keep(F a, int from, int to, F other) {
    const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i after = _mm256_cmpgt_epi32(i, _mm256_set1_epi32(from - 1));
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(to), i);
    return _mm256_blendv_ps(other, a, _mm256_castsi256_ps(_mm256_and_si256(after, before)));
  }
  static float reduce_add(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float reduce_max(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
};

// Eight numbers from position d; past `dim` they are zero and memory is not touched.
inline __m256 load8(const void* row, DType dtype, int dim, int d) {
  const char* p = static_cast<const char*>(row);
  if (dtype == F32) {
    if (d + 8 <= dim) return _mm256_loadu_ps(reinterpret_cast<const float*>(p) + d);
    float tail[8] = {};
    std::memcpy(tail, p + 4 * d, 4 * (dim - d));
    return _mm256_loadu_ps(tail);
  }
  uint16_t tail[8] = {};
  const void* from = p + 2 * d;
  if (d + 8 > dim) from = std::memcpy(tail, from, 2 * (dim - d));
  const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Eight keys by eight dimensions, transposed.
inline void transpose8(const void* const* rows, DType dtype, int dim, int d, float* dst) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = load8(rows[i], dtype, dim, d);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * kPanel, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * kPanel, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

void pack_keys(const void* const* keys, DType dtype, int dim, int padded, void* panel) {
  float* out = static_cast<float*>(panel);
  const int blocks = (dim + 7) / 8 * 8;
  for (int d = 0; d < blocks; d += 8) {
    transpose8(keys, dtype, dim, d, out + d * kPanel);
    transpose8(keys + 8, dtype, dim, d, out + d * kPanel + 8);
  }
  std::memset(out + blocks * kPanel, 0, sizeof(float) * (padded - blocks) * kPanel);
}

void pack_values(const void* const* values, DType dtype, int dim, int padded, void* dst) {
  float* out = static_cast<float*>(dst);
  for (int j = 0; j < kPanel; ++j, out += padded)
    for (int d = 0; d < padded; d += 8)
      _mm256_storeu_ps(out + d, d < dim ? load8(values[j], dtype, dim, d) : _mm256_setzero_ps());
}

}  // namespace

const AttentionKernels& attention_avx2() {
  static constexpr AttentionKernels kernels{
      4,           16,          no_begin,
      no_end,      pack_query_f32, pack_keys,
      pack_values, score_f32<Avx2>, softmax_row<Avx2, StoreF32, 5>,
      weigh_f32<Avx2>, merge_row<Avx2>};
  return kernels;
}

}  // namespace skimp
SKIMP_TARGET_END
#endif
