// Attention with AVX-512 in float32; bf16 caches are widened as they are packed.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "target.h"

SKIMP_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "attention_avx512.h"

namespace skimp {
namespace {

void pack_keys(const void* const* keys, DType dtype, int dim, int padded, void* panel) {
  if (dtype == F32) return pack_words(keys, 4 * dim, 4 * padded, panel);
  char* out = static_cast<char*>(panel);
  for (int d = 0; d < padded; d += 16, out += 1024) {
    __m512i a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_castps_si512(load16(keys[i], dtype, dim, d));
    transpose16(a, out);
  }
}

void pack_values(const void* const* values, DType dtype, int dim, int padded, void* dst) {
  float* out = static_cast<float*>(dst);
  for (int j = 0; j < kPanel; ++j, out += padded)
    for (int d = 0; d < padded; d += 16)
      _mm512_storeu_ps(out + d, load16(values[j], dtype, dim, d));
}

}  // namespace

const AttentionKernels& attention_avx512() {
  static constexpr AttentionKernels kernels{
      4,           16,          no_begin,
      no_end,      pack_query_f32, pack_keys,
      pack_values, score_f32<Avx512>, softmax_row<Avx512, StoreF32, 5>,
      weigh_f32<Avx512>, merge_row<Avx512>};
  return kernels;
}

}  // namespace skimp
SKIMP_TARGET_END
#endif
