// The driver of products with low-bit matrices: prepares the input rows, divides the work, has
// each panel multiplied as it is or, without the instructions for that, widened to float32 first.
//
// Any number of rows sums the same blocks in the same order, so a row's result does not depend on
// the other rows. With many rows, matmul.cpp may rather widen panels to BF16 and treat them as
// dense, unless results must not depend on how many there are.
#include "lowbit.h"

#include <algorithm>
#include <cstring>

#include "share.h"

namespace skimp {
namespace {

constexpr int PRIVATE_ROWS = 4;  // prepared by every thread for itself, as in matmul.cpp
// Rows that share widened weights, and inputs widened together.
constexpr int WIDE_ROWS = 256, WIDE_K = 256;

int64_t low_bytes(int kind, int64_t k) { return k * PANEL / (kind == LOW_INT4 ? 2 : 1); }

// ---- float32, for any instruction set ----------------------------------------------------------

void store_f32(const LowBit& low, float* row, int k, int k_padded, int, const LowRows& out,
               int index) {
  out.scale[index] =
      low.rounding == ROUND_NONE ? 1.0f : current_kernels().round_row(row, k, low.rounding);
  char* to = out.data + index * out.stride;
  std::memcpy(to, row, k * sizeof(float));
  std::memset(to + k * sizeof(float), 0, (k_padded - k) * sizeof(float));
}

void decode_f32(const LowSpan& span, const uint8_t* panels, int64_t panel_stride, void* out,
                int64_t out_stride) {
  current_kernels().decode_f32(span, panels, panel_stride, out, out_stride);
}

void tile_f32(const LowSpan& span, const LowRows& x, int row, int rows, const void* weights,
              int64_t stride, float* acc) {
  alignas(64) float part[TILE_ROWS * ACC_STRIDE];
  for (int first = 0; first < rows; first += TILE_ROWS) {
    const int count = std::min(rows - first, TILE_ROWS);
    current_kernels().tile_f32(x.data + (row + first) * x.stride + span.k0 * sizeof(float),
                               x.stride / sizeof(float), count, weights, stride / sizeof(float),
                               span.num_panels, span.k1 - span.k0, part);
    for (int r = 0; r < count; ++r)
      for (int i = 0; i < span.num_panels * PANEL; ++i)
        acc[(first + r) * ACC_STRIDE + i] =
            part[r * ACC_STRIDE + i] + (span.k0 ? acc[(first + r) * ACC_STRIDE + i] : 0.0f);
  }
}

constexpr LowKernels F32_KERNELS{4, 256, store_f32, decode_f32, tile_f32};

const LowKernels& choose(const MatmulOp& op) {
#if defined(__x86_64__)
  const Isa isa = current_isa();
  const bool fp8 = op.low.kind == LOW_FP8;
  if (!fp8 && isa >= Isa::Avx512Vnni)
    if (const LowKernels* kernels = vnni_low_kernels(op.low)) return *kernels;
  // Rounded inputs are exact in BF16, and others are what the model computes in.
  if (fp8 && isa >= Isa::Avx512Bf16 && has_vbmi() &&
      (op.head.dtype == BF16 || op.low.rounding != ROUND_NONE))
    return *fp8_low_kernels();
#endif
  return F32_KERNELS;
}

// ---- the driver --------------------------------------------------------------------------------

class Scratch {
 public:
  Scratch(void* data, int64_t bytes)
      : next_(static_cast<char*>(data)), end_(next_ + bytes) {}
  int64_t left() const { return end_ - next_; }
  template <class T>
  T* take(int64_t bytes) {
    char* at = next_;
    next_ += (bytes + 63) & ~int64_t{63};
    return reinterpret_cast<T*>(at);
  }

