// For any processor: vectors and loops over the 16 rows of a tile, which compilers turn into what it has.
#include "half.h"
#include "tiles.h"

namespace onnxsmith {
namespace generic {

#include "vector_generic.inl"

#include "tiles.inl"

// Eight sums or codes side by side, which every processor has instructions for.
typedef uint16_t Lanes __attribute__((vector_size(16)));
constexpr int kVectors = 4;  // of 16 bytes: a group of codes of all 16 rows

// Lanes hold two columns of a row by turns.
inline Lanes pairs(int8_t first, int8_t second) {
  const uint16_t a = static_cast<uint16_t>(int16_t(first));
  const uint16_t b = static_cast<uint16_t>(int16_t(second));
  return Lanes{a, b, a, b, a, b, a, b};
}

inline Lanes load(const uint8_t* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

inline int32_t sum(Lanes lanes, int row) {
  return int32_t(static_cast<int16_t>(lanes[2 * row])) + static_cast<int16_t>(lanes[2 * row + 1]);
}

// The integer products of one step of a tile's codes with one row. A product of 4 bits is at most 15 * 127, and
// 16 of them fit a lane of 16 bits; 8 bits are multiplied in halves.
inline void step_product(const uint8_t* codes, int bits, const int8_t* row, int64_t step, int32_t* out) {
  Lanes low[kVectors] = {};
  if (bits == 4) {
    for (int64_t g = 0; g < step / 8; ++g, codes += 64, row += 8) {
      const Lanes a = pairs(row[0], row[2]);
      const Lanes b = pairs(row[1], row[3]);
      const Lanes c = pairs(row[4], row[6]);
      const Lanes d = pairs(row[5], row[7]);
      for (int j = 0; j < kVectors; ++j) {
        const Lanes q = load(codes + 16 * j);
        low[j] += (q & 15) * a + ((q >> 8) & 15) * b + ((q >> 4) & 15) * c + (q >> 12) * d;
      }
    }
    for (int c = 0; c < kTile; ++c) out[c] = sum(low[c / 4], c % 4);
    return;
  }
  Lanes high[kVectors] = {};
  for (int64_t g = 0; g < step / 4; ++g, codes += 64, row += 4) {
    const Lanes a = pairs(row[0], row[2]);
    const Lanes b = pairs(row[1], row[3]);
    for (int j = 0; j < kVectors; ++j) {
      const Lanes q = load(codes + 16 * j);
      low[j] += (q & 15) * a + ((q >> 8) & 15) * b;
      high[j] += ((q >> 4) & 15) * a + (q >> 12) * b;
    }
  }
  for (int c = 0; c < kTile; ++c) out[c] = sum(low[c / 4], c % 4) + 16 * sum(high[c / 4], c % 4);
}

inline void load(const void* from, bool half, int64_t at, float* out) {
  for (int c = 0; c < kTile; ++c) {
    out[c] = half ? float_of_half(static_cast<const uint16_t*>(from)[at + c])
                  : static_cast<const float*>(from)[at + c];
  }
}

void product(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
             int64_t stride) {
  const int64_t unit = weight.unit;
  const int64_t units = weight.columns / unit;
  const int64_t step = weight.step();
  const uint8_t* codes = weight.codes + tile * weight.code_bytes();
  const int64_t scales_at = tile * weight.blocks() * kTile;
  for (int64_t r = 0; r < count; ++r) {
    float acc[kTile] = {};
    for (int64_t u = 0; u < units; ++u) {
      const int64_t at = scales_at + u * unit / weight.block_size * kTile;
      const float scale_of_row = rows.scales[r * units + u];
      const int32_t sum = rows.sums[r * units + u];
      int32_t dot[kTile];
      for (int64_t s = 0; s < unit; s += step) {
        int32_t some[kTile];
        step_product(codes + (u * unit + s) * kTile * weight.bits / 8, weight.bits,
                     rows.codes + r * weight.columns + u * unit + s, step, some);
        for (int c = 0; c < kTile; ++c) dot[c] = s == 0 ? some[c] : dot[c] + some[c];
      }
      float scales[kTile];
      load(weight.scales, weight.half_scales, at, scales);
      if (weight.kind == Offsets::kMiddle) {
        for (int c = 0; c < kTile; ++c) dot[c] -= sum * (1 << (weight.bits - 1));
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
  static const Tiles tiles{"generic",       generic::supported, generic::round, generic::normalize, generic::product,
                           one_by_one<generic::product>, generic::gate};
  return tiles;
}

}  // namespace onnxsmith
