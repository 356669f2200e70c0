// only: x86_64
// flags: -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512
// One register holds 16 rows of a weight by 4 columns, and a `vpdpbusd` multiplies it with 4 activations.
#include "tiles.h"
#include "x86.h"

#include <immintrin.h>

namespace onnxsmith {
namespace avx512vnni {

#include "vector_avx512.inl"

#include "tiles.inl"

// `round_by` of tiles.inl with sixteen numbers at a time, bit by bit.
template <int UNIT>
void round_vectors(const float* row, int64_t columns, Activations out) {
  constexpr int kVectors = UNIT / 16;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t u = 0; u < columns / UNIT; ++u) {
    __m512 values[kVectors];
    __m512i largest = _mm512_setzero_si512();
    for (int v = 0; v < kVectors; ++v) {
      values[v] = _mm512_loadu_ps(row + u * UNIT + 16 * v);
      largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(values[v]), magnitude));
    }
    const int32_t bits = _mm512_reduce_max_epi32(largest);
    float top;
    std::memcpy(&top, &bits, sizeof(top));
    const float scale = top / 127.0f;
    const __m512 inverse = _mm512_set1_ps(top > 1e-35f ? 127.0f / top : 0.0f);
    __m512i sums = _mm512_setzero_si512();
    for (int v = 0; v < kVectors; ++v) {
      const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(values[v], inverse));
      sums = _mm512_add_epi32(sums, codes);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out.codes + u * UNIT + 16 * v), _mm512_cvtepi32_epi8(codes));
    }
    const int32_t sum = _mm512_reduce_add_epi32(sums);
    out.scales[u] = scale;
    out.sums[u] = sum;
    out.scaled_sums[u] = scale * static_cast<float>(sum);
  }
}

void round_fast(const float* row, int64_t columns, int64_t unit, Activations out) {
  if (unit == 16) round_vectors<16>(row, columns, out);
  if (unit == 32) round_vectors<32>(row, columns, out);
  if (unit == 64) round_vectors<64>(row, columns, out);
  if (unit == 128) round_vectors<128>(row, columns, out);
}

inline __m512 load(const void* from, bool half, int64_t at) {
  if (!half) return _mm512_loadu_ps(static_cast<const float*>(from) + at);
  return _mm512_cvtph_ps(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + at)));
}

inline __m512i load_bytes(const void* from, int64_t at) {
  return _mm512_cvtepu8_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(from) + at)));
}

