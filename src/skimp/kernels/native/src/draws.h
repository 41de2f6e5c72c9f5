// Laws of tokens in float64, of rows of any width, and draws from them. Sums are of blocks of 64
// weights, each added up in eight lanes, one block after another: on every CPU the same bits.
#pragma once
#include <cstdint>

namespace skimp {

// weights[row][i] = exp((logits[row][i] - tops[row]) * scales[row]): 1 where the logit is the top,
// 0 where it is -inf. Logits' rows lie `stride` elements apart, those of weights `width`.
void temper(const float* logits, int64_t stride, const float* tops, const double* scales,
            int64_t rows, int64_t width, double* weights);

// The functions below read row i at weights[i] and laws[i]. Numbers are in [0, 1).

void pick_weights(const double* const* weights, const int64_t* ids, int64_t rows, double* found);

void sum_weights(const double* const* weights, int64_t rows, int64_t width, double* sums);

// The first token whose cumulative weight exceeds number * sum; never one of weight 0. Of a row that
// is no law, some token.
void draw_tokens(const double* const* weights, const double* numbers, int64_t rows, int64_t width,
                 int64_t* tokens);

// Of (scale * weight - law)+.
void sum_left(const double* const* weights, const double* const* laws, const double* scales,
              int64_t rows, int64_t width, double* sums);

// As draw_tokens, from the same; from the weights where nothing is left.
void draw_left(const double* const* weights, const double* const* laws, const double* scales,
               const double* numbers, int64_t rows, int64_t width, int64_t* tokens);

}  // namespace skimp
