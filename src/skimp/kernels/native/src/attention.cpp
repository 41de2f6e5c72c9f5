// Attention over the paged cache: who computes what, and where the numbers lie. The arithmetic is
// in attention_*.cpp. Few rows (generation) stream keys and values once for all query heads that
// share them; many rows (prefill) read a span of them once for a tile of rows. Both call the same
// kernels in the same order for a row, so they give the same bits.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu.h"

namespace skimp {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kMinTileRows = 64, kMaxTileRows = 192;
constexpr int kAheadBytes = 24576;   // that prefetching runs ahead
constexpr int64_t kReadCost = 8;     // reading a key costs about as much as this many rows

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

// Spans of a tile that one thread reads for adjacent kv heads.
struct Piece {
  Tile tile;
  int head, heads;
  int first_span, end_span;
  float* part;  // in shared memory, or null: the piece is a whole item
};

// The block of 16 keys or values to be prefetched next.
struct Ahead {
  size_t piece = 0;
  int span = 0, key = 0, head = 0;
  bool values = false;
};

// Kept from op to op, so that a step allocates nothing.
std::vector<Piece>& own_pieces() {
  thread_local std::vector<Piece> pieces;
  return pieces;
}

// A thread's working memory, carved from one block.
struct Workspace {
  char *queries, *keys, *values;
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
        element_(op.head.dtype == F32 ? 4 : 2),
        as_stored_(dim_ == padded_ && element_ == kernels_.operand_bytes),
        pieces_(own_pieces()) {
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
    int tiles = 0;
    for_each_tile([&](const Tile&) { ++tiles; });
    // Few tiles: their spans are shared out, head by head, and merged afterwards in order.
    // Many: a thread takes several heads of a sequence in turn, for they lie side by side.
    const int64_t heads = int64_t{tiles} * op_.num_kv_heads, wanted = int64_t{4} * team_.size;
    const bool split = team_.size > 1 && heads < wanted;
    band_ = split ? 1 : static_cast<int>(std::clamp<int64_t>(heads / wanted, 1, kTile));
    total_ = 0;
    for_each_item([&](const Tile& tile, int, int, int64_t, int64_t price) { total_ += price; });

    const int rows = (std::min(tile_tokens_, step_.rows) * group_ + kTile - 1) / kTile * kTile;
    const size_t bytes = work_.layout(nullptr, rows, padded_, kernels_.operand_bytes);
    std::unique_ptr<void, decltype(&std::free)> own(nullptr, &std::free);
    char* base = static_cast<char*>(team_.scratch);
    if (bytes > team_.scratch_bytes) {
      own.reset(std::aligned_alloc(64, bytes));
      base = static_cast<char*>(own.get());
    }
    work_.layout(base, rows, padded_, kernels_.operand_bytes);

    pieces_.clear();
    const int64_t used = split ? collect_spans() : collect_items();
    ahead_ = {};
    settle();
    const int64_t block = int64_t{kPanel} * dim_ * element_;
    for (int64_t i = 0; i < std::max<int64_t>(2, kAheadBytes / block); ++i) prefetch();
    for (const Piece& piece : pieces_) run_piece(piece);
    if (used > 0) {
      team_.barrier();
      for_each_shared([&](const Tile& tile, int head, int64_t before, int64_t price, int64_t at) {
        if (at >= 0 && owner(before, price) == team_.tid)
          merge_shared(tile, head, static_cast<float*>(team_.shared) + at);
      });
    }
    kernels_.end();
  }

 private:
  int64_t cost(const Tile& tile, int lo, int hi) const {
    return 1 + int64_t{std::max(0, hi - lo)} * (tile.tokens * group_ + kReadCost);
  }

