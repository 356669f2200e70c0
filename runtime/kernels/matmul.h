#pragma once

#include "packed.h"

namespace onnxsmith {

// MatMulPacked: A [..., K] times a packed weight's transpose, see docs/kernels.md.
class MatMulPacked : public Kernel {
 public:
  explicit MatMulPacked(const Attributes& attributes) : MatMulPacked(attributes, "MatMulPacked") {}
  void compute(const Run& run) const override;

 protected:
  MatMulPacked(const Attributes& attributes, const char* name);
  // The product of what `prepare(row, memory)` gives for each row: K numbers, in `memory` or elsewhere.
  template <typename Prepare>
  void multiply(const Run& run, const Tensor& a, size_t first_input, const Prepare& prepare) const;

  const char* name_;
  PackedAttributes packed_;
  Gate gate_;
};

// NormMatMulPacked: MatMulPacked of the RMS norm of A (+ skip), and that sum.
class NormMatMulPacked : public MatMulPacked {
 public:
  explicit NormMatMulPacked(const Attributes& attributes);
  void compute(const Run& run) const override;

 private:
  float epsilon_;
};

}  // namespace onnxsmith
