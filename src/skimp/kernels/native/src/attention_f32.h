// The attention kernels over a vector type V (width V::W, at most 16 floats). Each attention_*.cpp
// includes this inside its own target; the anonymous namespace keeps the copies apart.
//
// Every sum runs in an order fixed by absolute key position and head dimension alone; how many
// rows share a register block changes nothing.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "attention_codes.h"

#if defined(__clang__)
#define SKIMP_SHUFFLE(I, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SKIMP_SHUFFLE(I, a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

namespace skimp {
namespace {

// 2^x for x <= 127; at most 9e-8 relative error with 5 terms, 3e-6 with 4 (enough for bf16
// probabilities), and exactly 1 at 0, which merging relies on.
template <class V, int Terms>
inline typename V::F exp2_poly(typename V::F x) {
  x = V::max(x, V::set(-126.5f));
  const auto n = V::round(x);
  const auto f = V::sub(x, n);
  typename V::F y;
  if constexpr (Terms == 5) {
    y = V::fma(f, V::set(0.001326472731307149f), V::set(0.009671512991189957f));
    y = V::fma(f, y, V::set(0.05550733581185341f));
    y = V::fma(f, y, V::set(0.24022242426872253f));
    y = V::fma(f, y, V::set(0.6931470036506653f));
  } else {
    y = V::fma(f, V::set(0.009582852944731712f), V::set(0.055906426161527634f));
    y = V::fma(f, y, V::set(0.24024099111557007f));
    y = V::fma(f, y, V::set(0.6931241750717163f));
  }
  return V::scale2(V::fma(f, y, V::set(1.0f)), n);
}

template <class V>
inline float exp2_one(float x) {
  alignas(64) float y[V::W];
  V::store(y, exp2_poly<V, 5>(V::set(x)));
  return y[0];
}

struct StoreF32 {
  template <class V>
  static void put(float* scores, void*, int j, typename V::F p) {
    V::store(scores + j, p);
  }
};

struct StoreBF16 {
  template <class V>
  static void put(float*, void* probs, int j, typename V::F p) {
    V::store_bf16(static_cast<uint16_t*>(probs) + j, p);
  }
};

template <class V, class Store, int Terms, bool Codes>
inline void softmax_of(float* s, void* probs, int lo, int hi, int g0, int g1,
                       const SoftmaxScale& scale, const SpanScales& codes, float* max,
                       float* sum) {
  constexpr int W = V::W;
  const auto zero = V::set(0.0f);
  if (lo >= hi) {
    for (int j = g0; j < g1; j += W) Store::template put<V>(s, probs, j, zero);
    *max = -INFINITY;
    *sum = 0.0f;
    return;
  }
  const int v0 = lo / W * W, v1 = (hi + W - 1) / W * W;
  if constexpr (Codes)
    for (int j = v0; j < v1; j += W)
      V::store(s + j, V::mul(V::load(s + j), V::load(codes.keys + j)));
  if (scale.tanh_factor != 0.0f) {
    const auto c = V::set(scale.tanh_factor), one = V::set(1.0f), two = V::set(2.0f);
    for (int j = v0; j < v1; j += W) {
      const auto x = V::min(V::mul(V::load(s + j), c), V::set(64.0f));
      V::store(s + j, V::sub(one, V::div(two, V::add(exp2_poly<V, 5>(x), one))));
    }
  }
  const auto lowest = V::set(-INFINITY);
  auto top = lowest;
  for (int j = v0; j < v1; j += W) {
    auto x = V::load(s + j);
    if (j < lo || j + W > hi) x = V::keep(x, lo - j, hi - j, lowest);
    top = V::max(x, top);
  }
  *max = V::reduce_max(top) * scale.factor;
  const auto factor = V::set(scale.factor), shift = V::set(-*max);
  auto total = zero;
  for (int j = g0; j < v0; j += W) Store::template put<V>(s, probs, j, zero);
  for (int j = v0; j < v1; j += W) {
    auto p = exp2_poly<V, Terms>(V::fma(V::load(s + j), factor, shift));
    const bool part = j < lo || j + W > hi;
    if (part) p = V::keep(p, lo - j, hi - j, zero);
    total = V::add(total, p);
    if constexpr (Codes) {
      p = V::mul(p, V::load(codes.values + j));
      if (part) p = V::keep(p, lo - j, hi - j, zero);
    }
    Store::template put<V>(s, probs, j, p);
  }
  for (int j = v1; j < g1; j += W) Store::template put<V>(s, probs, j, zero);
  *sum = V::reduce_add(total);
}

template <class V, class Store, int Terms>
void softmax_row(float* s, void* probs, int lo, int hi, int g0, int g1, const SoftmaxScale& scale,
                 const SpanScales& codes, float* max, float* sum) {
  if (codes.keys)
    softmax_of<V, Store, Terms, true>(s, probs, lo, hi, g0, g1, scale, codes, max, sum);
  else
    softmax_of<V, Store, Terms, false>(s, probs, lo, hi, g0, g1, scale, codes, max, sum);
}

template <class V>
void merge_row(const float* part, float part_max, float part_sum, int padded, float* acc,
               float* max, float* sum) {
  if (part_sum == 0.0f) return;
  if (*sum == 0.0f) {
    std::memcpy(acc, part, padded * sizeof(float));
    *max = part_max;
    *sum = part_sum;
    return;
  }
  const float top = *max > part_max ? *max : part_max;
  const float a = exp2_one<V>(*max - top), b = exp2_one<V>(part_max - top);
  const auto va = V::set(a), vb = V::set(b);
  for (int d = 0; d < padded; d += V::W)
    V::store(acc + d, V::fma(V::load(part + d), vb, V::mul(V::load(acc + d), va)));
  *sum = *sum * a + part_sum * b;
  *max = top;
}

inline float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline void pack_query_f32(const float* q, float sign, int dim, int padded, void* dst) {
  float* out = static_cast<float*>(dst);
  for (int d = 0; d < dim; ++d) out[d] = q[d] * sign;
  for (int d = dim; d < padded; ++d) out[d] = 0.0f;
}

// Widening a pair is a shift and a mask; plain loops, which compilers vectorize.
inline void widen_pairs(const char* __restrict pairs, int count, float* __restrict even,
                        float* __restrict odd) {
  for (int i = 0; i < count; ++i) {
    uint32_t both;
    std::memcpy(&both, pairs + 4 * i, 4);
    even[i] = __builtin_bit_cast(float, both << 16);
    odd[i] = __builtin_bit_cast(float, both & 0xffff0000u);
  }
}

inline void read_keys_f32(const void* block, DType dtype, int dim, int padded, void* dst) {
  float* out = static_cast<float*>(dst);
  const char* in = static_cast<const char*>(block);
  if (dtype == F32) {
    std::memcpy(out, in, sizeof(float) * kPanel * dim);
  } else {
    int d = 0;
    for (; d + 2 <= dim; d += 2)
      widen_pairs(in + 2 * kPanel * d, kPanel, out + d * kPanel, out + (d + 1) * kPanel);
    for (int j = 0; d < dim && j < kPanel; ++j) {
      uint16_t bits;
      std::memcpy(&bits, in + 2 * kPanel * d + 2 * j, 2);
      out[d * kPanel + j] = to_float(bits);
    }
  }
  std::memset(out + dim * kPanel, 0, sizeof(float) * (padded - dim) * kPanel);
}

inline void read_values_f32(const void* block, DType dtype, int dim, int padded, int lo, int hi,
                            void* dst) {
  float* out = static_cast<float*>(dst);
  const char* in = static_cast<const char*>(block);
  for (int j = 0; j < kPanel; j += 2, out += 2 * padded) {
    if (dtype == F32) {
      std::memcpy(out, in + sizeof(float) * j * dim, sizeof(float) * dim);
      std::memcpy(out + padded, in + sizeof(float) * (j + 1) * dim, sizeof(float) * dim);
    } else {
      widen_pairs(in + 2 * j * dim, dim, out, out + padded);
    }
    for (int i = 0; i < 2; ++i) {
      const int kept = j + i >= lo && j + i < hi ? dim : 0;
      std::memset(out + i * padded + kept, 0, sizeof(float) * (padded - kept));
    }
  }
}

// Four by four at a time, in vectors that every processor has.
inline void turn_f32(const void* panel, int dim, int lo, int hi, void* dst) {
  typedef float v4 __attribute__((vector_size(16)));
  typedef int32_t i4 __attribute__((vector_size(16)));
  const float* in = static_cast<const float*>(panel);
  float* out = static_cast<float*>(dst);
  for (int j = 0; j < kPanel; j += 4) {
    for (int d = 0; d < dim; d += 4) {
      v4 x[4], y[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&x[i], in + (d + i) * kPanel + j, 16);
      for (int i = 0; i < 2; ++i) {
        y[2 * i] = SKIMP_SHUFFLE(i4, x[i], x[i + 2], 0, 4, 1, 5);
        y[2 * i + 1] = SKIMP_SHUFFLE(i4, x[i], x[i + 2], 2, 6, 3, 7);
      }
      for (int i = 0; i < 2; ++i) {
        x[2 * i] = SKIMP_SHUFFLE(i4, y[i], y[i + 2], 0, 4, 1, 5);
        x[2 * i + 1] = SKIMP_SHUFFLE(i4, y[i], y[i + 2], 2, 6, 3, 7);
      }
      for (int i = 0; i < 4; ++i) std::memcpy(out + (j + i) * dim + d, &x[i], 16);
    }
  }
  for (int j = 0; j < kPanel; ++j)
    if (j < lo || j >= hi) std::memset(out + j * dim, 0, sizeof(float) * dim);
}

inline void pack_made_f32(const float* scores, int count, void* lines) {
  float* out = static_cast<float*>(lines);
  for (int d = 0; d < count; ++d)
    std::memcpy(out + d * kPanel, scores + d * kScoreStride, sizeof(float) * kPanel);
}

// R rows against P panels, all of head_dim.
template <class V, int R, int P>
inline void score_block(const float* q, int padded, const float* panels, float* scores) {
  constexpr int W = V::W, N = kPanel / W;  // vectors a panel
  typename V::F acc[R][P * N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < P * N; ++v) acc[r][v] = V::set(0.0f);
  for (int d = 0; d < padded; ++d) {
    typename V::F key[P * N];
#pragma GCC unroll 16
    for (int v = 0; v < P * N; ++v)
      key[v] = V::load(panels + (v / N) * padded * kPanel + d * kPanel + (v % N) * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto x = V::set(q[r * padded + d]);
#pragma GCC unroll 16
      for (int v = 0; v < P * N; ++v) acc[r][v] = V::fma(x, key[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < P * N; ++v) V::store(scores + r * kScoreStride + v * W, acc[r][v]);
}

template <class V, int P>
inline void score_rows(const float* q, int rows, int padded, const float* panels, float* scores) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    score_block<V, 4, P>(q + r * padded, padded, panels, scores + r * kScoreStride);
  q += r * padded;
  scores += r * kScoreStride;
  if (rows - r == 3) score_block<V, 3, P>(q, padded, panels, scores);
  if (rows - r == 2) score_block<V, 2, P>(q, padded, panels, scores);
  if (rows - r == 1) score_block<V, 1, P>(q, padded, panels, scores);
}

template <class V>
void score_f32(const void* q_, int rows, int padded, const void* panels_, int num_panels,
               float* scores) {
  const float* q = static_cast<const float*>(q_);
  const float* panels = static_cast<const float*>(panels_);
  constexpr int P = V::W == 16 ? 4 : 1;  // as many as the registers hold
  int i = 0;
  for (; i + P <= num_panels; i += P)
    score_rows<V, P>(q, rows, padded, panels + i * padded * kPanel, scores + i * kPanel);
  if constexpr (P > 2)
    for (; i + 2 <= num_panels; i += 2)
      score_rows<V, 2>(q, rows, padded, panels + i * padded * kPanel, scores + i * kPanel);
  if (i < num_panels)
    score_rows<V, 1>(q, rows, padded, panels + i * padded * kPanel, scores + i * kPanel);
}

// R rows, N vectors of head_dim, all keys one after another.
template <class V, int R, int N>
inline void weigh_block(const float* p, int padded, const float* values, int num_keys,
                        bool accumulate, float* out) {
  constexpr int W = V::W;
  typename V::F acc[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v)
      acc[r][v] = accumulate ? V::load(out + r * padded + v * W) : V::set(0.0f);
  for (int j = 0; j < num_keys; ++j) {
    typename V::F value[N];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) value[v] = V::load(values + j * padded + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto x = V::set(p[r * kScoreStride + j]);
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) acc[r][v] = V::fma(x, value[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) V::store(out + r * padded + v * W, acc[r][v]);
}

template <class V, int N>
inline void weigh_rows(const float* p, int rows, int padded, const float* values, int num_keys,
                       bool accumulate, float* out) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    weigh_block<V, 4, N>(p + r * kScoreStride, padded, values, num_keys, accumulate,
                         out + r * padded);
  p += r * kScoreStride;
  out += r * padded;
  if (rows - r == 3) weigh_block<V, 3, N>(p, padded, values, num_keys, accumulate, out);
  if (rows - r == 2) weigh_block<V, 2, N>(p, padded, values, num_keys, accumulate, out);
  if (rows - r == 1) weigh_block<V, 1, N>(p, padded, values, num_keys, accumulate, out);
}

template <class V>
void weigh_f32(const float* scores, const void*, int rows, int padded, const void* values_,
               int key0, int num_keys, bool accumulate, float* out) {
  const float* values = static_cast<const float*>(values_);
  const float* p = scores + key0;
  constexpr int N = V::W == 16 ? 4 : 2;
  int d = 0;
  for (; d + N * V::W <= padded; d += N * V::W)
    weigh_rows<V, N>(p, rows, padded, values + d, num_keys, accumulate, out + d);
  for (; d < padded; d += V::W)
    weigh_rows<V, 1>(p, rows, padded, values + d, num_keys, accumulate, out + d);
}

inline void no_begin(int) {}
inline void no_end() {}

template <class V>
constexpr AttentionKernels KERNELS_F32{4,
                                       16,
                                       no_begin,
                                       no_end,
                                       pack_query_f32,
                                       read_keys_f32,
                                       read_values_f32,
                                       turn_f32,
                                       pack_made_f32,
                                       decode_keys_f32,
                                       decode_values_f32,
                                       score_f32<V>,
                                       softmax_row<V, StoreF32, 5>,
                                       weigh_f32<V>,
                                       merge_row<V>};

}  // namespace
}  // namespace skimp
