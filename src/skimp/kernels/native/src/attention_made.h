// Keys and values of one head, made of cached latents in the operands' form: the rows of its matrix
// are scored with latents as queries are with keys. Only for files compiled for any CPU.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention_plan.h"
#include "cache_codes.h"

namespace skimp {
namespace {

class HeadMaker {
 public:
  HeadMaker() = default;
  HeadMaker(const AttendOp& op, const AttentionKernels& kernels, const Widths& widths,
            const Workspace& work)
      : op_(&op),
        kernels_(&kernels),
        widths_(widths),
        work_(&work),
        value_row_((op.sizes.nope_dim + kTile - 1) / kTile * kTile) {}

  // Reads the head's matrix. Keys and values each begin with a tile of rows.
  void begin(int head) {
    const LatentSizes& sizes = op_->sizes;
    const int dim = sizes.latent_dim;
    std::memset(work_->makers, 0, (widths_.made + 2 * kTile) * row_bytes());
    std::vector<float> row(dim);
    for (int r = 0; r < widths_.made; ++r) {
      const int64_t at = (int64_t{head} * widths_.made + r) * dim;
      for (int i = 0; i < dim; ++i)
        row[i] = op_->head.dtype == F32
                     ? static_cast<const float*>(op_->made)[at + i]
                     : float_of(int32_t{static_cast<const uint16_t*>(op_->made)[at + i]} << 16);
      const int place = r < sizes.nope_dim ? r : value_row_ + r - sizes.nope_dim;
      kernels_->pack_query(row.data(), 1.0f, dim, widths_.latent, maker(place));
    }
  }

  // Panels of 16 keys and values, of as many panels of latents from position `first` on. Values
  // outside [lo, hi) become zero; keys there are arbitrary.
  void make(int first, int panels, int lo, int hi, char* keys, char* values) const {
    const LatentSizes& sizes = op_->sizes;
    const int64_t line = int64_t{kPanel} * kernels_->operand_bytes;  // of one dimension
    const int rotated = sizes.nope_dim, end = rotated + sizes.rope_dim;
    make_panels(0, sizes.nope_dim, panels, keys, widths_.key);
    make_panels(value_row_, sizes.value_dim, panels, work_->made_values, widths_.value);
    for (int i = 0; i < panels; ++i, first += kPanel) {
      char* key = keys + i * widths_.key * line;
      const char* latent = work_->latents + i * widths_.latent * line;
      std::memcpy(key + rotated * line, latent + sizes.latent_dim * line, sizes.rope_dim * line);
      std::memset(key + end * line, 0, (widths_.key - end) * line);
      const int64_t value = i * widths_.value * line;
      kernels_->turn(work_->made_values + value, widths_.value, std::max(lo - first, 0),
                     std::min(hi - first, kPanel), values + value);
    }
  }

 private:
  int64_t row_bytes() const { return int64_t{widths_.latent} * kernels_->operand_bytes; }

  char* maker(int row) const { return work_->makers + row * row_bytes(); }

  void make_panels(int row, int count, int panels, char* to, int width) const {
    const int64_t line = int64_t{kPanel} * kernels_->operand_bytes;
    for (int d = 0; d < count; d += kTile) {
      kernels_->score(maker(row + d), kTile, widths_.latent, work_->latents, panels,
                      work_->scores);
      for (int i = 0; i < panels; ++i)
        kernels_->pack_made(work_->scores + i * kPanel, std::min(kTile, count - d),
                            to + (int64_t{i} * width + d) * line);
    }
  }

  const AttendOp* op_ = nullptr;
  const AttentionKernels* kernels_ = nullptr;
  Widths widths_{};
  const Workspace* work_ = nullptr;
  int value_row_ = 0;
};

}  // namespace
}  // namespace skimp
