// QK-norm, rotary embedding (Su et al. 2021), the Hadamard turn and the append of keys and values,
// or of latents, to the cache.
// The loops are plain C++, compiled for several targets; without contraction or reassociation
// all of them give the same bits.
#include <cmath>
#include <cstring>
#include <vector>

#include "cache_codes.h"
#include "cache_pages.h"
#include "cpu.h"

namespace skimp {
namespace {

SKIMP_ALWAYS void norm(float* x, const float* factor, int dim, float eps) {
  float part[16] = {};
  int d = 0;
  for (; d + 16 <= dim; d += 16)
    for (int i = 0; i < 16; ++i) part[i] += x[d + i] * x[d + i];
  for (int i = 0; d + i < dim; ++i) part[i] += x[d + i] * x[d + i];
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  const float scale = 1.0f / std::sqrt(part[0] / static_cast<float>(dim) + eps);
  for (d = 0; d < dim; ++d) x[d] = x[d] * scale * factor[d];
}

SKIMP_ALWAYS void rotate(float* x, const float* cos, const float* sin, int half, bool interleaved) {
  if (interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  float* __restrict lo = x;
  float* __restrict hi = x + half;
  for (int i = 0; i < half; ++i) {
    const float a = lo[i], b = hi[i];
    lo[i] = a * cos[i] - b * sin[i];
    hi[i] = b * cos[i] + a * sin[i];
  }
}

// A key becomes one lane of its panel: a word every 64 bytes.
SKIMP_ALWAYS void write_key(const float* __restrict x, char* __restrict block, int lane, int dim,
                             bool bf16) {
  char* at = block + 4 * lane;
  if (!bf16) {
    for (int d = 0; d < dim; ++d) std::memcpy(at + 64 * d, x + d, 4);
    return;
  }
  for (int d = 0; d + 2 <= dim; d += 2) {
    const uint16_t pair[2] = {round_bf16(x[d]), round_bf16(x[d + 1])};
    std::memcpy(at + 32 * d, pair, 4);
  }
  if (dim % 2) {
    const uint16_t last = round_bf16(x[dim - 1]);
    std::memcpy(block + 32 * (dim - 1) + 2 * lane, &last, 2);
  }
}

// A bf16 value becomes one half of its pair; another thread may be writing the other half.
SKIMP_ALWAYS void write_value(const float* __restrict x, char* __restrict block, int lane,
                               int dim, bool bf16) {
  if (!bf16) {
    std::memcpy(block + sizeof(float) * lane * dim, x, sizeof(float) * dim);
    return;
  }
  char* at = block + 4 * (lane / 2) * dim + 2 * (lane % 2);
  for (int d = 0; d < dim; ++d) {
    const uint16_t rounded = round_bf16(x[d]);
    std::memcpy(at + 4 * d, &rounded, 2);
  }
}

// Every lane of a block of codes is written by its own thread.
SKIMP_ALWAYS void write(const Pages& pages, int seq, int head, int heads, int position, bool bf16,
                        const float* k, const float* v, int dim) {
  const int lane = position % kBlock;
  char* keys = pages.block(seq, head, position);
  char* values = pages.block(seq, heads + head, position);
  if (pages.at.format == CACHE_DENSE) {
    write_key(k, keys, lane, dim, bf16);
    write_value(v, values, lane, dim, bf16);
    return;
  }
  auto* key_codes = reinterpret_cast<uint8_t*>(keys);
  auto* value_codes = reinterpret_cast<uint8_t*>(values);
  pages.scales(seq, head, position)[lane] =
      encode(pages.at.format, k, dim, key_codes + lane, kBlock);
  pages.scales(seq, heads + head, position)[lane] =
      encode(pages.at.format, v, dim, value_codes + lane * pages.vector, 1);
}

// Units are (row, kv head): its query heads, its key, its value.
SKIMP_ALWAYS void run_units(const RopeAppendOp& op, int64_t from, int64_t to) {
  const RowMeta& meta = op.meta;
  const int dim = op.head_dim, half = op.rotary_dim / 2, heads = op.num_kv_heads;
  const int group = op.num_heads / heads;
  const bool bf16 = op.head.dtype == BF16;
  const Pages cache(op.cache, meta, op.head.dtype, heads, dim);
  const Pages recent(op.recent, meta, op.head.dtype, heads, dim);
  for (int64_t unit = from; unit < to; ++unit) {
    const int64_t row = unit / heads;
    const int head = static_cast<int>(unit % heads);
    const int position = meta.positions[row], seq = meta.row_seq[row];
    const float* cos = op.cos ? op.cos + int64_t{position} * half : nullptr;
    const float* sin = op.cos ? op.sin + int64_t{position} * half : nullptr;
    float* q = op.qkv + row * op.qkv_stride + int64_t{head} * group * dim;
    float* k = op.qkv + row * op.qkv_stride + (int64_t{op.num_heads} + head) * dim;
    float* v = k + int64_t{heads} * dim;
    for (int g = 0; g < group; ++g) {
      float* x = q + int64_t{g} * dim;
      if (op.q_norm) norm(x, op.q_norm, dim, op.norm_eps);
      if (cos) rotate(x, cos, sin, half, op.interleaved);
      if (op.hadamard) hadamard(x, dim);
    }
    if (op.k_norm) norm(k, op.k_norm, dim, op.norm_eps);
    if (cos) rotate(k, cos, sin, half, op.interleaved);
    if (op.hadamard) hadamard(k, dim), hadamard(v, dim);
    write(cache, seq, head, heads, position, bf16, k, v, dim);
    if (op.recent.block_table) write(recent, seq, head, heads, position, bf16, k, v, dim);
  }
}

// Units are the heads of a row, then its latent.
SKIMP_ALWAYS void run_units(const LatentAppendOp& op, int64_t from, int64_t to) {
  const RowMeta& meta = op.meta;
  const LatentSizes& sizes = op.sizes;
  const int half = op.rotary_dim / 2, dim = sizes.latent_dim + sizes.rope_dim;
  const Pages cache(op.cache, meta, op.head.dtype, 1, dim);
  thread_local std::vector<float> cached;
  cached.resize(dim);
  for (int64_t unit = from; unit < to; ++unit) {
    const int64_t row = unit / (op.num_heads + 1), head = unit % (op.num_heads + 1);
    const int position = meta.positions[row];
    const bool is_latent = head == op.num_heads;
    float* x = cached.data();
    if (is_latent)
      std::memcpy(x, op.latents + row * op.latents_stride, sizeof(float) * dim);
    else
      x = op.queries + row * op.q_stride + head * (sizes.nope_dim + sizes.rope_dim);
    float* rotated = x + (is_latent ? sizes.latent_dim : sizes.nope_dim);
    if (op.cos)
      rotate(rotated, op.cos + int64_t{position} * half, op.sin + int64_t{position} * half, half,
             op.interleaved);
    if (!is_latent) {
      float* absorbed = op.absorbed + row * op.absorbed_stride + head * dim + sizes.latent_dim;
      std::memcpy(absorbed, rotated, sizeof(float) * sizes.rope_dim);
      continue;
    }
    norm(x, op.norm, sizes.latent_dim, op.norm_eps);
    write_key(x, cache.block(meta.row_seq[row], 0, position), position % kBlock, dim,
              op.head.dtype == BF16);
  }
}

void run_any(const auto& op, int64_t from, int64_t to) { run_units(op, from, to); }

#if defined(__x86_64__)
__attribute__((target("avx2")))
void run_avx2(const auto& op, int64_t from, int64_t to) { run_units(op, from, to); }

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
void run_avx512(const auto& op, int64_t from, int64_t to) { run_units(op, from, to); }
#endif

void share_units(const auto& op, int64_t units, const Team& team) {
  const int64_t from = units * team.tid / team.size, to = units * (team.tid + 1) / team.size;
#if defined(__x86_64__)
  if (current_isa() >= Isa::Avx512) return run_avx512(op, from, to);
  if (current_isa() >= Isa::Avx2) return run_avx2(op, from, to);
#endif
  run_any(op, from, to);
}

}  // namespace

void run_rope_append(const void* op_, const StepInfo& step, const Team& team) {
  const auto& op = *static_cast<const RopeAppendOp*>(op_);
  share_units(op, int64_t{step.rows} * op.num_kv_heads, team);
}

void run_latent_append(const void* op_, const StepInfo& step, const Team& team) {
  const auto& op = *static_cast<const LatentAppendOp*>(op_);
  share_units(op, int64_t{step.rows} * (op.num_heads + 1), team);
}

}  // namespace skimp
