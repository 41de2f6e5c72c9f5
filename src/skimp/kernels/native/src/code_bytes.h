// Eight-bit codes to bf16 by table lookup, for CPUs with AVX512-VBMI. Include inside such a target.
#pragma once
#include <cstdint>

namespace skimp {
namespace {

// The two bytes of the bf16 number that each magnitude of a code stands for.
struct CodeBytes {
  alignas(64) uint8_t low[128], high[128];

  constexpr void set(int code, int bits) {
    low[code] = static_cast<uint8_t>(bits);
    high[code] = static_cast<uint8_t>(bits >> 8);
  }

  // mantissa * 2^power, the mantissa of less than 8 bits and not 0.
  constexpr void set(int code, int mantissa, int power) {
    while (mantissa < 128) mantissa *= 2, --power;
    set(code, (power + 7 + 127) << 7 | (mantissa & 127));
  }
};

constexpr CodeBytes int8_bytes() {
  CodeBytes table{};
  for (int i = 1; i < 128; ++i) table.set(i, i, 0);
  return table;
}

// 480 in place of NaN, unless `nan`: what no code was written to yet may hold anything, and is
// multiplied by nought.
constexpr CodeBytes e4m3_bytes(bool nan) {
  CodeBytes table{};
  for (int i = 1; i < 128; ++i)
    table.set(i, i < 8 ? i : 8 | (i & 7), (i < 8 ? 1 : i >> 3) - 10);
  if (nan) table.set(127, 0x7fc0);
  return table;
}

inline __attribute__((always_inline)) __m512i look_up(const uint8_t* table, __m512i index) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), index,
                                  _mm512_load_si512(table + 64));
}

// What byte of bf16 lies higher: that of the magnitude, with the code's own highest bit as sign.
inline __attribute__((always_inline)) __m512i look_up_high(const CodeBytes& table, __m512i index,
                                                           __m512i code) {
  return _mm512_ternarylogic_epi32(look_up(table.high, index), code, _mm512_set1_epi8(-128), 0xf8);
}

}  // namespace
}  // namespace skimp
