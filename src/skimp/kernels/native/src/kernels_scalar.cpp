// Kernels for any CPU: vectors of four floats, which every compiler lowers to what there is.
#include <cmath>
#include <cstdint>
#include <cstring>

#define SKIMP_VW 4
#define SKIMP_MAX_R 4
#define SKIMP_MAX_SUMS 16
#include "lowbit_f32.h"
#include "rows.h"
#include "tile_f32.h"

namespace skimp {

const KernelSet& scalar_kernels() {
  static constexpr KernelSet set{Isa::Scalar, false,  tile<false>, tile<true>,
                                 prepare,     finish, norm, embed, round_row, decode_f32, nullptr};
  return set;
}

}  // namespace skimp
