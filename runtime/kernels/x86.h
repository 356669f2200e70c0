// What an x86 processor and its system have. Not by __builtin_cpu_supports: zig's knows of nothing.
#pragma once

#if defined(__x86_64__)

#include <cpuid.h>

#include <cstdint>

namespace onnxsmith {

struct X86 {
  bool avx2 = false;        // with FMA and conversions of float16
  bool avxvnni = false;
  bool avx512vnni = false;  // with the parts F, BW, DQ and VL

  X86() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const uint32_t needed = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;  // FMA, OSXSAVE, AVX, F16C
    if ((c & needed) != needed) return;
    // The registers that the system keeps for each thread.
    uint32_t kept, upper;
    __asm__("xgetbv" : "=a"(kept), "=d"(upper) : "c"(0));
    if ((kept & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = (b >> 5 & 1) != 0;
    const uint32_t parts = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    avx512vnni = avx2 && (kept & 0xe6) == 0xe6 && (b & parts) == parts && (c >> 11 & 1) != 0;
    avxvnni = avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1) != 0;
  }
};

inline const X86& x86() {
  static const X86 found;
  return found;
}

}  // namespace onnxsmith

#endif
