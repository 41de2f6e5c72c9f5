// Vectors to the codes of low-bit caches, bit by bit as cache/formats.py computes them. Plain loops
// to be inlined into functions for any target; no sum of products, so contraction changes nothing.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "op.h"

namespace skimp {
namespace {

#define SKIMP_ALWAYS static inline __attribute__((always_inline))

SKIMP_ALWAYS int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

SKIMP_ALWAYS float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

SKIMP_ALWAYS uint16_t round_bf16(float x) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// x times the orthonormal Walsh-Hadamard matrix, in blocks of the power of two in dim.
SKIMP_ALWAYS void hadamard(float* x, int dim) {
  const int size = dim & -dim;
  for (int half = 1; half < size; half *= 2) {
    for (float* low = x; low < x + dim; low += 2 * half) {
      float* high = low + half;
      for (int i = 0; i < half; ++i) {
        const float a = low[i], b = high[i];
        low[i] = a + b;
        high[i] = a - b;
      }
    }
  }
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  for (int i = 0; i < dim; ++i) x[i] *= scale;
}

// To the nearest E4M3 number, |x| <= 448.
SKIMP_ALWAYS uint8_t round_fp8(float x) {
  const int32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  const int32_t normal =
      (magnitude - (120 << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  const int32_t small = bits_of(float_of(magnitude) + 16384.0f) - bits_of(16384.0f);
  return static_cast<uint8_t>((magnitude < (121 << 23) ? small : normal) |
                              ((bits >> 24) & 0x80));
}

// Codes of x [dim], byte i to codes[i * stride]; returns the scale in bf16.
template <int FORMAT>
SKIMP_ALWAYS uint16_t encode_as(const float* __restrict x, int dim, uint8_t* __restrict codes,
                                int64_t stride) {
  // Bit patterns order magnitudes, and put NaN above infinity.
  int32_t top = 0, positive = 0;
  for (int i = 0; i < dim; ++i) {
    const int32_t bits = bits_of(x[i]), magnitude = bits & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
    positive = bits > positive ? bits : positive;
  }
  const float largest = float_of(top);
  float scale;
  if (FORMAT == CACHE_INT4)
    scale = (positive == top ? largest : -largest) / -8.0f;
  else
    scale = largest * static_cast<float>(FORMAT == CACHE_INT8 ? 1.0 / 127 : 1.0 / 448);
  const uint16_t stored = round_bf16(scale);
  scale = float_of(int32_t{stored} << 16);
  const bool finite = std::fabs(scale) < INFINITY;
  const bool usable = finite && std::fabs(scale) >= 0x1p-100f;
  const float factor = usable ? 1.0f / scale : 0.0f;
  const int count = FORMAT == CACHE_INT4 ? dim / 2 : dim;
  constexpr int CHUNK = 64;
  for (int first = 0; first < count; first += CHUNK) {
    uint8_t chunk[CHUNK];
    const int n = count - first < CHUNK ? count - first : CHUNK;
    const float* low = x + first;
    const float* high = low + count;
    for (int i = 0; i < n; ++i) {
      if constexpr (FORMAT == CACHE_INT8) {
        float y = std::rint(low[i] * factor);
        y = y > 127.0f ? 127.0f : y < -127.0f ? -127.0f : y;
        chunk[i] = static_cast<uint8_t>(static_cast<int32_t>(y));
      } else if constexpr (FORMAT == CACHE_FP8) {
        const float y = low[i] * factor;
        chunk[i] = round_fp8(y > 448.0f ? 448.0f : y < -448.0f ? -448.0f : y);
      } else {
        float a = std::rint(low[i] * factor), b = std::rint(high[i] * factor);
        a = a > 7.0f ? 7.0f : a < -8.0f ? -8.0f : a;
        b = b > 7.0f ? 7.0f : b < -8.0f ? -8.0f : b;
        chunk[i] = static_cast<uint8_t>((static_cast<int32_t>(a) + 8) |
                                        (static_cast<int32_t>(b) + 8) << 4);
      }
    }
    if (!usable) std::memset(chunk, FORMAT == CACHE_INT4 ? 0x88 : 0, CHUNK);
    for (int i = 0; i < n; ++i) codes[(first + i) * stride] = chunk[i];
  }
  return usable || !finite ? stored : 0;
}

SKIMP_ALWAYS uint16_t encode(int format, const float* x, int dim, uint8_t* codes,
                             int64_t stride) {
  if (format == CACHE_INT8) return encode_as<CACHE_INT8>(x, dim, codes, stride);
  if (format == CACHE_FP8) return encode_as<CACHE_FP8>(x, dim, codes, stride);
  return encode_as<CACHE_INT4>(x, dim, codes, stride);
}

}  // namespace
}  // namespace skimp