 private:
  char *next_, *end_;
};

struct Plan {
  const LowKernels& kernels;
  int k;  // padded
  int block, blocks_a_group, blocks;
};

Plan plan(const MatmulOp& op, const LowKernels& kernels) {
  const int k = divide_up(op.k, LOW_ALIGN) * LOW_ALIGN;
  const int group = std::min(op.low.group, k);
  const int block = std::min(group, kernels.most_block);
  const int a_group = divide_up(group, block);
  const int whole = (k - 1) / group;  // the last group may be short
  return {kernels, k, block, a_group, whole * a_group + divide_up(k - whole * group, block)};
}

LowRows prepare(const MatmulOp& op, const Plan& plan, int rows, const Team& team,
                Scratch& scratch) {
  // An odd number of cache lines, so that the rows of a tile do not share a cache set.
  const int64_t stride = (divide_up(plan.k * plan.kernels.row_item, 64) | 1) * 64;
  const int64_t sums = (4 * plan.blocks + 63) & ~63, scales = (4 * rows + 63) & ~63;
  float* wide = scratch.take<float>(4 * plan.k);
  const bool own = rows <= PRIVATE_ROWS && rows * (stride + sums) + scales <= scratch.left();
  char* base = own ? scratch.take<char>(rows * (stride + sums) + scales)
                   : static_cast<char*>(op.x_scratch);
  const LowRows out{base, stride, reinterpret_cast<float*>(base + rows * (stride + sums)),
                    reinterpret_cast<int32_t*>(base + rows * stride), sums / 4};
  const Range mine = own ? Range{0, rows} : share(rows, team.tid, team.size);
  for (int row = mine.first; row < mine.last; ++row) {
    current_kernels().prepare(op, row, row + 1, false, wide, 0, op.k);
    plan.kernels.store_row(op.low, wide, op.k, plan.k, plan.block, out, row);
  }
  if (!own) team.barrier();
  return out;
}

}  // namespace

void run_low_matmul(const MatmulOp& op, int rows, const Team& team) {
  const Plan p = plan(op, choose(op));
  const LowKernels& kernels = p.kernels;
  Scratch scratch(team.scratch, team.scratch_bytes);
  const int tile_rows = kernels.decode ? WIDE_ROWS : TILE_ROWS;
  auto* acc = scratch.take<float>(sizeof(float) * tile_rows * ACC_STRIDE);
  constexpr int64_t WIDE_STRIDE = WIDE_K * PANEL * sizeof(float);
  auto* wide = kernels.decode ? scratch.take<uint8_t>(TILE_PANELS * WIDE_STRIDE) : nullptr;
  const LowRows x = prepare(op, p, rows, team, scratch);

  // A unit is what one thread must have whole: a panel, or a gate panel and its up panel.
  const int unit = op.activation == ACT_NONE ? 1 : 2;
  const int units = op.num_panels / unit;
  const int across = row_parts(team.size, divide_up(rows, TILE_ROWS), units);
  const int down = team.size / across;
  if (team.tid >= across * down) return;
  const Range my_rows = share(rows, team.tid / down, across);
  const Range my_units = share(units, team.tid % down, down);
  const Range my_panels{my_units.first * unit, my_units.last * unit};

  const int64_t stride = low_bytes(op.low.kind, p.k);
  const auto multiply = [&](int row, int count, int panel, int panels) {
    const auto* w = static_cast<const uint8_t*>(op.panels) + panel * stride;
    for (int k0 = 0; k0 < p.k;) {
      const int k1 = wide ? std::min(k0 + WIDE_K, p.k) : p.k;
      const LowSpan span{&op.low, panel, panels, k0, k1, p.block, p.blocks_a_group};
      const uint8_t* from = w + low_bytes(op.low.kind, k0);
      if (wide) kernels.decode(span, from, stride, wide, WIDE_STRIDE);
      kernels.tile(span, x, row, count, wide ? wide : from, wide ? WIDE_STRIDE : stride, acc);
      k0 = k1;
    }
    current_kernels().finish(op, row, count, panel, panels, acc, x.scale + row);
  };
  const int chunk = chunk_rows(x.stride, tile_rows);
  for (int row0 = my_rows.first; row0 < my_rows.last; row0 += chunk) {
    const int count = std::min(chunk, my_rows.last - row0), tiles = divide_up(count, tile_rows);
    for (int panel = my_panels.first; panel < my_panels.last; panel += TILE_PANELS)
      for (int t = 0; t < tiles; ++t) {
        const Range tile = share(count, t, tiles);
        multiply(row0 + tile.first, tile.last - tile.first, panel,
                 std::min(TILE_PANELS, my_panels.last - panel));
      }
  }
}

void widen_panels(const MatmulOp& op, int panel, int num_panels, int k_padded, void* out) {
  const int k = divide_up(op.k, LOW_ALIGN) * LOW_ALIGN;
  const int64_t stride = low_bytes(op.low.kind, k);
  const int64_t used = int64_t{2} * k * PANEL, out_stride = int64_t{2} * k_padded * PANEL;
  const LowSpan span{&op.low, panel, num_panels, 0, k, 0, 0};
  const auto* from = static_cast<const uint8_t*>(op.panels) + panel * stride;
  current_kernels().decode_bf16(span, from, stride, out, out_stride);
  for (int p = 0; p < num_panels; ++p)
    std::memset(static_cast<char*>(out) + p * out_stride + used, 0, out_stride - used);
}

void embed_low(const EmbedOp& op, int first, int last) {
  const KernelSet& kernels = current_kernels();
  const int k = divide_up(op.dim, LOW_ALIGN) * LOW_ALIGN;
  const int64_t stride = low_bytes(op.low.kind, k);
  // A stretch of the row's panel is decoded, and the row's lane read.
  constexpr int STRETCH = 64;
  alignas(64) float panel[STRETCH * PANEL];
  for (int row = first; row < last; ++row) {
    const int id = op.ids[row];
    float* out = op.out + row * op.out_stride;
    const auto* w = static_cast<const uint8_t*>(op.table) + id / PANEL * stride;
    for (int k0 = 0; k0 < k; k0 += STRETCH) {
      const LowSpan span{&op.low, id / PANEL, 1, k0, std::min(k0 + STRETCH, k), 0, 0};
      kernels.decode_f32(span, w + low_bytes(op.low.kind, k0), 0, panel, 0);
      for (int i = k0; i < std::min(k0 + STRETCH, int(op.dim)); ++i)
        out[i] = panel[(i - k0) * PANEL + id % PANEL] * op.scale;
    }
  }
}

}  // namespace skimp
