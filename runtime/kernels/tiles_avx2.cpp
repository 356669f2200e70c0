// only: x86_64
// flags: -mavx2 -mfma -mf16c
// Sums stay below the ends of their integers: products of 4 bits are added up in 16, and those of 8 bits, whose
// pairs would not fit 16 bits, in 32.
#include "tiles.h"
#include "x86.h"

#include <immintrin.h>

namespace onnxsmith {
namespace avx2 {

#include "vector_avx2.inl"

#include "tiles.inl"

#include "tiles_256.inl"

// dot[r][h] = the products of a step's 4 bit codes with `R` rows.
template <int R, int STEP>
inline void products_of_4(const uint8_t* codes, const int8_t* rows, int64_t stride, __m256i dot[R][kHalves]) {
  for (int r = 0; r < R; ++r) dot[r][0] = dot[r][1] = _mm256_setzero_si256();
  for (int g = 0; g < STEP / 8; ++g) {
    __m256i low[kHalves];
    __m256i high[kHalves];
    unpack(codes + 64 * g, low, high);
    for (int r = 0; r < R; ++r) {
      const __m256i first = four(rows + r * stride + 8 * g);
      const __m256i second = four(rows + r * stride + 8 * g + 4);
      for (int h = 0; h < kHalves; ++h) {
        // At most 16 * 15 * 127 = 30480 for all groups of a step.
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
template <int R, int STEP>
inline void products_of_8(const uint8_t* codes, const int8_t* rows, int64_t stride, __m256i dot[R][kHalves]) {
  alignas(32) int32_t even[R][8];
  alignas(32) int32_t odd[R][8];
  for (int r = 0; r < R; ++r) {
    const __m128i* from = reinterpret_cast<const __m128i*>(rows + r * stride);
    for (int i = 0; i < STEP / 16; ++i) {
      const __m128i a = _mm_loadu_si128(from + i);
      _mm_store_si128(reinterpret_cast<__m128i*>(even[r]) + i, _mm_srai_epi16(_mm_slli_epi16(a, 8), 8));
      _mm_store_si128(reinterpret_cast<__m128i*>(odd[r]) + i, _mm_srai_epi16(a, 8));
    }
    dot[r][0] = dot[r][1] = _mm256_setzero_si256();
  }
  const __m256i mask = _mm256_set1_epi16(255);
  for (int g = 0; g < STEP / 4; ++g) {
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

template <int R, int BITS, int STEP>
inline void step_products(const uint8_t* codes, const int8_t* rows, int64_t stride, __m256i dot[R][kHalves]) {
  if (BITS == 4) products_of_4<R, STEP>(codes, rows, stride, dot);
  if (BITS == 8) products_of_8<R, STEP>(codes, rows, stride, dot);
}

bool supported() { return x86().avx2; }

}  // namespace avx2

const Tiles& avx2_tiles() {
  static const Tiles tiles{"avx2",       avx2::supported, avx2::round, avx2::normalize, avx2::product,
                           one_by_one<avx2::product>, avx2::gate};
  return tiles;
}

}  // namespace onnxsmith
