// The loops are plain C++, compiled for several targets; without contraction or reassociation
// all of them give the same bits.
#include "draws.h"

#include <bit>
#include <limits>

#include "cpu.h"

#define SKIMP_ALWAYS static inline __attribute__((always_inline))

namespace skimp {
namespace {

constexpr int BLOCK = 64, LANES = 8;

constexpr double LEAST = -1418.0;  // where both factors of 2^n are 0

// exp of x <= 0, with an error below 1 ulp (Cody & Waite's reduction, Taylor's series on
// [-ln 2 / 2, ln 2 / 2]).
SKIMP_ALWAYS double exp_of(double x, double least) {
  constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  x = x > least ? x : least;
  const double shifted = x * 1.4426950408889634 + MAGIC;
  const double n = shifted - MAGIC;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  const double r2 = r * r, r4 = r2 * r2;
  const double p3 = (1.0 / 2 + r * (1.0 / 6)) + r2 * (1.0 / 24 + r * (1.0 / 120));
  const double p7 = (1.0 / 720 + r * (1.0 / 5040)) + r2 * (1.0 / 40320 + r * (1.0 / 362880));
  const double p11 =
      (1.0 / 3628800 + r * (1.0 / 39916800)) + r2 * (1.0 / 479001600 + r * (1.0 / 6227020800));
  const double p = 1.0 + (r + r2 * (p3 + r4 * (p7 + r4 * p11)));
  // 2^n in two factors: where the result has few bits, it is rounded once.
  const uint64_t biased = std::bit_cast<uint64_t>(shifted) - std::bit_cast<uint64_t>(MAGIC) + 2046;
  const uint64_t half = biased >> 1;
  return p * std::bit_cast<double>(half << 52) * std::bit_cast<double>((biased - half) << 52);
}

SKIMP_ALWAYS double sum_lanes(double* lanes) {
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// What is drawn from: a row's weights, or what a draft's law leaves of them.
struct Whole {
  const double* weights;
  double operator()(int64_t i) const { return weights[i]; }
};

struct Left {
  const double* weights;
  const double* law;
  double scale;
  double operator()(int64_t i) const {
    const double left = scale * weights[i] - law[i];
    return left > 0.0 ? left : 0.0;
  }
};

SKIMP_ALWAYS double sum_block(const auto& row, int64_t first, int64_t width) {
  double lanes[LANES] = {};
  if (first + BLOCK <= width) {
    for (int at = 0; at < BLOCK; at += LANES)
      for (int i = 0; i < LANES; ++i) lanes[i] += row(first + at + i);
  } else {
    for (int i = 0; first + i < width; ++i) lanes[i % LANES] += row(first + i);
  }
  return sum_lanes(lanes);
}

SKIMP_ALWAYS double sum_row(const auto& row, int64_t width) {
  double sum = 0.0;
  for (int64_t first = 0; first < width; first += BLOCK) sum += sum_block(row, first, width);
  return sum;
}

SKIMP_ALWAYS int64_t draw_row(const auto& row, int64_t width, double target) {
  double before = 0.0;
  for (int64_t first = 0; first < width; first += BLOCK) {
    const double after = before + sum_block(row, first, width);
    if (after > target) {
      int64_t found = first;
      double mass = before;
      for (int64_t i = first; i < width && i < first + BLOCK && !(mass > target); ++i) {
        const double weight = row(i);
        mass += weight;
        if (weight > 0.0) found = i;  // added one by one they may fall short of the block's sum
      }
      return found;
    }
    before = after;
  }
  return width - 1;
}

SKIMP_ALWAYS void temper_row(const float* __restrict logits, double top, double scale,
                             int64_t width, double* __restrict weights) {
  // Were it known to the compiler, it would branch around the series and not vectorise the loop.
  volatile double known = LEAST;
  const double least = known;
  for (int64_t i = 0; i < width; ++i) weights[i] = exp_of((logits[i] - top) * scale, least);
}

SKIMP_ALWAYS void temper_rows(const float* logits, int64_t stride, const float* tops,
                              const double* scales, int64_t rows, int64_t width, double* weights) {
  for (int64_t row = 0; row < rows; ++row)
    temper_row(logits + row * stride, tops[row], scales[row], width, weights + row * width);
}

SKIMP_ALWAYS bool has(const float* from, int64_t count, float value) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) found |= from[i] == value;
  return found;
}

constexpr int32_t SIGNLESS = 0x7fffffff, INFINITE = 0x7f800000;

// False where there is a NaN.
SKIMP_ALWAYS bool find_top(const float* logits, int64_t width, float* top, int64_t* at) {
  // As integers of the same order: a maximum of floats is not vectorised, because of NaN.
  int32_t most = INT32_MIN, largest = 0;
  for (int64_t i = 0; i < width; ++i) {
    const int32_t bits = std::bit_cast<int32_t>(logits[i]);
    const int32_t size = bits & SIGNLESS, key = bits ^ ((bits >> 31) & SIGNLESS);
    most = key > most ? key : most;
    largest = size > largest ? size : largest;
  }
  if (largest > INFINITE) return false;
  *top = std::bit_cast<float>(most ^ ((most >> 31) & SIGNLESS));
  *at = 0;
  while (*at + BLOCK < width && !has(logits + *at, BLOCK, *top)) *at += BLOCK;
  while (logits[*at] != *top) ++*at;
  return true;
}

SKIMP_ALWAYS bool is_finite(float x) {
  return (std::bit_cast<int32_t>(x) & SIGNLESS) < INFINITE;
}

SKIMP_ALWAYS void find_rows(const float* logits, int64_t stride, const double* scales,
                            int64_t rows, int64_t width, double* tops, int64_t* best,
                            double* weights) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = logits + row * stride;
    float top = std::numeric_limits<float>::quiet_NaN();
    best[row] = 0;
    if (find_top(from, width, &top, &best[row]) && scales[row] > 0.0 && is_finite(top)) {
      temper_row(from, top, scales[row], width, weights);
      weights += width;
    }
    tops[row] = top;
  }
}

