#pragma once

#include "kernel.h"

namespace onnxsmith {

// GroupQueryAttention with the inputs of com.microsoft's, see docs/kernels.md.
class GroupQueryAttention : public Kernel {
 public:
  explicit GroupQueryAttention(const Node& node);
  void compute(const Run& run) const override;

 private:
  int64_t heads_;
  int64_t kv_heads_;
  float scale_;
  float softcap_;
  int64_t window_;
  bool rotary_;
  bool interleaved_;
  bool rotary_rows_;
};

}  // namespace onnxsmith
