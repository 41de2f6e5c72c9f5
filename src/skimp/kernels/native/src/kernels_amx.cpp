// BF16 products on AMX tiles: a panel's 16 pairs of k are a B tile as they lie.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "target.h"

SKIMP_TARGET("amx-tile,amx-bf16,avx512f")

namespace skimp {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 are sums, 4-5 inputs (two blocks of up to 16 rows), 6-7 weights.
thread_local int configured_rows = 0;

void configure(int rows) {
  if (rows == configured_rows) return;
  configured_rows = rows;
  const int top = rows < 16 ? rows : 16, bottom = rows > 16 ? rows - 16 : 1;
  const int counts[8] = {top, top, bottom, bottom, top, bottom, 16, 16};
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(counts[i]);
  }
  _tile_loadconfig(&config);
}

constexpr int B_TILE = K_ALIGN * PANEL;  // elements
constexpr int AHEAD = 2;                 // tiles ahead at which weights are prefetched

void prefetch_tile(const uint16_t* tile) {
#pragma GCC unroll 16
  for (int line = 0; line < 16; ++line)
    _mm_prefetch(reinterpret_cast<const char*>(tile + line * 32), _MM_HINT_T0);
}

template <bool TWO_ROWS, bool TWO_PANELS>
void block(const uint16_t* x, int64_t stride, const uint16_t* w, int64_t panel_stride, int k,
           float* acc) {
  constexpr int64_t ACC_BYTES = ACC_STRIDE * 4;
  const int64_t bytes = stride * 2;
  _tile_zero(0);
  if constexpr (TWO_PANELS) _tile_zero(1);
  if constexpr (TWO_ROWS) _tile_zero(2);
  if constexpr (TWO_ROWS && TWO_PANELS) _tile_zero(3);
  for (int i = 0; i < k; i += K_ALIGN) {
    const uint16_t* b = w + int64_t{i} * PANEL;
    // Near its end a panel's stream goes on in the next pair of panels.
    const uint16_t* next = b + AHEAD * B_TILE;
    if (i + AHEAD * K_ALIGN >= k) next += TWO_PANELS ? panel_stride : 0;
    prefetch_tile(next);
    if constexpr (TWO_PANELS) prefetch_tile(next + panel_stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(4, x + i, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TWO_PANELS) {
      _tile_loadd(7, b + panel_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (TWO_ROWS) {
      _tile_loadd(5, x + 16 * stride + i, bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (TWO_PANELS) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, acc, ACC_BYTES);
  if constexpr (TWO_PANELS) _tile_stored(1, acc + PANEL, ACC_BYTES);
  if constexpr (TWO_ROWS) _tile_stored(2, acc + 16 * ACC_STRIDE, ACC_BYTES);
  if constexpr (TWO_ROWS && TWO_PANELS) _tile_stored(3, acc + 16 * ACC_STRIDE + PANEL, ACC_BYTES);
}

}  // namespace

void amx_tile_bf16(const void* x_, int64_t x_stride, int rows, const void* panels,
                   int64_t panel_stride, int num_panels, int k, float* acc) {
  configure(rows);
  const auto* x = static_cast<const uint16_t*>(x_);
  const auto* w = static_cast<const uint16_t*>(panels);
  for (int p = 0; p < num_panels; p += 2) {
    const bool two = p + 1 < num_panels;
    const auto fn = rows > 16 ? (two ? block<true, true> : block<true, false>)
                              : (two ? block<false, true> : block<false, false>);
    fn(x, x_stride, w + p * panel_stride, panel_stride, k, acc + p * PANEL);
  }
}

void amx_release() {
  if (configured_rows == 0) return;
  configured_rows = 0;
  _tile_release();
}

}  // namespace skimp

SKIMP_TARGET_END
#endif
