// What an AArch64 processor and its system have.
#pragma once

#if defined(__aarch64__)

#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace onnxsmith {

// Products of 4 bytes with 4 bytes, added to 32 bits: from ARMv8.4 on, and in many before.
inline bool has_dot_products() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP
#else
  return true;  // all that macOS runs on
#endif
}

}  // namespace onnxsmith

#endif
