// Products with low-bit matrices: what an instruction set's kernels offer the driver in lowbit.cpp.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace skimp {

// Input rows, normed and rounded: a row is scale * what data holds.
struct LowRows {
  char* data;
  int64_t stride;  // bytes
  float* scale;    // [rows]
  // [rows][blocks] what the sum over a block begins with, because weights are stored with an
  // offset: minus the block's sum of inputs, times the offset where it is the same everywhere.
  int32_t* sums;
  int64_t blocks;
};

// Inputs [k0, k1) of some panels. Both are multiples of a block, or the end.
struct LowSpan {
  const LowBit* low;
  int panel, num_panels;
  int k0, k1;
  int block;  // inputs from one flush of the sums to float32 to the next; a group may be several
  int blocks_a_group;
};

struct LowKernels {
  int row_item;    // bytes of an input in a prepared row
  int most_block;  // inputs that can be summed before a flush
  // One float32 row (which it may change) to a prepared one, zero up to k_padded.
  void (*store_row)(const LowBit& low, float* row, int k, int k_padded, int block,
                    const LowRows& out, int index);
  // A span of panels to float32 panels [k1 - k0][16]; null: tile takes the panels as they are.
  void (*decode)(const LowSpan& span, const uint8_t* panels, int64_t panel_stride, void* out,
                 int64_t out_stride);
  // acc[row][panel][16] = x W over the span, plus what it was if the span is not the first, for
  // rows from `row` on. Strides are in bytes; weights point at k0 of the first panel.
  void (*tile)(const LowSpan& span, const LowRows& x, int row, int rows, const void* weights,
               int64_t stride, float* acc);
};

// The largest absolute value times this is the step that a rounded row's values are multiples of.
constexpr float INT8_STEPS = 127.5f, FP8_MOST = 448.0f;

#if defined(__x86_64__)
// Integer products (AVX512-VNNI), or null if the matrix is not one for them.
const LowKernels* vnni_low_kernels(const LowBit& low);
// Products of fp8 weights widened to BF16 (AVX512-BF16 and VBMI).
const LowKernels* fp8_low_kernels();
#endif

void run_low_matmul(const MatmulOp& op, int rows, const Team& team);
// Panels [panel, panel + num_panels) as those of a dense BF16 matrix of k_padded inputs.
void widen_panels(const MatmulOp& op, int panel, int num_panels, int k_padded, void* out);
void embed_low(const EmbedOp& op, int first, int last);

}  // namespace skimp
