// Attention over the paged cache: who computes what, and where the numbers lie. The arithmetic is
// in attention_*.cpp. Few rows (generation) stream keys and values once for all query heads that
// share them; many rows (prefill) read a span of them once for a tile of rows. Both call the same
// kernels in the same order for a row, so they give the same bits.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "attention_made.h"
#include "attention_plan.h"
#include "cache_codes.h"
#include "cpu.h"
#include "latent.h"

namespace skimp {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kMinTileRows = 64, kMaxTileRows = 192;
constexpr int kAheadBytes = 24576;   // that prefetching runs ahead
constexpr int64_t kReadCost = 8;     // reading a key costs about as much as this many rows
constexpr int kLatentSpan = 128;     // keys: latents are long, and a span should stay in L2
constexpr int kMaxExpandedRows = 1024;  // of a tile, for they share what is made

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

class Attention {
 public:
  Attention(const AttendOp& op, const StepInfo& step, const Team& team)
      : op_(op),
        step_(step),
        team_(team),
        kernels_(kernels_for(static_cast<DType>(op.head.dtype))),
        latent_(static_cast<LatentForm>(op.latent)),
        dim_(op.head_dim),
        value_dim_(latent_ == LATENT_NONE       ? op.head_dim
                   : latent_ == LATENT_ABSORBED ? op.sizes.latent_dim
                                                : op.sizes.value_dim),
        stored_dim_(latent_ == LATENT_NONE ? dim_ : op.sizes.latent_dim + op.sizes.rope_dim),
        padded_(padded(dim_)),
        value_padded_(padded(value_dim_)),
        stored_padded_(padded(stored_dim_)),
        span_keys_(latent_ == LATENT_NONE ? kSpan : kLatentSpan),
        group_(op.num_heads / op.num_kv_heads),
        memories_{memory(op.cache), memory(op.recent)},
        pieces_(own_pieces()) {
    const float scale = std::fabs(op.scale);
    scale_ = op.softcap > 0.0f
                 ? SoftmaxScale{op.softcap * kLog2E, 2.0f * kLog2E * scale / op.softcap}
                 : SoftmaxScale{scale * kLog2E, 0.0f};
    const int64_t share =
        int64_t{step.rows} * op.num_heads / (int64_t{4} * team.size);  // rows x kv heads a tile
    const int rows = static_cast<int>(std::clamp<int64_t>(
        share, kMinTileRows, latent_ == LATENT_EXPANDED ? kMaxExpandedRows : kMaxTileRows));
    tile_tokens_ = std::max(1, rows / group_);
  }

