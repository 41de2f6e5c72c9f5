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
        vf zero = splat(bits == 4 ? 8.0f : 128.0f);
        if (low.zeros)
          for (int i = 0; i < VW; ++i) zero[i] = low.zeros[place + v * VW + i];
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

// To the nearest BF16 in the upper half of each word; a NaN is one with few bits set.
SKIMP_INLINE vu to_upper_bf16(vf value) {
  const vu bits = (vu)value;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

template <int KIND>
SKIMP_INLINE void decode_bf16_as(const LowSpan& span, int panel, const uint8_t* w, uint32_t* to) {
  const LowBit& low = *span.low;
  constexpr int BITS = KIND == LOW_INT4 ? 4 : 8;
  constexpr uint32_t MASK = (1u << BITS) - 1;
  const auto value = [](vu q, vf zero) {
    if constexpr (KIND == LOW_FP8) return fp8_to_float(q & MASK);
    return __builtin_convertvector((vi)(q & MASK), vf) - zero;
  };
  for (int k = span.k0; k < span.k1;) {
    const int group = k / low.group;
    const int64_t group_end = int64_t{group + 1} * low.group;
    const int end = group_end < span.k1 ? static_cast<int>(group_end) : span.k1;
    const int64_t place = (int64_t{panel} * low.groups + group) * PANEL;
    const int lines = (end - k) / LOW_ALIGN * (BITS / 4);
    for (int v = 0; v < VP; ++v) {
      const vf scale = load_scale(low, place + v * VW);
      vf zero = splat(BITS == 4 ? 8.0f : 128.0f);
      if (low.zeros)
        for (int i = 0; i < VW; ++i) zero[i] = low.zeros[place + v * VW + i];
      uint32_t* pair = to + v * VW;
      for (int line = 0; line < lines; ++line) {
        const vu words = load<vu>(w + line * 64 + v * VW * 4);
#pragma GCC unroll 4
        for (int i = 0; i < 16 / BITS; ++i, pair += PANEL) {
          const vu even = to_upper_bf16(value(words >> (i * BITS), zero) * scale);
          const vu odd = to_upper_bf16(value(words >> (16 + i * BITS), zero) * scale);
          store(pair, even >> 16 | (odd & 0xffff0000u));
        }
      }
    }
    w += lines * 64;
    to += (end - k) / 2 * PANEL;
    k = end;
  }
}

// The same rounded to BF16, as a dense matrix's panels [k / 2][16][2].
void decode_bf16(const LowSpan& span, const uint8_t* panels, int64_t panel_stride, void* out,
                 int64_t out_stride) {
  for (int p = 0; p < span.num_panels; ++p) {
    const uint8_t* w = panels + p * panel_stride;
    auto* to = reinterpret_cast<uint32_t*>(static_cast<char*>(out) + p * out_stride);
    if (span.low->kind == LOW_INT4)
      decode_bf16_as<LOW_INT4>(span, span.panel + p, w, to);
    else if (span.low->kind == LOW_INT8)
      decode_bf16_as<LOW_INT8>(span, span.panel + p, w, to);
    else
      decode_bf16_as<LOW_FP8>(span, span.panel + p, w, to);
  }
}

}  // namespace
}  // namespace skimp
