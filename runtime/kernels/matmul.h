#pragma once

#include "packed.h"

namespace onnxsmith {

// MatMulPacked: A [..., K] times a packed weight's transpose, see docs/kernels.md.
class MatMulPacked : public Kernel {
 public:
  explicit MatMulPacked(const Attributes& attributes);
  void compute(const Run& run) const override;

 private:
  PackedAttributes packed_;
  Gate gate_;
};

}  // namespace onnxsmith