  void run() {
    int tiles = 0;
    for_each_tile([&](const Tile&) { ++tiles; });
    if (tiles == 0) return;
    // Few tiles: their spans are shared out, head by head, and merged afterwards in order.
    // Many: a thread takes several heads of a sequence in turn, for they lie side by side.
    const int64_t heads = int64_t{tiles} * op_.num_kv_heads, wanted = int64_t{4} * team_.size;
    const bool split = team_.size > 1 && heads < wanted;
    const bool alone = split || latent_ != LATENT_NONE;
    band_ = alone ? 1 : static_cast<int>(std::clamp<int64_t>(heads / wanted, 1, kTile));
    total_ = 0;
    for_each_item([&](const Tile&, int, int, int64_t, int64_t price) { total_ += price; });

    const int rows = (std::min(tile_tokens_, step_.rows) * group_ + kTile - 1) / kTile * kTile;
    const bool expanded = latent_ == LATENT_EXPANDED;
    const Widths widths{padded_, value_padded_, latent_ == LATENT_NONE ? 0 : stored_padded_,
                        expanded ? op_.sizes.nope_dim + op_.sizes.value_dim : 0, span_keys_};
    const size_t bytes = work_.layout(nullptr, rows, band_, widths, kernels_.operand_bytes);
    std::unique_ptr<void, decltype(&std::free)> own(nullptr, &std::free);
    char* base = static_cast<char*>(team_.scratch);
    if (bytes > team_.scratch_bytes) {
      own.reset(std::aligned_alloc(64, bytes));
      base = static_cast<char*>(own.get());
    }
    work_.layout(base, rows, band_, widths, kernels_.operand_bytes);
    if (expanded) maker_ = HeadMaker(op_, kernels_, widths, work_);

    pieces_.clear();
    const int64_t used = split ? collect_spans() : collect_items();
    ahead_.piece = 0;
    ahead_.head = 0;
    ahead_.values = false;
    settle();
    const int64_t block = kPanel * memories_[0].pages.vector;
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
  int padded(int dim) const { return (dim + kernels_.align - 1) / kernels_.align * kernels_.align; }

  Memory memory(const CachePages& at) const {
    const Pages pages(at, op_.meta, op_.head.dtype, op_.num_kv_heads, stored_dim_);
    const bool dense = at.format == CACHE_DENSE;
    return {pages, dense && pages.vector == int64_t{stored_padded_} * kernels_.operand_bytes};
  }

  int64_t cost(const Tile& tile, int keys) const {
    return 1 + int64_t{keys} * (tile.tokens * group_ + kReadCost);
  }

  // Contiguous shares of about equal cost: the thread in whose share the middle of the piece is.
  int owner(int64_t before, int64_t cost) const {
    return static_cast<int>(
        std::min<int64_t>(team_.size - 1, (before + cost / 2) * team_.size / total_));
  }

  template <class Visit>
  void for_each_tile(Visit visit) const {
    const RowMeta& meta = op_.meta;
    for (int r = 0, run_end = 0; r < step_.rows;) {
      if (latent_ != LATENT_NONE && r >= run_end) {
        const LatentRun run = latent_run(op_.sizes, step_, meta, r);
        run_end = run.end;
        if (run.expanded != (latent_ == LATENT_EXPANDED)) {
          r = run_end;
          continue;
        }
      }
      Tile tile{r, 0, span_keys_, {}};
      for (; r < step_.rows && tile.tokens < tile_tokens_; ++r, ++tile.tokens) {
        if (meta.row_seq[r] != meta.row_seq[tile.first]) break;
        for (int m = 0; m < 2; ++m) tile.reach[m].join(row_reach(r, m));
      }
      visit(tile);
    }
  }

  // What a row sees of a memory: the newest tokens in the second, where there is one.
  Reach row_reach(int row, int memory) const {
    const RowMeta& meta = op_.meta;
    const int position = meta.positions[row], end = meta.kv_end[row];
    const int lo = op_.window > 0 ? std::max(0, position - op_.window + 1) : 0;
    if (!op_.recent.block_table) return memory ? Reach{} : Reach{lo, end};
    const int edge = std::max(lo, position - op_.recent_tokens + 1);
    return memory ? Reach{edge, end} : Reach{lo, std::min(edge, end)};
  }

  // Calls visit(tile, first kv head, number of kv heads, cost before it, its cost).
  template <class Visit>
  void for_each_item(Visit visit) const {
    int64_t before = 0;
    for_each_tile([&](const Tile& tile) {
      const int band = std::clamp(kTile / (tile.tokens * group_), 1, band_);
      int keys = 0;
      for (const Reach& seen : tile.reach) keys += std::max(0, seen.hi - seen.lo);
      const int64_t price = cost(tile, keys);
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
        pieces_.push_back({tile, head, heads, 0, tile.spans(), nullptr});
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
      const int64_t size = int64_t{tile.spans()} * part_floats(tile);
      const int first = owner(before, 1), last = owner(before + price - 1, 1);
      const bool split = first != last && tile.spans() > 1 && used + size <= room;
      visit(tile, head, before, price, split ? used : -1);
      if (split) used += size;
    });
    return used;
  }

  int64_t part_floats(const Tile& tile) const {
    return int64_t{tile.tokens} * group_ * (value_padded_ + 2);
  }

  int64_t collect_spans() {
    return for_each_shared(
        [&](const Tile& tile, int head, int64_t before, int64_t price, int64_t at) {
          if (at < 0) {
            if (owner(before, price) == team_.tid)
              pieces_.push_back({tile, head, 1, 0, tile.spans(), nullptr});
            return;
          }
          Piece piece{tile, head, 1, 0, 0, nullptr};
          float* part = static_cast<float*>(team_.shared) + at;
          for (int span = 0; span < tile.spans(); ++span) {
            const Span keys = tile.span(span);
            const int64_t share = cost(tile, keys.hi - keys.lo);
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
    for (int span = 0; span < tile.spans(); ++span)
      for (int r = 0; r < rows; ++r, part += value_padded_ + 2)
        kernels_.merge(part + 2, part[0], part[1], value_padded_,
                       work_.acc + int64_t{r} * value_padded_, work_.max + r, work_.sum + r);
    finish(tile, head, 1);
  }

  void run_piece(const Piece& piece) {
    start(piece);
    float* part = piece.part;
    for (int number = piece.first_span; number < piece.end_span; ++number) {
      const Span span = piece.tile.span(number);
      if (piece.tile.tokens * group_ <= kTile && latent_ != LATENT_EXPANDED)
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
    kernels_.begin(latent_ == LATENT_EXPANDED ? kTile : rows);
    if (latent_ == LATENT_EXPANDED) maker_.begin(piece.head);
    char* to = work_.queries;
    for (int h = 0; h < piece.heads; ++h) {
      for (int t = 0; t < tile.tokens; ++t) {
        const int row = tile.first + t;
        const float* q = op_.q + row * op_.q_stride + int64_t{piece.head + h} * group_ * dim_;
        for (int g = 0; g < group_; ++g, q += dim_, to += padded_ * kernels_.operand_bytes)
          kernels_.pack_query(q, op_.scale < 0.0f ? -1.0f : 1.0f, dim_, padded_, to);
        for (int m = 0; m < 2; ++m)
          std::fill_n(work_.reach[m] + h * rows + t * group_, group_, row_reach(row, m));
      }
    }
    std::fill_n(work_.sum, rows * piece.heads, 0.0f);
  }

  void locate(const Tile& tile, const Span& span, Places& places) const {
    const Memory& memory = memories_[span.memory];
    const int seq = op_.meta.row_seq[tile.first];
    for (int key = span.lo / kPanel * kPanel; key < span.hi; key += kPanel) {
      const int i = (key - span.base) / kPanel;
      places.blocks[i] = memory.pages.block(seq, 0, key);
      if (memory.codes()) places.scales[i] = memory.pages.scales(seq, 0, key);
    }
  }

  // The block of 16 keys or values at `key`.
  const char* block(const Places& places, const Span& span, int head, bool values,
                    int key) const {
    const Pages& pages = memories_[span.memory].pages;
    const int64_t plane = latent_ != LATENT_NONE ? 0 : head + (values ? op_.num_kv_heads : 0);
    return places.blocks[(key - span.base) / kPanel] + plane * pages.at.page_tokens * pages.vector;
  }

  // Brings keys (or values) [from, to) of a kv head, whole groups, into operand form. A key that
  // no row sees has a score of its own, which is masked, so what lies there does not matter; an
  // unseen value is multiplied by zero and must therefore be a number.
  void read(const Span& span, int head, bool values, int from, int to, char* dst) {
    const Memory& memory = memories_[span.memory];
    const int64_t bytes = panel_bytes(values ? value_padded_ : stored_padded_);
    const DType dtype = static_cast<DType>(op_.head.dtype);
    for (int key = from; key < to; key += kPanel, dst += bytes) {
      const int lo = std::max(span.lo - key, 0), hi = std::min(span.hi - key, kPanel);
      if (lo >= hi) {  // there may be no page
        std::memset(dst, 0, bytes);
        continue;
      }
      const char* source = block(places_, span, head, values, key);
      if (values && latent_ != LATENT_NONE) {
        if (!memory.as_stored) {
          kernels_.read_keys(source, dtype, stored_dim_, stored_padded_, work_.latents);
          source = work_.latents;
        }
        kernels_.turn(source, value_padded_, lo, hi, dst);
        continue;
      }
      if (memory.codes())
        (values ? kernels_.decode_values : kernels_.decode_keys)(
            reinterpret_cast<const uint8_t*>(source), memory.pages.at.format, dim_, padded_, dst);
      else if (values)
        kernels_.read_values(source, dtype, dim_, padded_, lo, hi, dst);
      else
        kernels_.read_keys(source, dtype, stored_dim_, stored_padded_, dst);
      prefetch();
    }
  }

  int64_t panel_bytes(int width) const {
    return int64_t{kPanel} * width * kernels_.operand_bytes;
  }

  // Keys and values of an expanded head, of latents [from, to).
  void make(const Span& span, int head, int from, int to) {
    read(span, head, false, from, to, work_.latents);
    maker_.make(from, (to - from) / kPanel, span.lo, span.hi, work_.keys, work_.values);
  }

  // The scales of a span's keys and values, for each head of the piece.
  void read_scales(const Piece& piece, const Span& span) {
    const Memory& memory = memories_[span.memory];
    if (!memory.codes()) return;
    const int64_t plane = memory.pages.at.page_tokens;
    for (int h = 0; h < piece.heads; ++h) {
      for (const bool values : {false, true}) {
        const int64_t at = plane * (piece.head + h + (values ? op_.num_kv_heads : 0));
        float* to = (values ? work_.value_scales : work_.key_scales) + h * kSpan;
        to += span.first_group() - span.base;
        for (int key = span.first_group(); key < span.end_group(); key += kPanel, to += kPanel) {
          if (key + kPanel <= span.lo || key >= span.hi) {  // there may be no page
            std::fill_n(to, kPanel, 0.0f);
            continue;
          }
          const uint16_t* from = places_.scales[(key - span.base) / kPanel] + at;
          for (int i = 0; i < kPanel; ++i) to[i] = float_of(int32_t{from[i]} << 16);
        }
      }
    }
  }

  // The block that will be read kAheadBytes later. Pages are scattered, so the processor cannot
  // guess them; within a page the order is that of addresses, which helps it.
  void prefetch() {
    Ahead& a = ahead_;
    if (a.piece == pieces_.size()) return;
    const Piece& piece = pieces_[a.piece];
    const char* p = block(a.places, a.span, piece.head + a.head, a.values, a.key);
    const int64_t bytes = kPanel * memories_[a.span.memory].pages.vector;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
    if (++a.head < piece.heads) return;
    a.head = 0;
    a.key += kPanel;
    if (a.key < a.span.hi) return;
    a.key = a.span.lo / kPanel * kPanel;
    const bool whole = a.values || latent_ != LATENT_NONE;
    if (whole && ++a.number < piece.end_span) {
      enter();
    } else if (whole) {
      ++a.piece;
      settle();
    }
    a.values = !whole;
  }

  // To the beginning of the next piece that reads anything.
  void settle() {
    Ahead& a = ahead_;
    while (a.piece < pieces_.size() && pieces_[a.piece].first_span >= pieces_[a.piece].end_span)
      ++a.piece;
    if (a.piece == pieces_.size()) return;
    a.number = pieces_[a.piece].first_span;
    enter();
  }

  // The scales are needed sooner than most of the span, so they are fetched at once.
  void enter() {
    Ahead& a = ahead_;
    const Piece& piece = pieces_[a.piece];
    a.span = piece.tile.span(a.number);
    a.key = a.span.lo / kPanel * kPanel;
    locate(piece.tile, a.span, a.places);
    const Memory& memory = memories_[a.span.memory];
    if (!memory.codes()) return;
    for (int key = a.key; key < a.span.hi; key += kPanel) {
      const uint16_t* scales = a.places.scales[(key - a.span.base) / kPanel];
      for (const int plane : {piece.head, piece.head + op_.num_kv_heads})
        __builtin_prefetch(scales + plane * memory.pages.at.page_tokens, 0, 2);
    }
  }

  // One span for few rows, all heads of the piece in turn: merged into the running sums, or left
  // at `shared`. Keys that have the operands' form are used where they lie;
  // values are copied line by line even so: a group of them spans two pages, and copying one from
  // L2 is faster than loading its tiles from there.
  void stream_span(const Piece& piece, const Span& span, float* shared) {
    const Tile& tile = piece.tile;
    const int base = span.base, rows = tile.tokens * group_;
    const int64_t key_bytes = int64_t{padded_} * kernels_.operand_bytes;
    const int g0 = span.first_group(), g1 = span.end_group();
    const Memory& memory = memories_[span.memory];
    locate(tile, span, places_);
    read_scales(piece, span);
    for (int k = g0; k < g1; k += kGroup) {
      for (int h = 0; h < piece.heads; ++h) {
        const char* queries = work_.queries + h * rows * key_bytes;
        float* scores = work_.scores + h * rows * kScoreStride + k - base;
        if (memory.as_stored && span.lo < k + kPanel && span.hi > k + kPanel) {
          for (int key = k; key < k + kGroup; key += kPanel, scores += kPanel) {
            kernels_.score(queries, rows, padded_,
                           block(places_, span, piece.head + h, false, key), 1, scores);
            prefetch();
          }
          continue;
        }
        read(span, piece.head + h, false, k, k + kGroup, work_.keys);
        kernels_.score(queries, rows, padded_, work_.keys, kGroup / kPanel, scores);
      }
    }
    for (int h = 0; h < piece.heads; ++h) softmax(span, h, h * rows, rows, g0, g1);
    for (int k = g0; k < g1; k += kGroup) {
      for (int h = 0; h < piece.heads; ++h) {
        read(span, piece.head + h, true, k, k + kGroup, work_.values);
        kernels_.weigh(work_.scores + h * rows * kScoreStride,
                       work_.probs + h * rows * kProbStride, rows, value_padded_, work_.values,
                       k - base, kGroup, k > g0, work_.part + h * rows * value_padded_);
      }
    }
    keep(0, rows * piece.heads, shared);
  }

  // The same for one head and many rows, which share what is read.
  void run_span(const Piece& piece, const Span& span, float* shared) {
    const Tile& tile = piece.tile;
    const int base = span.base, rows = tile.tokens * group_;
    const int64_t key_bytes = int64_t{padded_} * kernels_.operand_bytes;
    const int64_t value_bytes = int64_t{value_padded_} * kernels_.operand_bytes;
    const int g0 = span.first_group(), g1 = span.end_group();
    locate(tile, span, places_);
    read_scales(piece, span);
    if (latent_ == LATENT_EXPANDED) {
      make(span, piece.head, g0, g1);
    } else {
      read(span, piece.head, false, g0, g1, work_.keys);
      read(span, piece.head, true, g0, g1, work_.values);
    }
    for (int first = 0; first < rows; first += kTile) {
      const int count = std::min(kTile, rows - first);
      Reach seen;
      for (int r = first; r < first + count; ++r) seen.join(work_.reach[span.memory][r]);
      const int lo = std::max(seen.lo, base) / kGroup * kGroup;
      const int hi = (std::min(seen.hi, base + span_keys_) + kGroup - 1) / kGroup * kGroup;
      if (lo >= hi) {
        if (shared)
          std::fill_n(shared + first * (value_padded_ + 2), count * (value_padded_ + 2), 0.0f);
        continue;
      }
      kernels_.score(work_.queries + first * key_bytes, count, padded_,
                     work_.keys + (lo - g0) * key_bytes, (hi - lo) / kPanel,
                     work_.scores + lo - base);
      softmax(span, 0, first, count, lo, hi);
      kernels_.weigh(work_.scores, work_.probs, count, value_padded_,
                     work_.values + (lo - g0) * value_bytes, lo - base, hi - lo, false,
                     work_.part);
      keep(first, count, shared);
    }
  }

  // Rows [first, first + count), whose scores lie where the tile's first rows of head 0 or, with
  // several heads, those of `head` do.
  void softmax(const Span& span, int head, int first, int count, int g0, int g1) {
    const bool codes = memories_[span.memory].codes();
    const SpanScales scales = {codes ? work_.key_scales + head * kSpan : nullptr,
                               codes ? work_.value_scales + head * kSpan : nullptr};
    const int slot = head * count;
    for (int i = 0; i < count; ++i) {
      const Reach& seen = work_.reach[span.memory][first + i];
      const int lo = std::max(seen.lo - span.base, 0);
      const int hi = std::min(seen.hi - span.base, span_keys_);
      kernels_.softmax(work_.scores + (slot + i) * kScoreStride,
                       work_.probs + (slot + i) * kProbStride, lo, hi, g0 - span.base,
                       g1 - span.base, scale_, scales, part_max_ + slot + i,
                       part_sum_ + slot + i);
    }
  }

  void keep(int first, int count, float* shared) {
    for (int i = 0; i < count; ++i) {
      const int r = first + i;
      const float* part = work_.part + i * value_padded_;
      if (shared) {
        float* to = shared + int64_t{r} * (value_padded_ + 2);
        to[0] = part_max_[i];
        to[1] = part_sum_[i];
        std::memcpy(to + 2, part, 4 * value_padded_);
      } else {
        kernels_.merge(part, part_max_[i], part_sum_[i], value_padded_,
                       work_.acc + int64_t{r} * value_padded_, work_.max + r, work_.sum + r);
      }
    }
  }

  void finish(const Tile& tile, int head, int heads) const {
    for (int r = 0; r < tile.tokens * group_ * heads; ++r) {
      const int query_head = (head + r / (tile.tokens * group_)) * group_ + r % group_;
      const int token = tile.first + r / group_ % tile.tokens;
      const int64_t at = token * op_.out_stride + int64_t{query_head} * value_dim_;
      const float sum = work_.sum[r];
      float weight = sum > 0.0f ? 1.0f / sum : 0.0f;
      if (op_.sinks && sum > 0.0f) {
        const float sink = op_.sinks[query_head] * kLog2E;
        const float top = std::max(sink, work_.max[r]);
        const float mine = std::exp2(work_.max[r] - top);
        weight = mine / (sum * mine + std::exp2(sink - top));
      }
      float* acc = work_.acc + int64_t{r} * value_padded_;
      for (int d = 0; d < value_dim_; ++d) acc[d] = sum > 0.0f ? acc[d] * weight : 0.0f;
      if (op_.hadamard) hadamard(acc, value_dim_);
      if (op_.head.dtype == F32) {
        std::memcpy(static_cast<float*>(op_.out) + at, acc, sizeof(float) * value_dim_);
      } else {
        uint16_t* out = static_cast<uint16_t*>(op_.out) + at;
        for (int d = 0; d < value_dim_; ++d) out[d] = round_bf16(acc[d]);
      }
    }
  }

  const AttendOp& op_;
  const StepInfo& step_;
  const Team& team_;
  const AttentionKernels& kernels_;
  const LatentForm latent_;
  const int dim_, value_dim_, stored_dim_;  // of queries and keys; of results; of cached vectors
  const int padded_, value_padded_, stored_padded_;
  const int span_keys_, group_;
  const Memory memories_[2];  // the second: of the newest tokens, if there is one
  int tile_tokens_, band_ = 1;  // tokens a tile; kv heads a piece, at most
  int64_t total_ = 0;           // cost of the whole op
  SoftmaxScale scale_;
  Workspace work_;
  HeadMaker maker_;
  std::vector<Piece>& pieces_;
  Places places_;  // of the span that is being read
  Ahead ahead_;
  float part_max_[kTile], part_sum_[kTile];
};

}  // namespace

void run_attend(const void* op, const StepInfo& step, const Team& team) {
  if (step.rows == 0) return;
  Attention(*static_cast<const AttendOp*>(op), step, team).run();
}

}  // namespace skimp
