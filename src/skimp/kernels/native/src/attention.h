// What the attention driver (attention.cpp) asks of an instruction set (attention_*.cpp).
//
// Keys are cut at absolute positions into *spans*. Inside a span a row's softmax is computed in
// one go; spans are merged in ascending order. A row's arithmetic depends on its own range of
// keys only, never on its neighbours, its tile or its thread, so batching and chunking cannot
// change a result.
#pragma once
#include "cache_pages.h"
#include "op.h"

namespace skimp {

constexpr int kSpan = 512;                // keys whose softmax is computed together
constexpr int kGroup = 32;                // keys multiplied at a time
constexpr int kPanel = kBlock;             // keys side by side in a panel
constexpr int kTile = 16;                 // rows that pass through the kernels together
constexpr int kScoreStride = kSpan + 16;  // floats; padded so that rows do not share cache sets
constexpr int kProbStride = kSpan + 32;   // the same for bf16 probabilities

// Scores become exponents of two: exponent = score * factor, after softcap where there is one.
struct SoftmaxScale {
  float factor;
  float tanh_factor;  // 0: no softcap; else tanh(score * scale / cap) needs exp2(score * this)
};

// What the codes of keys and values [0, kSpan) of a span are multiples of; null: they are numbers.
struct SpanScales {
  const float *keys, *values;
};

// Operand forms, for operands of 4 bytes (float32) or 2 (bf16); `padded` is head_dim rounded up
// to `align`, and padding is zero. But for the padding they are the cache's own forms (op.h):
//   query  [padded]
//   key    panels of 16 keys: float32 [padded][16], bf16 [padded / 2][16][2]
//   value  float32 [key][padded], bf16 [key / 2][padded][2]
//   probabilities: float32 in place of the scores, bf16 [kTile][kProbStride]
struct AttentionKernels {
  int operand_bytes;
  int align;
  void (*begin)(int rows);  // before and after a run of score/weigh with at most `rows` rows
  void (*end)();
  void (*pack_query)(const float* q, float sign, int dim, int padded, void* dst);
  // A block of 16 keys or values from the cache. Values outside [lo, hi) become zero.
  void (*read_keys)(const void* block, DType dtype, int dim, int padded, void* dst);
  void (*read_values)(const void* block, DType dtype, int dim, int padded, int lo, int hi,
                      void* dst);
  // For latents: the values that are the first `dim` dimensions of a panel of 16 keys, `dim` a
  // multiple of `align`; those outside [lo, hi) become zero.
  void (*turn)(const void* panel, int dim, int lo, int hi, void* dst);
  // Panel lines of `count` dimensions, the first of them even, of 16 keys: scores[dimension][16].
  void (*pack_made)(const float* scores, int count, void* lines);
  // As read_keys and read_values for blocks of codes: every one, in units of its vector's scale.
  void (*decode_keys)(const uint8_t* block, int format, int dim, int padded, void* dst);
  void (*decode_values)(const uint8_t* block, int format, int dim, int padded, void* dst);
  // scores[r][16 * i ..] of consecutive panels
  void (*score)(const void* q, int rows, int padded, const void* panels, int num_panels,
                float* scores);
  // One row: keys [lo, hi) of the span are visible, probabilities are written for [g0, g1).
  // Returns the largest exponent and the sum of probabilities. Scores of codes are multiplied by
  // the scales of their keys before, and probabilities by those of their values when summed.
  void (*softmax)(float* scores, void* probs, int lo, int hi, int g0, int g1,
                  const SoftmaxScale& scale, const SpanScales& codes, float* max, float* sum);
  // out[r][padded] (+)= probabilities [key0, key0 + num_keys) times values from key0 on
  void (*weigh)(const float* scores, const void* probs, int rows, int padded, const void* values,
                int key0, int num_keys, bool accumulate, float* out);
  // Adds a span's part (out, max, sum) of one row to the running one.
  void (*merge)(const float* part, float part_max, float part_sum, int padded, float* acc,
                float* max, float* sum);
};

const AttentionKernels& attention_scalar();
#if defined(__x86_64__)
const AttentionKernels& attention_avx2();
const AttentionKernels& attention_avx512();      // f, bw, dq, vl
const AttentionKernels& attention_avx512bf16();  // bf16 operands
const AttentionKernels& attention_amx();         // bf16 operands

// AttentionKernels::decode_keys and decode_values to bf16 operands, with AVX512-VBMI.
void decode_keys_vbmi(const uint8_t* block, int format, int dim, int padded, void* dst);
void decode_values_vbmi(const uint8_t* block, int format, int dim, int padded, void* dst);
#endif

}  // namespace skimp
