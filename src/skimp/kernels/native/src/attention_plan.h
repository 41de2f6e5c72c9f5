// What the attention driver (attention.cpp) cuts its work into: tiles of rows, spans of keys, pieces
// for a thread, and where they lie in memory. Only for files compiled for any CPU.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention.h"

namespace skimp {
namespace {

// Keys [lo, hi) of one memory.
struct Reach {
  int lo = INT32_MAX, hi = 0;

  bool empty() const { return lo >= hi; }
  void join(const Reach& other) {
    if (other.empty()) return;
    lo = std::min(lo, other.lo);
    hi = std::max(hi, other.hi);
  }
  int spans(int keys) const { return empty() ? 0 : (hi + keys - 1) / keys - lo / keys; }
};

// The keys of one span of a memory that a tile sees.
struct Span {
  int memory, base;  // base: position of its first key, seen or not
  int lo, hi;

  int first_group() const { return lo / kGroup * kGroup; }
  int end_group() const { return (hi + kGroup - 1) / kGroup * kGroup; }
};

// Adjacent rows of one sequence that are computed together, for one kv head at a time. Their spans
// are numbered from 0: those of the first memory, then those of the newest tokens'.
struct Tile {
  int first, tokens;
  int keys;        // of a span
  Reach reach[2];  // what any of the rows sees

  int spans() const { return reach[0].spans(keys) + reach[1].spans(keys); }
  Span span(int number) const {
    const int memory = number >= reach[0].spans(keys);
    const Reach& seen = reach[memory];
    const int base = (seen.lo / keys + number - memory * reach[0].spans(keys)) * keys;
    return {memory, base, std::max(seen.lo, base), std::min(seen.hi, base + keys)};
  }
};

// Spans of a tile that one thread reads for adjacent kv heads.
struct Piece {
  Tile tile;
  int head, heads;
  int first_span, end_span;
  float* part;  // in shared memory, or null: the piece is a whole item
};

// Keys and values that queries read.
struct Memory {
  Pages pages;
  bool as_stored;  // they have the operands' form

  bool codes() const { return pages.at.format != CACHE_DENSE; }
};

// Where the keys of the first head of a span lie, by 16; the other planes at fixed distances.
struct Places {
  const char* blocks[kSpan / kPanel];
  const uint16_t* scales[kSpan / kPanel];
};

// The block of 16 keys or values to be prefetched next.
struct Ahead {
  size_t piece = 0;
  int number = 0, key = 0, head = 0;
  bool values = false;
  Span span;  // of that number
  Places places;
};

// Kept from op to op, so that a step allocates nothing.
std::vector<Piece>& own_pieces() {
  thread_local std::vector<Piece> pieces;
  return pieces;
}

// Numbers to a vector of each kind, padded as operands are, and keys to a span.
struct Widths {
  int key, value;  // of queries and keys; of values and results
  int latent;      // 0: none are cached
  int made;        // of latents for each head; 0: none
  int span;
};

// A thread's working memory, carved from one block.
struct Workspace {
  char *queries, *keys, *values;
  char *latents, *made_values, *makers;  // what values are turned out of; matrix rows (HeadMaker)
  uint16_t* probs;
  float *scores, *part, *acc, *max, *sum;
  float *key_scales, *value_scales;  // [heads][kSpan]
  Reach* reach[2];                   // of each row

  size_t layout(char* base, int rows, int heads, const Widths& widths, int operand_bytes) {
    size_t used = 0;
    const auto take = [&](size_t bytes) {
      char* p = base + used;
      used += (bytes + 63) / 64 * 64;
      return p;
    };
    const auto floats = [&](size_t n) { return reinterpret_cast<float*>(take(4 * n)); };
    const auto vectors = [&](size_t n, int width) { return take(n * width * operand_bytes); };
    queries = vectors(rows, widths.key);
    scores = floats(kTile * kScoreStride);
    probs = reinterpret_cast<uint16_t*>(take(2 * kTile * kProbStride));
    part = floats(kTile * widths.value);
    acc = floats(size_t(rows) * widths.value);
    max = floats(rows);
    sum = floats(rows);
    for (Reach*& rows_of : reach) rows_of = reinterpret_cast<Reach*>(take(sizeof(Reach) * rows));
    key_scales = floats(size_t(heads) * kSpan);
    value_scales = floats(size_t(heads) * kSpan);
    keys = vectors(widths.span, widths.key);
    values = vectors(widths.span, widths.value);
    latents = vectors(widths.made ? widths.span : kPanel, widths.latent);
    made_values = vectors(widths.made ? widths.span : 0, widths.value);
    makers = vectors(widths.made ? widths.made + 2 * kTile : 0, widths.latent);
    return used;
  }
};

}  // namespace
}  // namespace skimp
