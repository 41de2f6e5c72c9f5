// The driver of a matrix product: prepares the input rows, divides the work, calls the tiles.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels.h"
#include "lowbit.h"
#include "share.h"

namespace skimp {
namespace {

// At most this many rows are prepared by every thread for itself, which is quicker than sharing
// them over a barrier.
constexpr int PRIVATE_ROWS = 4;
// From this many rows AMX is quicker: up to three AVX512-BF16 keeps up with memory.
constexpr int AMX_ROWS = 4;

// From how many rows low-bit panels are rather widened to BF16, so that the rows share the time it
// takes: where dense products are quicker than those of panels as they are.
int widen_from([[maybe_unused]] const LowBit& low) {
#if defined(__x86_64__)
  if (current_isa() == Isa::Amx) return low.kind == LOW_FP8 ? 8 : 32;
  if (current_isa() == Isa::Avx512Bf16 && quick_bf16_dots())
    return low.kind == LOW_INT4 ? 128 : 256;
#endif
  return std::numeric_limits<int>::max();
}

struct Input {
  const char* data;
  int64_t stride;  // elements
};

Input prepare_input(const MatmulOp& op, const KernelSet& kernels, int rows, int k_padded,
                    bool bf16, const Team& team) {
  const bool same_type = (op.x_dtype == BF16) == bf16;
  if (same_type && !op.norm_factor && !op.row_index && k_padded == op.k)
    return {static_cast<const char*>(op.x), op.x_stride};
  // An odd number of cache lines, so that the rows of a tile do not share a cache set.
  const int64_t element = bf16 ? 2 : 4;
  const int64_t stride = ((divide_up(k_padded * element, 64) | 1) * 64) / element;
  if (rows <= PRIVATE_ROWS && rows * stride * element <= int64_t(team.scratch_bytes)) {
    kernels.prepare(op, 0, rows, bf16, team.scratch, stride, k_padded);
    return {static_cast<const char*>(team.scratch), stride};
  }
  const Range mine = share(rows, team.tid, team.size);
  kernels.prepare(op, mine.first, mine.last, bf16, op.x_scratch, stride, k_padded);
  team.barrier();
  return {static_cast<const char*>(op.x_scratch), stride};
}

// Whether a product with a low-bit matrix is one with a dense matrix of BF16, panel by panel.
bool widens(const MatmulOp& op, int rows, int k, const StepInfo& step, const Team& team) {
  return rows >= widen_from(op.low) && !step.deterministic && op.low.rounding == ROUND_NONE &&
         op.head.dtype == BF16 && size_t{2} * k * PANEL * TILE_PANELS <= team.scratch_bytes;
}

}  // namespace

const KernelSet& current_kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::Scalar: return scalar_kernels();
    case Isa::Avx2: return avx2_kernels();
    case Isa::Avx512:
    case Isa::Avx512Vnni: return avx512_kernels();
    default: return avx512bf16_kernels();
  }
#else
  return scalar_kernels();
#endif
}

void run_matmul(const void* op_, const StepInfo& step, const Team& team) {
  const auto& op = *static_cast<const MatmulOp*>(op_);
  const int rows = op.count ? step.num_logits : step.rows;
  if (rows <= 0) return;
  const KernelSet& kernels = current_kernels();
  const bool bf16_weights = op.head.dtype == BF16;
  const bool bf16_x = bf16_weights && kernels.bf16_x;
  const int k = bf16_weights ? divide_up(op.k, K_ALIGN) * K_ALIGN : op.k;
  const bool low = op.low.kind != LOW_NONE;
  if (low && !widens(op, rows, k, step, team)) return run_low_matmul(op, rows, team);
  const Input x = prepare_input(op, kernels, rows, k, bf16_x, team);
  const int64_t row_bytes = x.stride * (bf16_x ? 2 : 4);

  TileFn tile = bf16_weights ? kernels.tile_bf16 : kernels.tile_f32;
#if defined(__x86_64__)
  const bool amx =
      bf16_x && rows >= AMX_ROWS && current_isa() == Isa::Amx && !step.deterministic;
  if (amx) tile = amx_tile_bf16;
#endif

  // A unit is what one thread must have whole: a panel, or a gate panel and its up panel.
  const int unit = op.activation == ACT_NONE ? 1 : 2;
  const int units = op.num_panels / unit;
  const int blocks = divide_up(rows, TILE_ROWS);
  const int across = row_parts(team.size, blocks, units), down = team.size / across;
  if (team.tid >= across * down) return;
  const Range my_rows = share(rows, team.tid / down, across);
  const Range my_units = share(units, team.tid % down, down);
  const Range my_panels{my_units.first * unit, my_units.last * unit};

  const int64_t panel_stride = int64_t{k} * PANEL;
  const int64_t panel_bytes = panel_stride * (bf16_weights ? 2 : 4);
  // Widened weights are the dearer ones to have again: then all rows meet them.
  const int chunk = low ? my_rows.last - my_rows.first : chunk_rows(row_bytes, TILE_ROWS);
  alignas(64) float acc[TILE_ROWS * ACC_STRIDE];
  for (int row0 = my_rows.first; row0 < my_rows.last; row0 += chunk) {
    const int chunk_rows = std::min(chunk, my_rows.last - row0);
    const int chunk_blocks = divide_up(chunk_rows, TILE_ROWS);
    for (int panel = my_panels.first; panel < my_panels.last; panel += TILE_PANELS) {
      const int panels = std::min(TILE_PANELS, my_panels.last - panel);
      if (low) widen_panels(op, panel, panels, k, team.scratch);
      const char* weights = low ? static_cast<const char*>(team.scratch)
                                : static_cast<const char*>(op.panels) + panel * panel_bytes;
      for (int b = 0; b < chunk_blocks; ++b) {
        const Range block = share(chunk_rows, b, chunk_blocks);
        const int first = row0 + block.first, count = block.last - block.first;
        tile(x.data + first * row_bytes, x.stride, count, weights, panel_stride, panels, k, acc);
        kernels.finish(op, first, count, panel, panels, acc, nullptr);
      }
    }
  }
#if defined(__x86_64__)
  if (amx) amx_release();
#endif
}

void run_embed(const void* op, const StepInfo& step, const Team& team) {
  const Range mine = share(step.rows, team.tid, team.size);
  const auto& embed = *static_cast<const EmbedOp*>(op);
  if (embed.low.kind != LOW_NONE) return embed_low(embed, mine.first, mine.last);
  current_kernels().embed(embed, mine.first, mine.last);
}

void run_norm(const void* op, const StepInfo& step, const Team& team) {
  const Range mine = share(step.rows, team.tid, team.size);
  current_kernels().norm(*static_cast<const NormOp*>(op), mine.first, mine.last);
}

}  // namespace skimp
