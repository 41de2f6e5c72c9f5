// Kernels for CPUs with AVX2 and FMA: 16 registers of 8 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "target.h"

SKIMP_TARGET("avx2,fma")

#define SKIMP_VW 8
#define SKIMP_MAX_R 6
#define SKIMP_MAX_SUMS 12
#include "lowbit_f32.h"
#include "rows.h"
#include "tile_f32.h"

namespace skimp {

const KernelSet& avx2_kernels() {
  static constexpr KernelSet set{Isa::Avx2, false,  tile<false>, tile<true>,
                                 prepare,   finish, norm, embed, round_row, decode_f32, nullptr};
  return set;
}

}  // namespace skimp

SKIMP_TARGET_END
#endif
