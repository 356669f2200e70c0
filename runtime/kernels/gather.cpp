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
  const int64_t columns = weight.bits == 8 ? 4 : 8;  // of this row, in 64 bytes of a tile
  for (int64_t block = 0; block < weight.blocks(); ++block) {
    const int64_t at = (tile * weight.blocks() + block) * kTile + c;
    const float scale = element(weight.scales, weight.half_scales, at);
    const bool minimums = weight.kind == Offsets::kMinimums;
    float offset = static_cast<float>(1 << (weight.bits - 1));
    if (minimums) offset = element(weight.offsets, weight.half_offsets, at);
    if (weight.kind == Offsets::kZeroPoints) offset = static_cast<const uint8_t*>(weight.offsets)[at];
    const int64_t end = (block + 1) * weight.block_size;
    for (int64_t k = block * weight.block_size; k < end; k += columns) {
      const uint8_t* four = codes + k / columns * 64;
      float some[8];
      for (int i = 0; i < 4; ++i) {
        some[i] = static_cast<float>(weight.bits == 8 ? four[i] : four[i] & 15);
        some[4 + i] = static_cast<float>(four[i] >> 4);
      }
      for (int64_t i = 0; i < columns; ++i) {
        out[k + i] = minimums ? scale * some[i] + offset : scale * (some[i] - offset);
      }
    }
  }
}

}  // namespace

void GatherPacked::compute(const Run& run) const {
  const Tensor ids = run.input(0);
  const Weight weight = packed_.weight(run);
  Shape shape = ids.shape;
  shape.push_back(packed_.columns);
  const Tensor y = run.output(0, shape, kFloat);
  run.for_rows(ids.size(), [&](int64_t i) {
    int64_t row = ids.as<int64_t>()[i];
    if (row < 0) row += packed_.rows;
    if (row < 0 || row >= packed_.rows) {
      fail("GatherPacked, ids", std::to_string(ids.as<int64_t>()[i]),
           "numbers in [-N, N) with N = " + std::to_string(packed_.rows));
    }
    unpack_row(weight, row, y.as<float>() + i * packed_.columns);
  });
}

}  // namespace onnxsmith
