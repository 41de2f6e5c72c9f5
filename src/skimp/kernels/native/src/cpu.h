// Which instructions this CPU has, and which kernels therefore run.
#pragma once
#include <cstdint>

namespace skimp {

// Ordered: every level can run all lower ones.
enum class Isa : int32_t {
  Scalar = 0,
  Avx2 = 1,
  Avx512 = 2,
  Avx512Vnni = 3,
  Avx512Bf16 = 4,
  Amx = 5,
};

Isa best_isa();                  // what the CPU and the operating system allow
Isa current_isa();               // best, unless lowered
bool set_isa(Isa isa);           // false if the CPU cannot
const char* isa_name(Isa isa);
bool has_vbmi();                 // AVX512-VBMI, which not every Avx512Bf16 CPU has
bool quick_bf16_dots();          // VDPBF16PS as quick as VPDPWSSD, as on AMD's; not on Intel's
bool parse_isa(const char* name, Isa* isa);

}  // namespace skimp