  // Contiguous shares of about equal cost: the thread in whose share the middle of the piece is.
  int owner(int64_t before, int64_t cost) const {
    return static_cast<int>(
        std::min<int64_t>(team_.size - 1, (before + cost / 2) * team_.size / total_));
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

  // Calls visit(tile, first kv head, number of kv heads, cost before it, its cost).
  template <class Visit>
  void for_each_item(Visit visit) const {
    int64_t before = 0;
    for_each_tile([&](const Tile& tile) {
      const int band = std::clamp(kTile / (tile.tokens * group_), 1, band_);
      const int64_t price = cost(tile, tile.lo, tile.hi);
      for (int head = 0; head < op_.num_kv_heads; head += band) {
        const int heads = std::min(band, op_.num_kv_heads - head);
        visit(tile, head, heads, before, price * heads);
        before += price * heads;
      }
    });
  }

  int64_t collect_items() {
    for_each_item([&](const Tile& tile, int head, int heads, int64_t before, int64_t price) {
      if (owner(before, price) == team_.tid)
        pieces_.push_back({tile, head, heads, tile.first_span(), tile.end_span(), nullptr});
    });
    return 0;
  }

  // An item whose spans have several owners leaves one part a span in shared memory: calls
  // visit(tile, head, cost before it, its cost, where its parts begin or -1).
  template <class Visit>
  int64_t for_each_shared(Visit visit) const {
    int64_t used = 0;
    const int64_t room = team_.shared ? static_cast<int64_t>(team_.shared_bytes / 4) : 0;
    for_each_item([&](const Tile& tile, int head, int, int64_t before, int64_t price) {
      const int64_t size = int64_t{tile.end_span() - tile.first_span()} * part_floats(tile);
      const int first = owner(before, 1), last = owner(before + price - 1, 1);
      const bool split =
          first != last && tile.end_span() - tile.first_span() > 1 && used + size <= room;
      visit(tile, head, before, price, split ? used : -1);
      if (split) used += size;
    });
    return used;
  }

  int64_t part_floats(const Tile& tile) const {
    return int64_t{tile.tokens} * group_ * (padded_ + 2);
  }

  int64_t collect_spans() {
    return for_each_shared(
        [&](const Tile& tile, int head, int64_t before, int64_t price, int64_t at) {
          if (at < 0) {
            if (owner(before, price) == team_.tid)
              pieces_.push_back({tile, head, 1, tile.first_span(), tile.end_span(), nullptr});
            return;
          }
          Piece piece{tile, head, 1, 0, 0, nullptr};
          float* part = static_cast<float*>(team_.shared) + at;
          for (int span = tile.first_span(); span < tile.end_span(); ++span) {
            const int64_t share = cost(tile, tile.span_lo(span), tile.span_hi(span));
            if (owner(before, share) == team_.tid) {
              if (!piece.part) piece.part = part, piece.first_span = span;
              piece.end_span = span + 1;
            }
            before += share;
            part += part_floats(tile);
          }
          if (piece.part) pieces_.push_back(piece);
        });
  }

  void merge_shared(const Tile& tile, int head, const float* part) {
    const int rows = tile.tokens * group_;
    std::fill_n(work_.sum, rows, 0.0f);
    for (int span = tile.first_span(); span < tile.end_span(); ++span)
      for (int r = 0; r < rows; ++r, part += padded_ + 2)
        kernels_.merge(part + 2, part[0], part[1], padded_, work_.acc + int64_t{r} * padded_,
                       work_.max + r, work_.sum + r);
    finish(tile, head, 1);
  }

  void run_piece(const Piece& piece) {
    start(piece);
    float* part = piece.part;
    for (int span = piece.first_span; span < piece.end_span; ++span) {
      if (piece.tile.tokens * group_ <= kTile)
        stream_span(piece, span, part);
      else
        run_span(piece, span, part);
      if (part) part += part_floats(piece.tile);
    }
    if (!part) finish(piece.tile, piece.head, piece.heads);
  }

  // Rows are ordered by kv head, then by token, then by query head.
  void start(const Piece& piece) {
    const Tile& tile = piece.tile;
    const int rows = tile.tokens * group_;
    kernels_.begin(rows);
    char* to = work_.queries;
    for (int h = 0; h < piece.heads; ++h) {
      for (int t = 0; t < tile.tokens; ++t) {
        const int row = tile.first + t;
        const float* q = op_.q + row * op_.q_stride + int64_t{piece.head + h} * group_ * dim_;
        for (int g = 0; g < group_; ++g, q += dim_, to += padded_ * kernels_.operand_bytes)
          kernels_.pack_query(q, op_.scale < 0.0f ? -1.0f : 1.0f, dim_, padded_, to);
        std::fill_n(work_.lo + h * rows + t * group_, group_, row_lo(row));
        std::fill_n(work_.hi + h * rows + t * group_, group_, op_.meta.kv_end[row]);
      }
    }
    std::fill_n(work_.sum, rows * piece.heads, 0.0f);
  }

  // The block of 16 keys or values at `key`.
  const char* block(const Tile& tile, int head, bool values, int key) const {
    const RowMeta& meta = op_.meta;
    const int32_t* table = meta.block_table + meta.row_seq[tile.first] * meta.table_stride;
    const int page = key / op_.page_tokens, slot = key - page * op_.page_tokens;
    const int64_t vector = int64_t{dim_} * element_;
    const int64_t plane = head + (values ? op_.num_kv_heads : 0);
    return meta.arena + int64_t{64} * table[page] + op_.layer_offset +
           (plane * op_.page_tokens + slot) * vector;
  }

  // Brings keys (or values) [from, to) of a kv head, whole groups, into operand form. A key that
  // no row sees has a score of its own, which is masked, so what lies there does not matter; an
  // unseen value is multiplied by zero and must therefore be replaced.
  void read(const Tile& tile, int head, bool values, int from, int to, char* dst) {
    const int64_t bytes = int64_t{kPanel} * padded_ * kernels_.operand_bytes;
    const DType dtype = static_cast<DType>(op_.head.dtype);
    for (int key = from; key < to; key += kPanel, dst += bytes) {
      const int lo = std::max(tile.lo - key, 0), hi = std::min(tile.hi - key, kPanel);
      if (lo >= hi) {  // there may be no page
        std::memset(dst, 0, bytes);
        continue;
      }
      const char* source = block(tile, head, values, key);
      if (values)
        kernels_.read_values(source, dtype, dim_, padded_, lo, hi, dst);
      else
        kernels_.read_keys(source, dtype, dim_, padded_, dst);
      prefetch();
    }
  }

  // The block that will be read kAheadBytes later. Pages are scattered, so the processor cannot
  // guess them; within a page the order is that of addresses, which helps it.
  void prefetch() {
    Ahead& a = ahead_;
    if (a.piece == pieces_.size()) return;
    const Piece& piece = pieces_[a.piece];
    const char* p = block(piece.tile, piece.head + a.head, a.values, a.key);
    const int64_t bytes = int64_t{kPanel} * dim_ * element_;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
    if (++a.head < piece.heads) return;
    a.head = 0;
    a.key += kPanel;
    if (a.key < piece.tile.span_hi(a.span)) return;
    if (a.values) ++a.span;
    a.values = !a.values;
    if (a.span < piece.end_span) {
      a.key = piece.tile.span_lo(a.span) / kPanel * kPanel;
    } else {
      ++a.piece;
      settle();
    }
  }

  // To the beginning of the next piece that reads anything.
  void settle() {
    Ahead& a = ahead_;
    while (a.piece < pieces_.size() && pieces_[a.piece].first_span >= pieces_[a.piece].end_span)
      ++a.piece;
    if (a.piece == pieces_.size()) return;
    a.span = pieces_[a.piece].first_span;
    a.key = pieces_[a.piece].tile.span_lo(a.span) / kPanel * kPanel;
  }

  // One span for few rows, all heads of the piece in turn: merged into the running sums, or left
  // at `shared`. Keys that have the operands' form are used where they lie;
  // values are copied line by line even so: a group of them spans two pages, and copying one from
  // L2 is faster than loading its tiles from there.
  void stream_span(const Piece& piece, int span, float* shared) {
    const Tile& tile = piece.tile;
    const int base = span * kSpan, rows = tile.tokens * group_;
    const int64_t key_bytes = int64_t{padded_} * kernels_.operand_bytes;
    const int g0 = tile.span_lo(span) / kGroup * kGroup;
    const int g1 = (tile.span_hi(span) + kGroup - 1) / kGroup * kGroup;
    for (int k = g0; k < g1; k += kGroup) {
      for (int h = 0; h < piece.heads; ++h) {
        const char* queries = work_.queries + h * rows * key_bytes;
        float* scores = work_.scores + h * rows * kScoreStride + k - base;
        if (as_stored_ && tile.lo < k + kPanel && tile.hi > k + kPanel) {
          for (int key = k; key < k + kGroup; key += kPanel, scores += kPanel) {
            kernels_.score(queries, rows, padded_, block(tile, piece.head + h, false, key), 1,
                           scores);
            prefetch();
          }
          continue;
        }
        read(tile, piece.head + h, false, k, k + kGroup, work_.keys);
        kernels_.score(queries, rows, padded_, work_.keys, kGroup / kPanel, scores);
      }
    }
    softmax(0, rows * piece.heads, base, g0, g1);
    for (int k = g0; k < g1; k += kGroup) {
      for (int h = 0; h < piece.heads; ++h) {
        read(tile, piece.head + h, true, k, k + kGroup, work_.values);
        kernels_.weigh(work_.scores + h * rows * kScoreStride,
                       work_.probs + h * rows * kProbStride, rows, padded_, work_.values, k - base,
                       kGroup, k > g0, work_.part + h * rows * padded_);
      }
    }
    keep(0, rows * piece.heads, shared);
  }

  // The same for one head and many rows, which share what is read.
  void run_span(const Piece& piece, int span, float* shared) {
    const Tile& tile = piece.tile;
    const int base = span * kSpan, rows = tile.tokens * group_;
    const int64_t key_bytes = int64_t{padded_} * kernels_.operand_bytes;
    const int g0 = tile.span_lo(span) / kGroup * kGroup;
    const int g1 = (tile.span_hi(span) + kGroup - 1) / kGroup * kGroup;
    read(tile, piece.head, false, g0, g1, work_.keys);
    read(tile, piece.head, true, g0, g1, work_.values);
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

  void finish(const Tile& tile, int head, int heads) const {
    for (int r = 0; r < tile.tokens * group_ * heads; ++r) {
      const int query_head = (head + r / (tile.tokens * group_)) * group_ + r % group_;
      const int token = tile.first + r / group_ % tile.tokens;
      const int64_t at = token * op_.out_stride + int64_t{query_head} * dim_;
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
  const bool as_stored_;  // the operands' form is the cache's
  int tile_tokens_, band_ = 1;  // tokens a tile; kv heads a piece, at most
  int64_t total_ = 0;           // cost of the whole op
  SoftmaxScale scale_;
  Workspace work_;
  std::vector<Piece>& pieces_;
  Ahead ahead_;
  float part_max_[kTile], part_sum_[kTile];
};

}  // namespace

void run_attend(const void* op, const StepInfo& step, const Team& team) {
  if (step.rows == 0) return;
  Attention(*static_cast<const AttendOp*>(op), step, team).run();
}

}  // namespace skimp
