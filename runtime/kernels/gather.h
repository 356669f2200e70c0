#pragma once

#include "packed.h"

namespace onnxsmith {

// GatherPacked: rows of a packed weight by their numbers, in float32, see docs/kernels.md.
class GatherPacked : public Kernel {
 public:
  explicit GatherPacked(const Node& node) : packed_(node, "GatherPacked", 1) {
    if (packed_.is_float()) fail("GatherPacked, bits", "32", "4 or 8");
  }
  void compute(const Run& run) const override;

 private:
  PackedAttributes packed_;
};

}  // namespace onnxsmith
