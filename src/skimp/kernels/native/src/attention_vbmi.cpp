// Blocks of codes to bf16 operands by table lookup: attention_codes_bf16.h in fewer instructions,
// for CPUs with AVX512-VBMI.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "target.h"

SKIMP_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma")
#include "attention_avx512.h"
#include "attention_codes_bf16.h"
#include "code_bytes.h"

namespace skimp {
namespace {

constexpr CodeBytes INT8_TABLE = int8_bytes(), FP8_TABLE = e4m3_bytes(false);

// Four rows of sixteen bytes, so that unpacking two vectors of theirs gives two lines: pairs of
// rows a and b, and of c and d.
struct Order {
  alignas(64) uint8_t from[64];
};

constexpr Order order(int a, int b, int c, int d) {
  const int rows[4] = {a, b, c, d};
  Order order{};
  for (int i = 0; i < 64; ++i)
    order.from[i] =
        static_cast<uint8_t>(16 * rows[i % 16 / 8 * 2 + i % 2] + i / 16 * 4 + i % 8 / 2);
  return order;
}

constexpr Order KEY_ROWS = order(0, 1, 2, 3);    // four dimensions of 16 keys
constexpr Order VALUE_ROWS = order(0, 2, 1, 3);  // 32 dimensions of two values

inline __m512i arranged(const Order& order, __m512i x) {
  return _mm512_permutexvar_epi8(_mm512_load_si512(order.from), x);
}

struct Lines {
  __m512i first, second;
};

inline Lines unpack(__m512i low, __m512i high) {
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

template <int FORMAT>
inline Lines look_up(__m512i x) {
  const CodeBytes& table = FORMAT == CACHE_INT8 ? INT8_TABLE : FP8_TABLE;
  const __m512i index = FORMAT == CACHE_INT8 ? _mm512_abs_epi8(x) : x;  // its sign is not read
  return unpack(look_up(table.low, index), look_up_high(table, index, x));
}

// Nibbles, in the low halves of bytes.
inline Lines look_up_four(__m512i x) {
  const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(
      0x00, -0x20, -0x40, -0x60, -0x80, 0x40, 0x00, -0x80, 0x00, -0x80, 0x00, 0x40, -0x80, -0x60,
      -0x40, -0x20));
  const __m512i high = _mm512_broadcast_i32x4(_mm_setr_epi8(
      -0x3f, -0x40, -0x40, -0x40, -0x40, -0x40, -0x40, -0x41, 0x00, 0x3f, 0x40, 0x40, 0x40, 0x40,
      0x40, 0x40));
  return unpack(_mm512_shuffle_epi8(low, x), _mm512_shuffle_epi8(high, x));
}

struct Halves {
  Lines low, high;
};

inline Halves look_up_nibbles(__m512i x) {
  const __m512i mask = _mm512_set1_epi8(15);
  return {look_up_four(_mm512_and_si512(x, mask)),
          look_up_four(_mm512_and_si512(_mm512_srli_epi16(x, 4), mask))};
}

inline void put(char* out, const Lines& lines) {
  _mm512_storeu_si512(out, lines.first);
  _mm512_storeu_si512(out + 64, lines.second);
}

template <int FORMAT>
inline void decode_keys_as(const uint8_t* in, int dim, int padded, char* out) {
  for (int d = 0; d < padded; d += 4) {
    const __m512i x = _mm512_maskz_loadu_epi8(first_bytes(kPanel * (dim - d)), in + kPanel * d);
    put(out + 32 * d, look_up<FORMAT>(arranged(KEY_ROWS, x)));
  }
}

// Two values' bytes [d, d + 32), of `count`.
inline __m512i two_values(const uint8_t* in, int count, int d) {
  const __mmask32 mask = static_cast<__mmask32>(first_bytes(count - d < 32 ? count - d : 32));
  const __m256i a = _mm256_maskz_loadu_epi8(mask, in + d);
  const __m256i b = _mm256_maskz_loadu_epi8(mask, in + count + d);
  return arranged(VALUE_ROWS, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

template <int FORMAT>
inline void decode_values_as(const uint8_t* in, int dim, int padded, char* out) {
  for (int j = 0; j < kPanel; j += 2, in += 2 * dim, out += 4 * padded)
    for (int d = 0; d < padded; d += 32) put(out + 4 * d, look_up<FORMAT>(two_values(in, dim, d)));
}

inline void put_part(char* out, const Lines& lines, int count) {
  _mm512_mask_storeu_epi32(out, first_lanes(count), lines.first);
  _mm512_mask_storeu_epi32(out + 64, first_lanes(count - 16), lines.second);
}

}  // namespace

void decode_keys_vbmi(const uint8_t* in, int format, int dim, int padded, void* dst) {
  char* out = static_cast<char*>(dst);
  if (format == CACHE_INT8) return decode_keys_as<CACHE_INT8>(in, dim, padded, out);
  if (format == CACHE_FP8) return decode_keys_as<CACHE_FP8>(in, dim, padded, out);
  const int half = dim / 2;
  if (half % 4) return decode_keys_bf16(in, format, dim, padded, dst);
  for (int i = 0; i < half; i += 4) {
    const Halves lines =
        look_up_nibbles(arranged(KEY_ROWS, _mm512_loadu_si512(in + kPanel * i)));
    put(out + 32 * i, lines.low);
    put(out + 32 * (half + i), lines.high);
  }
  std::memset(out + 32 * dim, 0, 32 * (padded - dim));
}

void decode_values_vbmi(const uint8_t* in, int format, int dim, int padded, void* dst) {
  char* out = static_cast<char*>(dst);
  if (format == CACHE_INT8) return decode_values_as<CACHE_INT8>(in, dim, padded, out);
  if (format == CACHE_FP8) return decode_values_as<CACHE_FP8>(in, dim, padded, out);
  const int half = dim / 2;
  for (int j = 0; j < kPanel; j += 2, in += dim, out += 4 * padded) {
    for (int d = 0; d < half; d += 32) {
      const Halves lines = look_up_nibbles(two_values(in, half, d));
      put_part(out + 4 * d, lines.low, half - d);
      put_part(out + 4 * (half + d), lines.high, half - d);
    }
    std::memset(out + 4 * dim, 0, 4 * (padded - dim));
  }
}

}  // namespace skimp
SKIMP_TARGET_END
#endif
