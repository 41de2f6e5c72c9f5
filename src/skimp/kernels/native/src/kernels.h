// The instruction-set dependent parts, one table of functions for each set.
#pragma once
#include "cpu.h"
#include "op.h"

namespace skimp {

constexpr int TILE_ROWS = 32;             // most rows of one tile call
constexpr int TILE_PANELS = 4;            // most panels of one tile call
constexpr int ACC_STRIDE = TILE_PANELS * PANEL;

// acc[row][panel][16] = x W for rows <= TILE_ROWS and panels <= TILE_PANELS. Strides and k are in
// elements; k is padded where the panels are.
using TileFn = void (*)(const void* x, int64_t x_stride, int rows, const void* panels,
                        int64_t panel_stride, int num_panels, int k, float* acc);

struct LowSpan;

struct KernelSet {
  Isa isa;
  bool bf16_x;  // BF16 panels are multiplied by BF16 rows rather than by F32 ones
  TileFn tile_f32;
  TileFn tile_bf16;
  // Rows [first, last) of the op's input, normed and converted, to prepared rows at out + row *
  // out_stride elements, zero up to k_padded.
  void (*prepare)(const MatmulOp& op, int first, int last, bool to_bf16, void* out,
                  int64_t out_stride, int k_padded);
  // The epilogue for rows [row, row + rows) and panels [panel, panel + num_panels). Sums are first
  // multiplied by their row's scale, if there are scales [rows].
  void (*finish)(const MatmulOp& op, int row, int rows, int panel, int num_panels,
                 const float* acc, const float* scales);
  void (*norm)(const NormOp& op, int first, int last);
  void (*embed)(const EmbedOp& op, int first, int last);
  // For low-bit matrices (lowbit_f32.h).
  float (*round_row)(float* row, int k, int rounding);
  void (*decode_f32)(const LowSpan& span, const uint8_t* panels, int64_t panel_stride, void* out,
                     int64_t out_stride);
  // Null where BF16 panels are multiplied by F32 rows.
  void (*decode_bf16)(const LowSpan& span, const uint8_t* panels, int64_t panel_stride, void* out,
                      int64_t out_stride);
};

const KernelSet& scalar_kernels();
#if defined(__x86_64__)
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();
const KernelSet& avx512bf16_kernels();
void amx_tile_bf16(const void* x, int64_t x_stride, int rows, const void* panels,
                   int64_t panel_stride, int num_panels, int k, float* acc);
void amx_release();  // after the last tile call of an op, so that idle tile state costs nothing
#endif

const KernelSet& current_kernels();

}  // namespace skimp
