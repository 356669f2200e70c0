#pragma once

#include "packed.h"

namespace onnxsmith {

// MatMulPacked: A [..., K] times a packed weight's transpose, see docs/kernels.md.
class MatMulPacked : public Kernel {
 public:
  explicit MatMulPacked(const Node& node) : MatMulPacked(node, "MatMulPacked", 1, 5) {}
  void compute(const Run& run) const override;

 protected:
  // Without a `residual` where that is 0.
  MatMulPacked(const Node& node, const char* name, size_t first_input, size_t residual);
  // The product of what `prepare(row, memory)` gives for each row: K numbers, in `memory` or elsewhere.
  template <typename Prepare>
  void multiply(const Run& run, const Tensor& a, const Prepare& prepare) const;
  // The same for a weight of 32 bits, and rows [rows, K] that are ready.
  void multiply_floats(const Run& run, const Shape& shape, const float* rows) const;
  struct Place;
  struct Results;
  // What comes behind a product: bias, unless products began with it, activation and residual.
  void finish(const Results& results, const Place& place, float* const* to, bool straight, bool add_bias) const;
  Tensor checked_bias(const Run& run) const;
  // What is added to a result of this shape.
  Tensor checked_residual(const Run& run, const Shape& shape) const;
  int64_t width() const { return halves() ? packed_.rows / 2 : packed_.rows; }
  // Whether the weight's rows are those of a gate and of what it is multiplied with.
  bool halves() const { return gate_ != Gate::kNone && gated_; }

  const char* name_;
  PackedAttributes packed_;
  size_t bias_;      // which input
  size_t residual_;  // which input, or 0
  Gate gate_;
  bool gated_;
};

// NormMatMulPacked: MatMulPacked of the RMS norm of A (+ skip), and that sum.
class NormMatMulPacked : public MatMulPacked {
 public:
  explicit NormMatMulPacked(const Node& node);
  void compute(const Run& run) const override;

 private:
  float epsilon_;
};

}  // namespace onnxsmith
