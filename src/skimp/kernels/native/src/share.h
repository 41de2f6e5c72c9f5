// How the work of a product is divided among threads. Only for files compiled for any CPU.
#pragma once
#include <algorithm>
#include <cstdint>

namespace skimp {

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

struct Range {
  int first, last;
};

inline Range share(int total, int part, int parts) {
  return {static_cast<int>(int64_t{total} * part / parts),
          static_cast<int>(int64_t{total} * (part + 1) / parts)};
}

// How many of the threads divide the rows; the others divide the panels.
inline int row_parts(int threads, int row_blocks, int units) {
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int parts = 1; parts <= std::min(threads, row_blocks); ++parts) {
    const int64_t cost =
        int64_t{divide_up(row_blocks, parts)} * divide_up(units, threads / parts);
    if (cost < best_cost) best = parts, best_cost = cost;
  }
  return best;
}

// How many rows are worked on together, in whole tiles: beside the weights of a tile they stay in
// a second-level cache of 1 or 2 MiB.
inline int chunk_rows(int64_t row_bytes, int tile_rows) {
  constexpr int64_t BYTES = 3 << 19;
  return std::max<int>(static_cast<int>(BYTES / row_bytes / tile_rows), 1) * tile_rows;
}

}  // namespace skimp
