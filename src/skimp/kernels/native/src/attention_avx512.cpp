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

const AttentionKernels& attention_avx512() { return KERNELS_F32<Avx512>; }

}  // namespace skimp
SKIMP_TARGET_END
#endif