// `R` rows at once: the codes of a step are unpacked once for all of them.
template <int R, int BITS, int STEP, Offsets KIND>
void some_rows(const Weight& weight, int64_t tile, const Activations& rows, int64_t first, float* out,
               int64_t stride) {
  constexpr int kGroups = STEP / 4;
  const int64_t steps = weight.unit / STEP;
  const int64_t units = weight.columns / weight.unit;
  const int64_t per_block = weight.block_size / weight.unit;
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
      if (KIND == Offsets::kZeroPoints) zero_points = load_bytes(weight.offsets, at);
    }
    --left;
    __m512i dots[R];
    for (int r = 0; r < R; ++r) dots[r] = _mm512_setzero_si512();
    for (int64_t s = 0; s < steps; ++s) {
      ask_ahead(codes, STEP * kTile * BITS / 8);
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
        const int8_t* a = row + r * weight.columns + (u * steps + s) * STEP;
        __m512i even = dots[r];
        __m512i odd = _mm512_setzero_si512();
        for (int g = 0; g < kGroups; g += 2) {
          int32_t four;
          std::memcpy(&four, a + 4 * g, 4);
          even = _mm512_dpbusd_epi32(even, q[g], _mm512_set1_epi32(four));
          std::memcpy(&four, a + 4 * g + 4, 4);
          odd = _mm512_dpbusd_epi32(odd, q[g + 1], _mm512_set1_epi32(four));
        }
        dots[r] = _mm512_add_epi32(even, odd);
      }
    }
    for (int r = 0; r < R; ++r) {
      __m512i dot = dots[r];
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

// `R` rows and two tiles at once, for prompts: an activation is loaded once for both, which a processor with two
// units for `vpdpbusd` cannot do for each of them. Bitwise what `some_rows` gives.
template <int R, int BITS, int STEP, Offsets KIND>
void some_rows_of_two(const Weight& weight, const int64_t (&tiles)[2], const Activations& rows, int64_t first,
                      float* const (&out)[2], int64_t stride) {
  const int64_t units = weight.columns / weight.unit;
  const int64_t per_block = weight.block_size / weight.unit;
  const int64_t steps = weight.unit / STEP;
  const __m512i low = _mm512_set1_epi8(15);
  const int8_t* row = rows.codes + first * weight.columns;
  const float* row_scales = rows.scales + first * units;
  const int32_t* sums = rows.sums + first * units;
  const float* scaled_sums = rows.scaled_sums + first * units;
  const uint8_t* codes[2];
  __m512 acc[R][2];
  __m512 scales[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512 minimums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512i zero_points[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  int64_t at[2];
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {
    codes[t] = weight.codes + tiles[t] * weight.code_bytes();
    at[t] = (tiles[t] * weight.blocks() - 1) * kTile;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r][t] = _mm512_setzero_ps();
  }
  int64_t left = 0;  // units of this block
  for (int64_t u = 0; u < units; ++u) {
    if (left == 0) {
      left = per_block;
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t) {
        at[t] += kTile;
        scales[t] = load(weight.scales, weight.half_scales, at[t]);
        if (KIND == Offsets::kMinimums) minimums[t] = load(weight.offsets, weight.half_offsets, at[t]);
        if (KIND == Offsets::kZeroPoints) zero_points[t] = load_bytes(weight.offsets, at[t]);
      }
    }
    --left;
    __m512i dot[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __m512i begin = _mm512_setzero_si512();
      if (KIND == Offsets::kMiddle) {
        begin = _mm512_sub_epi32(begin, _mm512_slli_epi32(_mm512_set1_epi32(sums[r * units + u]), BITS - 1));
      }
      dot[r][0] = dot[r][1] = begin;
    }
    constexpr int kHalves = BITS == 4 ? 2 : 1;  // of a byte
    for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 8
      for (int g = 0; g < STEP / (4 * kHalves); ++g) {
        __m512i q[2][2];
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t) {
          const __m512i both = _mm512_loadu_si512(codes[t]);
          codes[t] += 64;
          q[t][0] = BITS == 4 ? _mm512_and_si512(both, low) : both;
          if (BITS == 4) q[t][1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            int32_t four;
            std::memcpy(&four, row + r * weight.columns + (u * steps + s) * STEP + 4 * (kHalves * g + h), 4);
            const __m512i activations = _mm512_set1_epi32(four);
            dot[r][0] = _mm512_dpbusd_epi32(dot[r][0], q[0][h], activations);
            dot[r][1] = _mm512_dpbusd_epi32(dot[r][1], q[1][h], activations);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 scale = _mm512_set1_ps(row_scales[r * units + u]);
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t) {
        __m512i exact = dot[r][t];
        if (KIND == Offsets::kZeroPoints) {
          exact = _mm512_sub_epi32(exact, _mm512_madd_epi16(zero_points[t], _mm512_set1_epi32(sums[r * units + u])));
        }
        acc[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), _mm512_mul_ps(scales[t], scale), acc[r][t]);
        if (KIND == Offsets::kMinimums) {
          acc[r][t] = _mm512_fmadd_ps(minimums[t], _mm512_set1_ps(scaled_sums[r * units + u]), acc[r][t]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) _mm512_storeu_ps(out[t] + (first + r) * stride, acc[r][t]);
  }
}

struct OneTile {
  template <int BITS, int STEP, Offsets KIND>
  static void run(const Weight& weight, int64_t tile, const Activations& rows, int64_t r, int64_t count, float* out,
                  int64_t stride) {
    for (; r + 8 <= count; r += 8) some_rows<8, BITS, STEP, KIND>(weight, tile, rows, r, out, stride);
    if (r + 4 <= count) some_rows<4, BITS, STEP, KIND>(weight, tile, rows, r, out, stride), r += 4;
    if (r + 2 <= count) some_rows<2, BITS, STEP, KIND>(weight, tile, rows, r, out, stride), r += 2;
    if (r < count) some_rows<1, BITS, STEP, KIND>(weight, tile, rows, r, out, stride);
  }
};

struct TwoTiles {
  template <int BITS, int STEP, Offsets KIND>
  static void run(const Weight& weight, const int64_t (&tiles)[2], const Activations& rows, int64_t count,
                  float* const (&out)[2], int64_t stride) {
    int64_t r = 0;
    // As many products side by side as keep both units busy, where few registers are needed for scales.
    for (; weight.unit >= 64 && r + 6 <= count; r += 6) {
      some_rows_of_two<6, BITS, STEP, KIND>(weight, tiles, rows, r, out, stride);
    }
    for (; r + 4 <= count; r += 4) some_rows_of_two<4, BITS, STEP, KIND>(weight, tiles, rows, r, out, stride);
    for (int t = 0; t < 2; ++t) OneTile::run<BITS, STEP, KIND>(weight, tiles[t], rows, r, count, out[t], stride);
  }
};

template <typename Work, int BITS, int STEP, typename... Given>
void by_kind(const Weight& weight, const Given&... given) {
  if (weight.kind == Offsets::kMiddle) {
    Work::template run<BITS, STEP, Offsets::kMiddle>(weight, given...);
  } else if (weight.kind == Offsets::kZeroPoints) {
    Work::template run<BITS, STEP, Offsets::kZeroPoints>(weight, given...);
  } else {
    Work::template run<BITS, STEP, Offsets::kMinimums>(weight, given...);
  }
}

template <typename Work, typename... Given>
void by_form(const Weight& weight, const Given&... given) {
  if (weight.bits == 4 && weight.step() == 32) by_kind<Work, 4, 32>(weight, given...);
  if (weight.bits == 4 && weight.step() == 16) by_kind<Work, 4, 16>(weight, given...);
  if (weight.bits == 8 && weight.step() == 32) by_kind<Work, 8, 32>(weight, given...);
  if (weight.bits == 8 && weight.step() == 16) by_kind<Work, 8, 16>(weight, given...);
}

void product(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
             int64_t stride) {
  by_form<OneTile>(weight, tile, rows, int64_t{0}, count, out, stride);
}

void products(const Weight& weight, int64_t one, int64_t other, const Activations& rows, int64_t count, float* out,
              float* other_out, int64_t stride) {
  const int64_t tiles[2] = {one, other};
  float* const outs[2] = {out, other_out};
  by_form<TwoTiles>(weight, tiles, rows, count, outs, stride);
}

bool supported() { return x86().avx512vnni; }

}  // namespace avx512vnni

const Tiles& avx512vnni_tiles() {
  static const Tiles tiles{"avx512vnni",          avx512vnni::supported, avx512vnni::round_fast,
                           avx512vnni::normalize, avx512vnni::product,   avx512vnni::products,
                           avx512vnni::gate};
  return tiles;
}

}  // namespace onnxsmith
