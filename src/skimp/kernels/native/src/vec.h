// Portable vectors of SKIMP_VW floats (GCC/Clang vector extensions), compiled once per
// instruction set: the including .cpp sets SKIMP_VW and a target pragma first, and where VW is 8 or
// 16 includes immintrin.h before that. Everything is in an unnamed namespace, so code for one CPU
// can never be linked into the path of another.
#pragma once
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

namespace skimp {
namespace {

constexpr int VW = SKIMP_VW;
constexpr int VP = 16 / VW;  // vectors to a panel

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint16_t vh __attribute__((vector_size(VW * 2)));

#define SKIMP_INLINE static inline __attribute__((always_inline))

template <class V>
SKIMP_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
SKIMP_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

SKIMP_INLINE vf splat(float value) { return value - vf{}; }

// a b + c, rounded once wherever the CPU can. Left to the compiler, some loops would get it and
// others not, and a row's bits would depend on which of them it met.
SKIMP_INLINE vf fma(vf a, vf b, vf c) {
#if SKIMP_VW == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SKIMP_VW == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

SKIMP_INLINE vf fma(vf a, float b, vf c) { return fma(a, splat(b), c); }
SKIMP_INLINE vf fma(vf a, vf b, float c) { return fma(a, b, splat(c)); }

SKIMP_INLINE vf from_bf16(vh bits) {
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}

// Round to nearest even; a NaN stays one.
SKIMP_INLINE vh to_bf16(vf value) {
  vu bits = (vu)value;
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vi nan = value != value;
  rounded = (rounded & ~(vu)nan) | ((vu)nan & 0x7fc0u);
  return __builtin_convertvector(rounded, vh);
}

SKIMP_INLINE float sum(vf v) {
  float lanes[VW];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = VW / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Relative error below 2e-7 (minimax polynomial of 2^f on [-1/2, 1/2]); clamps instead of
// overflowing.
SKIMP_INLINE vf vexp(vf x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = fma(x, splat(1.44269504088896341f), magic);
  vf n = shifted - magic;
  vf f = fma(n, -0.693145751953125f, x);
  f = fma(n, -1.42860682030941723e-6f, f);
  vf p = fma(f, splat(1.3950491e-3f), 8.36888939e-3f);
  p = fma(p, f, 4.16662058e-2f);
  p = fma(p, f, 1.66665188e-1f);
  p = fma(p, f, 5.00000010e-1f);
  p = fma(p, f * f, f) + 1.0f;
  vi scale = ((vi)shifted << 23) + (127 << 23);
  return p * (vf)scale;
}

SKIMP_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

SKIMP_INLINE vf vtanh(vf x) { return 1.0f - 2.0f / (1.0f + vexp(2.0f * x)); }

// The normal distribution function: half of erfc(t), t = |x| / sqrt(2), with
// erfc(t) = exp(-t P(t)) and P fitted on [0, 4.2]; absolute error below 1e-7.
SKIMP_INLINE vf normal_cdf(vf x) {
  vf t = x < 0.0f ? -x : x;
  t *= 0.70710678f;
  t = t > 4.2f ? splat(4.2f) : t;
  vf p = fma(t, splat(3.14401986e-5f), -3.08802478e-4f);
  p = fma(p, t, 1.03240261e-3f);
  p = fma(p, t, 5.36931837e-4f);
  p = fma(p, t, -1.95839590e-2f);
  p = fma(p, t, 1.02919613e-1f);
  p = fma(p, t, 6.36597734e-1f);
  p = fma(p, t, 1.12838025f);
  vf tail = 0.5f * vexp(-t * p);
  return x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace
}  // namespace skimp
