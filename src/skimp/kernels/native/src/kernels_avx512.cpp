// Kernels for CPUs with AVX-512 but no BF16 products: 32 registers of 16 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "target.h"

SKIMP_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")

#define SKIMP_VW 16
#define SKIMP_MAX_R 12
#define SKIMP_MAX_SUMS 24
#include "lowbit_f32.h"
#include "rows.h"
#include "tile_f32.h"

namespace skimp {

const KernelSet& avx512_kernels() {
  static constexpr KernelSet set{Isa::Avx512, false,  tile<false>, tile<true>,
                                 prepare,   finish, norm, embed, round_row, decode_f32, nullptr};
  return set;
}

}  // namespace skimp

SKIMP_TARGET_END
#endif