SKIMP_ALWAYS void spread_row(const float* logits, const int64_t* words, double top, double scale,
                             int64_t width, int64_t law_width, double* weights) {
  for (int64_t i = 0; i < law_width; ++i) weights[i] = 0.0;
  double part[BLOCK];
  for (int64_t first = 0; first < width; first += BLOCK) {
    const int64_t count = width - first < BLOCK ? width - first : BLOCK;
    temper_row(logits + first, top, scale, count, part);
    for (int64_t i = 0; i < count; ++i) weights[words[first + i]] = part[i];
  }
}

SKIMP_ALWAYS void guess_rows(const float* logits, int64_t stride, const int64_t* words,
                             const double* scales, const double* numbers, int64_t rows,
                             int64_t width, int64_t law_width, double* const* laws, double* tops,
                             int64_t* tokens) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = logits + row * stride;
    float top = std::numeric_limits<float>::quiet_NaN();
    int64_t at = 0;
    const bool right = find_top(from, width, &top, &at) && is_finite(top);
    tops[row] = top;
    tokens[row] = words ? words[at] : at;
    if (!right) continue;
    if (scales[row] > 0.0) {
      double* law = laws[row];
      if (words)
        spread_row(from, words, top, scales[row], width, law_width, law);
      else
        temper_row(from, top, scales[row], width, law);
      const Whole whole{law};
      const double sum = sum_row(whole, law_width);
      tokens[row] = draw_row(whole, law_width, numbers[row] * sum);
      const double factor = 1.0 / sum;
      for (int64_t i = 0; i < law_width; ++i) law[i] *= factor;
    } else if (words) {
      for (int64_t i = at; i < width; ++i)
        if (from[i] == top && words[i] < tokens[row]) tokens[row] = words[i];
    }
  }
}

SKIMP_ALWAYS void normalise_rows(const double* const* weights, int64_t rows, int64_t width,
                                 double* const* laws) {
  for (int64_t row = 0; row < rows; ++row) {
    const double factor = 1.0 / sum_row(Whole{weights[row]}, width);
    for (int64_t i = 0; i < width; ++i) laws[row][i] = weights[row][i] * factor;
  }
}

SKIMP_ALWAYS void sum_rows(const double* const* weights, int64_t rows, int64_t width,
                           double* sums) {
  for (int64_t row = 0; row < rows; ++row) sums[row] = sum_row(Whole{weights[row]}, width);
}

SKIMP_ALWAYS void draw_rows(const double* const* weights, const double* numbers, int64_t rows,
                            int64_t width, int64_t* tokens) {
  for (int64_t row = 0; row < rows; ++row) {
    const Whole whole{weights[row]};
    tokens[row] = draw_row(whole, width, numbers[row] * sum_row(whole, width));
  }
}

SKIMP_ALWAYS void sum_left_rows(const double* const* weights, const double* const* laws,
                                const double* scales, int64_t rows, int64_t width, double* sums) {
  for (int64_t row = 0; row < rows; ++row)
    sums[row] = sum_row(Left{weights[row], laws[row], scales[row]}, width);
}

