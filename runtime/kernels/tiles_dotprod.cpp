// only: aarch64
// flags: -march=armv8.2-a+dotprod
// Four registers hold 16 rows of a weight by 4 columns, and an `sdot` multiplies one with 4 activations.
#include "arm.h"
#include "tiles.h"

#include <arm_neon.h>

namespace onnxsmith {
namespace dotprod {

#include "vector_generic.inl"

#include "tiles.inl"

// What 16 rows have each one of: those of rows 0 to 3, 4 to 7, 8 to 11, and 12 to 15.
constexpr int kQuarters = 4;
constexpr int kColumns = 16;  // that one register of activations has

inline float32x4_t load(const void* from, bool half, int64_t at) {
  if (!half) return vld1q_f32(static_cast<const float*>(from) + at);
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(from) + at)));
}

inline int32x4_t zero_points_of(const void* from, int64_t at) {
  uint32_t four;
  std::memcpy(&four, static_cast<const uint8_t*>(from) + at, sizeof(four));
  const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
}

// dot[r][h] += the products of 16 columns of codes, in one quarter of the rows, with `R` rows of activations.
template <int R, int BITS>
inline void products_of_16(const uint8_t* codes, int h, const int8x16_t* a, int32x4_t dot[R][kQuarters]) {
  int8x16_t q[4];
  if (BITS == 4) {
    for (int g = 0; g < 2; ++g) {
      const uint8x16_t both = vld1q_u8(codes + 64 * g + 16 * h);
      q[2 * g] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      q[2 * g + 1] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
  } else {
    // Less 128, which makes them signed.
    for (int g = 0; g < 4; ++g) {
      q[g] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes + 64 * g + 16 * h), vdupq_n_u8(128)));
    }
  }
  for (int r = 0; r < R; ++r) {
    dot[r][h] = vdotq_laneq_s32(dot[r][h], q[0], a[r], 0);
    dot[r][h] = vdotq_laneq_s32(dot[r][h], q[1], a[r], 1);
    dot[r][h] = vdotq_laneq_s32(dot[r][h], q[2], a[r], 2);
    dot[r][h] = vdotq_laneq_s32(dot[r][h], q[3], a[r], 3);
  }
}

// `R` rows at once: the codes of a step are unpacked once for all of them.
template <int R, int BITS, Offsets KIND>
void some_rows(const Weight& weight, int64_t tile, const Activations& rows, int64_t first, float* out,
               int64_t stride) {
  const int64_t units = weight.columns / weight.unit;
  const int64_t per_block = weight.block_size / weight.unit;
  const int64_t parts = weight.unit / kColumns;
  const uint8_t* codes = weight.codes + tile * weight.code_bytes();
  const int8_t* row = rows.codes + first * weight.columns;
  const float* row_scales = rows.scales + first * units;
  const int32_t* sums = rows.sums + first * units;
  const float* scaled_sums = rows.scaled_sums + first * units;
  float32x4_t acc[R][kQuarters];
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < kQuarters; ++h) acc[r][h] = vdupq_n_f32(0.0f);
  }
  float32x4_t scales[kQuarters] = {};
  float32x4_t minimums[kQuarters] = {};
  int32x4_t zero_points[kQuarters] = {};
  int64_t left = 0;  // units of this block
  int64_t at = tile * weight.blocks() * kTile - kTile;
  for (int64_t u = 0; u < units; ++u) {
    if (left == 0) {
      left = per_block;
      at += kTile;
      for (int h = 0; h < kQuarters; ++h) {
        scales[h] = load(weight.scales, weight.half_scales, at + 4 * h);
        if (KIND == Offsets::kMinimums) minimums[h] = load(weight.offsets, weight.half_offsets, at + 4 * h);
        if (KIND == Offsets::kZeroPoints) zero_points[h] = zero_points_of(weight.offsets, at + 4 * h);
      }
    }
    --left;
    int32x4_t dot[R][kQuarters];
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < kQuarters; ++h) dot[r][h] = vdupq_n_s32(0);
    }
    for (int64_t i = 0; i < parts; ++i, codes += kColumns * kTile * BITS / 8) {
      ask_ahead(codes, kColumns * kTile * BITS / 8);
      int8x16_t a[R];
      for (int r = 0; r < R; ++r) a[r] = vld1q_s8(row + r * weight.columns + (u * parts + i) * kColumns);
      for (int h = 0; h < kQuarters; ++h) products_of_16<R, BITS>(codes, h, a, dot);
    }
    for (int r = 0; r < R; ++r) {
      const int32_t sum = sums[r * units + u];
      // What makes the codes as they are again, less the middle.
      const int32_t more = (BITS == 8 ? sum * 128 : 0) - (KIND == Offsets::kMiddle ? sum * (1 << (BITS - 1)) : 0);
      for (int h = 0; h < kQuarters; ++h) {
        int32x4_t exact = vaddq_s32(dot[r][h], vdupq_n_s32(more));
        if (KIND == Offsets::kZeroPoints) exact = vmlsq_n_s32(exact, zero_points[h], sum);
        const float32x4_t scale = vmulq_n_f32(scales[h], row_scales[r * units + u]);
        acc[r][h] = vfmaq_f32(acc[r][h], vcvtq_f32_s32(exact), scale);
        if (KIND == Offsets::kMinimums) acc[r][h] = vfmaq_n_f32(acc[r][h], minimums[h], scaled_sums[r * units + u]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < kQuarters; ++h) vst1q_f32(out + (first + r) * stride + 4 * h, acc[r][h]);
  }
}

template <int BITS, Offsets KIND>
void all_rows(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
              int64_t stride) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) some_rows<4, BITS, KIND>(weight, tile, rows, r, out, stride);
  if (r + 2 <= count) some_rows<2, BITS, KIND>(weight, tile, rows, r, out, stride), r += 2;
  if (r < count) some_rows<1, BITS, KIND>(weight, tile, rows, r, out, stride);
}

template <int BITS>
void by_kind(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
             int64_t stride) {
  if (weight.kind == Offsets::kMiddle) {
    all_rows<BITS, Offsets::kMiddle>(weight, tile, rows, count, out, stride);
  } else if (weight.kind == Offsets::kZeroPoints) {
    all_rows<BITS, Offsets::kZeroPoints>(weight, tile, rows, count, out, stride);
  } else {
    all_rows<BITS, Offsets::kMinimums>(weight, tile, rows, count, out, stride);
  }
}

void product(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
             int64_t stride) {
  if (weight.bits == 4) by_kind<4>(weight, tile, rows, count, out, stride);
  if (weight.bits == 8) by_kind<8>(weight, tile, rows, count, out, stride);
}

}  // namespace dotprod

const Tiles& dotprod_tiles() {
  static const Tiles tiles{"dotprod", has_dot_products, dotprod::round, dotprod::normalize, dotprod::product,
                           one_by_one<dotprod::product>, dotprod::gate};
  return tiles;
}

}  // namespace onnxsmith
