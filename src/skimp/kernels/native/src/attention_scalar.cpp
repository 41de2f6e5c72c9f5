// Attention in plain C++: any processor.
#include <algorithm>

#include "attention_f32.h"

namespace skimp {
namespace {

struct Scalar {
  static constexpr int W = 4;
  struct F {
    float x[W];
  };
  template <class Op>
  static F each(Op op) {
    F y;
    for (int i = 0; i < W; ++i) y.x[i] = op(i);
    return y;
  }
  static F set(float a) {
    return each([&](int) { return a; });
  }
  static F load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(float* p, F a) { std::memcpy(p, a.x, sizeof(a.x)); }
  static F add(F a, F b) {
    return each([&](int i) { return a.x[i] + b.x[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.x[i] - b.x[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.x[i] * b.x[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.x[i] / b.x[i]; });
  }
  static F fma(F a, F b, F c) {  // two roundings: fmaf without the instruction is a library call
    return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
  }
  static F max(F a, F b) {
    return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
  }
  static F min(F a, F b) {
    return each([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
  }
  static F round(F a) {  // to nearest even, for |a| < 2^22
    return each([&](int i) {
      volatile float shifted = a.x[i] + 12582912.0f;  // volatile: never folded away
      return shifted - 12582912.0f;
    });
  }
  static F scale2(F a, F n) {
    return each([&](int i) {
      const uint32_t bits = static_cast<uint32_t>(static_cast<int>(n.x[i]) + 127) << 23;
      float power;
      std::memcpy(&power, &bits, 4);
      return a.x[i] * power;
    });
  }
  static F keep(F a, int from, int to, F other) {
    return each([&](int i) { return i >= from && i < to ? a.x[i] : other.x[i]; });
  }
  static float reduce_add(F a) { return (a.x[0] + a.x[1]) + (a.x[2] + a.x[3]); }
  static float reduce_max(F a) {
    return std::max(std::max(a.x[0], a.x[1]), std::max(a.x[2], a.x[3]));
  }
};

}  // namespace

const AttentionKernels& attention_scalar() { return KERNELS_F32<Scalar>; }

}  // namespace skimp
