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

  // The weight is the inputs from `first_input` on. Throws std::invalid_argument where attributes do not fit
  // each other.
  PackedAttributes(const Node& node, const char* name, size_t first_input);
  int64_t tiles() const { return tiles_of(rows); }
  // The weight, whose types and sizes were checked: once, where it is the same in every run.
  Weight weight(const Run& run) const;
  // A weight of 32 bits: its tiles [K, 16], one after the other.
  const float* floats(const Run& run) const;
  bool is_float() const { return bits == 32; }
  // Throws where the last axis of an operand is not K numbers.
  void check_rows(const Tensor& operand, const char* what) const;

 private:
  void check_blocks() const;
  Weight checked(const Tensor& codes, const Tensor& scales, const Tensor& offsets) const;
  const float* checked(const Tensor& tiles) const;

  const char* name_;
  size_t first_input_;
  bool kept_ = false;
  Weight weight_{};
  const float* floats_ = nullptr;
};

}  // namespace onnxsmith
