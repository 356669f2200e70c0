// A packed weight as operators get it: attributes and three inputs.
#pragma once

#include "kernel.h"
#include "tiles.h"

namespace onnxsmith {

struct PackedAttributes {
  int64_t columns;  // K
  int64_t rows;     // N
  int64_t bits;
  int64_t block_size;
  int64_t activation_block;

  // Throws std::invalid_argument where they do not fit each other.
  PackedAttributes(const Attributes& attributes, const char* name);
  int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  // The weight, after a check of types and sizes. `offsets` may be absent.
  Weight weight(const Tensor& codes, const Tensor& scales, const Tensor& offsets) const;
  // A weight of 32 bits: its tiles [K, 16], one after the other.
  const float* floats(const Tensor& tiles) const;
  bool is_float() const { return bits == 32; }
  // Throws where the last axis of an operand is not K numbers.
  void check_rows(const Tensor& operand, const char* what) const;

 private:
  const char* name_;
};

}  // namespace onnxsmith
