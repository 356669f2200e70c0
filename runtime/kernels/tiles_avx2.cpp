// only: x86_64
// flags: -mavx2 -mfma -mf16c
// Two registers hold 16 rows of a weight by 4 columns. Sums stay below the ends of their integers: products
// of 4 bits are added up in 16, and those of 8 bits, whose pairs would not fit 16 bits, in 32.
#include "tiles.h"
#include "x86.h"

#include <immintrin.h>

namespace onnxsmith {
namespace avx2 {

#include "tiles.inl"

// What 16 rows have each one of: those of rows 0 to 7, and of rows 8 to 15.
constexpr int kHalves = 2;

inline __m256 load(const void* from, bool half, int64_t at) {
  if (!half) return _mm256_loadu_ps(static_cast<const float*>(from) + at);
  return _mm256_cvtph_ps(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + at)));
}

inline __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// The same four activations for all rows of a weight.
inline __m256i four(const int8_t* from) {
  int32_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  return _mm256_set1_epi32(bits);
}

// dot[r][h] = the products of a unit's 4 bit codes with `R` rows.
template <int R, int UNIT>
inline void products_of_4(const uint8_t* codes, const int8_t* rows, int64_t stride, __m256i dot[R][kHalves]) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int r = 0; r < R; ++r) dot[r][0] = dot[r][1] = _mm256_setzero_si256();
  for (int g = 0; g < UNIT / 8; ++g) {
    __m256i low[kHalves];
    __m256i high[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      const __m256i both = load(codes + 64 * g + 32 * h);
      low[h] = _mm256_and_si256(both, mask);
      high[h] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    }
    for (int r = 0; r < R; ++r) {
      const __m256i first = four(rows + r * stride + 8 * g);
      const __m256i second = four(rows + r * stride + 8 * g + 4);
      for (int h = 0; h < kHalves; ++h) {
        // At most 16 * 15 * 127 = 30480 for all groups of a unit.
        dot[r][h] = _mm256_add_epi16(dot[r][h], _mm256_add_epi16(_mm256_maddubs_epi16(low[h], first),
                                                                 _mm256_maddubs_epi16(high[h], second)));
      }
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < kHalves; ++h) dot[r][h] = _mm256_madd_epi16(dot[r][h], ones);
  }
}

// The same for 8 bit codes: even and odd columns apart, each widened to 16 bits.
template <int R, int UNIT>
inline void products_of_8(const uint8_t* codes, const int8_t* rows, int64_t stride, __m256i dot[R][kHalves]) {
  alignas(32) int32_t even[R][8];
  alignas(32) int32_t odd[R][8];
  for (int r = 0; r < R; ++r) {
    const __m128i* from = reinterpret_cast<const __m128i*>(rows + r * stride);
    for (int i = 0; i < UNIT / 16; ++i) {
      const __m128i a = _mm_loadu_si128(from + i);
      _mm_store_si128(reinterpret_cast<__m128i*>(even[r]) + i, _mm_srai_epi16(_mm_slli_epi16(a, 8), 8));
      _mm_store_si128(reinterpret_cast<__m128i*>(odd[r]) + i, _mm_srai_epi16(a, 8));
    }
    dot[r][0] = dot[r][1] = _mm256_setzero_si256();
  }
  const __m256i mask = _mm256_set1_epi16(255);
  for (int g = 0; g < UNIT / 4; ++g) {
    __m256i first[kHalves];
    __m256i second[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      const __m256i four_columns = load(codes + 64 * g + 32 * h);
      first[h] = _mm256_and_si256(four_columns, mask);
      second[h] = _mm256_srli_epi16(four_columns, 8);
    }
    for (int r = 0; r < R; ++r) {
      const __m256i evens = _mm256_set1_epi32(even[r][g]);
      const __m256i odds = _mm256_set1_epi32(odd[r][g]);
      for (int h = 0; h < kHalves; ++h) {
        dot[r][h] = _mm256_add_epi32(dot[r][h], _mm256_add_epi32(_mm256_madd_epi16(first[h], evens),
                                                                 _mm256_madd_epi16(second[h], odds)));
      }
    }
  }
}

