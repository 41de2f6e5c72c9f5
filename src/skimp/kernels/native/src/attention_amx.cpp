// Attention with AMX: the same operand forms as AVX512-BF16, products in tile registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "target.h"

SKIMP_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#include "attention_bf16.h"

namespace skimp {
namespace {

// Tiles 0..3 sum, 4 holds rows of the left operand, 5 columns of the right one.
void begin(int rows) {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = t < 5 ? (rows < kTile ? rows : kTile) : 16;
  }
  // GCC 12's intrinsic claims to read 8 bytes only, so that the other stores would be dropped.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

void end() { _tile_release(); }

// out[r][16 v ..] (+)= left [rows, 32 steps] times right; N vectors of 16 columns.
template <int N>
inline void multiply(const char* left, int64_t left_stride, const char* right,
                     int64_t step_stride, int64_t row_stride, int64_t vector_stride, int steps,
                     bool accumulate, float* out, int64_t out_stride) {
  const int64_t out_bytes = 4 * out_stride;
  if (accumulate) {
    _tile_loadd(0, out, out_bytes);
    if constexpr (N > 1) _tile_loadd(1, out + 16, out_bytes);
    if constexpr (N > 2) _tile_loadd(2, out + 32, out_bytes);
    if constexpr (N > 3) _tile_loadd(3, out + 48, out_bytes);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
  }
  for (int k = 0; k < steps; ++k) {
    const char* columns = right + k * step_stride;
    _tile_loadd(4, left + 64 * k, left_stride);
    _tile_loadd(5, columns, row_stride);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, columns + vector_stride, row_stride);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, columns + 2 * vector_stride, row_stride);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, columns + 3 * vector_stride, row_stride);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, out, out_bytes);
  if constexpr (N > 1) _tile_stored(1, out + 16, out_bytes);
  if constexpr (N > 2) _tile_stored(2, out + 32, out_bytes);
  if constexpr (N > 3) _tile_stored(3, out + 48, out_bytes);
}

void score(const void* q, int, int padded, const void* panels, int num_panels, float* scores) {
  const char* left = static_cast<const char*>(q);
  const char* right = static_cast<const char*>(panels);
  const int64_t panel_bytes = 2 * kPanel * padded;
  int i = 0;
  for (; i + 4 <= num_panels; i += 4)
    multiply<4>(left, 2 * padded, right + i * panel_bytes, 1024, 64, panel_bytes, padded / 32,
                false, scores + i * kPanel, kScoreStride);
  for (; i + 2 <= num_panels; i += 2)
    multiply<2>(left, 2 * padded, right + i * panel_bytes, 1024, 64, panel_bytes, padded / 32,
                false, scores + i * kPanel, kScoreStride);
  if (i < num_panels)
    multiply<1>(left, 2 * padded, right + i * panel_bytes, 1024, 64, panel_bytes, padded / 32,
                false, scores + i * kPanel, kScoreStride);
}

void weigh(const float*, const void* probs, int, int padded, const void* values, int key0,
           int num_keys, bool accumulate, float* out) {
  const char* left = static_cast<const char*>(probs) + 2 * key0;
  const char* right = static_cast<const char*>(values);
  const int64_t row = 4 * padded;
  int d = 0;
  for (; d + 64 <= padded; d += 64)
    multiply<4>(left, 2 * kProbStride, right + 4 * d, 16 * row, row, 64, num_keys / 32, accumulate,
                out + d, padded);
  for (; d < padded; d += 32)
    multiply<2>(left, 2 * kProbStride, right + 4 * d, 16 * row, row, 64, num_keys / 32, accumulate,
                out + d, padded);
}

}  // namespace

const AttentionKernels& attention_amx() {
  // Every CPU with AMX has VBMI.
  static constexpr AttentionKernels kernels = kernels_bf16<true>(begin, end, score, weigh);
  return kernels;
}

}  // namespace skimp
SKIMP_TARGET_END
#endif