SKIMP_ALWAYS void draw_left_rows(const double* const* weights, const double* const* laws,
                                 const double* scales, const double* numbers, int64_t rows,
                                 int64_t width, int64_t* tokens) {
  for (int64_t row = 0; row < rows; ++row) {
    const Left left{weights[row], laws[row], scales[row]};
    const Whole whole{weights[row]};
    const double sum = sum_row(left, width);
    tokens[row] = sum > 0.0 ? draw_row(left, width, numbers[row] * sum)
                            : draw_row(whole, width, numbers[row] * sum_row(whole, width));
  }
}

}  // namespace

// Compiles `rows` for each target and defines `name`, which calls what this CPU has.
#if defined(__x86_64__)
#define SKIMP_TARGETS(name, rows)                                                             \
  namespace {                                                                                 \
  __attribute__((target("avx2"))) void name##_avx2(auto... args) { rows(args...); }           \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void  \
  name##_avx512(auto... args) {                                                               \
    rows(args...);                                                                            \
  }                                                                                           \
  void name##_any(auto... args) {                                                             \
    if (current_isa() >= Isa::Avx512) return name##_avx512(args...);                          \
    if (current_isa() >= Isa::Avx2) return name##_avx2(args...);                              \
    rows(args...);                                                                            \
  }                                                                                           \
  }
#else
#define SKIMP_TARGETS(name, rows) \
  namespace {                     \
  void name##_any(auto... args) { rows(args...); } \
  }
#endif

SKIMP_TARGETS(temper, temper_rows)
SKIMP_TARGETS(find, find_rows)
SKIMP_TARGETS(guess, guess_rows)
SKIMP_TARGETS(normal, normalise_rows)
SKIMP_TARGETS(sum, sum_rows)
SKIMP_TARGETS(draw, draw_rows)
SKIMP_TARGETS(sum_left, sum_left_rows)
SKIMP_TARGETS(draw_left, draw_left_rows)

void temper(const float* logits, int64_t stride, const float* tops, const double* scales,
            int64_t rows, int64_t width, double* weights) {
  temper_any(logits, stride, tops, scales, rows, width, weights);
}

void find_laws(const float* logits, int64_t stride, const double* scales, int64_t rows,
               int64_t width, double* tops, int64_t* best, double* weights) {
  find_any(logits, stride, scales, rows, width, tops, best, weights);
}

void guess_tokens(const float* logits, int64_t stride, const int64_t* words, const double* scales,
                  const double* numbers, int64_t rows, int64_t width, int64_t law_width,
                  double* const* laws, double* tops, int64_t* tokens) {
  guess_any(logits, stride, words, scales, numbers, rows, width, law_width, laws, tops, tokens);
}

void random_numbers(const uint64_t* keys, const int64_t* positions, const int64_t* leads,
                    int64_t purpose, int64_t count, double* numbers) {
  for (int64_t i = 0; i < count; ++i) {
    const auto position = static_cast<uint64_t>(positions[i]);
    uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                     static_cast<uint32_t>(purpose), static_cast<uint32_t>(leads[i])};
    uint32_t k[2] = {static_cast<uint32_t>(keys[i]), static_cast<uint32_t>(keys[i] >> 32)};
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
      c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0];
      c[1] = static_cast<uint32_t>(b);
      c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1];
      c[3] = static_cast<uint32_t>(a);
      k[0] += 0x9E3779B9;
      k[1] += 0xBB67AE85;
    }
    numbers[i] = ((c[0] >> 5) * 67108864.0 + (c[1] >> 6)) * 0x1p-53;
  }
}

void normalise(const double* const* weights, int64_t rows, int64_t width, double* const* laws) {
  normal_any(weights, rows, width, laws);
}

void pick_weights(const double* const* weights, const int64_t* ids, int64_t rows, double* found) {
  for (int64_t row = 0; row < rows; ++row) found[row] = weights[row][ids[row]];
}

void sum_weights(const double* const* weights, int64_t rows, int64_t width, double* sums) {
  sum_any(weights, rows, width, sums);
}

void draw_tokens(const double* const* weights, const double* numbers, int64_t rows, int64_t width,
                 int64_t* tokens) {
  draw_any(weights, numbers, rows, width, tokens);
}

void sum_left(const double* const* weights, const double* const* laws, const double* scales,
              int64_t rows, int64_t width, double* sums) {
  sum_left_any(weights, laws, scales, rows, width, sums);
}

void draw_left(const double* const* weights, const double* const* laws, const double* scales,
               const double* numbers, int64_t rows, int64_t width, int64_t* tokens) {
  draw_left_any(weights, laws, scales, numbers, rows, width, tokens);
}

}  // namespace skimp
