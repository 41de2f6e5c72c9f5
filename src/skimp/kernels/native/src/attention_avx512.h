// The AVX-512 vector type and the packing that float32 and bf16 operands share.
// Included inside a target that has avx512f, bw, dq and vl.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics
#endif
#include "attention_f32.h"

namespace skimp {
namespace {

struct Avx512 {
  static constexpr int W = 16;
  using F = __m512;
  static F set(float a) { return _mm512_set1_ps(a); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }
  static F keep(F a, int from, int to, F other) {
    const uint32_t below = to >= 16 ? 0xffffu : (1u << to) - 1;
    const uint32_t skip = from <= 0 ? 0u : (1u << from) - 1;
    return _mm512_mask_mov_ps(other, static_cast<__mmask16>(below & ~skip), a);
  }
  static float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
  static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
};

inline __mmask64 first_bytes(int n) {
  return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1;
}

// 16 x 16 words of 4 bytes, transposed.
inline void transpose16(__m512i a[16], char* dst) {
  __m512i b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 g + c] holds, in 128-bit lane l, column 4 l + c of rows 4 g .. 4 g + 3.
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512i lo = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
    const __m512i hi = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i lo2 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i hi2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(dst + 64 * c, _mm512_shuffle_i32x4(lo, hi, 0x88));
    _mm512_storeu_si512(dst + 64 * (c + 4), _mm512_shuffle_i32x4(lo2, hi2, 0x88));
    _mm512_storeu_si512(dst + 64 * (c + 8), _mm512_shuffle_i32x4(lo, hi, 0xdd));
    _mm512_storeu_si512(dst + 64 * (c + 12), _mm512_shuffle_i32x4(lo2, hi2, 0xdd));
  }
}

// A panel of keys as they lie in the cache: words of 4 bytes (one float32 or two bf16).
inline void pack_words(const void* const* keys, int bytes, int padded_bytes, void* panel) {
  char* out = static_cast<char*>(panel);
  for (int b = 0; b < padded_bytes; b += 64, out += 1024) {
    const __mmask64 mask = first_bytes(bytes - b);
    __m512i a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      a[i] = _mm512_maskz_loadu_epi8(mask, static_cast<const char*>(keys[i]) + b);
    transpose16(a, out);
  }
}

// Sixteen numbers from position d as float32; past `dim` they are zero, memory is not touched.
inline __m512 load16(const void* row, DType dtype, int dim, int d) {
  const char* p = static_cast<const char*>(row);
  const __mmask16 mask = dim - d >= 16 ? 0xffff : dim <= d ? 0 : (1u << (dim - d)) - 1;
  if (dtype == F32) return _mm512_maskz_loadu_ps(mask, p + 4 * d);
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, p + 2 * d);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

}  // namespace
}  // namespace skimp
