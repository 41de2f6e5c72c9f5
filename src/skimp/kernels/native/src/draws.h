// Laws of tokens in float64, of rows of any width, and draws from them. Sums are of blocks of 64
// weights, each added up in eight lanes, one block after another: on every CPU the same bits.
#pragma once
#include <cstdint>

namespace skimp {

// weights[row][i] = exp((logits[row][i] - tops[row]) * scales[row]): 1 where the logit is the top,
// 0 where it is -inf. Logits' rows lie `stride` elements apart, those of weights `width`.
void temper(const float* logits, int64_t stride, const float* tops, const double* scales,
            int64_t rows, int64_t width, double* weights);

// Of each row the largest logit (NaN if it has one) and the lowest index where it is; and, as above,
// the weights of those with a finite top and a scale above 0, one after another.
void find_laws(const float* logits, int64_t stride, const double* scales, int64_t rows,
               int64_t width, double* tops, int64_t* best, double* weights);

// A token for each row, by itself: the best where the scale is 0, else drawn by its number from its
// law, which is left in laws[row], normalised, of law_width. Column i is token words[i] (null: i),
// and all other tokens have no chance. The bits are those of find_laws, draw_tokens and normalise.
void guess_tokens(const float* logits, int64_t stride, const int64_t* words, const double* scales,
                  const double* numbers, int64_t rows, int64_t width, int64_t law_width,
                  double* const* laws, double* tops, int64_t* tokens);

// Philox4x32-10: a number in [0, 1) with 53 random bits for each key, position and lead; see
// decoding/rng.py.
void random_numbers(const uint64_t* keys, const int64_t* positions, const int64_t* leads,
                    int64_t purpose, int64_t count, double* numbers);

// The functions below read row i at weights[i] and laws[i]. Numbers are in [0, 1).

void pick_weights(const double* const* weights, const int64_t* ids, int64_t rows, double* found);

void sum_weights(const double* const* weights, int64_t rows, int64_t width, double* sums);

// laws[i] is weights[i] times the reciprocal of its sum.
void normalise(const double* const* weights, int64_t rows, int64_t width, double* const* laws);

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
