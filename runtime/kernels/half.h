// IEEE 754 binary16 without help of the processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace onnxsmith {

inline float float_of_half(uint16_t half) {
  // The exponent is moved by multiplication. That would be right for subnormal numbers too, but a session may
  // have its processor take those of float32 for zero.
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t rest = uint32_t(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &rest, sizeof(value));
  value *= 5.192296858534828e33f;  // 2^112
  if ((half & 0x7c00) == 0) value = static_cast<float>(int32_t(half & 0x3ff)) * 5.9604644775390625e-8f;  // 2^-24
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((half & 0x7c00) == 0x7c00) bits = 0x7f800000u | (uint32_t(half & 0x3ff) << 13);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace onnxsmith
