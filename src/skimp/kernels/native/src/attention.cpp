// Attention over the paged cache: who computes what, and where the numbers lie. The arithmetic is
// in attention_*.cpp. Few rows (generation) stream keys and values once for all query heads that
// share them; many rows (prefill) pack a span of them once for a tile of rows. Both call the same
// kernels in the same order for a row, so they give the same bits.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu.h"

namespace skimp {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kMinTileRows = 64, kMaxTileRows = 192;
constexpr int kStreamBytes = 8192;  // packed at a time for few rows: stays in L1
constexpr int kAhead = 192;          // keys that prefetching runs ahead
constexpr int64_t kPackCost = 8;     // packing a key costs about as much as this many rows

const AttentionKernels& kernels_for(DType dtype) {
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (dtype == BF16 && isa >= Isa::Amx) return attention_amx();
  if (dtype == BF16 && isa >= Isa::Avx512Bf16) return attention_avx512bf16();
  if (isa >= Isa::Avx512) return attention_avx512();
  if (isa >= Isa::Avx2) return attention_avx2();
#endif
  return attention_scalar();
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Adjacent rows of one sequence that are computed together, for one kv head at a time.
struct Tile {
  int first, tokens;
  int lo, hi;  // keys that any of them sees

  int first_span() const { return lo / kSpan; }
  int end_span() const { return hi > lo ? (hi + kSpan - 1) / kSpan : first_span(); }
  // Keys of the tile that lie in a span.
  int span_lo(int span) const { return std::max(lo, span * kSpan); }
  int span_hi(int span) const { return std::min(hi, (span + 1) * kSpan); }
};

// A thread's working memory, carved from one block.
struct Workspace {
  char *queries, *keys, *values, *zero;
  uint16_t* probs;
  float *scores, *part, *acc, *max, *sum;
  int *lo, *hi;

  size_t layout(char* base, int rows, int padded, int operand_bytes) {
    size_t used = 0;
    const auto take = [&](size_t bytes) {
      char* p = base + used;
      used += (bytes + 63) / 64 * 64;
      return p;
    };
    const auto floats = [&](size_t n) { return reinterpret_cast<float*>(take(4 * n)); };
    const size_t row = size_t{4} * padded;
    zero = take(row);
    queries = take(rows * row);
    scores = floats(kTile * kScoreStride);
    probs = reinterpret_cast<uint16_t*>(take(2 * kTile * kProbStride));
    part = floats(kTile * padded);
    acc = floats(size_t(rows) * padded);
    max = floats(rows);
    sum = floats(rows);
    lo = reinterpret_cast<int*>(take(4 * rows));
    hi = reinterpret_cast<int*>(take(4 * rows));
    keys = take(size_t(kSpan) * padded * operand_bytes);
    values = take(size_t(kSpan) * padded * operand_bytes);
    return used;
  }
};

class Attention {
 public:
  Attention(const AttendOp& op, const StepInfo& step, const Team& team)
      : op_(op),
        step_(step),
        team_(team),
        kernels_(kernels_for(static_cast<DType>(op.head.dtype))),
        dim_(op.head_dim),
        padded_((op.head_dim + kernels_.align - 1) / kernels_.align * kernels_.align),
        group_(op.num_heads / op.num_kv_heads),
        element_(op.head.dtype == F32 ? 4 : 2) {
    const float scale = std::fabs(op.scale);
    scale_ = op.softcap > 0.0f
                 ? SoftmaxScale{op.softcap * kLog2E, 2.0f * kLog2E * scale / op.softcap}
                 : SoftmaxScale{scale * kLog2E, 0.0f};
    const int64_t share =
        int64_t{step.rows} * op.num_heads / (int64_t{4} * team.size);  // rows x kv heads a tile
    const int rows =
        static_cast<int>(std::clamp<int64_t>(share, kMinTileRows, kMaxTileRows));
    tile_tokens_ = std::max(1, rows / group_);
  }

  void run() {
    const int rows = (std::min(tile_tokens_, step_.rows) * group_ + kTile - 1) / kTile * kTile;
    const size_t bytes = work_.layout(nullptr, rows, padded_, kernels_.operand_bytes);
    std::unique_ptr<void, decltype(&std::free)> own(nullptr, &std::free);
    char* base = static_cast<char*>(team_.scratch);
    if (bytes > team_.scratch_bytes) {
      own.reset(std::aligned_alloc(64, bytes));
      base = static_cast<char*>(own.get());
    }
    work_.layout(base, rows, padded_, kernels_.operand_bytes);
    std::memset(work_.zero, 0, size_t{4} * padded_);

    int64_t items = 0, total = 0;
    for_each_tile([&](const Tile& tile) {
      items += op_.num_kv_heads;
      total += op_.num_kv_heads * cost(tile, tile.lo, tile.hi);
    });
    // Few items: their spans are shared out and merged afterwards, in the same order.
    if (team_.size > 1 && items < int64_t{4} * team_.size)
      run_spans(total);
    else
      run_items(total);
    kernels_.end();
  }

 private:
  int64_t cost(const Tile& tile, int lo, int hi) const {
    return 1 + int64_t{std::max(0, hi - lo)} * (tile.tokens * group_ + kPackCost);
  }

  // Contiguous shares of about equal cost: the thread in whose share the middle of the piece is.
  int owner(int64_t before, int64_t cost, int64_t total) const {
    return static_cast<int>(
        std::min<int64_t>(team_.size - 1, (before + cost / 2) * team_.size / total));
  }

  template <class Visit>
  void for_each_tile(Visit visit) const {
    const RowMeta& meta = op_.meta;
    for (int r = 0; r < step_.rows;) {
      Tile tile{r, 0, INT32_MAX, 0};
      for (; r < step_.rows && tile.tokens < tile_tokens_; ++r, ++tile.tokens) {
        if (meta.row_seq[r] != meta.row_seq[tile.first]) break;
        const int lo = row_lo(r);
        if (lo >= meta.kv_end[r]) continue;
        tile.lo = std::min(tile.lo, lo);
        tile.hi = std::max(tile.hi, meta.kv_end[r]);
      }
      if (tile.hi == 0) tile.lo = 0;
      visit(tile);
    }
  }

  int row_lo(int row) const {
    return op_.window > 0 ? std::max(0, op_.meta.positions[row] - op_.window + 1) : 0;
  }

  void run_items(int64_t total) {
    int64_t before = 0;
    for_each_tile([&](const Tile& tile) {
      const int64_t price = cost(tile, tile.lo, tile.hi);
      for (int head = 0; head < op_.num_kv_heads; ++head, before += price)
        if (owner(before, price, total) == team_.tid) run_item(tile, head);
    });
  }

  void run_item(const Tile& tile, int head) {
    start(tile, head);
    for (int span = tile.first_span(); span < tile.end_span(); ++span)
      run_span(tile, head, span, nullptr);
    finish(tile, head);
  }

  // An item whose spans have several owners leaves one part a span in shared memory.
  template <class Visit>
  int64_t for_each_shared(int64_t total, Visit visit) const {
    int64_t before = 0, used = 0;
    const int64_t room = team_.shared ? static_cast<int64_t>(team_.shared_bytes / 4) : 0;
    for_each_tile([&](const Tile& tile) {
      for (int head = 0; head < op_.num_kv_heads; ++head) {
        const int64_t price = cost(tile, tile.lo, tile.hi);
        const int64_t size = int64_t{tile.end_span() - tile.first_span()} * part_floats(tile);
        const int first = owner(before, 1, total), last = owner(before + price - 1, 1, total);
        const bool split = first != last && tile.end_span() - tile.first_span() > 1 &&
                           used + size <= room;
        visit(tile, head, before, price, split ? used : -1);
        if (split) used += size;
        before += price;
      }
    });
    return used;
  }

  int64_t part_floats(const Tile& tile) const {
    return int64_t{tile.tokens} * group_ * (padded_ + 2);
  }

  void run_spans(int64_t total) {
    const int64_t used = for_each_shared(
        total, [&](const Tile& tile, int head, int64_t before, int64_t price, int64_t at) {
          if (at < 0) {
            if (owner(before, price, total) == team_.tid) run_item(tile, head);
            return;
          }
          bool started = false;
          float* part = static_cast<float*>(team_.shared) + at;
          for (int span = tile.first_span(); span < tile.end_span(); ++span) {
            const int64_t piece = cost(tile, tile.span_lo(span), tile.span_hi(span));
            if (owner(before, piece, total) == team_.tid) {
              if (!started) start(tile, head);
              started = true;
              run_span(tile, head, span, part);
            }
            before += piece;
            part += part_floats(tile);
          }
        });
    if (used == 0) return;
    team_.barrier();
    for_each_shared(total,
                    [&](const Tile& tile, int head, int64_t before, int64_t price, int64_t at) {
                      if (at >= 0 && owner(before, price, total) == team_.tid)
                        merge_shared(tile, head, static_cast<float*>(team_.shared) + at);
                    });
  }

  void merge_shared(const Tile& tile, int head, const float* part) {
    const int rows = tile.tokens * group_;
    std::fill_n(work_.sum, rows, 0.0f);
    for (int span = tile.first_span(); span < tile.end_span(); ++span)
      for (int r = 0; r < rows; ++r, part += padded_ + 2)
        kernels_.merge(part + 2, part[0], part[1], padded_, work_.acc + int64_t{r} * padded_,
                       work_.max + r, work_.sum + r);
    finish(tile, head);
  }

  void start(const Tile& tile, int head) {
    const int rows = tile.tokens * group_;
    kernels_.begin(rows);
    char* to = work_.queries;
    for (int t = 0; t < tile.tokens; ++t) {
      const int row = tile.first + t;
      const float* q = op_.q + row * op_.q_stride + int64_t{head} * group_ * dim_;
      for (int g = 0; g < group_; ++g, q += dim_, to += padded_ * kernels_.operand_bytes)
        kernels_.pack_query(q, op_.scale < 0.0f ? -1.0f : 1.0f, dim_, padded_, to);
      std::fill_n(work_.lo + t * group_, group_, row_lo(row));
      std::fill_n(work_.hi + t * group_, group_, op_.meta.kv_end[row]);
    }
    std::fill_n(work_.sum, rows, 0.0f);
  }

  // Calls visit(key, address, count) for runs of keys (or values) that lie side by side.
  template <class Visit>
  void for_each_run(const Tile& tile, int head, bool values, int from, int to,
                    Visit visit) const {
    const RowMeta& meta = op_.meta;
    const int32_t* table = meta.block_table + meta.row_seq[tile.first] * meta.table_stride;
    const int64_t vector = int64_t{dim_} * element_;
    const int64_t plane = op_.page_tokens * vector;
    const int64_t offset = op_.layer_offset + plane * (head + (values ? op_.num_kv_heads : 0));
    for (int key = from; key < to;) {
      const int page = key / op_.page_tokens, slot = key - page * op_.page_tokens;
      const int count = std::min(op_.page_tokens - slot, to - key);
      visit(key, meta.arena + int64_t{64} * table[page] + offset + slot * vector, count);
      key += count;
    }
  }

  // Where 16 keys or values lie; those that no row of the tile sees are read as zeros, for what
  // lies there may be anything.
  void locate(const Tile& tile, int head, bool values, int first, const void** at) const {
    const int64_t vector = int64_t{dim_} * element_;
    const int lo = std::max(first, tile.lo), hi = std::min(first + kPanel, tile.hi);
    if (hi - lo < kPanel) std::fill_n(at, kPanel, work_.zero);
    for_each_run(tile, head, values, lo, hi, [&](int key, const char* p, int count) {
      for (int i = 0; i < count; ++i) at[key - first + i] = p + i * vector;
    });
  }

  // Packs keys (or values) [from, to) of the sequence, whole groups.
  void pack(const Tile& tile, int head, bool values, int from, int to, char* dst) const {
    const void* at[kPanel];
    const auto kernel = values ? kernels_.pack_values : kernels_.pack_keys;
    for (int key = from; key < to; key += kPanel) {
      locate(tile, head, values, key, at);
      prefetch(tile, head, values, key);
      kernel(at, static_cast<DType>(op_.head.dtype), dim_, padded_, dst);
      dst += int64_t{kPanel} * padded_ * kernels_.operand_bytes;
    }
  }

  // What will be packed kAhead keys later: after a span's keys come its values, then the next
  // span's keys. Pages are scattered, so the processor cannot guess them.
  void prefetch(const Tile& tile, int head, bool values, int key) const {
    const int span = key / kSpan, end = tile.span_hi(span);
    int from = key + kAhead;
    if (!values && from >= end) {
      values = true;
      from += tile.span_lo(span) - end;
    } else if (from >= end) {
      values = false;
    }
    const int to = std::min(from + kPanel, tile.hi);
    for_each_run(tile, head, values, std::max(from, tile.lo), to,
                 [&](int, const char* p, int count) {
                   const char* last = p + int64_t{count} * dim_ * element_;
                   for (; p < last; p += 64) __builtin_prefetch(p);
                 });
  }

  // One span for all rows of the tile: merged into the running sums, or left at `shared`.
  void run_span(const Tile& tile, int head, int span, float* shared) {
    const int base = span * kSpan, rows = tile.tokens * group_;
    const int64_t key_bytes = int64_t{padded_} * kernels_.operand_bytes;
    const int g0 = tile.span_lo(span) / kGroup * kGroup;
    const int g1 = (tile.span_hi(span) + kGroup - 1) / kGroup * kGroup;
    if (rows <= kTile) {
      const int stream =
          std::max(2 * kGroup, static_cast<int>(kStreamBytes / key_bytes) / kGroup * kGroup);
      for (int k = g0; k < g1; k += stream) {
        const int to = std::min(k + stream, g1);
        pack(tile, head, false, k, to, work_.keys);
        kernels_.score(work_.queries, rows, padded_, work_.keys, (to - k) / kPanel,
                       work_.scores + k - base);
      }
      softmax(0, rows, base, g0, g1);
      for (int k = g0; k < g1; k += stream) {
        const int to = std::min(k + stream, g1);
        pack(tile, head, true, k, to, work_.values);
        kernels_.weigh(work_.scores, work_.probs, rows, padded_, work_.values, k - base, to - k,
                       k > g0, work_.part);
      }
      keep(0, rows, shared);
      return;
    }
    pack(tile, head, false, g0, g1, work_.keys);
    pack(tile, head, true, g0, g1, work_.values);
    for (int first = 0; first < rows; first += kTile) {
      const int count = std::min(kTile, rows - first);
      int lo = base + kSpan, hi = base;
      for (int r = first; r < first + count; ++r) {
        if (work_.lo[r] >= work_.hi[r]) continue;
        lo = std::min(lo, work_.lo[r]);
        hi = std::max(hi, work_.hi[r]);
      }
      lo = std::max(lo, base) / kGroup * kGroup;
      hi = (std::min(hi, base + kSpan) + kGroup - 1) / kGroup * kGroup;
      if (lo >= hi) {
        if (shared) std::fill_n(shared + first * (padded_ + 2), count * (padded_ + 2), 0.0f);
        continue;
      }
      kernels_.score(work_.queries + first * key_bytes, count, padded_,
                     work_.keys + (lo - g0) * key_bytes, (hi - lo) / kPanel,
                     work_.scores + lo - base);
      softmax(first, count, base, lo, hi);
      kernels_.weigh(work_.scores, work_.probs, count, padded_,
                     work_.values + (lo - g0) * key_bytes, lo - base, hi - lo, false, work_.part);
      keep(first, count, shared);
    }
  }

  void softmax(int first, int count, int base, int g0, int g1) {
    for (int i = 0; i < count; ++i) {
      const int lo = std::max(work_.lo[first + i] - base, 0);
      const int hi = std::min(work_.hi[first + i] - base, kSpan);
      kernels_.softmax(work_.scores + i * kScoreStride, work_.probs + i * kProbStride, lo, hi,
                       g0 - base, g1 - base, scale_, part_max_ + i, part_sum_ + i);
    }
  }

  void keep(int first, int count, float* shared) {
    for (int i = 0; i < count; ++i) {
      const int r = first + i;
      const float* part = work_.part + i * padded_;
      if (shared) {
        float* to = shared + int64_t{r} * (padded_ + 2);
        to[0] = part_max_[i];
        to[1] = part_sum_[i];
        std::memcpy(to + 2, part, 4 * padded_);
      } else {
        kernels_.merge(part, part_max_[i], part_sum_[i], padded_,
                       work_.acc + int64_t{r} * padded_, work_.max + r, work_.sum + r);
      }
    }
  }

  void finish(const Tile& tile, int head) const {
    for (int r = 0; r < tile.tokens * group_; ++r) {
      const int query_head = head * group_ + r % group_;
      const int64_t at = (tile.first + r / group_) * op_.out_stride + int64_t{query_head} * dim_;
      const float sum = work_.sum[r];
      float weight = sum > 0.0f ? 1.0f / sum : 0.0f;
      if (op_.sinks && sum > 0.0f) {
        const float sink = op_.sinks[query_head] * kLog2E;
        const float top = std::max(sink, work_.max[r]);
        const float mine = std::exp2(work_.max[r] - top);
        weight = mine / (sum * mine + std::exp2(sink - top));
      }
      const float* acc = work_.acc + int64_t{r} * padded_;
      if (op_.head.dtype == F32) {
        float* out = static_cast<float*>(op_.out) + at;
        for (int d = 0; d < dim_; ++d) out[d] = sum > 0.0f ? acc[d] * weight : 0.0f;
      } else {
        uint16_t* out = static_cast<uint16_t*>(op_.out) + at;
        for (int d = 0; d < dim_; ++d) out[d] = sum > 0.0f ? to_bf16(acc[d] * weight) : 0;
      }
    }
  }

  const AttendOp& op_;
  const StepInfo& step_;
  const Team& team_;
  const AttentionKernels& kernels_;
  const int dim_, padded_, group_, element_;
  int tile_tokens_;
  SoftmaxScale scale_;
  Workspace work_;
  float part_max_[kTile], part_sum_[kTile];
};

}  // namespace

void run_attend(const void* op, const StepInfo& step, const Team& team) {
  if (step.rows == 0) return;
  Attention(*static_cast<const AttendOp*>(op), step, team).run();
}

}  // namespace skimp
