// The AVX-512 vector type and what attention in float32 and in bf16 share.
// Included inside a target that has avx512f, bw, dq and vl.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
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

// Sixteen numbers from position d; past `dim` they are zero and memory is not touched.
inline __m512 load16(const float* row, int dim, int d) {
  const __mmask16 mask = dim - d >= 16 ? 0xffff : dim <= d ? 0 : (1u << (dim - d)) - 1;
  return _mm512_maskz_loadu_ps(mask, row + d);
}

}  // namespace
}  // namespace skimp
