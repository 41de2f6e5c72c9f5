// Attention with AVX512-BF16: products of bf16 pairs, sums in float32.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "cpu.h"
#include "target.h"

SKIMP_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "attention_bf16.h"

namespace skimp {
namespace {

inline __m512bh pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline __m512bh repeat(const void* pair) {
  int word;
  std::memcpy(&word, pair, 4);
  return (__m512bh)_mm512_set1_epi32(word);
}

// acc[r][v] += sum over `steps` pairs: left row r broadcast, right vector v.
template <int R, int N>
inline void multiply(const char* left, int64_t left_stride, const char* right,
                     int64_t right_stride, int64_t vector_stride, int steps, bool accumulate,
                     float* out, int64_t out_stride) {
  __m512 acc[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v)
      acc[r][v] =
          accumulate ? _mm512_loadu_ps(out + r * out_stride + 16 * v) : _mm512_setzero_ps();
  for (int k = 0; k < steps; ++k) {
    __m512bh x[N];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) x[v] = pairs(right + k * right_stride + v * vector_stride);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh y = repeat(left + r * left_stride + 4 * k);
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], y, x[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) _mm512_storeu_ps(out + r * out_stride + 16 * v, acc[r][v]);
}

template <int N>
inline void multiply_rows(int rows, const char* left, int64_t left_stride, const char* right,
                          int64_t right_stride, int64_t vector_stride, int steps,
                          bool accumulate, float* out, int64_t out_stride) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    multiply<4, N>(left + r * left_stride, left_stride, right, right_stride, vector_stride, steps,
                   accumulate, out + r * out_stride, out_stride);
  left += r * left_stride;
  out += r * out_stride;
  const auto rest = rows - r == 3 ? multiply<3, N> : rows - r == 2 ? multiply<2, N> : multiply<1, N>;
  if (r < rows)
    rest(left, left_stride, right, right_stride, vector_stride, steps, accumulate, out,
         out_stride);
}

void score(const void* q, int rows, int padded, const void* panels, int num_panels,
           float* scores) {
  const char* left = static_cast<const char*>(q);
  const char* right = static_cast<const char*>(panels);
  const int64_t panel_bytes = 2 * kPanel * padded;
  int i = 0;
  for (; i + 4 <= num_panels; i += 4)
    multiply_rows<4>(rows, left, 2 * padded, right + i * panel_bytes, 64, panel_bytes, padded / 2,
                     false, scores + i * kPanel, kScoreStride);
  for (; i + 2 <= num_panels; i += 2)
    multiply_rows<2>(rows, left, 2 * padded, right + i * panel_bytes, 64, panel_bytes, padded / 2,
                     false, scores + i * kPanel, kScoreStride);
  if (i < num_panels)
    multiply_rows<1>(rows, left, 2 * padded, right + i * panel_bytes, 64, panel_bytes, padded / 2,
                     false, scores + i * kPanel, kScoreStride);
}

void weigh(const float*, const void* probs, int rows, int padded, const void* values, int key0,
           int num_keys, bool accumulate, float* out) {
  const char* left = static_cast<const char*>(probs) + 2 * key0;
  const char* right = static_cast<const char*>(values);
  int d = 0;
  for (; d + 64 <= padded; d += 64)
    multiply_rows<4>(rows, left, 2 * kProbStride, right + 4 * d, 4 * padded, 64, num_keys / 2,
                     accumulate, out + d, padded);
  for (; d < padded; d += 32)
    multiply_rows<2>(rows, left, 2 * kProbStride, right + 4 * d, 4 * padded, 64, num_keys / 2,
                     accumulate, out + d, padded);
}

}  // namespace

const AttentionKernels& attention_avx512bf16() {
  static constexpr AttentionKernels kernels = kernels_bf16<false>(no_begin, no_end, score, weigh);
  static constexpr AttentionKernels vbmi = kernels_bf16<true>(no_begin, no_end, score, weigh);
  return has_vbmi() ? vbmi : kernels;
}

}  // namespace skimp
SKIMP_TARGET_END
#endif
