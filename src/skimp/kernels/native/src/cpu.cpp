#include "cpu.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace skimp {
namespace {

#if defined(__x86_64__)

uint64_t xgetbv() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux grants the 8 KiB of tile state only to processes that ask.
bool request_amx() {
#if defined(__linux__)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023;
  constexpr int XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

Isa detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::Scalar;
  const bool osxsave = c & (1u << 27), fma = c & (1u << 12), avx = c & (1u << 28);
  if (!osxsave || !fma || !avx) return Isa::Scalar;
  const uint64_t state = xgetbv();
  if ((state & 0x6) != 0x6) return Isa::Scalar;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::Scalar;
  if (!(b & (1u << 5))) return Isa::Scalar;
  // F, DQ, BW, VL and the opmask and zmm state
  const uint32_t avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  if ((b & avx512) != avx512 || (state & 0xe6) != 0xe6) return Isa::Avx2;
  const bool vnni = c & (1u << 11);
  const bool amx = (d & (1u << 24)) && (d & (1u << 22)) && (state & 0x60000) == 0x60000;
  if (!vnni) return Isa::Avx512;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return Isa::Avx512Vnni;
  return amx && request_amx() ? Isa::Amx : Isa::Avx512Bf16;
}

#else

Isa detect() { return Isa::Scalar; }

#endif

std::atomic<int> chosen{-1};

constexpr const char* NAMES[] = {"scalar",     "avx2",       "avx512",
                                 "avx512vnni", "avx512bf16", "amx"};

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa current_isa() {
  const int isa = chosen.load(std::memory_order_relaxed);
  return isa < 0 ? best_isa() : static_cast<Isa>(isa);
}

bool set_isa(Isa isa) {
  if (isa > best_isa()) return false;
  chosen = static_cast<int>(isa);
  return true;
}

const char* isa_name(Isa isa) { return NAMES[static_cast<int>(isa)]; }

bool has_vbmi() {
#if defined(__x86_64__)
  uint32_t a, b, c, d;
  static const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & (1u << 1));
  return has && best_isa() >= Isa::Avx512;
#else
  return false;
#endif
}

bool quick_bf16_dots() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

bool parse_isa(const char* name, Isa* isa) {
  for (int i = 0; i < 6; ++i) {
    if (std::strcmp(name, NAMES[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

}  // namespace skimp
