// Which rows of a step attend in which form of latent attention (op.h). Only for files compiled for
// any CPU.
#pragma once
#include <algorithm>
#include <cstdint>

#include "op.h"

namespace skimp {

// A sequence's rows of a step.
struct LatentRun {
  int first, end;
  bool expanded;
};

// A head's nope_dim + value_dim numbers are made of each latent seen if expanded; absorbed, as many
// products are made with each row, which then meets two latents' numbers in place of those. The
// forms differ in their last bits: where neighbours must not matter, no row is expanded.
inline bool expands(const LatentSizes& sizes, const StepInfo& step, int64_t rows, int64_t seen) {
  if (!sizes.expand_rows || rows < sizes.expand_rows || step.deterministic) return false;
  const int64_t made = sizes.nope_dim + sizes.value_dim;
  const int64_t pairs = rows * std::max<int64_t>(seen - rows / 2, 0);
  return pairs * (2 * sizes.latent_dim - made) > (seen - rows) * made * sizes.latent_dim;
}

inline LatentRun latent_run(const LatentSizes& sizes, const StepInfo& step, const RowMeta& meta,
                            int first) {
  int end = first, seen = 0;
  for (; end < step.rows && meta.row_seq[end] == meta.row_seq[first]; ++end)
    seen = std::max(seen, meta.kv_end[end]);
  return {first, end, expands(sizes, step, end - first, seen)};
}

}  // namespace skimp
