// IEEE 754 binary16 without help of the processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace onnxsmith {

inline float float_of_half(uint16_t half) {
  // The exponent is moved by multiplication, which is right for subnormal numbers too; infinities and NaN
  // are not.
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t rest = uint32_t(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &rest, sizeof(value));
  value *= 5.192296858534828e33f;  // 2^112
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((half & 0x7c00) == 0x7c00) bits = 0x7f800000u | (uint32_t(half & 0x3ff) << 13);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace onnxsmith
