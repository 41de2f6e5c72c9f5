// Work on whole rows around a matrix product: norms, conversions, epilogues. Every function
// treats a row the same way whatever the other rows are. Include vec.h's prerequisites first.
#pragma once
#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace skimp {
namespace {

SKIMP_INLINE float bf16_to_float(uint16_t bits) {
  uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Whole vectors, then the tail through a zeroed vector.
template <class Body>
SKIMP_INLINE void for_vectors(int n, Body body) {
  int i = 0;
  for (; i + VW <= n; i += VW) body(i, VW);
  if (i < n) body(i, n - i);
}

SKIMP_INLINE vf load_part(const float* p, int count) {
  if (count == VW) return load<vf>(p);
  float lanes[VW] = {};
  std::memcpy(lanes, p, count * 4);
  return load<vf>(lanes);
}

SKIMP_INLINE vf load_part(const uint16_t* p, int count) {
  if (count == VW) return from_bf16(load<vh>(p));
  uint16_t lanes[VW] = {};
  std::memcpy(lanes, p, count * 2);
  return from_bf16(load<vh>(lanes));
}

SKIMP_INLINE void store_part(float* p, vf v, int count) {
  if (count == VW) return store(p, v);
  std::memcpy(p, &v, count * 4);
}

SKIMP_INLINE void store_part(uint16_t* p, vf v, int count) {
  const vh bits = to_bf16(v);
  if (count == VW) return store(p, bits);
  std::memcpy(p, &bits, count * 2);
}

// rsqrt(mean(x^2) + eps)
SKIMP_INLINE float inverse_rms(const float* x, int n, float eps) {
  vf a{}, b{}, c{}, d{};
  int i = 0;
  for (; i + 4 * VW <= n; i += 4 * VW) {
    const vf x0 = load<vf>(x + i), x1 = load<vf>(x + i + VW);
    const vf x2 = load<vf>(x + i + 2 * VW), x3 = load<vf>(x + i + 3 * VW);
    a = fma(x0, x0, a);
    b = fma(x1, x1, b);
    c = fma(x2, x2, c);
    d = fma(x3, x3, d);
  }
  for_vectors(n - i, [&](int j, int count) {
    const vf v = load_part(x + i + j, count);
    a = fma(v, v, a);
  });
  return 1.0f / std::sqrt(sum((a + b) + (c + d)) / static_cast<float>(n) + eps);
}

template <class In, class Out>
SKIMP_INLINE void prepare_rows(const MatmulOp& op, int first, int last, Out* out,
                               int64_t out_stride, int k_padded) {
  for (int row = first; row < last; ++row) {
    const int source = op.row_index ? op.row_index[row] : row;
    const In* x = static_cast<const In*>(op.x) + source * op.x_stride;
    Out* y = out + row * out_stride;
    if constexpr (sizeof(In) == 4) {
      if (op.norm_factor) {
        const float scale = inverse_rms(x, op.k, op.norm_eps);
        for_vectors(op.k, [&](int i, int count) {
          store_part(y + i, load_part(x + i, count) * scale * load_part(op.norm_factor + i, count),
                     count);
        });
      }
    }
    if (sizeof(In) != 4 || !op.norm_factor)
      for_vectors(op.k, [&](int i, int count) { store_part(y + i, load_part(x + i, count), count); });
    if (k_padded > op.k) std::memset(y + op.k, 0, (k_padded - op.k) * sizeof(Out));
  }
}

void prepare(const MatmulOp& op, int first, int last, bool to_bf16, void* out, int64_t out_stride,
             int k_padded) {
  auto* out_f = static_cast<float*>(out);
  auto* out_h = static_cast<uint16_t*>(out);
  if (op.x_dtype == F32 && to_bf16)
    prepare_rows<float>(op, first, last, out_h, out_stride, k_padded);
  else if (op.x_dtype == F32)
    prepare_rows<float>(op, first, last, out_f, out_stride, k_padded);
  else if (to_bf16)
    prepare_rows<uint16_t>(op, first, last, out_h, out_stride, k_padded);
  else
    prepare_rows<uint16_t>(op, first, last, out_f, out_stride, k_padded);
}

template <int ACT>
SKIMP_INLINE vf activate(vf x) {
  if constexpr (ACT == ACT_SILU) return x * sigmoid(x);
  if constexpr (ACT == ACT_GELU_TANH)
    return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
  if constexpr (ACT == ACT_GELU) return x * normal_cdf(x);
  return x;
}

template <int ACT, class Out>
void finish_as(const MatmulOp& op, int row0, int rows, int panel0, int num_panels,
               const float* acc, const float* scales) {
  constexpr int STEP = ACT == ACT_NONE ? 1 : 2;
  const float* bias = op.bias ? op.bias + panel0 * PANEL : nullptr;
  for (int r = 0; r < rows; ++r, acc += ACC_STRIDE) {
    const float* residual =
        op.residual ? op.residual + (row0 + r) * op.residual_stride : nullptr;
    Out* out = static_cast<Out*>(op.out) + (row0 + r) * op.out_stride;
    const float scale = scales ? scales[r] : 1.0f;
#pragma GCC unroll 4
    for (int i = 0; i < num_panels / STEP * VP; ++i) {
      const int column = panel0 / STEP * PANEL + i * VW;
      const int count = op.n - column < VW ? op.n - column : VW;
      if (count <= 0) break;
      const int lane = i / VP * STEP * PANEL + i % VP * VW;
      vf y = load<vf>(acc + lane) * scale;
      if (bias) y += load<vf>(bias + lane);
      if constexpr (STEP == 2) {
        vf up = load<vf>(acc + lane + PANEL) * scale;
        if (bias) up += load<vf>(bias + lane + PANEL);
        if constexpr (ACT == ACT_CLAMPED) {
          const float limit = op.act_limit;
          y = y > limit ? splat(limit) : y;
          up = up > limit ? splat(limit) : up;
          up = up < -limit ? splat(-limit) : up;
          y = (up + 1.0f) * y * sigmoid(op.act_alpha * y);
        } else {
          y = activate<ACT>(y) * up;
        }
      }
      if (op.softcap != 0.0f) y = op.softcap * vtanh(y / op.softcap);
      if (residual) y += load_part(residual + column, count);
      store_part(out + column, y, count);
    }
  }
}

void finish(const MatmulOp& op, int row, int rows, int panel, int num_panels, const float* acc,
            const float* scales) {
  using Fn = void (*)(const MatmulOp&, int, int, int, int, const float*, const float*);
  static constexpr Fn to_float[] = {finish_as<ACT_NONE, float>, finish_as<ACT_SILU, float>,
                                    finish_as<ACT_GELU_TANH, float>, finish_as<ACT_GELU, float>,
                                    finish_as<ACT_CLAMPED, float>};
  static constexpr Fn to_half[] = {
      finish_as<ACT_NONE, uint16_t>, finish_as<ACT_SILU, uint16_t>,
      finish_as<ACT_GELU_TANH, uint16_t>, finish_as<ACT_GELU, uint16_t>,
      finish_as<ACT_CLAMPED, uint16_t>};
  (op.out_dtype == F32 ? to_float : to_half)[op.activation](op, row, rows, panel, num_panels, acc,
                                                         scales);
}

void norm(const NormOp& op, int first, int last) {
  for (int row = first; row < last; ++row) {
    const float* x = op.x ? op.x + row * op.x_stride : nullptr;
    const float* y = op.y + row * op.y_stride;
    float* out = op.out + row * op.out_stride;
    const float scale = inverse_rms(y, op.dim, op.eps);
    for_vectors(op.dim, [&](int i, int count) {
      vf value = load_part(y + i, count) * scale * load_part(op.factor + i, count);
      if (x) value += load_part(x + i, count);
      store_part(out + i, value, count);
    });
  }
}

template <class T>
SKIMP_INLINE float as_float(T value) {
  if constexpr (sizeof(T) == 4) return value;
  else return bf16_to_float(value);
}

// In panels an output's weights are one element (or pair) of every line.
template <class T>
SKIMP_INLINE void embed_rows(const EmbedOp& op, int first, int last) {
  const T* table = static_cast<const T*>(op.table);
  const int64_t padded = (op.dim + K_ALIGN - 1) / K_ALIGN * K_ALIGN;
  for (int row = first; row < last; ++row) {
    const int64_t id = op.ids[row];
    float* out = op.out + row * op.out_stride;
    if (!op.panels) {
      const T* source = table + id * op.table_stride;
      for_vectors(op.dim, [&](int i, int count) {
        store_part(out + i, load_part(source + i, count) * op.scale, count);
      });
    } else if constexpr (sizeof(T) == 4) {
      const T* source = table + id / PANEL * PANEL * op.dim + id % PANEL;
      for (int i = 0; i < op.dim; ++i) out[i] = as_float(source[i * PANEL]) * op.scale;
    } else {
      const T* source = table + id / PANEL * PANEL * padded + id % PANEL * 2;
      for (int i = 0; i < op.dim; ++i)
        out[i] = as_float(source[i / 2 * 2 * PANEL + i % 2]) * op.scale;
    }
  }
}

void embed(const EmbedOp& op, int first, int last) {
  if (op.head.dtype == F32)
    embed_rows<float>(op, first, last);
  else
    embed_rows<uint16_t>(op, first, last);
}

}  // namespace
}  // namespace skimp
