#include "gather.h"

#include "half.h"

namespace onnxsmith {

namespace {

float element(const void* from, bool half, int64_t at) {
  return half ? float_of_half(static_cast<const uint16_t*>(from)[at]) : static_cast<const float*>(from)[at];
}

void unpack_row(const Weight& weight, int64_t row, float* out) {
  const int64_t tile = row / kTile;
  const int64_t c = row % kTile;
  const uint8_t* codes = weight.codes + tile * weight.code_bytes() + 4 * c;
  for (int64_t k = 0; k < weight.columns; ++k) {
    const int64_t at = (tile * weight.blocks() + k / weight.block_size) * kTile + c;
    int code;
    if (weight.bits == 8) {
      code = codes[k / 4 * 64 + k % 4];
    } else {
      code = (codes[k / 8 * 64 + k % 4] >> (k % 8 < 4 ? 0 : 4)) & 15;
    }
    const float scale = element(weight.scales, weight.half_scales, at);
    if (weight.kind == Offsets::kMinimums) {
      out[k] = scale * float(code) + element(weight.offsets, weight.half_offsets, at);
    } else {
      const int zero = weight.kind == Offsets::kMiddle ? 1 << (weight.bits - 1)
                                                       : static_cast<const uint8_t*>(weight.offsets)[at];
      out[k] = scale * float(code - zero);
    }
  }
}

}  // namespace

void GatherPacked::compute(const Run& run) const {
  const Tensor ids = run.input(0);
  const Weight weight = packed_.weight(run.input(1), run.input(2), run.input(3));
  std::vector<int64_t> shape = ids.shape;
  shape.push_back(packed_.columns);
  const Tensor y = run.output(0, shape, kFloat);
  const int64_t count = ids.size();
  for (int64_t i = 0; i < count; ++i) {
    int64_t row = ids.as<int64_t>()[i];
    if (row < 0) row += packed_.rows;
    if (row < 0 || row >= packed_.rows) {
      fail("GatherPacked, ids", std::to_string(ids.as<int64_t>()[i]),
           "numbers in [-N, N) with N = " + std::to_string(packed_.rows));
    }
    unpack_row(weight, row, y.as<float>() + i * packed_.columns);
  }
}

}  // namespace onnxsmith
