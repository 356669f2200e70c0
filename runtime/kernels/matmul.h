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
  // The same for a weight of 32 bits, and rows [rows, K] that are ready.
  void multiply_floats(const Run& run, const std::vector<int64_t>& shape, const float* rows,
                       size_t first_input) const;
  Tensor checked_bias(const Run& run, size_t index) const;
  int64_t width() const { return halves() ? packed_.rows / 2 : packed_.rows; }
  // Whether the weight's rows are those of a gate and of what it is multiplied with.
  bool halves() const { return gate_ != Gate::kNone && gated_; }

  const char* name_;
  PackedAttributes packed_;
  Gate gate_;
  bool gated_;
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
