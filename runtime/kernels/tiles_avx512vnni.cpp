// only: x86_64
// flags: -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512
// One register holds 16 rows of a weight by 4 columns, and a `vpdpbusd` multiplies it with 4 activations.
#include "tiles.h"
#include "x86.h"

#include <immintrin.h>

namespace onnxsmith {
namespace avx512vnni {

#include "tiles.inl"

inline __m512 load(const void* from, bool half, int64_t at) {
  if (!half) return _mm512_loadu_ps(static_cast<const float*>(from) + at);
  return _mm512_cvtph_ps(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + at)));
}

// `R` rows at once: the codes of a unit are unpacked once for all of them.
template <int R, int BITS, int UNIT, Offsets KIND>
void some_rows(const Weight& weight, int64_t tile, const Activations& rows, int64_t first, float* out,
               int64_t stride) {
  constexpr int kGroups = UNIT / 4;
  const int64_t units = weight.columns / UNIT;
  const int64_t per_block = weight.block_size / UNIT;
  const uint8_t* codes = weight.codes + tile * weight.code_bytes();
  const int64_t scales_at = tile * weight.blocks() * kTile;
  const __m512i low = _mm512_set1_epi8(15);
  const int8_t* row = rows.codes + first * weight.columns;
  const float* row_scales = rows.scales + first * units;
  const int32_t* sums = rows.sums + first * units;
  const float* scaled_sums = rows.scaled_sums + first * units;
  __m512 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
  __m512 scales = _mm512_setzero_ps();
  __m512 minimums = _mm512_setzero_ps();
  __m512i zero_points = _mm512_setzero_si512();
  int64_t left = 0;  // units of this block
  int64_t at = scales_at - kTile;
  for (int64_t u = 0; u < units; ++u) {
    if (left == 0) {
      left = per_block;
      at += kTile;
      scales = load(weight.scales, weight.half_scales, at);
      if (KIND == Offsets::kMinimums) minimums = load(weight.offsets, weight.half_offsets, at);
      if (KIND == Offsets::kZeroPoints) {
        zero_points = _mm512_cvtepu8_epi32(_mm_loadu_si128(
            reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(weight.offsets) + at)));
      }
    }
    --left;
    __m512i q[kGroups];
    if (BITS == 4) {
      for (int g = 0; g < kGroups / 2; ++g, codes += 64) {
        const __m512i both = _mm512_loadu_si512(codes);
        q[2 * g] = _mm512_and_si512(both, low);
        q[2 * g + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      }
    } else {
      for (int g = 0; g < kGroups; ++g, codes += 64) q[g] = _mm512_loadu_si512(codes);
    }
    for (int r = 0; r < R; ++r) {
      const int8_t* a = row + r * weight.columns + u * UNIT;
      __m512i even = _mm512_setzero_si512();
      __m512i odd = _mm512_setzero_si512();
      for (int g = 0; g < kGroups; g += 2) {
        int32_t four;
        std::memcpy(&four, a + 4 * g, 4);
        even = _mm512_dpbusd_epi32(even, q[g], _mm512_set1_epi32(four));
        std::memcpy(&four, a + 4 * g + 4, 4);
        odd = _mm512_dpbusd_epi32(odd, q[g + 1], _mm512_set1_epi32(four));
      }
      __m512i dot = _mm512_add_epi32(even, odd);
      if (KIND == Offsets::kMiddle) {
        dot = _mm512_sub_epi32(dot, _mm512_slli_epi32(_mm512_set1_epi32(sums[r * units + u]), BITS - 1));
      }
      if (KIND == Offsets::kZeroPoints) {
        // Both fit 16 bits; the upper halves of the zero points are zero.
        dot = _mm512_sub_epi32(dot, _mm512_madd_epi16(zero_points, _mm512_set1_epi32(sums[r * units + u])));
      }
      const float scale = row_scales[r * units + u];
      acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scales, _mm512_set1_ps(scale)), acc[r]);
      if (KIND == Offsets::kMinimums) {
        acc[r] = _mm512_fmadd_ps(minimums, _mm512_set1_ps(scaled_sums[r * units + u]), acc[r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(out + (first + r) * stride, acc[r]);
}

template <int BITS, int UNIT, Offsets KIND>
void all_rows(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
              int64_t stride) {
  int64_t r = 0;
  for (; r + 8 <= count; r += 8) some_rows<8, BITS, UNIT, KIND>(weight, tile, rows, r, out, stride);
  if (r + 4 <= count) some_rows<4, BITS, UNIT, KIND>(weight, tile, rows, r, out, stride), r += 4;
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

bool supported() { return x86().avx512vnni; }

}  // namespace avx512vnni

const Tiles& avx512vnni_tiles() {
  static const Tiles tiles{"avx512vnni", avx512vnni::supported, avx512vnni::round, avx512vnni::normalize, avx512vnni::product,
                           avx512vnni::gate};
  return tiles;
}

}  // namespace onnxsmith
