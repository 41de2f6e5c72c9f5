// Where the blocks of a layer's cache lie in its pages (layout in op.h).
#pragma once
#include "op.h"

namespace skimp {

constexpr int kBlock = 16;  // tokens whose keys, or values, lie together

struct Pages {
  char* arena;
  CachePages at;
  int64_t vector;  // bytes of one vector's numbers
  int planes;      // keys of every kv head, then values

  inline __attribute__((always_inline)) Pages(const CachePages& pages, const RowMeta& meta,
                                              int32_t dtype, int kv_heads, int head_dim)
      : arena(meta.arena),
        at(pages),
        vector(pages.format == CACHE_DENSE  ? int64_t{head_dim} * (dtype == F32 ? 4 : 2)
               : pages.format == CACHE_INT4 ? head_dim / 2
                                            : head_dim),
        planes(2 * kv_heads) {}

  // The block that `position` of a sequence is in.
  inline __attribute__((always_inline)) char* block(int seq, int plane, int position) const {
    return share(seq, position) + slot(plane, position) * vector;
  }

  inline __attribute__((always_inline)) uint16_t* scales(int seq, int plane, int position) const {
    return reinterpret_cast<uint16_t*>(share(seq, position) + planes * at.page_tokens * vector) +
           slot(plane, position);
  }

 private:
  inline __attribute__((always_inline)) char* share(int seq, int position) const {
    const int32_t* table = at.block_table + seq * at.table_stride;
    return arena + int64_t{64} * table[position / at.page_tokens] + at.layer_offset;
  }

  inline __attribute__((always_inline)) int64_t slot(int plane, int position) const {
    const int within = position % at.page_tokens;
    return int64_t{plane} * at.page_tokens + within - within % kBlock;
  }
};

}  // namespace skimp
