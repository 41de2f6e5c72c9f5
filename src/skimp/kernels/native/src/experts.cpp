// Mixtures of experts: routing, grouping of rows by expert, and each expert's products over its
// rows. Like kernels/experts.py, and in the same order of sums for any number of rows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "op.h"
#include "share.h"

namespace skimp {
namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The first of the largest.
int largest(const float* values, int count) {
  return static_cast<int>(std::max_element(values, values + count) - values);
}

// Closes the experts outside the best groups; ``best`` has room for a number a group.
void limit_groups(const ExpertsOp& op, float* ranks, float* best) {
  const int size = op.num_experts / op.groups;
  for (int g = 0; g < op.groups; ++g) {
    const float* own = ranks + g * size;
    const int first = largest(own, size);
    best[g] = own[first];
    if (!op.top2) continue;
    float second = LOWEST;
    for (int i = 0; i < size; ++i)
      if (i != first) second = std::max(second, own[i]);
    best[g] += second;
  }
  // The chosen are marked by what no score is.
  for (int i = 0; i < op.groups_chosen; ++i) best[largest(best, op.groups)] = LOWEST;
  for (int g = 0; g < op.groups; ++g)
    if (best[g] != LOWEST) std::fill_n(ranks + g * size, size, LOWEST);
}

// A row's experts, in ascending order, and their weights. ``work`` has room for two numbers an
// expert and one a group.
void route(const ExpertsOp& op, int row, float* work) {
  const int count = op.num_experts;
  const float* logits = op.logits + row * op.logits_stride;
  float *scores = work, *ranks = work + count;
  if (op.sigmoid) {
    for (int e = 0; e < count; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
  } else {
    const float most = *std::max_element(logits, logits + count);
    float total = 0.0f;
    for (int e = 0; e < count; ++e) total += scores[e] = std::exp(logits[e] - most);
    for (int e = 0; e < count; ++e) scores[e] /= total;
  }
  for (int e = 0; e < count; ++e) {
    const float rank = op.correction ? scores[e] + op.correction[e] : scores[e];
    // A row that is not a number has to name experts all the same.
    ranks[e] = std::isnan(rank) ? std::numeric_limits<float>::max() : rank;
  }
  if (op.groups_chosen < op.groups) limit_groups(op, ranks, ranks + count);
  int32_t* chosen = op.chosen + int64_t{row} * op.per_token;
  float* weights = op.weights + int64_t{row} * op.per_token;
  for (int j = 0; j < op.per_token; ++j) {
    chosen[j] = largest(ranks, count);
    ranks[chosen[j]] = LOWEST;
  }
  std::sort(chosen, chosen + op.per_token);
  float total = op.normalize_eps;
  for (int j = 0; j < op.per_token; ++j) total += weights[j] = scores[chosen[j]];
  for (int j = 0; j < op.per_token; ++j)
    weights[j] = (op.normalize ? weights[j] / total : weights[j]) * op.scale;
}

// Where each expert's pairs begin, whose rows they are, and where each pair lies.
void group(const ExpertsOp& op, int rows) {
  const int pairs = rows * op.per_token;
  std::fill_n(op.starts, op.num_experts + 1, 0);
  for (int p = 0; p < pairs; ++p) ++op.starts[op.chosen[p] + 1];
  for (int e = 0; e < op.num_experts; ++e) op.starts[e + 1] += op.starts[e];
  for (int p = 0; p < pairs; ++p) {
    const int place = op.starts[op.chosen[p]]++;
    op.sources[place] = p / op.per_token;
    op.places[p] = place;
  }
  for (int e = op.num_experts; e > 0; --e) op.starts[e] = op.starts[e - 1];
  op.starts[0] = 0;
}

int64_t row_bytes(int64_t stride, int32_t dtype) { return stride * (dtype == BF16 ? 2 : 4); }

void products(const ExpertsOp& op, const MatmulOp* const* matrices, bool first,
              const StepInfo& step, const Team& team) {
  for (int e = 0; e < op.num_experts; ++e) {
    StepInfo own = step;
    own.rows = op.starts[e + 1] - op.starts[e];
    if (!own.rows) continue;
    MatmulOp product = *matrices[e];
    if (first)
      product.row_index = op.sources + op.starts[e];
    else
      product.x = static_cast<const char*>(product.x) +
                  op.starts[e] * row_bytes(product.x_stride, product.x_dtype);
    product.out = static_cast<char*>(product.out) +
                  op.starts[e] * row_bytes(product.out_stride, product.out_dtype);
    run_matmul(&product, own, team);
    team.barrier();  // the next one prepares its rows in the same scratch
  }
}

}  // namespace

void run_experts(const void* op_, const StepInfo& step, const Team& team) {
  const auto& op = *static_cast<const ExpertsOp*>(op_);
  if (step.rows <= 0) return;
  const Range mine = share(step.rows, team.tid, team.size);
  for (int row = mine.first; row < mine.last; ++row)
    route(op, row, static_cast<float*>(team.scratch));
  team.barrier();
  if (team.tid == 0) group(op, step.rows);
  team.barrier();
  products(op, op.gate_up, true, step, team);
  products(op, op.down, false, step, team);
  for (int row = mine.first; row < mine.last; ++row) {
    float* out = op.out + row * op.out_stride;
    std::fill_n(out, op.dim, 0.0f);
    for (int j = 0; j < op.per_token; ++j) {
      const int64_t pair = int64_t{row} * op.per_token + j;
      const float* y = op.y + op.places[pair] * op.y_stride;
      const float weight = op.weights[pair];
      for (int i = 0; i < op.dim; ++i) out[i] += weight * y[i];
    }
  }
}

void run_add(const void* op_, const StepInfo& step, const Team& team) {
  const auto& op = *static_cast<const AddOp*>(op_);
  const Range mine = share(step.rows, team.tid, team.size);
  for (int row = mine.first; row < mine.last; ++row) {
    float* x = op.x + row * op.x_stride;
    const float* y = op.y + row * op.y_stride;
    for (int i = 0; i < op.dim; ++i) x[i] += op.scale * y[i];
  }
}

}  // namespace skimp
