// The products of latent attention that are of one head each: queries to the latent, and what was
// mixed there to values.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "latent.h"
#include "share.h"

namespace skimp {
namespace {

constexpr int kMostRows = 256;  // of one product: prepared, they stay in a second-level cache

int64_t element(int32_t dtype) { return dtype == BF16 ? 2 : 4; }

// Adjacent absorbed rows, in chunks of at most `most`; kept from op to op.
const std::vector<Range>& absorbed_chunks(const HeadProductsOp& op, const StepInfo& step,
                                          int most) {
  thread_local std::vector<Range> chunks;
  chunks.clear();
  for (int row = 0; row < step.rows;) {
    const LatentRun run = latent_run(op.sizes, step, op.meta, row);
    row = run.end;
    if (run.expanded) continue;
    for (int first = run.first; first < run.end;) {
      Range* last = chunks.empty() ? nullptr : &chunks.back();
      if (!last || last->last != first || last->last - last->first == most) {
        chunks.push_back({first, first});
        last = &chunks.back();
      }
      last->last = std::min(run.end, last->first + most);
      first = last->last;
    }
  }
  return chunks;
}

}  // namespace

// Units are (head, part of its panels, chunk of rows). Each is one thread's own, so that nothing
// waits between products that are short while generating.
void run_head_products(const void* op_, const StepInfo& step, const Team& team) {
  const auto& op = *static_cast<const HeadProductsOp*>(op_);
  const MatmulOp& one = *op.product;
  const int64_t room = static_cast<int64_t>(team.scratch_bytes) / (5 * int64_t{one.k} + 512);
  const int most = static_cast<int>(std::clamp<int64_t>(room, 1, kMostRows));
  const std::vector<Range>& chunks = absorbed_chunks(op, step, most);
  if (chunks.empty()) return;
  const int count = static_cast<int>(chunks.size());
  const int parts = std::clamp(divide_up(team.size, op.num_heads * count), 1, one.num_panels);
  const bool bf16 = one.head.dtype == BF16;
  const int64_t k = bf16 ? divide_up(one.k, K_ALIGN) * K_ALIGN : one.k;
  const int64_t panel_bytes = k * PANEL * element(one.head.dtype);
  Team alone = team;
  alone.tid = 0;
  alone.size = 1;
  alone.barrier_fn = [](void*) {};
  const Range mine = share(op.num_heads * parts * count, team.tid, team.size);
  for (int unit = mine.first; unit < mine.last; ++unit) {
    const Range& rows = chunks[unit % count];
    const int head = unit / count / parts;
    const Range panels = share(one.num_panels, unit / count % parts, parts);
    MatmulOp product = one;
    product.x = static_cast<const char*>(one.x) +
                (rows.first * one.x_stride + head * op.x_step) * element(one.x_dtype);
    product.panels = static_cast<const char*>(one.panels) +
                     (int64_t{head} * one.num_panels + panels.first) * panel_bytes;
    product.out = static_cast<char*>(one.out) +
                  (rows.first * one.out_stride + head * op.out_step + panels.first * PANEL) *
                      element(one.out_dtype);
    product.num_panels = panels.last - panels.first;
    product.n = std::min(one.n - panels.first * PANEL, product.num_panels * PANEL);
    product.x_scratch = team.scratch;
    StepInfo own = step;
    own.rows = rows.last - rows.first;
    run_matmul(&product, own, alone);
  }
}

}  // namespace skimp
