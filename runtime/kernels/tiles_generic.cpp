// For any processor: plain loops over the 16 rows of a tile, which compilers turn into what it has.
#include "half.h"
#include "tiles.h"

namespace onnxsmith {
namespace generic {

#include "tiles.inl"

// The integer products of one unit of a tile's codes with one row: out[c] += sum of q * a.
inline void unit_product(const uint8_t* codes, int bits, const int8_t* row, int64_t unit, int32_t* out) {
  if (bits == 8) {
    for (int64_t g = 0; g < unit / 4; ++g, codes += 64, row += 4) {
      for (int c = 0; c < kTile; ++c) {
        for (int i = 0; i < 4; ++i) out[c] += int32_t(codes[4 * c + i]) * row[i];
      }
    }
    return;
  }
  for (int64_t g = 0; g < unit / 8; ++g, codes += 64, row += 8) {
    for (int c = 0; c < kTile; ++c) {
      for (int i = 0; i < 4; ++i) {
        out[c] += int32_t(codes[4 * c + i] & 15) * row[i] + int32_t(codes[4 * c + i] >> 4) * row[i + 4];
      }
    }
  }
}

inline void load(const void* from, bool half, int64_t at, float* out) {
  for (int c = 0; c < kTile; ++c) {
    out[c] = half ? float_of_half(static_cast<const uint16_t*>(from)[at + c])
                  : static_cast<const float*>(from)[at + c];
  }
}

void product(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
             int64_t stride) {
  const int64_t unit = weight.unit();
  const int64_t units = weight.columns / unit;
  const int64_t unit_bytes = unit * kTile * weight.bits / 8;
  const uint8_t* codes = weight.codes + tile * weight.code_bytes();
  const int64_t scales_at = tile * weight.blocks() * kTile;
  for (int64_t r = 0; r < count; ++r) {
    float acc[kTile] = {};
    for (int64_t u = 0; u < units; ++u) {
      const int64_t at = scales_at + u * unit / weight.block_size * kTile;
      const float scale_of_row = rows.scales[r * (weight.columns / kActivations) + u * unit / kActivations];
      const int32_t sum = rows.sums[r * units + u];
      int32_t dot[kTile] = {};
      unit_product(codes + u * unit_bytes, weight.bits, rows.codes + r * weight.columns + u * unit, unit, dot);
      float scales[kTile];
      load(weight.scales, weight.half_scales, at, scales);
      if (weight.kind == Offsets::kMiddle) {
        for (int c = 0; c < kTile; ++c) dot[c] -= sum << (weight.bits - 1);
      } else if (weight.kind == Offsets::kZeroPoints) {
        for (int c = 0; c < kTile; ++c) dot[c] -= sum * static_cast<const uint8_t*>(weight.offsets)[at + c];
      }
      for (int c = 0; c < kTile; ++c) acc[c] = std::fma(float(dot[c]), scales[c] * scale_of_row, acc[c]);
      if (weight.kind == Offsets::kMinimums) {
        float offsets[kTile];
        load(weight.offsets, weight.half_offsets, at, offsets);
        for (int c = 0; c < kTile; ++c) acc[c] = std::fma(offsets[c], rows.scaled_sums[r * units + u], acc[c]);
      }
    }
    std::memcpy(out + r * stride, acc, sizeof(acc));
  }
}

bool supported() { return true; }

}  // namespace generic

const Tiles& generic_tiles() {
  static const Tiles tiles{"generic", generic::supported, generic::round, generic::normalize, generic::product, generic::gate};
  return tiles;
}

}  // namespace onnxsmith
