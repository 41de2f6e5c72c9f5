// Attention with AVX-512 in float32; bf16 caches are widened as they are read.
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

const AttentionKernels& attention_avx512() {
  static constexpr AttentionKernels kernels{
      4,
      16,
      no_begin,
      no_end,
      pack_query_f32,
      read_keys_f32,
      read_values_f32,
      score_f32<Avx512>,
      softmax_row<Avx512, StoreF32, 5>,
      weigh_f32<Avx512>,
      merge_row<Avx512>,
  };
  return kernels;
}

}  // namespace skimp
SKIMP_TARGET_END
#endif
