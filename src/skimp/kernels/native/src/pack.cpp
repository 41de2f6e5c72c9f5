// Row-major weights to panels and back (layout in op.h).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "op.h"

namespace skimp {
namespace {

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, body = half & 0x7fffu;
  if (body >= 0x7c00u) return to_float(sign | 0x7f800000u | (body & 0x3ffu) << 13);
  // Scaling by a power of two puts the exponent right, subnormals included.
  return to_float(sign | to_bits(to_float(body << 13) * to_float((127u + 112u) << 23)));
}

uint16_t float_to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
T read(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <class To>
To element(const char* row, int64_t i, int32_t dtype) {
  if constexpr (sizeof(To) == 2)
    if (dtype == SRC_BF16) return read<uint16_t>(row + 2 * i);
  const float value = dtype == SRC_F32    ? read<float>(row + 4 * i)
                      : dtype == SRC_BF16 ? to_float(uint32_t{read<uint16_t>(row + 2 * i)} << 16)
                                          : half_to_float(read<uint16_t>(row + 2 * i));
  if constexpr (sizeof(To) == 2) return float_to_bf16(value);
  else return value;
}

struct Place {
  int64_t panel;
  int lane;
};

Place place(const PackOp& op, int row) {
  const int output = op.first + row;
  const int64_t panel = output / PANEL;
  return {op.layout == 0 ? panel : 2 * panel + (op.layout - 1), output % PANEL};
}

// T is the element of the panels; a line holds PER of them for each of the 16 outputs.
template <class T>
void pack_rows(const PackOp& op, int first, int last) {
  constexpr int PER = sizeof(T) == 2 ? 2 : 1;
  const int64_t k_padded =
      PER == 2 ? (int64_t{op.k} + K_ALIGN - 1) / K_ALIGN * K_ALIGN : op.k;
  const int64_t item = op.rows_dtype == SRC_F32 ? 4 : 2;
  // A tile of rows and k at a time: panel lines are written while they are in the cache.
  constexpr int K_BLOCK = 128;
  for (int row0 = first; row0 < last; row0 += PANEL) {
    const int row1 = std::min(row0 + PANEL, last);
    for (int k0 = 0; k0 < op.k; k0 += K_BLOCK) {
      const int k1 = std::min(k0 + K_BLOCK, op.k);
      for (int row = row0; row < row1; ++row) {
        const Place at = place(op, row);
        T* panel = static_cast<T*>(op.panels) + at.panel * k_padded * PANEL + at.lane * PER;
        char* line = static_cast<char*>(op.rows) + row * op.row_stride * item;
        if (op.unpack) {
          for (int k = k0; k < k1; ++k)
            std::memcpy(line + k * item, &panel[int64_t{k / PER} * PER * PANEL + k % PER], sizeof(T));
        } else {
          int k = k0;
          // The usual case, bfloat16 as it is: a pair is one word on both sides.
          if (PER == 2 && op.rows_dtype == SRC_BF16)
            for (; k + 2 <= k1; k += 2) std::memcpy(&panel[int64_t{k} * PANEL], line + 2 * k, 4);
          for (; k < k1; ++k)
            panel[int64_t{k / PER} * PER * PANEL + k % PER] = element<T>(line, k, op.rows_dtype);
        }
      }
    }
  }
}

// Where in its panel, from its output's first byte on, weight k of an output lies.
struct LowPlace {
  int64_t byte;
  int shift;
};

LowPlace low_place(int kind, int64_t k) {
  const int64_t eight = k / LOW_ALIGN;
  const int i = k % LOW_ALIGN, pair = i / 2, half = i % 2;
  if (kind == LOW_INT4) return {eight * 64 + half * 2 + pair / 2, pair % 2 * 4};
  return {eight * 128 + pair / 2 * 64 + half * 2 + pair % 2, 0};
}

void pack_low_rows(const PackOp& op, int first, int last) {
  const bool four = op.low_kind == LOW_INT4;
  const int64_t k_padded = (int64_t{op.k} + LOW_ALIGN - 1) / LOW_ALIGN * LOW_ALIGN;
  const int64_t panel_bytes = k_padded * PANEL / (four ? 2 : 1);
  const uint8_t offset = op.low_kind == LOW_INT8 ? 128 : 0;
  constexpr int K_BLOCK = 256;
  LowPlace places[K_BLOCK];
  for (int k0 = 0; k0 < op.k; k0 += K_BLOCK) {
    const int count = std::min(K_BLOCK, op.k - k0);
    for (int i = 0; i < count; ++i) places[i] = low_place(op.low_kind, k0 + i);
    for (int row = first; row < last; ++row) {
      const Place at = place(op, row);
      uint8_t* panel = static_cast<uint8_t*>(op.panels) + at.panel * panel_bytes + at.lane * 4;
      uint8_t* line = static_cast<uint8_t*>(op.rows) + row * op.row_stride;
      for (int i = 0; i < count; ++i) {
        uint8_t& there = panel[places[i].byte];
        if (!four) {
          uint8_t& here = line[k0 + i];
          (op.unpack ? here : there) = (op.unpack ? there : here) ^ offset;
        } else {
          uint8_t& here = line[(k0 + i) / 2];
          const int in = (k0 + i) % 2 * 4, out = places[i].shift;
          if (op.unpack)
            here |= (there >> out & 15) << in;
          else
            there |= (here >> in & 15) << out;
        }
      }
    }
  }
}

}  // namespace

void run_pack(const void* op_, const StepInfo&, const Team& team) {
  const auto& op = *static_cast<const PackOp*>(op_);
  // In multiples of a panel, so that no two threads write to one cache line.
  const int64_t first = op.first, end = op.first + op.n;
  const int64_t panels = (end + PANEL - 1) / PANEL - first / PANEL;
  auto edge = [&](int part) {
    const int64_t output = (first / PANEL + panels * part / team.size) * PANEL;
    return static_cast<int>(std::clamp(output, first, end) - first);
  };
  const int begin = edge(team.tid);
  const int stop = team.tid + 1 == team.size ? op.n : edge(team.tid + 1);
  if (op.low_kind != LOW_NONE)
    pack_low_rows(op, begin, stop);
  else if (op.head.dtype == BF16)
    pack_rows<uint16_t>(op, begin, stop);
  else
    pack_rows<float>(op, begin, stop);
}

}  // namespace skimp
