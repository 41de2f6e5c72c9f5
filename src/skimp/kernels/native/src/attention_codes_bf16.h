// Blocks of codes (op.h) to bf16 operands: every code is exact in bf16. Included inside a target
// that has avx512f, bw, dq and vl, after attention_avx512.h.
#pragma once

namespace skimp {
namespace {

inline __mmask16 first_lanes(int n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n > 0 ? n : 0)) - 1);
}

// Sixteen codes to float32, whose low halves are zero.
struct Int8Codes {
  static __m512i widen(__m128i codes) {
    return (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
  }
};

struct Fp8Codes {
  static __m512i widen(__m128i codes) {
    const __m512i x = _mm512_cvtepu8_epi32(codes);
    const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7f));
    const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20),
                                            _mm512_set1_epi32(120 << 23));
    const __m512 step = _mm512_set1_ps(0x1p-9f);
    const __m512i small = (__m512i)_mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), step);
    const __mmask16 is_small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
    const __m512i value = _mm512_mask_mov_epi32(normal, is_small, small);
    const __m512i sign = _mm512_slli_epi32(x, 24);
    // value | sign & 0x80000000
    return _mm512_ternarylogic_epi32(value, sign, _mm512_set1_epi32(INT32_MIN), 0xf8);
  }
};

// Pairs of neighbours: even ones in the low halves of words, odd ones in the high halves.
inline __m512i beside(__m512i even, __m512i odd) {
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

// bf16(n - 8) for the nibbles n, in the high halves.
inline __m512i nibble_table() {
  return (__m512i)_mm512_setr_ps(-8.f, -7.f, -6.f, -5.f, -4.f, -3.f, -2.f, -1.f, 0.f, 1.f, 2.f,
                                 3.f, 4.f, 5.f, 6.f, 7.f);
}

// Rows a and b of sixteen bytes, two codes each, to a line of pairs from the low halves and one
// from the high halves. The lookup reads the lowest four bits alone.
inline void nibble_lines(__m128i a, __m128i b, __m512i* low, __m512i* high) {
  const __m512i odd = nibble_table(), even = _mm512_srli_epi32(odd, 16);
  const __m512i x = _mm512_cvtepu8_epi32(a), y = _mm512_cvtepu8_epi32(b);
  *low = _mm512_or_si512(_mm512_permutexvar_epi32(x, even), _mm512_permutexvar_epi32(y, odd));
  *high = _mm512_or_si512(_mm512_permutexvar_epi32(_mm512_srli_epi32(x, 4), even),
                          _mm512_permutexvar_epi32(_mm512_srli_epi32(y, 4), odd));
}

inline __m128i sixteen(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

template <class Codes>
inline void decode_key_bytes(const uint8_t* in, int dim, char* out) {
  int d = 0;
  for (; d + 2 <= dim; d += 2)
    _mm512_storeu_si512(out + 32 * d, beside(Codes::widen(sixteen(in + kPanel * d)),
                                             Codes::widen(sixteen(in + kPanel * (d + 1)))));
  if (d < dim)
    _mm512_storeu_si512(out + 32 * d, beside(Codes::widen(sixteen(in + kPanel * d)),
                                             _mm512_setzero_si512()));
}

inline void decode_keys_bf16(const uint8_t* in, int format, int dim, int padded, void* dst) {
  char* out = static_cast<char*>(dst);
  if (format == CACHE_INT8) {
    decode_key_bytes<Int8Codes>(in, dim, out);
  } else if (format == CACHE_FP8) {
    decode_key_bytes<Fp8Codes>(in, dim, out);
  } else {
    // Rows of bytes hold dimensions i and half + i; where half is odd, a pair is of two rows' ends.
    const int half = dim / 2;
    char* upper = out + 32 * half;
    int i = 0;
    if (half % 2 == 0) {
      for (; i < half; i += 2) {
        __m512i low, high;
        nibble_lines(sixteen(in + kPanel * i), sixteen(in + kPanel * (i + 1)), &low, &high);
        _mm512_storeu_si512(out + 32 * i, low);
        _mm512_storeu_si512(upper + 32 * i, high);
      }
    } else {
      const auto row = [&](int d) {
        const __m512i x = _mm512_cvtepu8_epi32(sixteen(in + kPanel * (d % half)));
        return _mm512_permutexvar_epi32(d < half ? x : _mm512_srli_epi32(x, 4), nibble_table());
      };
      for (int d = 0; d < dim; d += 2)
        _mm512_storeu_si512(out + 32 * d, beside(row(d), row(d + 1)));
    }
  }
  for (int i = (dim + 1) / 2; i < padded / 2; ++i)
    _mm512_storeu_si512(out + 64 * i, _mm512_setzero_si512());
}

template <class Codes>
inline void decode_value_bytes(const uint8_t* in, int dim, int padded, char* out) {
  for (int j = 0; j < kPanel; j += 2, in += 2 * dim, out += 4 * padded) {
    for (int d = 0; d < padded; d += 16) {
      const __mmask16 mask = first_lanes(dim - d);
      _mm512_storeu_si512(out + 4 * d,
                          beside(Codes::widen(_mm_maskz_loadu_epi8(mask, in + d)),
                                 Codes::widen(_mm_maskz_loadu_epi8(mask, in + dim + d))));
    }
  }
}

inline void decode_values_bf16(const uint8_t* in, int format, int dim, int padded, void* dst) {
  char* out = static_cast<char*>(dst);
  if (format == CACHE_INT8) return decode_value_bytes<Int8Codes>(in, dim, padded, out);
  if (format == CACHE_FP8) return decode_value_bytes<Fp8Codes>(in, dim, padded, out);
  const int half = dim / 2;
  for (int j = 0; j < kPanel; j += 2, in += dim, out += 4 * padded) {
    for (int d = 0; d < half; d += 16) {
      const __mmask16 mask = first_lanes(half - d);
      __m512i low, high;
      nibble_lines(_mm_maskz_loadu_epi8(mask, in + d), _mm_maskz_loadu_epi8(mask, in + half + d),
                   &low, &high);
      _mm512_mask_storeu_epi32(out + 4 * d, mask, low);
      _mm512_mask_storeu_epi32(out + 4 * (half + d), mask, high);
    }
    for (int d = dim; d < padded; d += 16)
      _mm512_mask_storeu_epi32(out + 4 * d, first_lanes(padded - d), _mm512_setzero_si512());
  }
}

}  // namespace
}  // namespace skimp