// `R` rows at once: the codes of a unit are unpacked once for all of them.
template <int R, int BITS, int UNIT, Offsets KIND>
void some_rows(const Weight& weight, int64_t tile, const Activations& rows, int64_t first, float* out,
               int64_t stride) {
  const int64_t units = weight.columns / UNIT;
  const int64_t per_block = weight.block_size / UNIT;
  const int64_t scales_of_row = weight.columns / UNIT;
  const uint8_t* codes = weight.codes + tile * weight.code_bytes();
  const int8_t* row = rows.codes + first * weight.columns;
  const float* row_scales = rows.scales + first * scales_of_row;
  const int32_t* sums = rows.sums + first * units;
  const float* scaled_sums = rows.scaled_sums + first * units;
  __m256 acc[R][kHalves];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
  __m256 scales[kHalves] = {};
  __m256 minimums[kHalves] = {};
  __m256i zero_points[kHalves] = {};
  int64_t left = 0;  // units of this block
  int64_t at = tile * weight.blocks() * kTile - kTile;
  for (int64_t u = 0; u < units; ++u, codes += UNIT * kTile * BITS / 8) {
    if (left == 0) {
      left = per_block;
      at += kTile;
      for (int h = 0; h < kHalves; ++h) {
        scales[h] = load(weight.scales, weight.half_scales, at + 8 * h);
        if (KIND == Offsets::kMinimums) minimums[h] = load(weight.offsets, weight.half_offsets, at + 8 * h);
        if (KIND == Offsets::kZeroPoints) {
          zero_points[h] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(
              reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(weight.offsets) + at + 8 * h)));
        }
      }
    }
    --left;
    __m256i dot[R][kHalves];
    if (BITS == 4) products_of_4<R, UNIT>(codes, row + u * UNIT, weight.columns, dot);
    if (BITS == 8) products_of_8<R, UNIT>(codes, row + u * UNIT, weight.columns, dot);
    for (int r = 0; r < R; ++r) {
      const __m256i sum = _mm256_set1_epi32(sums[r * units + u]);
      const __m256 scale = _mm256_set1_ps(row_scales[r * scales_of_row + u]);
      for (int h = 0; h < kHalves; ++h) {
        __m256i exact = dot[r][h];
        if (KIND == Offsets::kMiddle) exact = _mm256_sub_epi32(exact, _mm256_slli_epi32(sum, BITS - 1));
        if (KIND == Offsets::kZeroPoints) {
          // Both fit 16 bits; the upper halves of the zero points are zero.
          exact = _mm256_sub_epi32(exact, _mm256_madd_epi16(zero_points[h], sum));
        }
        acc[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), _mm256_mul_ps(scales[h], scale), acc[r][h]);
        if (KIND == Offsets::kMinimums) {
          acc[r][h] = _mm256_fmadd_ps(minimums[h], _mm256_set1_ps(scaled_sums[r * units + u]), acc[r][h]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < kHalves; ++h) _mm256_storeu_ps(out + (first + r) * stride + 8 * h, acc[r][h]);
  }
}

template <int BITS, int UNIT, Offsets KIND>
void all_rows(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
              int64_t stride) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) some_rows<4, BITS, UNIT, KIND>(weight, tile, rows, r, out, stride);
  if (r + 2 <= count) some_rows<2, BITS, UNIT, KIND>(weight, tile, rows, r, out, stride), r += 2;
  if (r < count) some_rows<1, BITS, UNIT, KIND>(weight, tile, rows, r, out, stride);
}

template <int BITS, int UNIT>
void by_kind(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
             int64_t stride) {
  if (weight.kind == Offsets::kMiddle) {
    all_rows<BITS, UNIT, Offsets::kMiddle>(weight, tile, rows, count, out, stride);
  } else if (weight.kind == Offsets::kZeroPoints) {
    all_rows<BITS, UNIT, Offsets::kZeroPoints>(weight, tile, rows, count, out, stride);
  } else {
    all_rows<BITS, UNIT, Offsets::kMinimums>(weight, tile, rows, count, out, stride);
  }
}

void product(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
             int64_t stride) {
  if (weight.bits == 4 && weight.unit == 32) by_kind<4, 32>(weight, tile, rows, count, out, stride);
  if (weight.bits == 4 && weight.unit == 16) by_kind<4, 16>(weight, tile, rows, count, out, stride);
  if (weight.bits == 8 && weight.unit == 32) by_kind<8, 32>(weight, tile, rows, count, out, stride);
  if (weight.bits == 8 && weight.unit == 16) by_kind<8, 16>(weight, tile, rows, count, out, stride);
}

bool supported() { return x86().avx2; }

}  // namespace avx2

const Tiles& avx2_tiles() {
  static const Tiles tiles{"avx2",       avx2::supported, avx2::round, avx2::normalize, avx2::product,
                           one_by_one<avx2::product>, avx2::gate};
  return tiles;
}

}  // namespace onnxsmith
