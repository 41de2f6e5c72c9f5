// Blocks of codes (op.h) to float32 operands; plain loops, which compilers vectorize. Included
// inside a target, see attention_f32.h.
#pragma once
#include <cstdint>
#include <cstring>

#include "attention.h"

namespace skimp {
namespace {

// A byte that is no number of ours (there may be any in slots that were never written) becomes a
// finite one all the same, so unseen values need no mask.
inline void decode_bytes(const uint8_t* __restrict codes, int format, int count,
                         float* __restrict out) {
  if (format == CACHE_INT8) {
    for (int i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<int8_t>(codes[i]));
    return;
  }
  for (int i = 0; i < count; ++i) {
    const int32_t magnitude = codes[i] & 0x7f, sign = (codes[i] & 0x80) << 24;
    const int32_t normal = (magnitude << 20) + (120 << 23);
    const int32_t small = __builtin_bit_cast(int32_t, static_cast<float>(magnitude) * 0x1p-9f);
    const int32_t is_small = -(magnitude < 8);  // a choice would be a branch, and no vector
    const int32_t bits = (small & is_small) | (normal & ~is_small) | sign;
    out[i] = __builtin_bit_cast(float, bits);
  }
}

inline void decode_nibbles(const uint8_t* __restrict codes, int count, float* __restrict low,
                           float* __restrict high) {
  for (int i = 0; i < count; ++i) {
    low[i] = static_cast<float>((codes[i] & 15) - 8);
    high[i] = static_cast<float>((codes[i] >> 4) - 8);
  }
}

inline void decode_keys_f32(const uint8_t* block, int format, int dim, int padded, void* dst) {
  float* out = static_cast<float*>(dst);
  if (format == CACHE_INT4)
    decode_nibbles(block, dim / 2 * kPanel, out, out + dim / 2 * kPanel);
  else
    decode_bytes(block, format, dim * kPanel, out);
  std::memset(out + dim * kPanel, 0, sizeof(float) * (padded - dim) * kPanel);
}

inline void decode_values_f32(const uint8_t* block, int format, int dim, int padded, void* dst) {
  float* out = static_cast<float*>(dst);
  for (int j = 0; j < kPanel; ++j, out += padded) {
    if (format == CACHE_INT4)
      decode_nibbles(block + j * (dim / 2), dim / 2, out, out + dim / 2);
    else
      decode_bytes(block + j * dim, format, dim, out);
    std::memset(out + dim, 0, sizeof(float) * (padded - dim));
  }
}

}  // namespace
}  // namespace skimp
