#pragma once

#include "kernel.h"

namespace onnxsmith {

// MultiHeadAttention without a cache, of which every row sees every key, see docs/kernels.md.
class MultiHeadAttention : public Kernel {
 public:
  explicit MultiHeadAttention(const Node& node);
  void compute(const Run& run) const override;

 private:
  int64_t heads_;
  float scale_;
};

}  // namespace onnxsmith
