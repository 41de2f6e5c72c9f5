// Low-bit matrices without instructions for them: rows rounded in float32, weights widened to
// float32 panels. Include after rows.h.
#pragma once
#include "lowbit.h"
#include "rows.h"

namespace skimp {
namespace {

// Which of 8 inputs each piece of a 4-byte word is, from its lowest bits on.
constexpr int BYTE_ORDER_OF[2][4] = {{0, 2, 1, 3}, {4, 6, 5, 7}};
constexpr int NIBBLE_ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};

// The largest absolute value; a NaN is larger than anything.
SKIMP_INLINE float largest(const float* x, int n) {
  vi top{};
  for_vectors(n, [&](int i, int count) {
    const vi bits = (vi)load_part(x + i, count) & 0x7fffffff;
    top = bits > top ? bits : top;
  });
  float most = 0.0f;
  int32_t most_bits = 0;
  for (int i = 0; i < VW; ++i) most_bits = top[i] > most_bits ? top[i] : most_bits;
  std::memcpy(&most, &most_bits, 4);
  return most;
}

SKIMP_INLINE vf at_most(vf x, float most) {
  x = x > most ? splat(most) : x;
  return x < -most ? splat(-most) : x;
}

// To the nearest multiple of the power of two that `magic` is 1.5 * 2^23 times.
SKIMP_INLINE vf to_grid(vf x, float magic) {
  const vf shifted = x + magic;
  return shifted - magic;
}

// E4M3: four significant bits down to 2^-6, multiples of 2^-9 below.
SKIMP_INLINE vf to_fp8(vf x) {
  x = at_most(x, FP8_MOST);
  const vu bits = (vu)x;
  const vf normal = (vf)((bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u);
  const vf small = to_grid(x, 12582912.0f / 512.0f);
  const vf magnitude = (vf)(bits & 0x7fffffffu);
  return magnitude < 0.015625f ? small : normal;
}

// Rounds a row in place to what a product with `rounding` sees, in steps of the scale returned.
float round_row(float* x, int n, int rounding) {
  float scale = largest(x, n) / (rounding == ROUND_INT8 ? INT8_STEPS : FP8_MOST);
  if (scale == 0.0f) scale = 1.0f;
  if (rounding == ROUND_INT8)
    for_vectors(n, [&](int i, int count) {
      const vf q = to_grid(load_part(x + i, count) / scale, 12582912.0f);
      store_part(x + i, q > 127.0f ? splat(127.0f) : q, count);
    });
  else
    for_vectors(n, [&](int i, int count) {
      store_part(x + i, to_fp8(load_part(x + i, count) / scale), count);
    });
  return scale;
}

SKIMP_INLINE vf load_scale(const LowBit& low, int64_t index) {
  if (low.scale_dtype == BF16)
    return from_bf16(load<vh>(static_cast<const uint16_t*>(low.scales) + index));
  return load<vf>(static_cast<const float*>(low.scales) + index);
}

// What was added to the stored integers.
SKIMP_INLINE vf load_zero(const LowBit& low, int64_t index) {
  vf zero = splat(low.kind == LOW_INT4 ? 8.0f : 128.0f);
  if (low.zeros)
    for (int i = 0; i < VW; ++i) zero[i] = low.zeros[index + i];
  return zero;
}

SKIMP_INLINE vf fp8_to_float(vu bits) {
  const vf magnitude = (vf)((bits & 0x7fu) << 20) * 0x1p120f;
  const vf value = (bits & 0x7fu) == 0x7fu ? splat(__builtin_nanf("")) : magnitude;
  return (vf)((vu)value | (bits & 0x80u) << 24);
}

// (q - zero) * scale in float32 panels [k][16].
void decode_f32(const LowSpan& span, const uint8_t* panels, int64_t panel_stride, void* out,
                int64_t out_stride) {
  const LowBit& low = *span.low;
  const int bits = low.kind == LOW_INT4 ? 4 : 8;
  const uint32_t mask = bits == 4 ? 15u : 255u;
  for (int p = 0; p < span.num_panels; ++p) {
    const uint8_t* w = panels + p * panel_stride;
    float* to = reinterpret_cast<float*>(static_cast<char*>(out) + p * out_stride);
    for (int k = span.k0; k < span.k1; k += LOW_ALIGN, to += LOW_ALIGN * PANEL) {
      const int64_t place =
          ((int64_t{span.panel} + p) * low.groups + k / low.group) * PANEL;
      for (int v = 0; v < VP; ++v) {
        const vf scale = load_scale(low, place + v * VW);
        const vf zero = load_zero(low, place + v * VW);
        for (int line = 0; line < bits / 4; ++line) {
          const vu words = load<vu>(w + line * 64 + v * VW * 4);
          for (int i = 0; i < 32 / bits; ++i) {
            const vu q = (words >> (i * bits)) & mask;
            const vf value = low.kind == LOW_FP8
                                 ? fp8_to_float(q)
                                 : __builtin_convertvector((vi)q, vf) - zero;
            const int at = bits == 4 ? NIBBLE_ORDER[i] : BYTE_ORDER_OF[line][i];
            store(to + at * PANEL + v * VW, value * scale);
          }
        }
      }
      w += bits * 16;
    }
  }
}

}  // namespace
}  // namespace skimp
